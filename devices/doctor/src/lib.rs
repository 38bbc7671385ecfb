//! What keeps a host from passing GPUs through.
//!
//! - [`fact`]: small reads below the host's root. Each keeps where it was read, and tells absent from unreadable.
//! - [`Host`]: everything of the host that a check looks at, gathered once.
//! - [`software`]: what others know of containerd, Kata and their neighbours, handed in as data.
//! - [`findings`]: one pure function a check, from these to a [`Finding`] with its evidence and what to do.
//! - [`ready`]: the files by which NVIDIA's GPU Operator is told that a node is ready.
//!
//! Data flows one way: observe, judge, tell. Nothing of the host is changed but by [`ready::apply`].
//!
//! This crate knows nothing of containerd's files, registries, the command line or how anything is drawn.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

pub mod fact;
mod finding;
pub mod findings;
mod host;
mod kubelet;
mod modules;
mod ports;
pub mod ready;
pub mod software;

pub use finding::{Check, Evidence, Finding, State};
pub use findings::{Case, examine};
pub use host::{Cpu, Host, Limits, Vendor};
pub use kubelet::Kubelet;
pub use modules::{Modules, Presence};
pub use ports::Acs;
pub use software::{Software, Wants};
