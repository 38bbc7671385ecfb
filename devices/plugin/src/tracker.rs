//! The devices that this run has known, and what is told of them. Data only: looks come in, snapshots go out.

use std::collections::{BTreeMap, BTreeSet};

use km_cdi::devices::{Device, Found};
use km_vfio::{Address, Inventory, Kind};

use crate::health::{self, FunctionSeen, Past, Seen};
use crate::snapshot::{Listed, Place, Snapshot};

/// A device that can be given away, or could be.
#[derive(Clone, Debug)]
struct Known {
    device: Device,
    place: Place,
    gpu: bool,
    /// Why it cannot be given away, when it was not found last time.
    missing: Option<String>,
}

/// All devices that were found since the start. One that is not found any more stays, and is told as unhealthy: so the kubelet goes
/// on counting it, and tells a pod that has it.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    known: BTreeMap<Address, Known>,
    past: Past,
    nvswitches: bool,
}

/// One look at everything that [`Tracker::functions`] and [`Tracker::nodes`] name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    pub(crate) functions: BTreeMap<Address, FunctionSeen>,
    /// The nodes that the host does not have.
    pub(crate) missing: BTreeSet<String>,
}

impl Tracker {
    /// Learns from an inventory.
    pub(crate) fn learn(&mut self, inventory: &Inventory, found: &Found) {
        let kind = |address| inventory.function(address).map(|function| function.kind);
        self.nvswitches = inventory
            .primaries()
            .any(|function| function.kind == Kind::NvSwitch);
        for known in self.known.values_mut() {
            known.missing = Some("VFIO cannot give its IOMMU group away".to_owned());
        }
        for device in &found.devices {
            let lead = inventory.function(device.name);
            let known = Known {
                device: device.clone(),
                place: lead.map(Place::of).unwrap_or_default(),
                gpu: lead.is_some_and(|lead| lead.kind == Kind::Gpu),
                missing: None,
            };
            self.known.insert(device.name, known);
        }
        for left in &found.left_out {
            if let Some(known) = self.known.get_mut(&left.address) {
                known.missing = Some(left.reason.clone());
            }
        }
        // What goes with another device now is none of its own any more.
        let members: BTreeSet<Address> = found
            .devices
            .iter()
            .flat_map(|device| device.functions.iter().filter(|one| **one != device.name))
            .copied()
            .collect();
        self.known.retain(|id, known| {
            !(members.contains(id) && known.missing.is_some() && kind(*id).is_some())
        });
    }

    /// Whether a device of this name was ever found.
    pub(crate) fn knows(&self, id: Address) -> bool {
        self.known.contains_key(&id)
    }

    /// The functions to look at.
    pub(crate) fn functions(&self) -> BTreeSet<Address> {
        let all = self.known.values();
        all.flat_map(|known| known.device.functions.iter().copied())
            .collect()
    }

    /// The nodes to look at.
    pub(crate) fn nodes(&self) -> BTreeSet<&str> {
        let all = self.known.values();
        all.flat_map(|known| known.device.nodes.iter().map(String::as_str))
            .collect()
    }

