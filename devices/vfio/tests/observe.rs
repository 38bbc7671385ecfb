//! Inventories of prepared machines, and of trees that no kernel would show.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files plainly, and fail by panicking"
)]

use std::path::{Path, PathBuf};

use km_host::Root;
use km_tests_sysfs::{Machine, device, shapes};
use km_vfio::{Address, BridgeKind, Inventory, Kind, Users};
use proptest::prelude::*;

fn look(machine: &Machine) -> (Inventory, Users, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    machine.write(dir.path());
    let root = Root::new(dir.path()).unwrap();
    let inventory = Inventory::observe(&root).unwrap();
    let users = Users::observe(&root, &inventory).unwrap();
    (inventory, users, dir)
}

fn at(text: &str) -> Address {
    text.parse().unwrap()
}

#[test]
fn one_gpu_with_everything_about_it() {
    let (inventory, _, _dir) = look(&shapes::one_gpu());
    assert_eq!(inventory.scanned, 2);
    let [gpu] = &inventory.functions[..] else {
        panic!("{inventory:?}");
    };
    assert_eq!(
        (gpu.kind, gpu.device, gpu.class),
        (Kind::Gpu, 0x2331, 0x03_0200)
    );
    assert_eq!(gpu.label(), "H100 PCIe");
    assert_eq!((gpu.driver.as_deref(), gpu.iommu_group), (None, Some(12)));
    assert_eq!(gpu.path, [at("00:10.0")]);
    assert_eq!(gpu.root_complex.as_deref(), Some("pci0000:00"));
    let bars: Vec<_> = gpu
        .bars
        .iter()
        .map(|bar| (bar.index, bar.bytes >> 20))
        .collect();
    assert_eq!(bars, [(0, 16), (2, 128 << 10), (4, 32)]);
    assert!(gpu.bars[1].wide && gpu.bars[1].prefetchable);
    assert_eq!(gpu.reset_methods, ["flr", "bus"]);
    assert_eq!(gpu.link.as_ref().unwrap().speed.as_deref(), Some("32.0"));
    assert_eq!(
        (gpu.numa_node, gpu.dead, gpu.boot_vga),
        (None, false, false)
    );
    assert_eq!(inventory.bridges[0].kind, BridgeKind::RootPort);
    assert!(!inventory.groups[0].viable);
}

#[test]
fn eight_gpus_and_their_switches() {
    let (inventory, _, _dir) = look(&shapes::eight_gpus());
    let count = |kind| {
        inventory
            .functions
            .iter()
            .filter(|f| f.kind == kind)
            .count()
    };
    assert_eq!((count(Kind::Gpu), count(Kind::NvSwitch)), (8, 4));
    let ports = |kind| inventory.bridges.iter().filter(|b| b.kind == kind).count();
    assert_eq!(ports(BridgeKind::RootPort), 4);
    assert_eq!(ports(BridgeKind::UpstreamPort), 4);
    assert_eq!(ports(BridgeKind::DownstreamPort), 12);
    let domains = inventory.topology();
    assert_eq!(domains.len(), 2);
    assert_eq!(domains[1].numa_node, Some(1));
    assert!(inventory.groups.iter().all(|group| group.viable));
}

#[test]
fn a_shared_group_has_all_its_members() {
    let (inventory, _, _dir) = look(&shapes::shared_group());
    let kinds: Vec<_> = inventory.functions.iter().map(|f| f.kind).collect();
    assert_eq!(kinds, [Kind::Gpu, Kind::Audio, Kind::Foreign]);
    let [group] = &inventory.groups[..] else {
        panic!("{inventory:?}");
    };
    assert_eq!(group.members.len(), 4);
    assert_eq!(group.members[0].kind, None, "the bridge is told apart");
    assert_eq!(inventory.unit(at("01:00.1")).len(), 3);
}

#[test]
fn users_are_found_by_path() {
    let (inventory, users, _dir) = look(&shapes::two_models());
    let holders: Vec<_> = users.of(at("01:00.0")).collect();
    assert_eq!(holders.len(), 1);
    assert_eq!(
        (holders[0].pid, &*holders[0].name),
        (4242, "qemu-system-x86")
    );
    assert_eq!(holders[0].file, "/dev/vfio/12");
    assert_eq!(users.of(at("81:00.0")).count(), 0);
    assert_eq!(inventory.functions.len(), 2);

    let cuda = shapes::two_models().process(77, "python", &["/dev/nvidia0"]);
    let (_, users, _dir) = look(&cuda);
    assert_eq!(users.of(at("81:00.0")).next().unwrap().pid, 77);
    let other = shapes::two_models().process(77, "python", &["/dev/nvidia1"]);
    let (_, users, _dir) = look(&other);
    assert_eq!(users.of(at("81:00.0")).count(), 0);
}

