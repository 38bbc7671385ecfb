//! What was found on the bus: plain data and questions to it. Must not read or write anything.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{Address, NVIDIA};

/// A snapshot of the NVIDIA functions of a host and of what belongs to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// GPUs, NVSwitches, their companions and the other endpoints of their IOMMU groups, by address.
    pub functions: Vec<Function>,
    /// The bridges between them and the processor, by address.
    pub bridges: Vec<Bridge>,
    /// The IOMMU groups of the functions, by number.
    pub groups: Vec<Group>,
    /// How many functions the bus has in all.
    pub scanned: usize,
}

/// What a function is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A GPU: class 0300 (VGA) or 0302 (3D controller).
    Gpu,
    /// An NVSwitch: class 0680.
    NvSwitch,
    /// The audio function beside a GPU: class 0403.
    Audio,
    /// The USB controller beside a GPU: class 0c03.
    Usb,
    /// The USB-C port controller (UCSI) beside a GPU: class 0c80.
    SerialBus,
    /// Another NVIDIA function of the same slot or group.
    Other,
    /// Another vendor's function in the same IOMMU group.
    Foreign,
}

impl Kind {
    /// Whether this is a device that somebody asks for, and no companion of one.
    pub fn is_primary(self) -> bool {
        matches!(self, Kind::Gpu | Kind::NvSwitch)
    }

    /// What a vendor and a class (24 bits, as in configuration space) are to us.
    pub fn of(vendor: u16, class: u32) -> Kind {
        match (vendor == NVIDIA, class >> 8) {
            (false, _) => Kind::Foreign,
            (true, 0x0300 | 0x0302) => Kind::Gpu,
            (true, 0x0680) => Kind::NvSwitch,
            (true, 0x0403) => Kind::Audio,
            (true, 0x0c03) => Kind::Usb,
            (true, 0x0c80) => Kind::SerialBus,
            (true, _) => Kind::Other,
        }
    }

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Gpu => "GPU",
            Kind::NvSwitch => "NVSwitch",
            Kind::Audio => "audio",
            Kind::Usb => "USB",
            Kind::SerialBus => "USB-C",
            Kind::Other => "other",
            Kind::Foreign => "foreign",
        }
    }
}

/// Whether a class is a bridge that VFIO leaves alone: host (0600), ISA (0601) or PCI-to-PCI (0604). An NVSwitch, 0680, is none.
pub(crate) fn is_bridge(class: u32) -> bool {
    matches!(class >> 8, 0x0600 | 0x0601 | 0x0604)
}

/// A function that is no bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Function {
    /// Where it is.
    pub address: Address,
    /// What it is to us.
    pub kind: Kind,
    /// Vendor number.
    #[serde(serialize_with = "hex4")]
    pub vendor: u16,
    /// Device number.
    #[serde(serialize_with = "hex4")]
    pub device: u16,
    /// Vendor number of the card's maker.
    #[serde(serialize_with = "hex4")]
    pub subsystem_vendor: u16,
    /// Device number of the card.
    #[serde(serialize_with = "hex4")]
    pub subsystem_device: u16,
    /// Class, subclass and programming interface, 24 bits.
    #[serde(serialize_with = "hex6")]
    pub class: u32,
    /// Its name in `pci.ids`, where there is one.
    pub name: Option<String>,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// What `driver_override` says, when it says something.
    pub driver_override: Option<String>,
    /// Its IOMMU group; `None` without an IOMMU.
    pub iommu_group: Option<u32>,
    /// Its VFIO character device's name (`vfio0`), while a VFIO driver has it. The node, `/dev/vfio/devices/vfio0`, is there on
    /// kernels with `CONFIG_VFIO_DEVICE_CDEV`.
    pub vfio_device: Option<String>,
    /// Whether that node is there.
    pub cdev: bool,
    /// Its NUMA node; `None` where the firmware tells none.
    pub numa_node: Option<u16>,
    /// The root bus that it hangs from, as sysfs names it (`pci0000:40`).
    pub root_complex: Option<String>,
    /// The bridges above it, from the root port down.
    pub path: Vec<Address>,
    /// Its base address registers that have a size.
    pub bars: Vec<Bar>,
    /// How the kernel can reset it, first choice first.
    pub reset_methods: Vec<String>,
    /// Its PCIe link, for GPUs and NVSwitches.
    pub link: Option<Link>,
    /// Its power state.
    pub power: Power,
    /// Whether its configuration space answers all ones: it has fallen off the bus.
    pub dead: bool,
    /// Whether the firmware showed the console on it.
    pub boot_vga: bool,
    /// Its `modalias`, which drivers are matched with.
    #[serde(skip)]
    pub modalias: String,
}

impl Function {
    /// Whether a VFIO driver has it: vfio-pci or a variant. Each variant in the kernel has `vfio` in its name.
    pub fn on_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }

    /// What a person calls it: its model, or its numbers.
    pub fn label(&self) -> String {
        match &self.name {
            Some(name) => crate::ids::model(name).to_owned(),
            None => format!("{:04x}:{:04x}", self.vendor, self.device),
        }
    }
}

