//! What we write is taken by the library, with every name that we gave.

use std::collections::BTreeSet;
use std::path::PathBuf;

use container_device_interface::spec::read_spec;
use km_cdi::devices::{Backend, Device, Found, Naming, find};
use km_cdi::files::{self, Step};
use km_cdi::names::Class;
use km_host::{HostPath, Root};
use km_tests_sysfs::{Machine, device, shapes};
use km_vfio::{Address, Inventory};
use proptest::prelude::*;

/// A spec as it was judged.
#[derive(Debug, PartialEq, Eq)]
struct Judged {
    kind: String,
    names: BTreeSet<String>,
    nodes: BTreeSet<String>,
}

/// Writes the specs of devices as the program does, and has each judged.
fn judge(found: &Found) -> Vec<Judged> {
    let folder = tempfile::tempdir().unwrap();
    let root = Root::new(folder.path()).unwrap();
    let dir = HostPath::new(km_cdi::DIR).unwrap();
    let steps = files::plan(&dir, &[], found).unwrap();
    files::apply(&root, &steps).unwrap();
    let judged = steps.iter().map(|step| {
        let Step::Write { path, text, .. } = step else {
            panic!("there is nothing to remove: {step:?}");
        };
        let file: PathBuf = folder.path().join(path.as_str().trim_start_matches('/'));
        // Reading judges by the JSON Schema and by the rules that it cannot say.
        let spec = read_spec(&file, 0).unwrap_or_else(|error| panic!("{error:#}\n{text}"));
        let devices = spec.get_devices();
        let edits = devices
            .values()
            .map(|device| device.edits().container_edits);
        let nodes = edits.flat_map(|edits| edits.device_nodes.unwrap_or_default());
        Judged {
            kind: format!("{}/{}", spec.get_vendor(), spec.get_class()),
            nodes: nodes.map(|node| path_of(&node)).collect(),
            names: devices.into_keys().collect(),
        }
    });
    judged.collect()
}

/// The path of a node, which the library keeps to itself but writes down.
fn path_of(node: &impl serde::Serialize) -> String {
    let node = serde_json::to_value(node).unwrap();
    node["path"].as_str().unwrap().to_owned()
}

/// What is to come of a judgement.
fn wanted(found: &Found) -> Vec<Judged> {
    let of = |(class, devices): (&Class, Vec<&Device>)| Judged {
        kind: class.kind(),
        names: devices.iter().flat_map(|device| device.names()).collect(),
        nodes: devices
            .iter()
            .flat_map(|device| device.nodes.clone())
            .collect(),
    };
    found.by_class().into_iter().map(of).collect()
}

/// A GPU with its audio function, and two GPUs, each pair in one group.
fn groups() -> Machine {
    let gpu = |address, group, number| {
        device(address, shapes::L40, shapes::GPU)
            .group(group)
            .vfio(number)
    };
    let audio = device("0000:01:00.1", (0x10de, 0x22ba), 0x04_0300);
    Machine::new(vec![
        gpu("0000:01:00.0", 9, 1),
        audio.group(9).vfio(2),
        gpu("0000:02:00.0", 10, 3),
        gpu("0000:03:00.0", 10, 4),
    ])
}

/// Each machine with the number of its classes, by groups and by iommufd's nodes, under aliases and under the models' names.
#[test]
fn every_shape() {
    let machines = [
        ("a GPU that VFIO does not have", shapes::one_gpu(), 0),
        ("two models", shapes::two_models(), 1),
        ("GPUs and NVSwitches", shapes::eight_gpus(), 2),
        ("a crowd", shapes::crowd(20), 2),
        ("groups of several functions", groups(), 1),
        ("a group with a stranger", shapes::shared_group(), 0),
        ("no IOMMU", shapes::no_iommu(), 0),
    ];
    for (name, machine, classes) in machines {
        let folder = tempfile::tempdir().unwrap();
        machine.write(folder.path());
        let mut inventory = Inventory::observe(&Root::new(folder.path()).unwrap()).unwrap();
        for backend in [Backend::Group, Backend::IommufdOnly] {
            if backend == Backend::IommufdOnly {
                let functions = inventory.functions.iter_mut();
                functions.for_each(|function| function.cdev = true);
            }
            for (gpu, nvswitch) in [("pgpu", "nvswitch"), ("", "")] {
                let naming = Naming::new(gpu, nvswitch).unwrap();
                let found = find(&inventory, &naming, backend);
                let judged = judge(&found);
                assert_eq!(judged.len(), classes, "{name}: {judged:?}");
                assert_eq!(judged, wanted(&found), "{name}");
                let cdev = |node: &String| node.starts_with("/dev/vfio/devices/");
                let nodes = judged.iter().flat_map(|one| &one.nodes);
                assert!(
                    nodes.clone().all(cdev) == (backend != Backend::Group) || nodes.count() == 0
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_devices(
        model in "\\PC{0,60}",
        slots in proptest::collection::btree_set(any::<u8>(), 1..20),
        group in any::<u32>(),
        cdev: bool,
    ) {
        let class = Class::of_model(Some(&model), 1);
        let devices = slots.iter().enumerate().map(|(at, slot)| {
            let name = Address { domain: 0, bus: *slot, device: 0, function: 0 };
            let group = group.wrapping_add(at as u32);
            let nodes = match cdev {
                true => vec![format!("/dev/vfio/devices/vfio{at}")],
                false => vec![format!("/dev/vfio/{group}"), "/dev/vfio/vfio".to_owned()],
            };
            Device {
                class: class.clone(),
                name,
                indices: vec![at],
                group,
                nodes,
                functions: vec![name],
                model: "a model".to_owned(),
                numa_node: None,
            }
        });
        let found = Found { devices: devices.collect(), left_out: Vec::new() };
        prop_assert_eq!(judge(&found), wanted(&found));
    }
}