    /// Judges a look. `recovered` are functions that the kernel has brought back since the last one.
    pub(crate) fn judge(&mut self, look: &Look, recovered: &[Address]) -> Snapshot {
        for (address, seen) in &look.functions {
            self.past.note(*address, seen, recovered.contains(address));
        }
        let mut snapshot = Snapshot::default();
        for (id, known) in &self.known {
            let device = &known.device;
            let of = |address: &Address| {
                let seen = look.functions.get(address).cloned();
                (*address, seen.unwrap_or_default())
            };
            let seen = Seen {
                functions: device.functions.iter().map(of).collect(),
                missing: device
                    .nodes
                    .iter()
                    .filter(|node| look.missing.contains(*node))
                    .cloned()
                    .collect(),
                group: known.missing.clone(),
            };
            let listed = Listed {
                id: *id,
                place: known.place.clone(),
                nodes: device.nodes.clone(),
                causes: health::judge(&seen, &self.past),
            };
            if self.nvswitches && known.gpu {
                snapshot.partitioned.insert(device.class.clone());
            }
            let class = snapshot.classes.entry(device.class.clone());
            class.or_default().push(listed);
        }
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use km_cdi::devices::{Backend, Naming, find};
    use km_cdi::names::Class;
    use km_host::Root;
    use km_tests_sysfs::{Machine, device, shapes};

    use super::*;
    use crate::probe;
    use crate::snapshot::Cause;

    /// Looks at a machine as the observer does; all nodes are there.
    fn see(tracker: &mut Tracker, machine: &Machine) -> Snapshot {
        let dir = tempfile::tempdir().unwrap();
        machine.write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        let inventory = Inventory::observe(&root).unwrap();
        let naming = Naming::new("pgpu", "nvswitch").unwrap();
        tracker.learn(&inventory, &find(&inventory, &naming, Backend::Group));
        let functions = tracker.functions().into_iter();
        let look = Look {
            functions: functions
                .map(|address| (address, probe::function(&root, address)))
                .collect(),
            missing: BTreeSet::new(),
        };
        tracker.judge(&look, &[])
    }

    fn pgpu() -> Class {
        Class::new("pgpu").unwrap()
    }

    #[test]
    fn a_machine_is_told_with_its_places() {
        let snapshot = see(&mut Tracker::default(), &shapes::eight_gpus());
        assert_eq!(snapshot.partitioned, [pgpu()].into());
        let gpus = snapshot.of(&pgpu());
        assert_eq!(gpus.len(), 8);
        assert!(gpus.iter().all(Listed::healthy), "{gpus:?}");
        let numa: Vec<_> = gpus.iter().map(|gpu| gpu.place.numa.unwrap()).collect();
        assert_eq!(numa, [0, 0, 0, 0, 1, 1, 1, 1]);
        let switches: BTreeSet<_> = gpus.iter().map(|gpu| gpu.place.switch.unwrap()).collect();
        assert_eq!(switches.len(), 4);
        assert_eq!(snapshot.of(&Class::new("nvswitch").unwrap()).len(), 4);
    }

    #[test]
    fn what_goes_stays_listed_and_comes_back() {
        let tracker = &mut Tracker::default();
        let all = shapes::eight_gpus();
        let healthy = see(tracker, &all);
        let mut without = all.clone();
        let gone: Address = without.devices[2].address.parse().unwrap();
        let gone = without
            .devices
            .iter()
            .position(|device| device.class == shapes::GPU)
            .map_or(gone, |at| {
                without.devices.remove(at).address.parse().unwrap()
            });
        let snapshot = see(tracker, &without);
        let listed = snapshot.device(&pgpu(), gone).unwrap();
        assert_eq!(listed.causes, [Cause::Gone(gone)]);
        assert_eq!(snapshot.of(&pgpu()).len(), 8);
        assert_eq!(see(tracker, &all), healthy);
    }

    #[test]
    fn a_group_that_changes_hands_is_told() {
        let gpu = |address, vfio| {
            device(address, shapes::L40, shapes::GPU)
                .group(9)
                .vfio(vfio)
        };
        let tracker = &mut Tracker::default();
        let second = Machine::new(vec![gpu("0000:02:00.0", 2)]);
        assert_eq!(see(tracker, &second).of(&pgpu()).len(), 1);
        // With another at a lower address the group goes by that name, and the old one is not told twice.
        let both = Machine::new(vec![gpu("0000:01:00.0", 1), gpu("0000:02:00.0", 2)]);
        let snapshot = see(tracker, &both);
        let ids: Vec<String> = snapshot
            .of(&pgpu())
            .iter()
            .map(|one| one.id.to_string())
            .collect();
        assert_eq!(ids, ["0000:01:00.0"]);
        // A stranger in the group keeps it from being given away.
        let card = device("0000:03:00.0", (0x8086, 0x1572), 0x02_0000);
        let foreign = Machine::new(vec![gpu("0000:01:00.0", 1), card.group(9).driver("i40e")]);
        let snapshot = see(tracker, &foreign);
        let cause = snapshot.of(&pgpu())[0].causes[0].to_string();
        // The second function is gone from the bus, which says more than the group does.
        assert!(cause.contains("0000:02:00.0 is not on the bus"), "{cause}");
    }

    #[test]
    fn another_driver_is_told() {
        let tracker = &mut Tracker::default();
        let mut machine = shapes::two_models();
        see(tracker, &machine);
        machine.devices[1].driver = Some("nvidia".to_owned());
        let snapshot = see(tracker, &machine);
        let cause = snapshot.of(&pgpu())[0].causes[0].to_string();
        assert_eq!(cause, "0000:01:00.0 has the driver nvidia, not VFIO's");
    }
}
