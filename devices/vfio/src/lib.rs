//! NVIDIA functions on a host's PCI bus: what is there, who uses it, and handing it to VFIO and back.
//!
//! - [`Inventory`]: a snapshot of the functions, the groups that they share and the way up to the processor, from sysfs.
//! - [`glance`]: a quick look at a few functions, for whoever has a millisecond.
//! - [`users`]: which processes hold a function.
//! - [`plan`]: what binding and unbinding would do, or why it is refused.
//! - [`apply`]: doing it, and putting everything back when a step fails.
//! - [`persist`]: bindings that come back after a reboot.
//! - [`ids`], [`alias`]: names, and the VFIO driver that fits best.
//!
//! Data flows one way: observe, plan, apply, verify. Everything is read below a [`km_host::Root`]. The snapshot is plain
//! data, and everything in it has been made printable: names and drivers come from files that may hold anything.
//!
//! This crate knows nothing of Kubernetes, containers, Kata or how anything is drawn.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files and processes plainly"
    )
)]

mod address;
pub mod alias;
pub mod apply;
pub mod glance;
pub mod ids;
mod inventory;
mod observe;
pub mod persist;
pub mod plan;
mod sysfs;
pub mod topology;
pub mod users;

pub use address::{Address, AddressError};
pub use inventory::{
    Bar, Bridge, BridgeKind, Function, Group, Inventory, Kind, Link, Member, Power,
};
pub use sysfs::printable;
pub use users::{Holder, Users};

/// NVIDIA's vendor number (<https://pci-ids.ucw.cz/read/PC/10de>).
pub const NVIDIA: u16 = 0x10de;
