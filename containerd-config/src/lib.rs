//! containerd's runtime handlers: the edit of its configuration, and the transaction that makes an edit live.
//!
//! - [`edit`] is pure: text in, text out. It finds tables with a TOML parser and changes the text by splices, so that every
//!   byte that is not ours stays as it was, and removing is the exact inverse of adding.
//! - [`effective`] reads what is in force: the main file and everything that it imports, merged as this containerd does.
//! - [`place`] chooses the file, plans the edit of every file that it takes, and proves it on the merged reading.
//! - [`transaction`] carries an edit out: check with containerd's own reading of it, back up, write, restart, wait until the
//!   handlers are live, or put everything back.
//! - [`peers`] tells who else registers handlers.
//! - [`handler`], [`live`] and [`shim`] say what a handler is, what containerd reports about one, and whether the program
//!   that it names can be run.
//!
//! This crate knows nothing of Kata, GPUs, artifacts or Kubernetes, and speaks neither D-Bus nor CRI: who does hands in a
//! [`transaction::Daemon`].

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

mod digest;
pub mod edit;
pub mod effective;
pub mod handler;
pub mod live;
pub mod peers;
pub mod place;
pub mod shim;
pub mod transaction;

pub use digest::Digest;
pub use handler::{ContainerdVersion, Handler};
