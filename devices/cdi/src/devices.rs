//! From an inventory of the PCI bus to CDI devices: one for each IOMMU group that VFIO can give away. Must not write anything.

use std::collections::{BTreeMap, BTreeSet};

use km_host::Root;
use km_vfio::{Address, Function, Group, Inventory, Kind};
use rustix::fs::OFlags;
use serde::Serialize;

use crate::names::{Class, ClassError};

/// VFIO's container (Linux, Documentation/driver-api/vfio.rst): whoever opens a group by its node needs this one too.
const CONTAINER: &str = "/dev/vfio/vfio";

/// The node of iommufd (Linux, Documentation/userspace-api/iommufd.rst).
const IOMMUFD: &str = "/dev/iommu";

/// How classes are named. The default is NVIDIA's: `pgpu` and `nvswitch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Naming {
    gpu: Option<Class>,
    nvswitch: Option<Class>,
}

impl Naming {
    /// With these aliases for GPUs and for NVSwitches; an empty one means that each model is a class of its own.
    ///
    /// # Errors
    /// [`ClassError`] when an alias cannot be a class.
    pub fn new(gpu: &str, nvswitch: &str) -> Result<Naming, ClassError> {
        let class = |alias: &str| match alias {
            "" => Ok(None),
            alias => Class::new(alias).map(Some),
        };
        Ok(Naming {
            gpu: class(gpu)?,
            nvswitch: class(nvswitch)?,
        })
    }

    /// The kinds that the aliases give, such as `nvidia.com/pgpu`.
    pub fn kinds(&self) -> Vec<String> {
        let aliases = [&self.gpu, &self.nvswitch];
        aliases.into_iter().flatten().map(Class::kind).collect()
    }

    fn class(&self, function: &Function) -> Class {
        let alias = match function.kind {
            Kind::NvSwitch => &self.nvswitch,
            _ => &self.gpu,
        };
        alias
            .clone()
            .unwrap_or_else(|| Class::of_model(function.name.as_deref(), function.device))
    }
}

/// Which nodes give a group to a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The group's own: `/dev/vfio/<group>` with `/dev/vfio/vfio`.
    Group,
    /// One for each function, `/dev/vfio/devices/vfio<n>`, where all functions of a group have one; the group's own elsewhere.
    Iommufd,
    /// One for each function, and nothing else: a group where one is missing is left out. Kata's confidential guests take no
    /// others.
    IommufdOnly,
}

impl Backend {
    /// What a host offers: iommufd where its node is there, as NVIDIA's Sandbox Device Plugin decides.
    pub fn observe(root: &Root) -> Backend {
        match root.open(IOMMUFD.as_ref(), OFlags::PATH) {
            Ok(_) => Backend::Iommufd,
            Err(_) => Backend::Group,
        }
    }
}

/// A CDI device: an IOMMU group that VFIO can give away now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Its class.
    pub class: Class,
    /// Its name, which is also the ID that the kubelet knows it by: the address of the group's first GPU, or else of its first
    /// NVSwitch.
    pub name: Address,
    /// The places of its GPUs or NVSwitches among all of the class on the bus, bound to VFIO or not, by address and from 0. They
    /// are names too.
    pub indices: Vec<usize>,
    /// Its IOMMU group.
    pub group: u32,
    /// The host's nodes that give it away, sorted.
    pub nodes: Vec<String>,
    /// The functions that go with it, by address.
    pub functions: Vec<Address>,
    /// The model of the function that it is named by.
    pub model: String,
    /// The NUMA node of that function.
    pub numa_node: Option<u16>,
}

impl Device {
    /// All names that it has in its class: its address first, then the indices.
    pub fn names(&self) -> Vec<String> {
        let indices = self.indices.iter().map(usize::to_string);
        std::iter::once(self.name.to_string())
            .chain(indices)
            .collect()
    }
}

/// A GPU or NVSwitch that is no CDI device, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Where it is.
    pub address: Address,
    /// Its model.
    pub model: String,
    /// What keeps it from being given away.
    pub reason: String,
}

/// What an inventory has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Found {
    /// The devices by class, then address.
    pub devices: Vec<Device>,
    /// The GPUs and NVSwitches that are none.
    pub left_out: Vec<LeftOut>,
}

impl Found {
    /// The devices of each class.
    pub fn by_class(&self) -> BTreeMap<&Class, Vec<&Device>> {
        let mut classes: BTreeMap<&Class, Vec<&Device>> = BTreeMap::new();
        for device in &self.devices {
            classes.entry(&device.class).or_default().push(device);
        }
        classes
    }
}

