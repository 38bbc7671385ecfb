//! Reads an [`Inventory`] from sysfs (<https://docs.kernel.org/admin-guide/abi-testing-files.html>, sysfs-bus-pci).
//!
//! `modalias` has vendor, device, subsystem and class in one read and takes no lock, so it is all that is read of most
//! functions. Only those that are ours are looked at closer. What vanishes while it is read is left out.

use std::collections::{BTreeMap, BTreeSet};

use km_host::Root;

use crate::ids::{self, Names};
use crate::inventory::{is_bridge, is_vfio};
use crate::sysfs::Sysfs;
use crate::{
    Address, Bar, Bridge, BridgeKind, Function, Group, Inventory, Kind, Link, Member, NVIDIA, Power,
};

const DEVICES: &str = "/sys/bus/pci/devices";
const GROUPS: &str = "/sys/kernel/iommu_groups";

/// The most bridges above a function that are believed: buses have 8 bits.
const DEPTH: usize = 256;

/// What `modalias` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    device: u16,
    subsystem_vendor: u16,
    subsystem_device: u16,
    pub(crate) class: u32,
}

impl Inventory {
    /// Looks at a host's bus.
    ///
    /// # Errors
    /// When the bus cannot be listed. A host without a PCI bus has an empty inventory.
    pub fn observe(root: &Root) -> Result<Inventory, km_host::Error> {
        let sysfs = Sysfs::new(root);
        let all = match identities(sysfs) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            all => all?,
        };
        let mut groups = Groups::default();
        let ours = select(sysfs, &all, &mut groups);
        let functions: Vec<Function> = ours
            .iter()
            .filter_map(|address| function(sysfs, *address, all.get(address)?))
            .collect();
        // A function that came or went in between may name another group now than when they were selected.
        for function in &functions {
            if let Some(id) = function.iommu_group {
                groups.members(sysfs, id, function.address);
            }
        }
        let mut inventory = Inventory {
            functions,
            scanned: all.len(),
            ..Inventory::default()
        };
        inventory.bridges = bridges(&inventory.functions, &all);
        inventory.groups = groups.finish(sysfs, &inventory.functions, &all);
        name(sysfs, &mut inventory);
        Ok(inventory)
    }
}

type All = BTreeMap<Address, (Identity, String)>;

fn identities(sysfs: Sysfs<'_>) -> Result<All, km_host::Error> {
    let mut all = All::new();
    for entry in sysfs.require_folder(DEVICES)? {
        let Ok(address) = entry.parse::<Address>() else {
            continue;
        };
        let Some(modalias) = sysfs.text(format!("{DEVICES}/{address}/modalias")) else {
            continue;
        };
        if let Some(identity) = identity(&modalias) {
            all.insert(address, (identity, modalias));
        }
    }
    Ok(all)
}

/// Reads `pci:v000010DEd00002331sv000010DEsd00001626bc03sc02i00` (scripts/mod/file2alias.c of the kernel has the format).
pub(crate) fn identity(modalias: &str) -> Option<Identity> {
    let mut rest = modalias.strip_prefix("pci:")?;
    let mut field = |name: &str, digits: usize| {
        let (value, after) = rest.strip_prefix(name)?.split_at_checked(digits)?;
        rest = after;
        value
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit())
            .then(|| u32::from_str_radix(value, 16).ok())?
    };
    let (vendor, device) = (field("v", 8)?, field("d", 8)?);
    let (subsystem_vendor, subsystem_device) = (field("sv", 8)?, field("sd", 8)?);
    let class = field("bc", 2)? << 16 | field("sc", 2)? << 8 | field("i", 2)?;
    Some(Identity {
        vendor: u16::try_from(vendor).ok()?,
        device: u16::try_from(device).ok()?,
        // A bridge may have no subsystem; the kernel then writes all ones in 32 bits.
        subsystem_vendor: u16::try_from(subsystem_vendor).unwrap_or(u16::MAX),
        subsystem_device: u16::try_from(subsystem_device).unwrap_or(u16::MAX),
        class,
    })
}

/// GPUs and NVSwitches, NVIDIA's other functions of their slots, and the endpoints of all their groups.
fn select(sysfs: Sysfs<'_>, all: &All, groups: &mut Groups) -> BTreeSet<Address> {
    let nvidia = |address: &Address| {
        let (identity, _) = all.get(address)?;
        (identity.vendor == NVIDIA && !is_bridge(identity.class))
            .then(|| Kind::of(identity.vendor, identity.class))
    };
    let primaries = all
        .keys()
        .filter(|address| nvidia(address).is_some_and(Kind::is_primary));
    let mut ours = BTreeSet::new();
    for primary in primaries {
        let slot = Address {
            function: 0,
            ..*primary
        }..=Address {
            function: 7,
            ..*primary
        };
        ours.extend(
            all.range(slot)
                .map(|(address, _)| *address)
                .filter(|address| nvidia(address).is_some()),
        );
    }
    for address in ours.clone() {
        let Some(id) = group_id(sysfs, address) else {
            continue;
        };
        ours.extend(groups.members(sysfs, id, address).iter().filter(|member| {
            all.get(member)
                .is_some_and(|(identity, _)| !is_bridge(identity.class))
        }));
    }
    ours
}

