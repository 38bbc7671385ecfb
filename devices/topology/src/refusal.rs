//! Why there is no plan. Each message says what to do.

use crate::Kata;

/// A plan that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nothing to plan for.
    #[error("no device was named: name PCI addresses, `all`, or a pod that has devices")]
    NoDevices,
    /// An address of no PCI function.
    #[error("{0:?} is no PCI address: write it as 0000:41:00.0")]
    Address(String),
    /// The same function twice.
    #[error("{0} is named twice: a function can be given to a guest once")]
    Twice(String),
    /// A function that nothing isolates.
    #[error(
        "{0} has no IOMMU group: switch the IOMMU on in the firmware and boot with intel_iommu=on or amd_iommu=on"
    )]
    NoGroup(String),
    /// A function that must go through iommufd and cannot.
    #[error(
        "{address} has no /dev/vfio/devices node, and {reason} needs one: bind it to vfio-pci on a kernel with CONFIG_VFIO_DEVICE_CDEV \
         (Linux 6.6 and later)"
    )]
    NoCdev {
        /// The function.
        address: String,
        /// Who needs it.
        reason: String,
    },
    /// A Kata that does not look for devices.
    #[error(
        "{kata} does not look up and cold-plug a pod's devices: use {first} or later, or let kata-manager-qemu inject them"
    )]
    TooOld {
        /// This one.
        kata: Kata,
        /// The first that does.
        first: crate::Version,
    },
    /// A function that a pod needs and that this Kata would drop.
    #[error("{kata} drops {address}: {reason}; use Kata 4.1 or later, or leave the device out")]
    Dropped {
        /// The function.
        address: String,
        /// The Kata.
        kata: Kata,
        /// Why.
        reason: String,
    },
    /// More devices than ports.
    #[error(
        "{needed} functions need a port each, and {who} makes {most} at most: give the pod fewer devices{hint}"
    )]
    Ports {
        /// How many are needed.
        needed: usize,
        /// How many there can be.
        most: usize,
        /// Who makes them.
        who: String,
        /// What else helps.
        hint: &'static str,
    },
    /// A layout that nobody would make.
    #[error("{kata} emits no {what}: plan with {instead}")]
    Layout {
        /// The Kata.
        kata: Kata,
        /// What was asked for.
        what: &'static str,
        /// What can be had.
        instead: &'static str,
    },
    /// A guest without NUMA nodes where they are needed.
    #[error(
        "expanders belong to NUMA nodes, and the guest has none: give it NUMA nodes, or plan with root ports"
    )]
    NoNuma,
    /// More NUMA nodes than bus numbers.
    #[error(
        "the guest has {nodes} NUMA nodes, and the expander of node {most} would have bus number 256, which wraps to 0: \
         {most} at most, so list fewer in numa_mapping"
    )]
    Expanders {
        /// How many it has.
        nodes: usize,
        /// How many there can be.
        most: usize,
    },
    /// A function without a NUMA node among expanders.
    #[error(
        "the firmware tells no NUMA node of {0}, and {1} would put it behind a port that it does not make: set its numa_node in sysfs, or plan \
         with root ports (enable_numa = false)"
    )]
    NumaUnknown(String, Kata),
    /// A function of a NUMA node that the guest does not have.
    #[error(
        "{address} is on NUMA node {node} of the host, and the guest has none of its own there: add it to numa_mapping, or give the pod a device of \
         nodes {covered:?}"
    )]
    NumaUncovered {
        /// The function.
        address: String,
        /// Its node.
        node: u16,
        /// The nodes that the guest has.
        covered: Vec<u16>,
    },
    /// Expanders that are there already.
    #[error(
        "QEMU's arguments have expanders already: this Kata lays devices out itself, so kata-manager-qemu is to check, not to inject"
    )]
    ExpandersThere,
    /// More buses than numbers.
    #[error(
        "{place} needs bus numbers up to {needed}, and {last} is its last: give the pod fewer devices"
    )]
    Buses {
        /// Where.
        place: String,
        /// The last that is needed.
        needed: u16,
        /// The last that there is.
        last: u16,
    },
}