/// Finds the devices.
///
/// Indices are counted over all GPUs or NVSwitches of the class, so that binding one to VFIO, or giving one back, renames no other;
/// only a card that comes or goes at a lower address does. Whoever must not meet that uses addresses.
pub fn find(inventory: &Inventory, naming: &Naming, backend: Backend) -> Found {
    let mut places: BTreeMap<Class, Vec<Address>> = BTreeMap::new();
    for function in inventory.primaries() {
        let class = naming.class(function);
        places.entry(class).or_default().push(function.address);
    }
    let mut found = Found::default();
    let mut seen = BTreeSet::new();
    for function in inventory.primaries() {
        match group(inventory, function) {
            Err(reason) => found.left_out.push(LeftOut {
                address: function.address,
                model: function.label(),
                reason,
            }),
            Ok(group) if seen.insert(group.id) => {
                let Some(device) = device(inventory, naming, backend, group, &places) else {
                    continue;
                };
                match device.nodes.is_empty() {
                    false => found.devices.push(device),
                    true => found.left_out.push(LeftOut {
                        address: device.name,
                        model: device.model,
                        reason: "not all functions of its group have a node in /dev/vfio/devices: the kernel needs iommufd and CONFIG_VFIO_DEVICE_CDEV".to_owned(),
                    }),
                }
            }
            Ok(_) => {}
        }
    }
    found
        .devices
        .sort_by(|a, b| (&a.class, a.name).cmp(&(&b.class, b.name)));
    found
}

/// The group of a function, when VFIO can give it away.
fn group<'a>(inventory: &'a Inventory, function: &Function) -> Result<&'a Group, String> {
    let Some(group) = function.iommu_group.and_then(|id| inventory.group(id)) else {
        return Err("it has no IOMMU group: switch the IOMMU on".to_owned());
    };
    if !function.on_vfio() {
        return Err(match &function.driver {
            Some(driver) => format!(
                "the driver {driver} has it: \"kata-manager devices bind\" hands it to VFIO"
            ),
            None => "no driver has it: \"kata-manager devices bind\" hands it to VFIO".to_owned(),
        });
    }
    if group.viable {
        return Ok(group);
    }
    let others = group.members.iter().filter(|member| member.kind.is_some());
    let held: Vec<String> = others
        .filter_map(|member| {
            let driver = member.driver.as_deref()?;
            let harmless = driver.contains("vfio") || driver == "pci-stub";
            (!harmless).then(|| format!("{} with the driver {driver}", member.address))
        })
        .collect();
    Err(format!(
        "its IOMMU group {} is shared with {}",
        group.id,
        held.join(", ")
    ))
}

fn device(
    inventory: &Inventory,
    naming: &Naming,
    backend: Backend,
    group: &Group,
    places: &BTreeMap<Class, Vec<Address>>,
) -> Option<Device> {
    let functions: Vec<&Function> = group
        .members
        .iter()
        .filter_map(|member| inventory.function(member.address))
        .filter(|function| function.on_vfio())
        .collect();
    let first = |kind| functions.iter().find(|function| function.kind == kind);
    let lead = first(Kind::Gpu).or_else(|| first(Kind::NvSwitch))?;
    let class = naming.class(lead);
    let indices = functions
        .iter()
        .filter(|function| function.kind.is_primary() && naming.class(function) == class)
        .filter_map(|function| places.get(&class)?.binary_search(&function.address).ok())
        .collect();
    Some(Device {
        class,
        name: lead.address,
        indices,
        group: group.id,
        nodes: nodes(&functions, group.id, backend),
        functions: functions.iter().map(|function| function.address).collect(),
        model: lead.label(),
        numa_node: lead.numa_node,
    })
}

/// None when the backend has none for these functions.
fn nodes(functions: &[&Function], group: u32, backend: Backend) -> Vec<String> {
    let of_functions: Option<BTreeSet<String>> = functions
        .iter()
        .map(|function| {
            let name = function.vfio_device.as_ref().filter(|_| function.cdev)?;
            Some(format!("/dev/vfio/devices/{name}"))
        })
        .collect();
    match (of_functions, backend) {
        (Some(nodes), Backend::Iommufd | Backend::IommufdOnly) => nodes.into_iter().collect(),
        (None, Backend::IommufdOnly) => Vec::new(),
        (_, Backend::Group) | (None, Backend::Iommufd) => {
            vec![format!("/dev/vfio/{group}"), CONTAINER.to_owned()]
        }
    }
}

#[cfg(test)]
mod tests {
    use km_tests_sysfs::{Machine, device, shapes};

    use super::*;