/// The groups seen so far, with all of their members.
#[derive(Default)]
struct Groups(BTreeMap<u32, Vec<Address>>);

impl Groups {
    /// The members of the group that a function names.
    fn members(&mut self, sysfs: Sysfs<'_>, id: u32, address: Address) -> &[Address] {
        let members = self.0.entry(id).or_insert_with(|| {
            let names = sysfs.names(format!("{GROUPS}/{id}/devices"));
            names.iter().filter_map(|name| name.parse().ok()).collect()
        });
        // A group whose folder has vanished still has the function that names it.
        if !members.contains(&address) {
            members.push(address);
            members.sort_unstable();
        }
        members
    }

    fn finish(self, sysfs: Sysfs<'_>, functions: &[Function], all: &All) -> Vec<Group> {
        let member = |address: &Address| -> Option<Member> {
            let (identity, _) = all.get(address)?;
            let known = functions
                .iter()
                .find(|function| function.address == *address);
            Some(Member {
                address: *address,
                kind: (!is_bridge(identity.class))
                    .then(|| Kind::of(identity.vendor, identity.class)),
                class: identity.class,
                driver: match known {
                    Some(function) => function.driver.clone(),
                    None => sysfs.link_name(format!("{DEVICES}/{address}/driver")),
                },
            })
        };
        let group = |(id, addresses): (u32, Vec<Address>)| {
            let members: Vec<Member> = addresses.iter().filter_map(member).collect();
            Group {
                id,
                viable: viable(&members),
                members,
            }
        };
        self.0.into_iter().map(group).collect()
    }
}

/// The rule of the kernel's `vfio_dev_viable` and of the ownership of groups that replaced it (drivers/vfio/group.c).
fn viable(members: &[Member]) -> bool {
    let endpoints = || members.iter().filter(|member| member.kind.is_some());
    let harmless = |driver: &str| is_vfio(driver) || driver == "pci-stub";
    endpoints().all(|member| member.driver.as_deref().is_none_or(harmless))
        && endpoints().any(|member| member.driver.as_deref().is_some_and(is_vfio))
}

fn group_id(sysfs: Sysfs<'_>, address: Address) -> Option<u32> {
    sysfs
        .link_name(format!("{DEVICES}/{address}/iommu_group"))?
        .parse()
        .ok()
}

/// The name of a function's VFIO character device (`vfio0`).
pub(crate) fn vfio_device(sysfs: Sysfs<'_>, address: Address) -> Option<String> {
    let names = sysfs.names(format!("{DEVICES}/{address}/vfio-dev"));
    names.into_iter().find(|name| is_vfio_device(name))
}

fn function(
    sysfs: Sysfs<'_>,
    address: Address,
    (identity, modalias): &(Identity, String),
) -> Option<Function> {
    let dir = format!("{DEVICES}/{address}");
    let (root_complex, mut path) = upstream(sysfs, address);
    // The last part of the way is the function itself.
    path.pop_if(|last| *last == address);
    let kind = Kind::of(identity.vendor, identity.class);
    let vfio_device = vfio_device(sysfs, address);
    Some(Function {
        address,
        kind,
        vendor: identity.vendor,
        device: identity.device,
        subsystem_vendor: identity.subsystem_vendor,
        subsystem_device: identity.subsystem_device,
        class: identity.class,
        name: None,
        driver: sysfs.link_name(format!("{dir}/driver")),
        driver_override: sysfs
            .text(format!("{dir}/driver_override"))
            .filter(|text| !text.is_empty() && text != "(null)"),
        iommu_group: group_id(sysfs, address),
        cdev: vfio_device
            .as_ref()
            .is_some_and(|name| sysfs.exists(format!("/dev/vfio/devices/{name}"))),
        vfio_device,
        numa_node: sysfs
            .number::<i32>(format!("{dir}/numa_node"))
            .and_then(|node| u16::try_from(node).ok()),
        root_complex,
        path,
        bars: bars(&sysfs.lines(format!("{dir}/resource"))),
        reset_methods: words(sysfs, &format!("{dir}/reset_method")),
        link: kind.is_primary().then(|| link(sysfs, &dir)).flatten(),
        power: Power {
            state: sysfs.text(format!("{dir}/power_state")),
            runtime_status: sysfs.text(format!("{dir}/power/runtime_status")),
            control: sysfs.text(format!("{dir}/power/control")),
        },
        dead: sysfs.bytes(format!("{dir}/config"), 4).as_deref() == Some(&[0xff; 4]),
        boot_vga: sysfs.text(format!("{dir}/boot_vga")).as_deref() == Some("1"),
        modalias: modalias.clone(),
    })
}

