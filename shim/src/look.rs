//! Looks at the node for one sandbox: CDI specs, the functions behind VFIO's nodes, and who else uses them. Reads only, but for opening
//! groups to see whether they are free.

use std::collections::BTreeMap;

use km_cdi::files;
use km_host::claims::Found;
use km_host::{Error, HostPath, Root};
use km_vfio::glance::{self, Glance};
use km_vfio::{Address, Inventory, Kind, Users};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::decide::{CDEVS, Catalogue, Seen, Wanted};

/// Reads the specs. What is in the folder for running programs comes before what is in the static one, and a device that two files of
/// one folder list is nobody's (CDI, pkg/cdi/cache.go).
///
/// # Errors
/// When a folder is there and cannot be listed.
pub fn catalogue(root: &Root) -> Result<Catalogue, Error> {
    let mut catalogue = Catalogue::new();
    for dir in [km_cdi::STATIC_DIR, km_cdi::DIR] {
        let dir = HostPath::new(dir).map_err(|error| {
            Error::io("name", dir)(std::io::Error::new(std::io::ErrorKind::InvalidInput, error))
        })?;
        let files = files::observe(root, &dir)?;
        for spec in files.iter().filter_map(|file| file.spec.as_ref().ok()) {
            for device in &spec.devices {
                let nodes = device.host_nodes().map(str::to_owned).collect();
                catalogue.insert(format!("{}={}", spec.kind, device.name), nodes);
            }
        }
        for doubled in files::doubled(&files) {
            catalogue.insert(doubled.device, Vec::new());
        }
    }
    Ok(catalogue)
}

/// Looks at what is behind the nodes. `claims` are those of other sandboxes that live.
///
/// # Errors
/// When processes have to be looked through and cannot be listed.
pub fn look(root: &Root, wanted: &[Wanted], claims: &[Found]) -> Result<Seen, Error> {
    let mut seen = Seen::default();
    for one in wanted {
        let behind = behind(root, &mut seen, &one.node);
        for address in &behind {
            meet(root, &mut seen, *address);
        }
        seen.behind.insert(one.node.clone(), behind);
    }
    primaries(root, &mut seen);
    let groups: Vec<u32> = seen
        .functions
        .values()
        .filter_map(|function| function.iommu_group)
        .collect();
    for id in groups {
        for address in group(root, &mut seen, id) {
            meet(root, &mut seen, address);
        }
    }
    seen.used = claimed(claims);
    held(root, &mut seen)?;
    Ok(seen)
}

fn behind(root: &Root, seen: &mut Seen, node: &str) -> Vec<Address> {
    if let Some(name) = node.strip_prefix(CDEVS) {
        return glance::character_device(root, name).into_iter().collect();
    }
    let id = node.strip_prefix("/dev/vfio/");
    let id = id.and_then(|name| name.parse().ok());
    id.map_or_else(Vec::new, |id| group(root, seen, id))
}

/// The members of a group, which is listed once; none when there is no such group.
fn group(root: &Root, seen: &mut Seen, id: u32) -> Vec<Address> {
    if let Some(members) = seen.groups.get(&id) {
        return members.clone();
    }
    let members = glance::group(root, id);
    if !members.is_empty() {
        seen.groups.insert(id, members.clone());
    }
    members
}

fn meet(root: &Root, seen: &mut Seen, address: Address) {
    if !seen.functions.contains_key(&address)
        && let Some(function) = Glance::at(root, address)
    {
        seen.functions.insert(address, function);
    }
}

/// All GPUs and NVSwitches that VFIO drivers have; only a pod with several GPUs can have all.
fn primaries(root: &Root, seen: &mut Seen) {
    let gpus = seen
        .functions
        .values()
        .filter(|f| f.kind == Some(Kind::Gpu));
    if gpus.count() < 2 {
        return;
    }
    for address in glance::on_vfio(root) {
        meet(root, seen, address);
    }
    let primary =
        |function: &&Glance| function.on_vfio() && function.kind.is_some_and(Kind::is_primary);
    seen.primaries = seen.functions.values().filter(primary).cloned().collect();
}

fn claimed(claims: &[Found]) -> BTreeMap<Address, String> {
    let mut used = BTreeMap::new();
    for found in claims {
        if let Found::Claim(claim) = found {
            for device in &claim.devices {
                if let Ok(address) = device.address.parse() {
                    used.insert(address, format!("sandbox {} (its claim)", claim.sandbox));
                }
            }
        }
    }
    used
}

/// A group's node can be opened once, and not while a character device of the group is open (Linux, drivers/vfio/group.c,
/// `vfio_group_fops_open`): so opening it tells whether anybody has it. Where there is no such node, processes are looked through.
fn held(root: &Root, seen: &mut Seen) -> Result<(), Error> {
    let mut unsure = Vec::new();
    for (id, members) in &seen.groups {
        match open(root, &format!("/dev/vfio/{id}")) {
            Free::Yes => {}
            Free::No | Free::Unknown => unsure.push((*id, members.clone())),
        }
    }
    if unsure.is_empty() {
        return Ok(());
    }
    let inventory = Inventory::observe(root)?;
    let users = Users::observe(root, &inventory)?;
    for (id, members) in unsure {
        let busy = matches!(open(root, &format!("/dev/vfio/{id}")), Free::No);
        for address in members {
            let mut holders = users.of(address).filter(|holder| holder.file != CLAIM);
            let holder = holders.next().map(ToString::to_string);
            let unnamed = busy.then(|| "a process that cannot be seen from here".to_owned());
            if let Some(holder) = holder.or(unnamed) {
                seen.used.entry(address).or_insert(holder);
            }
        }
    }
    Ok(())
}

/// How [`Users`] calls a claim; claims have been looked at already.
const CLAIM: &str = "its claim";

enum Free {
    Yes,
    No,
    /// There is no such node, or it is no device.
    Unknown,
}

fn open(root: &Root, node: &str) -> Free {
    match root.open(node.as_ref(), OFlags::RDWR) {
        Ok(fd) => {
            let device = rustix::fs::fstat(&fd).is_ok_and(|stat| {
                FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            });
            if device { Free::Yes } else { Free::Unknown }
        }
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Free::No,
        Err(_) => Free::Unknown,
    }
}
