//! CDI specs (Container Device Interface, <https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>) of the
//! GPUs and NVSwitches that VFIO can give away.
//!
//! - [`names`]: from a model or an alias to a class that both CDI and Kubernetes take.
//! - [`devices`]: from an inventory of the PCI bus to devices with names and nodes.
//! - [`spec`]: one spec: rendered, read, judged.
//! - [`files`]: a folder of specs: what is there, what would have to change, the change.
//!
//! Data flows one way: observe, plan, apply. Specs of others are read as the bytes of strangers: bounded, and never changed.
//!
//! This crate knows nothing of containerd, Kubernetes' API, Kata or the command line.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

pub mod devices;
pub mod files;
pub mod names;
pub mod spec;

/// The vendor of every kind of ours: kinds are also the names of Kubernetes' extended resources, and those of NVIDIA's are
/// `nvidia.com/<class>`.
pub const VENDOR: &str = "nvidia.com";

/// Where specs lie that programs write while a machine runs (CDI, SPEC.md). On most machines `/var/run` leads to `/run`.
pub const DIR: &str = "/var/run/cdi";

/// Where specs lie that a person or a package put there (CDI, SPEC.md). What is in [`DIR`] comes before them.
pub const STATIC_DIR: &str = "/etc/cdi";
