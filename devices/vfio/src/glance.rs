//! A quick look at a few functions: what must be known of one before a guest gets it, and nothing else. [`crate::Inventory`] looks at the
//! whole bus and takes milliseconds; this takes a handful of small reads for each function.

use km_host::Root;
use serde::Serialize;

use crate::inventory::{is_bridge, is_vfio};
use crate::observe::{Identity, identity, is_vfio_device, vfio_device};
use crate::sysfs::Sysfs;
use crate::{Address, Kind};

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVERS: &str = "/sys/bus/pci/drivers";

/// What a guest's start depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Glance {
    /// Where it is.
    pub address: Address,
    /// What it is to us; `None` for a bridge, which VFIO leaves alone.
    pub kind: Option<Kind>,
    /// Class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// Its IOMMU group; `None` without an IOMMU.
    pub iommu_group: Option<u32>,
    /// Its NUMA node; `None` where the firmware tells none.
    pub numa_node: Option<u16>,
    /// Whether its configuration space answers all ones: it has fallen off the bus.
    pub dead: bool,
}

impl Glance {
    /// Looks at a function; `None` when there is none.
    pub fn at(root: &Root, address: Address) -> Option<Glance> {
        let folder = Sysfs::new(root).folder(format!("{DEVICES}/{address}"))?;
        let Identity { vendor, class, .. } = identity(&folder.text("modalias")?)?;
        Some(Glance {
            address,
            kind: (!is_bridge(class)).then(|| Kind::of(vendor, class)),
            class,
            driver: folder.link_name("driver"),
            iommu_group: folder
                .link_name("iommu_group")
                .and_then(|name| name.parse().ok()),
            numa_node: folder
                .text("numa_node")
                .and_then(|node| u16::try_from(node.parse::<i32>().ok()?).ok()),
            dead: folder.bytes("config", 4).as_deref() == Some(&[0xff; 4]),
        })
    }

    /// Whether a VFIO driver has it.
    pub fn on_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }

    /// Whether it keeps its group from being given away: another driver than VFIO's or `pci-stub` has it.
    pub fn in_the_way(&self) -> bool {
        let driver = self.driver.as_deref();
        self.kind.is_some() && driver.is_some_and(|name| !is_vfio(name) && name != "pci-stub")
    }
}

/// The members of an IOMMU group, bridges included, by address; none when there is no such group.
pub fn group(root: &Root, id: u32) -> Vec<Address> {
    let names = Sysfs::new(root).names(format!("/sys/kernel/iommu_groups/{id}/devices"));
    let mut members: Vec<Address> = names.iter().filter_map(|name| name.parse().ok()).collect();
    members.sort_unstable();
    members
}

/// The name of a function's VFIO character device (`vfio0`), which it has while a VFIO driver of a kernel with iommufd has it.
pub fn character_device_of(root: &Root, address: Address) -> Option<String> {
    vfio_device(Sysfs::new(root), address)
}

/// The function behind a VFIO character device (`vfio0`): the last function in the device's place in sysfs.
pub fn character_device(root: &Root, name: &str) -> Option<Address> {
    if !is_vfio_device(name) {
        return None;
    }
    let target = Sysfs::new(root).link(format!("/sys/class/vfio-dev/{name}"))?;
    let target = target.to_str()?;
    target.rsplit('/').find_map(|part| part.parse().ok())
}

/// The functions that VFIO drivers have, by address.
pub fn on_vfio(root: &Root) -> Vec<Address> {
    let sysfs = Sysfs::new(root);
    let drivers = sysfs
        .names(DRIVERS)
        .into_iter()
        .filter(|name| is_vfio(name));
    let mut found: Vec<Address> = drivers
        .flat_map(|driver| sysfs.names(format!("{DRIVERS}/{driver}")))
        .filter_map(|name| name.parse().ok())
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use km_tests_sysfs::{Machine, shapes};

    use super::*;
    use crate::Inventory;

    fn root(machine: &Machine) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        machine.write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        (dir, root)
    }

    #[test]
    fn a_glance_is_what_the_inventory_has() {
        for machine in [
            shapes::one_gpu(),
            shapes::two_models(),
            shapes::eight_gpus(),
            shapes::shared_group(),
            shapes::no_iommu(),
        ] {
            let (_dir, root) = root(&machine);
            let inventory = Inventory::observe(&root).unwrap();
            for function in &inventory.functions {
                let glance = Glance::at(&root, function.address).unwrap();
                assert_eq!(glance.kind, Some(function.kind));
                assert_eq!(glance.class, function.class);
                assert_eq!(glance.driver, function.driver);
                assert_eq!(glance.iommu_group, function.iommu_group);
                let own = character_device_of(&root, function.address);
                assert_eq!(own, function.vfio_device);
                assert_eq!(glance.numa_node, function.numa_node);
                assert_eq!(glance.dead, function.dead);
                if let Some(name) = &function.vfio_device {
                    assert_eq!(character_device(&root, name), Some(function.address));
                }
            }
            for wanted in &inventory.groups {
                let members: Vec<_> = wanted.members.iter().map(|m| m.address).collect();
                assert_eq!(group(&root, wanted.id), members);
            }
            let bound = inventory.functions.iter().filter(|f| f.on_vfio());
            let bound: Vec<_> = bound.map(|function| function.address).collect();
            assert_eq!(on_vfio(&root), bound);
        }
    }

    #[test]
    fn what_is_not_there_is_none() {
        let (_dir, root) = root(&shapes::one_gpu());
        assert_eq!(Glance::at(&root, "0000:77:00.0".parse().unwrap()), None);
        assert_eq!(group(&root, 4711), []);
        for name in ["vfio99", "../vfio0", "vfio", ""] {
            assert_eq!(character_device(&root, name), None, "{name:?}");
        }
    }
}