#[test]
fn a_dead_device_and_a_host_without_a_bus() {
    let mut machine = shapes::one_gpu();
    machine.devices[1].dead = true;
    let (inventory, _, _dir) = look(&machine);
    assert!(inventory.functions[0].dead);
    let (inventory, ..) = look(&shapes::no_iommu());
    assert_eq!(inventory.functions[0].iommu_group, None);
    let empty = tempfile::tempdir().unwrap();
    let inventory = Inventory::observe(&Root::new(empty.path()).unwrap()).unwrap();
    assert_eq!(inventory, Inventory::default());
}

#[test]
fn sixteen_among_five_hundred() {
    let (inventory, ..) = look(&shapes::crowd(468));
    assert_eq!(inventory.primaries().count(), 16);
    assert!(inventory.scanned >= 500, "{}", inventory.scanned);
}

/// Every file and link of a tree, in order.
fn entries(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// What is done to an entry of a tree.
#[derive(Clone, Debug)]
enum Harm {
    Remove,
    Bytes(Vec<u8>),
    Huge,
    LinkTo(String),
    Folder,
    Pipe,
}

fn harm() -> impl Strategy<Value = Harm> {
    let targets = prop::sample::select(vec![
        ".",
        "..",
        "/",
        "self",
        "/etc/passwd",
        "../../../devices/../..",
    ]);
    prop_oneof![
        Just(Harm::Remove),
        prop::collection::vec(any::<u8>(), 0..80).prop_map(Harm::Bytes),
        Just(Harm::Huge),
        targets.prop_map(|target| Harm::LinkTo(target.to_owned())),
        Just(Harm::Folder),
        Just(Harm::Pipe),
    ]
}

fn inflict(path: &Path, harm: &Harm) {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(_) => return,
    };
    removed.unwrap();
    match harm {
        Harm::Remove => {}
        Harm::Bytes(bytes) => std::fs::write(path, bytes).unwrap(),
        Harm::Huge => std::fs::File::create(path)
            .unwrap()
            .set_len(1 << 40)
            .unwrap(),
        Harm::LinkTo(target) => std::os::unix::fs::symlink(target, path).unwrap(),
        Harm::Folder => std::fs::create_dir(path).unwrap(),
        Harm::Pipe => rustix::fs::mkfifoat(rustix::fs::CWD, path, 0o600.into()).unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn harmed_trees_never_panic_or_hang(harms in prop::collection::vec((any::<prop::sample::Index>(), harm()), 1..6)) {
        let dir = tempfile::tempdir().unwrap();
        shapes::two_models().write(dir.path());
        for (index, harm) in &harms {
            let entries = entries(dir.path());
            if !entries.is_empty() {
                inflict(&entries[index.index(entries.len())], harm);
            }
        }
        let root = Root::new(dir.path()).unwrap();
        if let Ok(inventory) = Inventory::observe(&root) {
            inventory.topology();
            let _ = Users::observe(&root, &inventory);
        }
    }

    #[test]
    fn any_attribute_is_read(name in "(resource|modalias|numa_node|reset_method|max_link_(speed|width)|power_state)", text in "\\PC{0,200}") {
        let gpu = device("0000:01:00.0", shapes::H100, shapes::GPU).with(&name, &text);
        let (inventory, ..) = look(&Machine::new(vec![gpu]));
        for function in &inventory.functions {
            prop_assert!(!function.label().chars().any(char::is_control));
        }
    }
}

/// Functions that come and go while they are read.
#[test]
fn a_tree_that_changes_while_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    shapes::eight_gpus().write(dir.path());
    let root = Root::new(dir.path()).unwrap();
    let gone = dir.path().join("sys/devices/pci0000:10");
    let aside = dir.path().join("aside");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                std::fs::rename(&gone, &aside).unwrap();
                std::fs::rename(&aside, &gone).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Release);
        });
        while !done.load(std::sync::atomic::Ordering::Acquire) {
            let inventory = Inventory::observe(&root).unwrap();
            assert!(inventory.primaries().count() >= 9);
            for function in &inventory.functions {
                let Some(id) = function.iommu_group else {
                    continue;
                };
                let group = inventory.group(id).expect("a group that a function names");
                assert!(group.members.iter().any(|m| m.address == function.address));
            }
            Users::observe(&root, &inventory).ok();
        }
    });
    assert_eq!(Inventory::observe(&root).unwrap().primaries().count(), 12);
}
