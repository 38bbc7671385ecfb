//! The command line as people and scripts see it: help, errors, exit codes and output, of the real binary.
//!
//! The binary is the one that `KM_BIN` names, or the one that `cargo build -p kata-manager` put beside these tests. It runs with
//! an environment of its own. Snapshots are in `snapshots/`; `INSTA_UPDATE=always` writes them anew.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files and start their program plainly, and fail by panicking"
)]

mod cdi;
mod config;
mod containerd;
mod devices;
mod doctor;
mod place;
mod topology;
mod usage;
