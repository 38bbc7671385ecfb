//! Looks at the node for one sandbox: CDI specs, the functions behind VFIO's nodes, and who else uses them. Reads only, but for opening
//! groups to see whether they are free.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use km_cdi::files;
use km_host::claims::Found;
use km_host::{Error, HostPath, Root};
use km_vfio::glance::{self, Glance};
use km_vfio::{Address, Inventory, Kind, Users};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::decide::{CDEVS, Catalogue, Seen, Wanted};

/// The longest that looking at the devices of one sandbox may take; it takes milliseconds.
const WITHIN: Duration = Duration::from_secs(15);

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

/// Why the node cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// A function answers late.
    #[error(
        "{address} did not answer within {} s: it is being reset, or broken; see \"kata-manager devices list\"",
        WITHIN.as_secs()
    )]
    Late {
        /// The function that was looked at last.
        address: Address,
    },
    /// The host.
    #[error(transparent)]
    Host(#[from] Error),
}

/// Looks at what is behind the nodes. `claims` are those of other sandboxes that live.
///
/// Reading a function that is being reset waits in the kernel until that is done (Linux, drivers/pci/access.c, `pci_wait_cfg`), and no
/// signal ends it: a thread that watches could not end this process sooner. So the clock is looked at after each function.
///
/// # Errors
/// [`LookError`]: a function that answers late, or processes that have to be looked through and cannot be listed.
pub fn look(root: &Root, wanted: &[Wanted], claims: &[Found]) -> Result<Seen, LookError> {
    let mut looking = Looking {
        root,
        until: Instant::now() + WITHIN,
        seen: Seen::default(),
    };
    for one in wanted {
        let behind = looking.behind(&one.node);
        for address in &behind {
            looking.meet(*address)?;
        }
        looking.seen.behind.insert(one.node.clone(), behind);
    }
    looking.primaries()?;
    let functions = looking.seen.functions.values();
    let groups: Vec<u32> = functions.filter_map(|one| one.iommu_group).collect();
    for id in groups {
        for address in looking.group(id) {
            looking.meet(address)?;
        }
    }
    let mut seen = looking.seen;
    seen.used = claimed(claims);
    held(root, &mut seen)?;
    Ok(seen)
}

struct Looking<'a> {
    root: &'a Root,
    until: Instant,
    seen: Seen,
}

impl Looking<'_> {
    fn behind(&mut self, node: &str) -> Vec<Address> {
        if let Some(name) = node.strip_prefix(CDEVS) {
            let address = glance::character_device(self.root, name);
            return address.into_iter().collect();
        }
        let id = node.strip_prefix("/dev/vfio/");
        let id = id.and_then(|name| name.parse().ok());
        id.map_or_else(Vec::new, |id| self.group(id))
    }

    /// The members of a group, which is listed once; none when there is no such group.
    fn group(&mut self, id: u32) -> Vec<Address> {
        if let Some(members) = self.seen.groups.get(&id) {
            return members.clone();
        }
        let members = glance::group(self.root, id);
        if !members.is_empty() {
            self.seen.groups.insert(id, members.clone());
        }
        members
    }

    fn meet(&mut self, address: Address) -> Result<(), LookError> {
        if self.seen.functions.contains_key(&address) {
            return Ok(());
        }
        if let Some(function) = Glance::at(self.root, address) {
            self.seen.functions.insert(address, function);
        }
        match Instant::now() < self.until {
            true => Ok(()),
            false => Err(LookError::Late { address }),
        }
    }

    /// All GPUs and NVSwitches that VFIO drivers have; only a pod with several GPUs can have all.
    fn primaries(&mut self) -> Result<(), LookError> {
        let functions = self.seen.functions.values();
        let gpus = functions.filter(|one| one.kind == Some(Kind::Gpu));
        if gpus.count() < 2 {
            return Ok(());
        }
        for address in glance::on_vfio(self.root) {
            self.meet(address)?;
        }
        let primary = |one: &&Glance| one.on_vfio() && one.kind.is_some_and(Kind::is_primary);
        let functions = self.seen.functions.values();
        self.seen.primaries = functions.filter(primary).cloned().collect();
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use km_tests_sysfs::shapes;

    use super::*;

    #[test]
    fn a_function_that_answers_late_is_named() {
        let dir = tempfile::tempdir().unwrap();
        shapes::one_gpu().write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        let address = Inventory::observe(&root).unwrap().functions[0].address;
        let mut looking = Looking {
            root: &root,
            until: Instant::now() + WITHIN,
            seen: Seen::default(),
        };
        looking.meet(address).unwrap();
        looking.until = Instant::now();
        // What has answered is not asked again.
        looking.meet(address).unwrap();
        looking.seen.functions.clear();
        let late = looking.meet(address).unwrap_err().to_string();
        assert!(
            late.starts_with(&format!("{address} did not answer")),
            "{late}"
        );
    }
}
