//! A plan: what there will be, as data.

use serde::Serialize;

use crate::{Class, Guest, Kata, Layout};

/// The topology of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The Kata that it is for.
    pub kata: Kata,
    /// The kind of guest.
    pub class: Class,
    /// The guest's shape.
    pub guest: Guest,
    /// How devices hang.
    pub layout: Layout,
    /// Root buses besides `pcie.0`, by bus number.
    pub expanders: Vec<Expander>,
    /// Switches.
    pub switches: Vec<Switch>,
    /// Ports in the order in which QEMU is told of them.
    pub ports: Vec<Port>,
    /// Objects that devices reach the IOMMU by.
    pub iommufd: Vec<IommuFd>,
    /// Each function and its place.
    pub devices: Vec<Placed>,
    /// Functions that the guest is not given, although they were named.
    pub skipped: Vec<Skipped>,
    /// What Kata's configuration must say.
    pub told: Told,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// A `pxb-pcie`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Expander {
    /// Its id, which is the name of its bus.
    pub id: String,
    /// The number of its bus.
    pub bus: u8,
    /// The last bus number of its range.
    pub last_bus: u8,
    /// The guest's NUMA node that it belongs to.
    pub guest_node: u16,
    /// The host's NUMA node behind that.
    pub host_node: u16,
}

/// An `x3130-upstream` with its downstream ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Switch {
    /// Its id.
    pub id: String,
    /// The root port that it is behind.
    pub port: String,
    /// The number of the bus between its upstream port and its downstream ports.
    pub bus: u8,
}

/// What kind of port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// `pcie-root-port`.
    Root,
    /// `xio3130-downstream`.
    Downstream,
}

/// A port. One thing at most stands behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// Its id, which is the name of the bus behind it.
    pub id: String,
    /// What kind.
    pub kind: PortKind,
    /// The bus that it is on: `pcie.0`, an expander, a switch.
    pub parent: String,
    /// Its slot on that bus, where the arguments say it; else QEMU takes the next.
    pub addr: Option<u8>,
    /// Its chassis number.
    pub chassis: u8,
    /// Its slot number in the chassis. The two together are unique.
    pub slot: u16,
    /// The number that the firmware gives the bus behind it when nothing else is there.
    pub bus: u8,
}

/// An `iommufd` object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IommuFd {
    /// Its id.
    pub id: String,
    /// How many devices share it, and so one mapping of the guest's memory.
    pub devices: usize,
}

/// A function and its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Placed {
    /// Its address on the host.
    pub address: String,
    /// Its class, 24 bits.
    pub class: u32,
    /// Its NUMA node on the host.
    pub host_node: Option<u16>,
    /// Its id in QEMU's arguments.
    pub id: String,
    /// The port in front of it.
    pub port: String,
    /// Its iommufd object; `None` for a legacy group.
    pub iommufd: Option<String>,
    /// Its path in the guest, slot by slot, where it is known before the guest starts (`09/00`).
    pub guest_path: Option<String>,
}

/// A function that the guest is not given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Skipped {
    /// Its address on the host.
    pub address: String,
    /// Why.
    pub reason: String,
}

/// What Kata's configuration must say so that this comes out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// `cold_plug_vfio`.
    pub cold_plug_vfio: &'static str,
    /// `pcie_root_port`.
    pub pcie_root_port: u32,
    /// `pcie_switch_port`; `None` for a Kata that does not know it.
    pub pcie_switch_port: Option<u32>,
    /// `enable_numa`; `None` for a Kata that does not know it.
    pub enable_numa: Option<bool>,
    /// `create_container_timeout`, and how long the agent may take to answer, in seconds.
    pub timeout_seconds: u32,
}

impl Plan {
    /// The port with an id.
    pub fn port(&self, id: &str) -> Option<&Port> {
        self.ports.iter().find(|port| port.id == id)
    }

    /// The device behind a port.
    pub fn behind(&self, port: &str) -> Option<&Placed> {
        self.devices.iter().find(|device| device.port == port)
    }
}
