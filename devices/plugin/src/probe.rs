//! A quick look at devices that are known: a few small reads for each. It neither finds devices nor judges what it sees.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use km_host::Root;
use km_vfio::Address;
use rustix::fs::OFlags;

use crate::health::FunctionSeen;

/// <https://docs.kernel.org/admin-guide/abi-testing-files.html>, sysfs-bus-pci.
const DEVICES: &str = "/sys/bus/pci/devices";

/// The most names of a folder that are looked at. A machine with every bus of four domains full has fewer functions.
const ENTRIES: usize = 1 << 16;

/// The most of an attribute that is read: the kernel gives at most a page.
const PAGE: usize = 4096;

/// What is told about the machine as a whole. When it is another than before, it is time for a full inventory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) functions: BTreeSet<String>,
    /// The functions of the last inventory, which drivers may take or leave.
    pub(crate) drivers: BTreeMap<Address, Option<String>>,
    pub(crate) nodes: BTreeSet<String>,
}

impl Fingerprint {
    /// Looks at which functions and VFIO nodes there are, and at the drivers of these functions.
    pub(crate) fn take(root: &Root, functions: &[Address]) -> Fingerprint {
        let driver = |address: &Address| (*address, driver(root, *address));
        let mut nodes = names(root, "/dev/vfio");
        nodes.extend(names(root, "/dev/vfio/devices"));
        if exists(root, "/dev/iommu") {
            nodes.insert("iommu".to_owned());
        }
        Fingerprint {
            functions: names(root, DEVICES),
            drivers: functions.iter().map(driver).collect(),
            nodes,
        }
    }

    /// Looks at the same again.
    pub(crate) fn again(&self, root: &Root) -> Fingerprint {
        let functions: Vec<Address> = self.drivers.keys().copied().collect();
        Fingerprint::take(root, &functions)
    }
}

/// Looks at a function.
pub(crate) fn function(root: &Root, address: Address) -> FunctionSeen {
    let folder = format!("{DEVICES}/{address}");
    if !exists(root, &folder) {
        return FunctionSeen::default();
    }
    FunctionSeen {
        present: true,
        driver: driver(root, address),
        dead: !is_powered_off(root, &folder)
            && bytes(root, &format!("{folder}/config"), 4).as_deref() == Some(&[0xff; 4]),
        fatal: bytes(root, &format!("{folder}/aer_dev_fatal"), PAGE)
            .and_then(|text| fatal_errors(&String::from_utf8_lossy(&text))),
    }
}

/// Whether a path of the host is there.
pub(crate) fn exists(root: &Root, path: &str) -> bool {
    root.open(Path::new(path), OFlags::PATH).is_ok()
}

/// Whether a function is in D3cold: to read its configuration space would switch it on again and again.
fn is_powered_off(root: &Root, folder: &str) -> bool {
    let state = bytes(root, &format!("{folder}/power_state"), PAGE);
    state.is_some_and(|state| state.trim_ascii() == b"D3cold")
}

/// The sum at the end of `aer_dev_fatal` (Linux, sysfs-bus-pci-devices-aer_stats).
fn fatal_errors(text: &str) -> Option<u64> {
    let total = |line: &str| line.strip_prefix("TOTAL_ERR_FATAL")?.trim().parse().ok();
    text.lines().find_map(total)
}

fn driver(root: &Root, address: Address) -> Option<String> {
    let path = format!("{DEVICES}/{address}/driver");
    let link = root
        .open(Path::new(&path), OFlags::PATH | OFlags::NOFOLLOW)
        .ok()?;
    // An empty path reads the link that the descriptor is of (readlink(2)).
    let target = rustix::fs::readlinkat(&link, "", Vec::new()).ok()?;
    let target = target.to_string_lossy().into_owned();
    let name = target.rsplit('/').next()?;
    (!name.chars().any(char::is_control)).then(|| name.to_owned())
}

fn bytes(root: &Root, path: &str, limit: usize) -> Option<Vec<u8>> {
    let file = File::from(root.open(Path::new(path), OFlags::RDONLY).ok()?);
    let mut bytes = Vec::new();
    file.take(limit as u64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn names(root: &Root, folder: &str) -> BTreeSet<String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let Some(dir) = root
        .open(Path::new(folder), flags)
        .ok()
        .and_then(|fd| rustix::fs::Dir::new(fd).ok())
    else {
        return BTreeSet::new();
    };
    // An entry that cannot be read ends the listing; what came before it counts.
    dir.take(ENTRIES)
        .map_while(Result::ok)
        .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned))
        .filter(|name| name != "." && name != "..")
        .collect()
}

#[cfg(test)]
mod tests {
    use km_tests_sysfs::{Machine, device, shapes};

    use super::*;

    const ERRORS: &str = "Undefined 0\nDLP 1\nSDES 0\nTLP 2\nTOTAL_ERR_FATAL 3\n";

    #[test]
    fn a_function_is_seen_as_sysfs_shows_it() {
        let gpu = |address, vfio, state| {
            device(address, shapes::H100, shapes::GPU)
                .group(1)
                .vfio(vfio)
                .with("aer_dev_fatal", ERRORS)
                .with("power_state", state)
        };
        let mut off = gpu("0000:02:00.0", 2, "D3cold\n");
        off.dead = true;
        let mut dead = gpu("0000:03:00.0", 3, "unknown\n");
        dead.dead = true;
        let machine = Machine::new(vec![gpu("0000:01:00.0", 1, "D0\n"), off, dead]);
        let dir = tempfile::tempdir().unwrap();
        machine.write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        let see = |address: &str| function(&root, address.parse().unwrap());
        let good = see("0000:01:00.0");
        assert!(good.present && good.on_vfio() && !good.dead, "{good:?}");
        assert_eq!(good.fatal, Some(3));
        assert!(!see("0000:02:00.0").dead, "it is only switched off");
        assert!(see("0000:03:00.0").dead);
        assert_eq!(see("0000:04:00.0"), FunctionSeen::default());
        assert_eq!(fatal_errors("TOTAL_ERR_FATAL x\n"), None);
        assert_eq!(fatal_errors(""), None);
    }

    #[test]
    fn a_fingerprint_changes_with_functions_drivers_and_nodes() {
        let dir = tempfile::tempdir().unwrap();
        shapes::two_models().write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        let known: Vec<Address> = vec!["0000:01:00.0".parse().unwrap()];
        let first = Fingerprint::take(&root, &known);
        assert_eq!(Fingerprint::take(&root, &known), first);
        std::fs::create_dir_all(dir.path().join("dev/vfio")).unwrap();
        std::fs::write(dir.path().join("dev/vfio/12"), "").unwrap();
        let second = Fingerprint::take(&root, &known);
        assert_ne!(second, first);
        let link = dir.path().join("sys/bus/pci/devices/0000:01:00.0/driver");
        std::fs::remove_file(link).unwrap();
        let third = Fingerprint::take(&root, &known);
        assert_ne!(third, second);
        std::fs::remove_file(dir.path().join("sys/bus/pci/devices/0000:81:00.0")).unwrap();
        assert_ne!(Fingerprint::take(&root, &known), third);
    }
}
