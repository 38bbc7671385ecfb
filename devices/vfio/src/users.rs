//! Who uses a function: processes that have one of its nodes open, and sandboxes that have claimed it and live.
//!
//! A function's nodes are those that sysfs shows below it (a `dev` file: VFIO character devices, `/dev/dri`, `/dev/snd`), its
//! group's `/dev/vfio/<group>`, and for NVIDIA's own driver `/dev/nvidia<minor>` and `/dev/nvidia-nvswitch<n>`. An open file is
//! one of them when its device number says so, in whatever container and under whatever name it was opened, or its path does.
//!
//! A process may also hold a VFIO device by the descriptor that its group gave (`anon_inode:[vfio-device]`) after it closed
//! the group; newer kernels tell of which function (`vfio-device-syspath` in fdinfo). On older ones its group is busy, and the
//! process is one of those with such a descriptor ([`Users::unplaced`]).

use std::collections::{BTreeMap, BTreeSet};

use km_host::Root;
use km_host::claims::{Claims, Found};
use serde::Serialize;

use crate::sysfs::{Sysfs, printable};
use crate::{Address, Function, Inventory, Kind};

/// A process that uses a function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// Its process id as the host's `/proc` has it.
    pub pid: u32,
    /// Its command's short name.
    pub name: String,
    /// What it has open.
    pub file: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}] ({})", self.name, self.pid, self.file)
    }
}

/// Who uses which function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    holders: BTreeMap<Address, BTreeSet<Holder>>,
    /// Processes that have a VFIO device open, and the kernel does not tell which.
    unplaced: BTreeSet<Holder>,
    /// How many processes' open files could not be looked at: without root, those of others.
    pub unseen: usize,
    /// Claims that cannot be read: any function may be theirs.
    pub unreadable: Vec<String>,
}

/// How deep below a function nodes are looked for: `sound/card0/pcmC0D3p/dev` is the deepest of a GPU.
const DEPTH: usize = 5;

/// The most folders below a function that are looked at.
const FOLDERS: usize = 2048;

/// The major number of `/dev/nvidia<minor>` (the kernel's devices.txt).
const NVIDIA_MAJOR: u32 = 195;

/// The kernel's name for a VFIO device's descriptor (drivers/vfio/group.c).
const VFIO_DEVICE: &str = "anon_inode:[vfio-device]";

fn unnamed(pid: u32, file: &str) -> Holder {
    Holder {
        pid,
        name: String::new(),
        file: printable(file).chars().take(120).collect(),
    }
}

impl Users {
    /// Looks through the host's processes.
    ///
    /// # Errors
    /// When the processes cannot be listed.
    pub fn observe(root: &Root, inventory: &Inventory) -> Result<Users, km_host::Error> {
        let sysfs = Sysfs::new(root);
        let nodes = Nodes::of(sysfs, inventory);
        let mut users = Users::default();
        if inventory.functions.is_empty() {
            return Ok(users);
        }
        let open = km_host::process::open_devices(root, &mut |pid, file| {
            let found = nodes.match_file(inventory, file);
            if found.is_empty() && file.name() == VFIO_DEVICE {
                users.unplaced.insert(unnamed(pid, file.name()));
            }
            for address in found {
                users.add(address, pid, file.name());
            }
        })?;
        users.unseen = open.unseen;
        for holder in users.names_missing() {
            let name = sysfs.text(format!("/proc/{holder}/comm"));
            users.name(holder, &name.unwrap_or_else(|| "?".to_owned()));
        }
        users.claims(root, inventory)?;
        Ok(users)
    }

