//! What `devices list --output json` says, as far as tests look, and whether it is what the shape file says.

use anyhow::{Context, Result, ensure};
use km_gpu_emulator::model::Model;
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::node_in_a_box::shape::Placed;
use serde::Deserialize;

/// The whole answer.
#[derive(Debug, Deserialize)]
pub(crate) struct Listed {
    pub(crate) devices: Vec<Device>,
    groups: Vec<Group>,
}

/// A function.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    pub(crate) address: String,
    kind: String,
    vendor: String,
    device: String,
    class: String,
    pub(crate) name: Option<String>,
    pub(crate) driver: Option<String>,
    pub(crate) driver_override: Option<String>,
    pub(crate) iommu_group: Option<u32>,
    pub(crate) numa_node: Option<u16>,
    root_complex: Option<String>,
    pub(crate) path: Vec<String>,
    bars: Vec<Bar>,
    reset_methods: Vec<String>,
    pub(crate) dead: bool,
    pub(crate) vfio_device: Option<String>,
    pub(crate) cdev: bool,
    pub(crate) holders: Vec<Holder>,
}

#[derive(Clone, Debug, Deserialize)]
struct Bar {
    index: u8,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Group {
    id: u32,
    viable: bool,
    members: Vec<Member>,
}

#[derive(Debug, Deserialize)]
struct Member {
    address: String,
}

/// A process that holds a function.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Holder {
    pub(crate) name: String,
    pub(crate) file: String,
}

impl Listed {
    /// Asks the node.
    pub(crate) fn of(node: &mut Node) -> Result<Self> {
        let listed = node.kata_manager(&["devices", "list", "--output", "json"], 0)?;
        serde_json::from_str(&listed.stdout).with_context(|| format!("read {}", listed.stdout))
    }

    /// The function at an address.
    pub(crate) fn at(&self, address: &str) -> Result<&Device> {
        let found = self.devices.iter().find(|device| device.address == address);
        found.with_context(|| format!("{address} is not listed"))
    }

    /// That it lists the shape's functions and no others, each with what the shape and its model say of it.
    pub(crate) fn is_the_shape(&self, node: &mut Node) -> Result<()> {
        let functions = node.pci()?;
        let shape = node.shape().clone();
        let placed = shape.placed();
        ensure!(
            self.devices.len() == placed.len(),
            "{} functions are listed, the shape has {}",
            self.devices.len(),
            placed.len()
        );
        for wanted in &placed {
            let address = &km_tests_e2e::node_in_a_box::pci::at(&functions, &wanted.place)?.address;
            let device = self.at(address)?;
            let name = &wanted.named.name;
            device
                .is(wanted)
                .with_context(|| format!("{name} is listed as {device:?}"))?;
            ensure!(device.iommu_group.is_some() == shape.iommu, "{device:?}");
            let slot: Vec<&str> = self.slot_mates(address).collect();
            if let Some(id) = device.iommu_group {
                let group = self.groups.iter().find(|group| group.id == id);
                let group = group.with_context(|| format!("group {id} is not listed"))?;
                let listed = |member: &&Member| self.at(&member.address).is_ok();
                let members: Vec<&str> = group
                    .members
                    .iter()
                    .filter(listed)
                    .map(|member| member.address.as_str())
                    .collect();
                ensure!(members == slot, "group {id} has {members:?}, not {slot:?}");
            }
        }
        Ok(())
    }

    fn slot_mates(&self, address: &str) -> impl Iterator<Item = &str> {
        let slot = address.split('.').next().unwrap_or_default();
        let addresses = self.devices.iter().map(|device| device.address.as_str());
        addresses.filter(move |other| other.starts_with(slot))
    }

    /// That each function has this driver, none of them an override left over, and their groups can be given away or not.
    pub(crate) fn all_on(&self, driver: Option<&str>, viable: bool) -> Result<()> {
        for device in &self.devices {
            ensure!(device.driver.as_deref() == driver, "{device:?}");
            ensure!(device.driver_override.is_none(), "{device:?}");
        }
        for group in &self.groups {
            ensure!(group.viable == viable, "{group:?}");
        }
        Ok(())
    }
}

impl Device {
    /// The node that it is given away by: its own, where the kernel has iommufd, or its group's.
    pub(crate) fn node(&self) -> Option<String> {
        let own = self.vfio_device.as_ref().filter(|_| self.cdev);
        let own = own.map(|name| format!("/dev/vfio/devices/{name}"));
        own.or_else(|| Some(format!("/dev/vfio/{}", self.iommu_group?)))
    }

    /// Whether it is a GPU or an NVSwitch.
    pub(crate) fn is_primary(&self) -> bool {
        matches!(self.kind.as_str(), "gpu" | "nv-switch")
    }

    /// The class that it has by default.
    pub(crate) fn class(&self) -> &'static str {
        match self.kind.as_str() {
            "nv-switch" => "nvswitch",
            _ => "pgpu",
        }
    }

    /// Vendor and device number as a driver's `new_id` takes them.
    pub(crate) fn id(&self) -> String {
        format!("{} {}", self.vendor, self.device)
    }

    fn is(&self, wanted: &Placed<'_>) -> Result<()> {
        let facts = wanted.named.function.facts();
        let (kind, name) = match wanted.named.function.model {
            Model::H100Pcie => ("gpu", "H100 PCIe"),
            Model::H100Sxm => ("gpu", "H100 SXM5"),
            Model::B200 => ("gpu", "B200"),
            Model::Nvswitch => ("nv-switch", "NVSwitch"),
            Model::Audio => ("audio", "Audio Controller"),
        };
        ensure!(self.kind == kind, "kind {kind} is wanted");
        ensure!(
            self.name.as_deref().is_some_and(|said| said.contains(name)),
            "a name with {name:?} is wanted"
        );
        ensure!(self.vendor == "10de", "vendor 10de is wanted");
        ensure!(self.device == format!("{:04x}", facts.device), "the ID");
        ensure!(self.class == format!("{:06x}", facts.class), "the class");
        ensure!(
            self.numa_node == u16::try_from(wanted.numa).ok(),
            "NUMA node {} is wanted",
            wanted.numa
        );
        let root = format!("pci0000:{:02x}", wanted.place.root);
        ensure!(self.root_complex == Some(root), "the root bus");
        // The bridges' own numbers on their buses; the buses' numbers are the firmware's to give.
        let mut steps: Vec<&str> = self.path.iter().map(|address| step(address)).collect();
        steps.push(step(&self.address));
        ensure!(steps == wanted.place.steps, "{:?} is wanted", wanted.place);
        let bars: Vec<(u8, u64)> = self.bars.iter().map(|bar| (bar.index, bar.bytes)).collect();
        let sizes = wanted.named.function.bars();
        let sizes: Vec<(u8, u64)> = sizes.iter().map(|bar| (bar.index, bar.size)).collect();
        ensure!(bars == sizes, "BARs {sizes:?} are wanted");
        ensure!(
            self.reset_methods.iter().any(|method| method == "flr"),
            "no FLR"
        );
        Ok(())
    }
}

/// Device and function of an address: `0000:01:00.0` has `00.0`.
fn step(address: &str) -> &str {
    address.rsplit(':').next().unwrap_or_default()
}
