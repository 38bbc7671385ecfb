//! Holds a launch against what the sandbox claimed: each function that it was given is there once, behind a port of its own, on its
//! NUMA node, reached in the right way; and nothing of the host is there that it was not given.

use std::collections::{BTreeMap, BTreeSet};

use km_host::claims;
use km_topology::{Class, Guest, Kata, Layout, Request, Writer};
use km_vfio::Address;

use super::Refused;
use super::view::{Device, Role, View};

/// The most steps from a device to its root bus. A switch takes four.
const DEPTH: usize = 16;

/// What a launch must have.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// What the sandbox was given.
    pub devices: &'a [claims::Device],
    /// Whether the guest's memory is encrypted.
    pub confidential: bool,
    /// The Kata that wrote the launch.
    pub kata: Kata,
    /// Functions of the node that nobody may have without being given them: NVIDIA's, and what shares their groups.
    pub guarded: &'a BTreeSet<Address>,
}

/// Checks a launch.
///
/// # Errors
/// Everything that is wrong with it.
pub fn check(view: &View, wanted: &Wanted<'_>) -> Result<(), Refused> {
    let mut problems = Vec::new();
    let launched = launched(view, wanted, &mut problems);
    let nothing = wanted.devices.is_empty() && launched.is_empty() && view.unclear.is_empty();
    if nothing && problems.is_empty() {
        return Ok(());
    }
    problems.extend(view.unclear.iter().cloned());
    let given = given(wanted, view, &mut problems);
    for (address, device) in &given {
        match launched.get(address).map(Vec::as_slice) {
            None => problems.push(format!(
                "{address} was given to this sandbox and is missing"
            )),
            Some([one]) => {
                let mut judged = Judged {
                    view,
                    device: one,
                    given: device,
                    wanted,
                    problems: &mut problems,
                };
                judged.placed();
                judged.way();
            }
            Some(several) => {
                problems.push(format!("{address} is there {} times", several.len()));
            }
        }
    }
    for address in launched.keys() {
        let guarded = wanted.guarded.contains(address) || !given.is_empty();
        let ours = wanted
            .devices
            .iter()
            .any(|one| parse(&one.address) == Some(*address));
        // Other people's functions are none of our business, unless it cannot be told whose they are.
        if !given.contains_key(address) && guarded && (ours || wanted.guarded.contains(address)) {
            let skipped = if ours {
                ", and its Kata leaves it out"
            } else {
                ""
            };
            problems.push(format!(
                "{address} is there and was not given to this sandbox{skipped}"
            ));
        }
    }
    ports(view, &mut problems);
    if problems.is_empty() {
        return Ok(());
    }
    problems.sort();
    problems.dedup();
    Err(Refused(problems))
}

fn parse(address: &str) -> Option<Address> {
    address.parse().ok()
}

/// The host's functions in a launch. One that cannot be told may be anything, so it is a problem.
fn launched<'a>(
    view: &'a View,
    wanted: &Wanted<'_>,
    problems: &mut Vec<String>,
) -> BTreeMap<Address, Vec<&'a Device>> {
    let mut found = BTreeMap::<Address, Vec<&Device>>::new();
    for device in view.vfio() {
        match device.host() {
            Ok(address) => found.entry(address).or_default().push(device),
            Err(why) => problems.push(why),
        }
        if !matches!(device.driver.as_str(), "vfio-pci" | "vfio-pci-nohotplug") {
            problems.push(format!(
                "{} is of a driver that is not known here",
                device.name()
            ));
        }
    }
    // What is neither given nor guarded is somebody else's.
    found.retain(|address, _| {
        let ours = wanted
            .devices
            .iter()
            .any(|one| parse(&one.address) == Some(*address));
        ours || wanted.guarded.contains(address)
    });
    found
}

/// The functions that this Kata puts into the launch, by the planner's rules.
fn given<'a>(
    wanted: &Wanted<'a>,
    view: &View,
    problems: &mut Vec<String>,
) -> BTreeMap<Address, &'a claims::Device> {
    let mut given = BTreeMap::new();
    for device in wanted.devices {
        match parse(&device.address) {
            None => problems.push(format!(
                "the claim names {:?}, which is no PCI address",
                device.address
            )),
            Some(_) if wanted.kata.skips(device.class).is_some() => {}
            Some(address) => {
                given.insert(address, device);
            }
        }
    }
    if let Err(refusal) = km_topology::plan(&request(wanted, view))
        && !given.is_empty()
    {
        problems.push(refusal.to_string());
    }
    given
}

