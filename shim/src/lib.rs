//! The containerd shim that kata-manager's handlers name. It never serves anything: for the `start` of a sandbox it looks which
//! devices the pod has, checks that the node can give them, writes what Kata would not find by itself and leaves a claim; then,
//! and for every other call at once, it becomes Kata's own shim by execve(2).
//!
//! - [`settings`]: what is configured for a handler.
//! - [`call`]: what containerd asks for.
//! - [`bundle`]: config.json, read and written.
//! - [`table`]: what is done with a device, by where it comes from.
//! - [`kubelet`], [`look`]: what is asked and looked at.
//! - [`decide`]: from all of that to what is done. Pure.
//! - [`prepare`]: a sandbox's `start` from beginning to end.
//! - [`record`]: the log.
//! - [`launch`]: the second program, which stands in QEMU's place and checks what Kata made of the devices.
//!
//! It must not know containerd's configuration, registries, or Kubernetes beyond the kubelet's PodResources API; it links
//! neither a TLS nor a Kubernetes client.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

pub mod bundle;
pub mod call;
pub mod decide;
pub mod kubelet;
pub mod launch;
pub mod look;
pub mod prepare;
pub mod record;
mod run;
mod said;
pub mod settings;
pub mod table;

pub use run::run;
