//! The kubelet device plugin (v1beta1) of GPUs and NVSwitches that VFIO can give away.
//!
//! - [`api`]: the kubelet's API, generated.
//! - [`snapshot`]: what the kubelet is told, as plain data.
//! - [`health`], [`preferred`], [`allocate`]: pure functions: what is wrong with a device, which devices fit together, what a container
//!   gets.
//! - [`uevent`]: events of the kernel about devices.
//! - [`serve`]: all of it, running: a thread watches the devices and publishes snapshots; one gRPC server for each resource answers
//!   from the last one; a loop keeps the sockets in their places and the kubelet told.
//!
//! Data flows one way: events and probes, tracker, snapshot, answers. What the kubelet sends is read as the bytes of a stranger.
//!
//! This crate knows nothing of Kata, containerd or the command line.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

pub mod allocate;
pub mod api;
mod conflict;
mod error;
mod folder;
pub mod health;
mod observer;
pub mod preferred;
mod probe;
mod serve;
mod server;
mod service;
pub mod snapshot;
mod tracker;
pub mod uevent;

pub use conflict::{Other, socket_name};
pub use error::Error;
pub use serve::{Settings, serve};
