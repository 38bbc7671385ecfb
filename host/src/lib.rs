//! The one door to the operating system.
//!
//! Everything that kata-manager reads or changes on a host goes through here, below a [`Root`] that is an argument: `/` on
//! a plain host, `/host` in a pod, a prepared folder in tests. A [`HostPath`] is a path as the host sees it and is what we
//! write into files; [`Root::resolve`] turns it into the path that this process opens.
//!
//! - [`atomic`]: files, links and folders that are either old or new, never half.
//! - [`lock`]: one writer at a time, and who it is.
//! - [`claims`]: which sandbox uses what.
//! - [`process`]: who answers a socket, who holds a file open.
//! - [`attribute`]: writes to the kernel's attributes, with a deadline.
//! - [`command`]: host programs, in the host's root, with a deadline.
//! - [`memory`]: how much of it there is.
//!
//! This crate knows nothing of containerd, registries, Kata or GPUs.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files and processes plainly"
    )
)]

pub mod atomic;
pub mod attribute;
pub mod claims;
pub mod command;
mod error;
pub mod lock;
pub mod memory;
pub mod process;
mod root;

pub use error::Error;
pub use root::{HostPath, PathError, Root, read_regular};
