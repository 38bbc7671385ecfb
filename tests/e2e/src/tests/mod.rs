//! The tests, one file a subject.

pub(crate) mod apply;
pub(crate) mod cdi;
pub(crate) mod containerd;
pub(crate) mod crash;
pub(crate) mod failures;
pub(crate) mod faults;
pub(crate) mod harness;
pub(crate) mod hostile;
pub(crate) mod image;
pub(crate) mod launcher;
pub(crate) mod layout;
pub(crate) mod lifecycle;
pub(crate) mod lock;
mod node;
pub(crate) mod others;
pub(crate) mod plugin;
pub(crate) mod registries;
pub(crate) mod shim;
pub(crate) mod shim_devices;
pub(crate) mod topology;
pub(crate) mod transfer;
pub(crate) mod trust;
