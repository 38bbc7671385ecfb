//! Restarts a systemd unit over D-Bus and tells how it went.
//!
//! Speaks to systemd's manager through the system bus's socket, whose path the caller gives (a pod sees the host's
//! below its host root). Every call has a deadline. D-Bus carries no logs: [`log_tail_argv`] is the command line that
//! shows them. This crate must not know which unit it restarts or why, and runs no program itself.

mod error;
mod journal;
mod manager;
mod unit;

pub use error::Error;
pub use journal::log_tail_argv;
pub use manager::Manager;
pub use unit::{MainExit, UnitState};
