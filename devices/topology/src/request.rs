//! What a plan is made from.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::Kata;

/// Everything that a plan depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The functions that the guest is given, companions included.
    pub devices: Vec<Device>,
    /// What kind of guest.
    pub class: Class,
    /// The Kata that starts it.
    pub kata: Kata,
    /// The guest's shape.
    pub guest: Guest,
    /// The layout; `None` for the one that fits: expanders where the guest has several NUMA nodes and this Kata emits them, root
    /// ports else.
    pub layout: Option<Layout>,
    /// Who writes the ports into QEMU's arguments.
    pub writer: Writer,
}

/// A PCI function of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its address, `0000:41:00.0`.
    pub address: String,
    /// Class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// Its NUMA node on the host; `None` where the firmware tells none.
    pub numa_node: Option<u16>,
    /// Its IOMMU group.
    pub iommu_group: Option<u32>,
    /// Whether it has a character device of its own (`/dev/vfio/devices/vfioN`), which iommufd needs.
    pub cdev: bool,
}

/// What kind of guest it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Class {
    /// Whether the guest's memory is encrypted (SEV-SNP or TDX).
    pub confidential: bool,
}

/// The guest's shape.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Guest {
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Its processors.
    pub vcpus: u32,
    /// The host's NUMA node behind each of its own, in order. Empty where it has none.
    pub numa: Vec<u16>,
}

/// How devices hang from the root complex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Each behind a root port of its own.
    RootPort,
    /// Each behind a downstream port of one emulated switch.
    SwitchPort,
    /// Each behind a root port below an expander of its NUMA node.
    Numa,
}

/// Who writes the ports into QEMU's arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Kata, by its own rules.
    Kata {
        /// `pcie_root_port`: ports that it makes even for fewer devices.
        pool: u32,
    },
    /// We, beside what the arguments already have.
    Launcher(Taken),
}

/// What QEMU's arguments already use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Devices on `pcie.0`, each in a slot of its own.
    pub slots: usize,
    /// Pairs of chassis and slot.
    pub chassis: BTreeSet<(u8, u16)>,
    /// Bridges and ports that will have a bus number on `pcie.0`.
    pub buses: u16,
    /// Whether there are expanders.
    pub expanders: bool,
}