/// Whether a driver is vfio-pci or a variant of it.
pub(crate) fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bar {
    /// Its index, 0 to 5.
    pub index: u8,
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether it is 64 bits wide.
    pub wide: bool,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
}

/// A PCIe link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Link {
    /// Transfer rate of each lane now, in GT/s, as the kernel writes it (`32.0`).
    pub speed: Option<String>,
    /// Lanes now.
    pub width: Option<u8>,
    /// The most that the function can do.
    pub max_speed: Option<String>,
    /// The most lanes that the function has.
    pub max_width: Option<u8>,
}

/// Power management.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Power {
    /// `D0`, `D3hot`, `D3cold` or `unknown`.
    pub state: Option<String>,
    /// `active`, `suspended`, `unsupported` or `error`.
    pub runtime_status: Option<String>,
    /// `on` (never suspended) or `auto`.
    pub control: Option<String>,
}

/// A bridge between functions and the processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bridge {
    /// Where it is.
    pub address: Address,
    /// What part it plays.
    pub kind: BridgeKind,
    /// Vendor number.
    #[serde(serialize_with = "hex4")]
    pub vendor: u16,
    /// Device number.
    #[serde(serialize_with = "hex4")]
    pub device: u16,
    /// Its name in `pci.ids`, or its vendor's.
    pub name: Option<String>,
}

/// The part that a bridge plays, by where it stands: those on a root bus are root ports; below a root port or a downstream port
/// comes the upstream port of a switch, and below that its downstream ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BridgeKind {
    /// On the root bus.
    RootPort,
    /// A switch's port towards the processor.
    UpstreamPort,
    /// A switch's port towards the functions.
    DownstreamPort,
}

/// An IOMMU group: what can only be given away together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    /// Its number. Numbers change with the devices that a machine has.
    pub id: u32,
    /// Its members by address, bridges included.
    pub members: Vec<Member>,
    /// Whether VFIO can give it away now: each member that is no bridge has a VFIO driver, `pci-stub` or none, and at least one
    /// has a VFIO driver.
    pub viable: bool,
}

/// A member of an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Where it is.
    pub address: Address,
    /// What it is to us; `None` for a bridge, which VFIO leaves alone.
    pub kind: Option<Kind>,
    /// Class, subclass and programming interface, 24 bits.
    #[serde(serialize_with = "hex6")]
    pub class: u32,
    /// The driver that it is bound to.
    pub driver: Option<String>,
}

impl Inventory {
    /// The function at an address.
    pub fn function(&self, address: Address) -> Option<&Function> {
        let found = self
            .functions
            .binary_search_by_key(&address, |function| function.address);
        found.ok().map(|at| &self.functions[at])
    }

    /// The bridge at an address.
    pub fn bridge(&self, address: Address) -> Option<&Bridge> {
        let found = self
            .bridges
            .binary_search_by_key(&address, |bridge| bridge.address);
        found.ok().map(|at| &self.bridges[at])
    }

    /// The group with a number.
    pub fn group(&self, id: u32) -> Option<&Group> {
        let found = self.groups.binary_search_by_key(&id, |group| group.id);
        found.ok().map(|at| &self.groups[at])
    }

    /// The GPUs and NVSwitches.
    pub fn primaries(&self) -> impl Iterator<Item = &Function> {
        self.functions
            .iter()
            .filter(|function| function.kind.is_primary())
    }

    /// The functions that only go together with the one at an address: its slot's, and the other endpoints of their groups.
    pub fn unit(&self, address: Address) -> Vec<&Function> {
        let slot = |function: &Function| function.address.same_slot(&address);
        let groups: Vec<u32> = self
            .functions
            .iter()
            .filter(|function| slot(function))
            .filter_map(|function| function.iommu_group)
            .collect();
        self.functions
            .iter()
            .filter(|function| {
                slot(function) || function.iommu_group.is_some_and(|id| groups.contains(&id))
            })
            .collect()
    }

    /// The functions by the GPU or NVSwitch that they stand beside: each primary with its companions; what stands beside none
    /// comes under its own address.
    pub fn by_primary(&self) -> Vec<(&Function, Vec<&Function>)> {
        let mut found: BTreeMap<Address, (&Function, Vec<&Function>)> = self
            .primaries()
            .map(|primary| (primary.address, (primary, Vec::new())))
            .collect();
        for function in self.functions.iter().filter(|f| !f.kind.is_primary()) {
            let lead = self.primaries().find(|primary| {
                primary.address.same_slot(&function.address)
                    || (primary.iommu_group.is_some()
                        && primary.iommu_group == function.iommu_group)
            });
            match lead.and_then(|lead| found.get_mut(&lead.address)) {
                Some((_, companions)) => companions.push(function),
                None => {
                    found.insert(function.address, (function, Vec::new()));
                }
            }
        }
        found.into_values().collect()
    }
}

fn hex4<S: serde::Serializer>(value: &u16, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:04x}"))
}

fn hex6<S: serde::Serializer>(value: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:06x}"))
}