    /// A sandbox that has claimed a function uses it, even before its virtual machine has opened it.
    fn claims(&mut self, root: &Root, inventory: &Inventory) -> Result<(), km_host::Error> {
        let claims = Claims::open(root)?;
        for found in claims.list()? {
            let claim = match found {
                Found::Claim(claim) => claim,
                Found::Unreadable { path, problem } => {
                    let text = format!("{}: {problem}", path.display());
                    self.unreadable.push(printable(&text));
                    continue;
                }
            };
            if !claims.is_alive(&claim) {
                continue;
            }
            let devices = claim.devices.iter();
            let devices = devices.filter_map(|device| device.address.parse().ok());
            for address in devices.filter(|address| inventory.function(*address).is_some()) {
                self.holders.entry(address).or_default().insert(Holder {
                    pid: claim.process.pid,
                    name: format!("sandbox {}", printable(&claim.sandbox)),
                    file: "its claim".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Who uses the function at an address.
    pub fn of(&self, address: Address) -> impl Iterator<Item = &Holder> {
        self.holders.get(&address).into_iter().flatten()
    }

    /// Processes that have a VFIO device open of which the kernel does not tell the function.
    pub fn unplaced(&self) -> impl Iterator<Item = &Holder> {
        self.unplaced.iter()
    }

    fn add(&mut self, address: Address, pid: u32, file: &str) {
        let holder = unnamed(pid, file);
        self.holders.entry(address).or_default().insert(holder);
    }

    fn names_missing(&self) -> BTreeSet<u32> {
        let holders = self.holders.values().flatten().chain(&self.unplaced);
        holders.map(|holder| holder.pid).collect()
    }

    fn name(&mut self, pid: u32, name: &str) {
        for holders in self.holders.values_mut().chain([&mut self.unplaced]) {
            *holders = std::mem::take(holders)
                .into_iter()
                .map(|holder| match holder.pid == pid {
                    true => Holder {
                        name: name.to_owned(),
                        ..holder
                    },
                    false => holder,
                })
                .collect();
        }
    }
}

/// The nodes of functions, by number and by path.
#[derive(Debug, Default)]
struct Nodes {
    numbers: BTreeMap<(u32, u32), BTreeSet<Address>>,
    paths: BTreeMap<String, BTreeSet<Address>>,
}

impl Nodes {
    fn of(sysfs: Sysfs<'_>, inventory: &Inventory) -> Nodes {
        let mut nodes = Nodes::default();
        for function in &inventory.functions {
            nodes.below(sysfs, function.address);
            nodes.group(sysfs, function);
            nodes.nvidia(sysfs, function);
        }
        nodes
    }

    fn number(&mut self, address: Address, number: Option<(u32, u32)>) {
        if let Some(number) = number {
            self.numbers.entry(number).or_default().insert(address);
        }
    }

    fn path(&mut self, address: Address, path: String) {
        self.paths.entry(path).or_default().insert(address);
    }

    /// Everything below the function that has a number.
    fn below(&mut self, sysfs: Sysfs<'_>, address: Address) {
        let mut folders = vec![(format!("/sys/bus/pci/devices/{address}"), 0)];
        let mut seen = 0;
        while let Some((folder, depth)) = folders.pop() {
            seen += 1;
            for name in sysfs.folders(&folder) {
                let inside = format!("{folder}/{name}");
                // Other functions behind this one are not it.
                if name.parse::<Address>().is_ok() || name == "power" {
                    continue;
                }
                if let Some(number) = sysfs
                    .text(format!("{inside}/dev"))
                    .and_then(|text| major_minor(&text))
                {
                    self.number(address, Some(number));
                    self.path(address, format!("/dev/{name}"));
                    self.path(address, format!("/dev/dri/{name}"));
                    self.path(address, format!("/dev/snd/{name}"));
                    self.path(address, format!("/dev/vfio/devices/{name}"));
                }
                if depth + 1 < DEPTH && seen + folders.len() < FOLDERS {
                    folders.push((inside, depth + 1));
                }
            }
        }
    }

    /// The group's node holds each VFIO function of the group.
    fn group(&mut self, sysfs: Sysfs<'_>, function: &Function) {
        let Some(id) = function.iommu_group.filter(|_| function.on_vfio()) else {
            return;
        };
        let number = sysfs.text(format!("/sys/class/vfio/{id}/dev"));
        self.number(function.address, number.and_then(|text| major_minor(&text)));
        self.path(function.address, format!("/dev/vfio/{id}"));
    }

    /// NVIDIA's driver shows its nodes nowhere in sysfs. It tells a GPU's minor number in its own folder of `/proc`; where it
    /// does not, and for NVSwitches, each of its nodes may be this function's.
    fn nvidia(&mut self, sysfs: Sysfs<'_>, function: &Function) {
        let address = function.address;
        match (function.driver.as_deref(), function.kind) {
            (Some("nvidia"), Kind::Gpu) => {
                let told = sysfs.text(format!("/proc/driver/nvidia/gpus/{address}/information"));
                let minor = told.as_deref().and_then(device_minor);
                for minor in minor.map_or(0..=253, |minor| minor..=minor) {
                    self.number(address, Some((NVIDIA_MAJOR, minor)));
                    self.path(address, format!("/dev/nvidia{minor}"));
                }
            }
            (Some("nvidia" | "nvidia-nvswitch"), Kind::NvSwitch) => {
                for number in 0..64 {
                    self.path(address, format!("/dev/nvidia-nvswitch{number}"));
                }
            }
            _ => {}
        }
    }

    fn match_file(
        &self,
        inventory: &Inventory,
        file: &km_host::process::OpenFile<'_>,
    ) -> BTreeSet<Address> {
        let mut found = BTreeSet::new();
        if let Some(number) = file.device_number() {
            found.extend(self.numbers.get(&number).into_iter().flatten());
        }
        found.extend(self.paths.get(file.name()).into_iter().flatten());
        if file.name() == VFIO_DEVICE
            && let Some(info) = file.info()
        {
            found.extend(
                vfio_device(&info).filter(|address| inventory.function(*address).is_some()),
            );
        }
        found
    }
}

/// `Device Minor: \t 3` in the driver's file.
fn device_minor(information: &str) -> Option<u32> {
    // Control characters (tabs and ends of lines) have been replaced.
    let (_, rest) = information.split_once("Device Minor:")?;
    let digits: String = rest
        .chars()
        .skip_while(|char| !char.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .take(3)
        .collect();
    digits.parse().ok()
}

/// The function in `vfio-device-syspath: /sys/devices/pci0000:00/.../0000:41:00.0` of fdinfo.
fn vfio_device(info: &str) -> Option<Address> {
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    line.trim().rsplit('/').next()?.parse().ok()
}

fn major_minor(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
