//! Looks at the node for one sandbox: CDI specs, the functions behind VFIO's nodes, and who else uses them. Reads only, but for opening
//! groups to see whether they are free.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
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
pub const WITHIN: Duration = Duration::from_secs(15);

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
    /// It takes too long.
    #[error(
        "the pod's devices could not be looked at within {} s; {slowest} alone took {} ms: a function is being reset, or broken, which the kernel's log tells (journalctl -k)",
        within.as_secs(),
        took.as_millis()
    )]
    Late {
        /// How long it may take.
        within: Duration,
        /// What took longest.
        slowest: String,
        /// How long that was.
        took: Duration,
    },
    /// The host.
    #[error(transparent)]
    Host(#[from] Error),
}

/// Looks at what is behind the nodes, for as long as `within`. `claims` are those of other sandboxes that live.
///
/// Reading the configuration space of a function that is being reset waits in the kernel until that is done, and no signal ends it
/// (Linux, drivers/pci/access.c, `pci_wait_cfg`): a thread that watches could not end this process sooner. So the clock is looked at after
/// each step.
///
/// # Errors
/// [`LookError`]: it takes too long, or processes have to be looked through and cannot be listed.
pub fn look(
    root: &Root,
    wanted: &[Wanted],
    claims: &[Found],
    within: Duration,
) -> Result<Seen, LookError> {
    let mut looking = Looking {
        root,
        began: Instant::now(),
        within,
        slowest: (String::new(), Duration::ZERO),
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
    if wanted.iter().any(|one| one.node.starts_with(CDEVS)) {
        looking.cdevs()?;
    }
    looking.seen.used = claimed(claims);
    looking.held()?;
    Ok(looking.seen)
}

struct Looking<'a> {
    root: &'a Root,
    began: Instant,
    within: Duration,
    /// What took longest, and how long.
    slowest: (String, Duration),
    seen: Seen,
}

impl Looking<'_> {
    /// Does a step, and looks at the clock.
    fn step<T>(
        &mut self,
        what: impl FnOnce() -> String,
        step: impl FnOnce(&Root) -> T,
    ) -> Result<T, LookError> {
        let began = Instant::now();
        let done = step(self.root);
        let now = Instant::now();
        if now - began > self.slowest.1 {
            self.slowest = (what(), now - began);
        }
        if now - self.began < self.within {
            return Ok(done);
        }
        let (slowest, took) = std::mem::take(&mut self.slowest);
        Err(LookError::Late {
            within: self.within,
            slowest,
            took,
        })
    }

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
        let glance = |root: &Root| Glance::at(root, address);
        if let Some(function) = self.step(|| address.to_string(), glance)? {
            self.seen.functions.insert(address, function);
        }
        Ok(())
    }

    /// The character devices of the functions that are behind no wanted node: a companion is given away by its own where the others are.
    fn cdevs(&mut self) -> Result<(), LookError> {
        let behind: BTreeSet<&Address> = self.seen.behind.values().flatten().collect();
        let others = self.seen.functions.keys();
        let others = others.filter(|address| !behind.contains(address));
        for address in others.copied().collect::<Vec<Address>>() {
            let own = |root: &Root| glance::character_device_of(root, address);
            if let Some(name) = self.step(|| address.to_string(), own)? {
                self.seen.cdevs.insert(address, name);
            }
        }
        Ok(())
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

    /// A group's node can be opened once, and not while a character device of the group is open (Linux, drivers/vfio/group.c,
    /// `vfio_group_fops_open`): so opening it tells whether anybody has it. Where there is no such node, processes are looked through.
    fn held(&mut self) -> Result<(), LookError> {
        let groups: Vec<u32> = self.seen.groups.keys().copied().collect();
        let mut unsure = Vec::new();
        for id in groups {
            match self.opened(id)? {
                Free::Yes(_) => {}
                Free::No | Free::Unknown => unsure.push(id),
            }
        }
        if unsure.is_empty() {
            return Ok(());
        }
        let inventory = self.step(|| "the PCI bus".to_owned(), Inventory::observe)??;
        let users = |root: &Root| Users::observe(root, &inventory);
        let users = self.step(|| "all processes".to_owned(), users)??;
        // That took a while: a node's number may be another by now.
        self.seen.numbers.clear();
        for id in unsure {
            let busy = matches!(self.opened(id)?, Free::No);
            for address in self.group(id) {
                let mut holders = users.of(address).filter(|holder| holder.file != CLAIM);
                let holder = holders.next().map(ToString::to_string);
                let unnamed = busy.then(|| "a process that cannot be seen from here".to_owned());
                if let Some(holder) = holder.or(unnamed) {
                    self.seen.used.entry(address).or_insert(holder);
                }
            }
        }
        Ok(())
    }

    fn opened(&mut self, group: u32) -> Result<Free, LookError> {
        let node = format!("/dev/vfio/{group}");
        let free = self.step(|| node.clone(), |root| open(root, &node))?;
        if let Free::Yes(number) = free {
            self.seen.numbers.insert(node, number);
        }
        Ok(free)
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

/// How [`Users`] calls a claim; claims have been looked at already.
const CLAIM: &str = "its claim";

enum Free {
    /// Nobody has it; its device number.
    Yes(u64),
    No,
    /// There is no such node, or it is no device.
    Unknown,
}

fn open(root: &Root, node: &str) -> Free {
    match root.open(node.as_ref(), OFlags::RDWR) {
        Ok(fd) => number(&fd).map_or(Free::Unknown, Free::Yes),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => Free::No,
        Err(_) => Free::Unknown,
    }
}

/// The device number of a character device.
fn number(node: &OwnedFd) -> Option<u64> {
    let stat = rustix::fs::fstat(node).ok()?;
    let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    device.then_some(stat.st_rdev)
}

/// The device number of a node that is a character device; [`look`] has those of free groups.
pub fn number_of(root: &Root, node: &str) -> Option<u64> {
    number(&root.open(node.as_ref(), OFlags::PATH).ok()?)
}

#[cfg(test)]
mod tests {
    use km_tests_sysfs::shapes;

    use super::*;
    use crate::table::Source;

    #[test]
    fn a_device_has_its_number_and_a_file_has_none() {
        let root = Root::new("/").unwrap();
        let null = rustix::fs::makedev(1, 3);
        assert!(matches!(open(&root, "/dev/null"), Free::Yes(number) if number == null));
        assert_eq!(number_of(&root, "/dev/null"), Some(null));
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = file.path().canonicalize().unwrap();
        assert!(matches!(open(&root, file.to_str().unwrap()), Free::Unknown));
        for none in [file.to_str().unwrap(), "/dev/none"] {
            assert_eq!(number_of(&root, none), None, "{none}");
        }
    }

    #[test]
    fn a_look_that_takes_too_long_says_what_took_longest() {
        let dir = tempfile::tempdir().unwrap();
        shapes::one_gpu().write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        let inventory = Inventory::observe(&root).unwrap();
        let group = inventory.groups[0].id;
        let member = inventory.groups[0].members[0].address.to_string();
        let wanted = [Wanted {
            name: "nvidia.com/pgpu=0".to_owned(),
            source: Source::Plugin,
            node: format!("/dev/vfio/{group}"),
        }];
        look(&root, &wanted, &[], WITHIN).unwrap();
        let late = look(&root, &wanted, &[], Duration::ZERO).unwrap_err();
        assert!(
            matches!(&late, LookError::Late { slowest, .. } if *slowest == member),
            "{late}"
        );
    }
}