    fn inventory(machine: &Machine) -> Inventory {
        let dir = tempfile::tempdir().unwrap();
        machine.write(dir.path());
        Inventory::observe(&Root::new(dir.path()).unwrap()).unwrap()
    }

    fn look(machine: &Machine, naming: &Naming) -> Found {
        find(&inventory(machine), naming, Backend::Group)
    }

    fn usual() -> Naming {
        Naming::new("pgpu", "nvswitch").unwrap()
    }

    #[test]
    fn eight_gpus_and_four_switches() {
        let found = look(&shapes::eight_gpus(), &usual());
        let classes = found.by_class();
        let sizes: Vec<_> = classes
            .iter()
            .map(|(class, all)| (class.as_str(), all.len()))
            .collect();
        assert_eq!(sizes, [("nvswitch", 4), ("pgpu", 8)]);
        let first = classes[&Class::new("pgpu").unwrap()][0];
        assert_eq!(first.names(), ["0000:13:00.0", "0"]);
        assert_eq!(
            first.nodes,
            [format!("/dev/vfio/{}", first.group), CONTAINER.to_owned()]
        );
        assert_eq!(found.left_out, []);
    }

    #[test]
    fn an_index_counts_what_is_not_bound_too() {
        let mut machine = shapes::two_models();
        let found = look(&machine, &usual());
        assert_eq!(found.devices.len(), 1);
        assert_eq!(found.devices[0].indices, [0]);
        assert!(found.left_out[0].reason.contains("nvidia"), "{found:?}");
        machine.devices[1].driver = Some("nvidia".to_owned());
        machine.devices[3].driver = Some("vfio-pci".to_owned());
        let found = look(&machine, &usual());
        assert_eq!(found.devices[0].names(), ["0000:81:00.0", "1"]);
        let found = look(&machine, &Naming::new("", "").unwrap());
        assert_eq!(found.devices[0].class.as_str(), "AD102GL_L40");
        assert_eq!(found.devices[0].indices, [0]);
    }

    #[test]
    fn a_group_is_one_device_with_all_its_functions() {
        let gpu = |address| device(address, shapes::L40, shapes::GPU).group(9);
        let audio = device("0000:01:00.1", (0x10de, 0x22ba), 0x04_0300).group(9);
        let parts = vec![
            gpu("0000:01:00.0").vfio(1),
            audio.vfio(2),
            gpu("0000:02:00.0").vfio(3),
        ];
        let later = device("0000:03:00.0", shapes::H100, shapes::GPU)
            .group(10)
            .vfio(4);
        let machine = Machine::new([parts, vec![later]].concat());
        let found = look(&machine, &usual());
        assert_eq!(found.devices.len(), 2);
        assert_eq!(found.devices[0].names(), ["0000:01:00.0", "0", "1"]);
        assert_eq!(found.devices[0].functions.len(), 3);
        assert_eq!(found.devices[1].names(), ["0000:03:00.0", "2"]);
        let mut foreign = machine;
        foreign.devices.push(
            device("0000:04:00.0", (0x8086, 0x1572), 0x02_0000)
                .group(9)
                .driver("i40e"),
        );
        let found = look(&foreign, &usual());
        assert_eq!(found.devices.len(), 1);
        assert!(
            found.left_out[0]
                .reason
                .ends_with("shared with 0000:04:00.0 with the driver i40e"),
            "{found:?}"
        );
        // The index of the one that is left is what it was.
        assert_eq!(found.devices[0].names(), ["0000:03:00.0", "2"]);
    }

    #[test]
    fn iommufd_where_every_function_has_its_node() {
        let machine = shapes::eight_gpus();
        let mut inventory = inventory(&machine);
        let nodes = |inventory: &Inventory| {
            find(inventory, &usual(), Backend::Iommufd).devices[0]
                .nodes
                .clone()
        };
        assert!(nodes(&inventory).contains(&CONTAINER.to_owned()));
        let strict = find(&inventory, &usual(), Backend::IommufdOnly);
        assert_eq!((strict.devices.len(), strict.left_out.len()), (0, 12));
        assert!(strict.left_out[0].reason.contains("iommufd"), "{strict:?}");
        inventory
            .functions
            .iter_mut()
            .for_each(|function| function.cdev = true);
        assert_eq!(nodes(&inventory), ["/dev/vfio/devices/vfio2"]);
        let strict = find(&inventory, &usual(), Backend::IommufdOnly);
        assert_eq!((strict.devices.len(), strict.left_out.len()), (12, 0));
    }

    #[test]
    fn nothing_without_an_iommu() {
        let found = look(&shapes::no_iommu(), &usual());
        assert_eq!(found.devices, []);
        assert!(found.left_out[0].reason.contains("IOMMU"));
    }
}