/// The plan that this launch should be an instance of.
fn request(wanted: &Wanted<'_>, view: &View) -> Request {
    let expanders = view.devices.iter().any(|d| d.role() == Role::Expander);
    let switches = view.devices.iter().any(|d| d.role() == Role::Upstream);
    let numa = view
        .nodes
        .values()
        .filter_map(|hosts| hosts.first().copied());
    Request {
        devices: wanted.devices.iter().map(planned).collect(),
        class: Class {
            confidential: wanted.confidential,
        },
        kata: Kata {
            // Which version writes expanders does not matter any more: they are there.
            version: match expanders {
                true => wanted.kata.version.max(km_topology::Version::new(4, 1)),
                false => wanted
                    .kata
                    .version
                    .max(Kata::first_with_cold_plug(wanted.kata.flavor)),
            },
            ..wanted.kata
        },
        guest: Guest {
            numa: numa.collect(),
            ..Guest::default()
        },
        layout: Some(match (expanders, switches) {
            (true, _) if !view.nodes.values().all(BTreeSet::is_empty) => Layout::Numa,
            (_, true) => Layout::SwitchPort,
            _ => Layout::RootPort,
        }),
        writer: Writer::Kata { pool: 0 },
    }
}

/// A claimed function, as the planner wants it.
pub(super) fn planned(device: &claims::Device) -> km_topology::Device {
    km_topology::Device {
        address: device.address.clone(),
        class: device.class,
        numa_node: device.numa_node,
        iommu_group: device.iommu_group,
        cdev: device.cdev.is_some(),
    }
}

/// A device of a launch beside what the sandbox was given, while it is judged.
struct Judged<'a> {
    view: &'a View,
    device: &'a Device,
    given: &'a claims::Device,
    wanted: &'a Wanted<'a>,
    problems: &'a mut Vec<String>,
}

impl Judged<'_> {
    fn wrong(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Whether it is behind a port of its own, and that port where it belongs.
    fn placed(&mut self) {
        let (view, device, address) = (self.view, self.device, &self.given.address);
        let Some(bus) = device.bus.as_deref() else {
            self.wrong(format!(
                "{address} is on no named bus, so behind no port of its own"
            ));
            return;
        };
        let port = view.by_id(bus);
        match port.map(|port| (port, port.role())) {
            None => self.wrong(format!(
                "{address} is on bus {bus:?}, and no port of that name is made"
            )),
            Some((port, Role::RootPort | Role::Downstream)) => {
                if port.at > device.at {
                    self.wrong(format!("{address} comes before its port {bus:?}"));
                }
                self.root(port);
                rust_slot(port, self.wanted.kata, self.problems);
            }
            Some((port, _)) => {
                self.wrong(format!("{address} is on {}, which is no port", port.name()));
            }
        }
        let neighbours = view
            .devices
            .iter()
            .filter(|other| other.at != device.at && other.bus.as_deref() == Some(bus));
        for other in neighbours {
            self.wrong(format!(
                "{address} shares port {bus:?} with {}",
                other.name()
            ));
        }
        match device.slot() {
            Ok(None | Some((0, 0))) => {}
            Ok(Some((slot, function))) => self.wrong(format!(
                "{address} is at {slot:02x}.{function} behind its port, where a guest looks for 00.0 alone"
            )),
            Err(why) => self.wrong(why),
        }
    }

    /// Follows a port to its root bus: it must end at one, and on the device's NUMA node.
    fn root(&mut self, port: &Device) {
        let (view, address) = (self.view, &self.given.address);
        let mut at = port;
        for _ in 0..DEPTH {
            let parent = at.bus.as_deref().unwrap_or("pcie.0");
            if parent == "pcie.0" {
                match self.given.numa_node {
                    Some(node) if covered(view, node) => self.wrong(format!(
                        "{address} is on NUMA node {node} of the host, and its port on pcie.0 in place of that node's expander"
                    )),
                    _ => {}
                }
                return;
            }
            let Some(above) = view.by_id(parent) else {
                self.wrong(format!(
                    "{} is on bus {parent:?}, which is not made",
                    at.name()
                ));
                return;
            };
            if above.at > at.at {
                self.wrong(format!("{} comes before its bus {parent:?}", at.name()));
            }
            match (at.role(), above.role()) {
                (Role::RootPort, Role::Expander) => return self.expander(above),
                (Role::Downstream, Role::Upstream)
                | (Role::Upstream, Role::RootPort | Role::Downstream) => at = above,
                _ => {
                    self.wrong(format!(
                        "{} is on {}, where it cannot be",
                        at.name(),
                        above.name()
                    ));
                    return;
                }
            }
        }
        self.wrong(format!(
            "{address} is deeper than {DEPTH} buses, or in a circle"
        ));
    }

    /// Whether an expander is of the device's NUMA node.
    fn expander(&mut self, expander: &Device) {
        let hosts = hosts_of(self.view, expander);
        let (Some(node), Some(hosts)) = (self.given.numa_node, hosts) else {
            return;
        };
        if !hosts.is_empty() && !hosts.contains(&node) {
            self.wrong(format!(
                "{} is on NUMA node {node} of the host, and its port below {}, whose memory is on {hosts:?}",
                self.given.address,
                expander.name()
            ));
        }
    }

    /// Whether it reaches the IOMMU as it should.
    fn way(&mut self) {
        let address = &self.given.address;
        match self.device.keyed.get("iommufd") {
            Some(object) => {
                if !self.view.iommufd.iter().any(|(id, _)| id == object) {
                    self.wrong(format!(
                        "{address} names the iommufd object {object:?}, which is not made"
                    ));
                }
                if self.device.keyed.get("x-nv-gpudirect-clique").is_some() {
                    self.wrong(format!(
                        "{address} has x-nv-gpudirect-clique, and iommufd maps no peer's memory"
                    ));
                }
            }
            None if self.wanted.confidential => self.wrong(format!(
                "{address} goes through a legacy group, and a confidential guest needs iommufd"
            )),
            None if self.given.cdev.is_some() => self.wrong(format!(
                "{address} was given by its own node, and the launch would open its group's"
            )),
            None => {}
        }
    }
}