/// Whether a name is one that the kernel gives to VFIO devices: `vfio` and a number.
pub(crate) fn is_vfio_device(name: &str) -> bool {
    name.strip_prefix("vfio").is_some_and(|digits| {
        !digits.is_empty() && digits.len() < 10 && digits.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn words(sysfs: Sysfs<'_>, path: &str) -> Vec<String> {
    let text = sysfs.text(path).unwrap_or_default();
    text.split_whitespace()
        .take(16)
        .map(str::to_owned)
        .collect()
}

/// The root bus and the functions on the way down, from the target of the function's link:
/// `../../../devices/pci0000:40/0000:40:01.0/0000:41:00.0`.
fn upstream(sysfs: Sysfs<'_>, address: Address) -> (Option<String>, Vec<Address>) {
    let target = sysfs
        .link(format!("{DEVICES}/{address}"))
        .unwrap_or_default();
    let target = target.to_string_lossy();
    let root = target.split('/').rfind(|part| is_root_bus(part));
    let path = target.split('/').filter_map(|part| part.parse().ok());
    (root.map(str::to_owned), path.take(DEPTH).collect())
}

fn is_root_bus(part: &str) -> bool {
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    part.strip_prefix("pci")
        .and_then(|rest| rest.split_once(':'))
        .is_some_and(|(domain, bus)| part.len() < 16 && plain(domain) && plain(bus))
}

/// The lines of `resource`: start, end and flags of each (include/linux/ioport.h), the first six of which are the BARs.
fn bars(resource: &str) -> Vec<Bar> {
    const MEM_64: u64 = 0x0010_0000;
    const PREFETCH: u64 = 0x2000;
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let bar = |(index, line): (usize, &str)| {
        let mut fields = line.split_whitespace().map(number);
        let (start, end, flags) = (fields.next()??, fields.next()??, fields.next()??);
        let bytes = end.checked_sub(start)?.checked_add(1)?;
        // An unused one is all zeroes.
        (end != 0).then_some(Bar {
            index: u8::try_from(index).ok()?,
            bytes,
            wide: flags & MEM_64 != 0,
            prefetchable: flags & PREFETCH != 0,
        })
    };
    resource
        .lines()
        .take(6)
        .enumerate()
        .filter_map(bar)
        .collect()
}

fn link(sysfs: Sysfs<'_>, dir: &str) -> Option<Link> {
    let speed = |name: &str| {
        // "32.0 GT/s PCIe", or "Unknown".
        let text = sysfs.text(format!("{dir}/{name}"))?;
        let (number, _) = text.split_once(" GT/s")?;
        let plain = number.len() < 8 && number.parse::<f32>().is_ok_and(f32::is_finite);
        plain.then(|| number.to_owned())
    };
    let width = |name: &str| {
        let width = sysfs.number::<u8>(format!("{dir}/{name}"))?;
        // 0 and 63 or 255 (all ones) mean that there is no link.
        (1..=32).contains(&width).then_some(width)
    };
    let link = Link {
        speed: speed("current_link_speed"),
        width: width("current_link_width"),
        max_speed: speed("max_link_speed"),
        max_width: width("max_link_width"),
    };
    (link.speed.is_some() || link.max_speed.is_some()).then_some(link)
}

fn bridges(functions: &[Function], all: &All) -> Vec<Bridge> {
    let mut found = BTreeMap::new();
    for function in functions {
        let mut above = None;
        for address in &function.path {
            let kind = match above {
                None => BridgeKind::RootPort,
                Some(BridgeKind::UpstreamPort) => BridgeKind::DownstreamPort,
                Some(BridgeKind::RootPort | BridgeKind::DownstreamPort) => BridgeKind::UpstreamPort,
            };
            above = Some(kind);
            let identity = all.get(address).map(|(identity, _)| identity);
            found.entry(*address).or_insert(Bridge {
                address: *address,
                kind,
                vendor: identity.map_or(0, |identity| identity.vendor),
                device: identity.map_or(0, |identity| identity.device),
                name: None,
            });
        }
    }
    found.into_values().collect()
}

/// Gives names from the first `pci.ids` that is there.
fn name(sysfs: Sysfs<'_>, inventory: &mut Inventory) {
    let mut wanted: BTreeSet<ids::Id> = BTreeSet::new();
    wanted.extend(inventory.functions.iter().map(|f| (f.vendor, f.device)));
    wanted.extend(inventory.bridges.iter().map(|b| (b.vendor, b.device)));
    if wanted.is_empty() {
        return;
    }
    let text = ids::PLACES
        .iter()
        .find_map(|place| sysfs.bytes(place, ids::LIMIT))
        .unwrap_or_default();
    let names = Names::parse(&text, &wanted);
    let of = |id: ids::Id| {
        let name = names.name(id).map(str::to_owned);
        name.or_else(|| {
            names
                .vendor_name(id.0)
                .filter(|_| id.0 != NVIDIA)
                .map(|name| format!("{name} {:04x}", id.1))
        })
    };
    for function in &mut inventory.functions {
        function.name = of((function.vendor, function.device));
    }
    for bridge in &mut inventory.bridges {
        bridge.name = of((bridge.vendor, bridge.device));
    }
}