/// Whether a NUMA node of the host has an expander in the guest.
fn covered(view: &View, node: u16) -> bool {
    let mut expanders = view.devices.iter().filter(|d| d.role() == Role::Expander);
    expanders.any(|expander| hosts_of(view, expander).is_some_and(|hosts| hosts.contains(&node)))
}

/// The NUMA nodes of the host that are behind an expander's node of the guest, where it has one and they are told.
fn hosts_of<'a>(view: &'a View, expander: &Device) -> Option<&'a BTreeSet<u16>> {
    let guest = expander.keyed.get("numa_node")?.parse().ok()?;
    view.nodes.get(&guest)
}

/// runtime-rs tells the guest the path `09+n/00` of port `rp<n>`, whatever QEMU makes of it.
fn rust_slot(port: &Device, kata: Kata, problems: &mut Vec<String>) {
    let number = port
        .id
        .as_deref()
        .and_then(|id| id.strip_prefix("rp")?.parse::<u8>().ok());
    let (km_topology::Flavor::Rust, Some(number)) = (kata.flavor, number) else {
        return;
    };
    let expected = km_topology::kata::RUST_FIRST_SLOT.checked_add(number);
    match port.slot() {
        Ok(Some((slot, 0))) if Some(slot) == expected => {}
        Ok(_) => problems.push(format!(
            "{} is not in the slot where runtime-rs tells the guest to look for its device",
            port.name()
        )),
        Err(why) => problems.push(why),
    }
}

/// Ports and ids that collide, and bus numbers that do.
fn ports(view: &View, problems: &mut Vec<String>) {
    let mut ids = BTreeSet::new();
    for id in view
        .devices
        .iter()
        .filter_map(|device| device.id.as_deref())
    {
        if !ids.insert(id) {
            problems.push(format!("the id {id:?} is there twice"));
        }
    }
    let mut objects = BTreeSet::new();
    for (id, _) in &view.iommufd {
        if !objects.insert(id) {
            problems.push(format!("the iommufd object {id:?} is there twice"));
        }
    }
    let mut slots = BTreeSet::new();
    let mut buses = BTreeMap::new();
    for device in &view.devices {
        let number = |key: &str| device.keyed.get(key).and_then(number);
        match device.role() {
            Role::RootPort | Role::Downstream => {
                let pair = (number("chassis").unwrap_or(0), number("slot").unwrap_or(0));
                if !slots.insert(pair) {
                    problems.push(format!(
                        "{} has chassis {} slot {}, which another port has",
                        device.name(),
                        pair.0,
                        pair.1
                    ));
                }
            }
            Role::Expander => {
                let bus = number("bus_nr").unwrap_or(0);
                if bus == 0 || bus > 255 {
                    problems.push(format!(
                        "{} has bus number {bus}, which is no second root's",
                        device.name()
                    ));
                }
                if buses.insert(bus, ()).is_some() {
                    problems.push(format!(
                        "{} has bus number {bus}, which another has",
                        device.name()
                    ));
                }
            }
            _ => {}
        }
    }
    room(view, &buses, problems);
}

/// A number as QEMU reads it: decimal, or hexadecimal with `0x`.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Each expander's ports must have numbers before the next expander's.
fn room(view: &View, buses: &BTreeMap<u64, ()>, problems: &mut Vec<String>) {
    for expander in view.devices.iter().filter(|d| d.role() == Role::Expander) {
        let Some(first) = expander.keyed.get("bus_nr").and_then(number) else {
            continue;
        };
        let next = buses
            .range(first + 1..)
            .next()
            .map_or(256, |(bus, ())| *bus);
        let ports = view
            .devices
            .iter()
            .filter(|device| device.bus.is_some() && device.bus == expander.id)
            .count() as u64;
        if first.saturating_add(ports) >= next {
            problems.push(format!(
                "{} has {ports} ports, and bus numbers from {first} to {} only",
                expander.name(),
                next.saturating_sub(1)
            ));
        }
    }
}
