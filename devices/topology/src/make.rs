//! From a request to a plan, or the reason why there is none.

use std::collections::{BTreeMap, BTreeSet};

use crate::kata::{BRIDGES, BUSES, EXPANDER_BUSES, EXPANDER_CHASSIS, LAST_SLOT, RUST_FIRST_SLOT};
use crate::{
    Device, Expander, Flavor, IommuFd, Kata, Layout, Placed, Plan, Port, PortKind, Refusal,
    Request, Skipped, Switch, Taken, Told, Writer, timeouts,
};

/// The chassis of ports that we write: Kata's begin at 0 and 10 and count upwards.
const OUR_CHASSIS: u8 = 128;

/// Slots of a bus (PCI Local Bus Specification: 5 bits).
const SLOTS: usize = 32;

/// Makes the plan.
///
/// # Errors
/// [`Refusal`]: what cannot be laid out, or would not come out as planned.
pub fn plan(request: &Request) -> Result<Plan, Refusal> {
    let devices = named(request)?;
    let kata = request.kata;
    let by_kata = matches!(request.writer, Writer::Kata { .. });
    if by_kata && !kata.cold_plugs() {
        let first = Kata::first_with_cold_plug(kata.flavor);
        return Err(Refusal::TooOld { kata, first });
    }
    let layout = layout(request)?;
    let (given, skipped) = given(request, devices)?;
    groups(request, &given)?;
    let count = given.len();
    let pool = match request.writer {
        Writer::Kata { pool } => usize::try_from(pool).unwrap_or(usize::MAX),
        Writer::Launcher(_) => 0,
    };
    let most = most_ports(request, layout);
    if count.max(pool) > most {
        return Err(Refusal::Ports {
            needed: count.max(pool),
            most,
            who: match by_kata {
                true => kata.to_string(),
                false => "what is left of pcie.0".to_owned(),
            },
            hint: match (by_kata, count < pool) {
                (true, true) => ", or lower pcie_root_port",
                _ => "",
            },
        });
    }
    let mut plan = empty(request, layout, skipped);
    match layout {
        Layout::RootPort => root_ports(&mut plan, request, count.max(pool))?,
        Layout::SwitchPort => switch(&mut plan, request, count)?,
        Layout::Numa => expanders(&mut plan, request, &given)?,
    }
    place(&mut plan, request, given);
    tell(&mut plan);
    Ok(plan)
}

/// The named devices by address, each once.
fn named(request: &Request) -> Result<Vec<&Device>, Refusal> {
    let mut seen = BTreeMap::new();
    for device in &request.devices {
        if !is_address(&device.address) {
            let shown = device.address.chars().take(40).collect();
            return Err(Refusal::Address(shown));
        }
        if seen.insert(device.address.as_str(), device).is_some() {
            return Err(Refusal::Twice(device.address.clone()));
        }
    }
    if seen.is_empty() {
        return Err(Refusal::NoDevices);
    }
    Ok(seen.into_values().collect())
}

/// Whether a text is a full address as sysfs writes it. Domains have 4 digits or more (Intel VMD's begin at 0x10000).
fn is_address(text: &str) -> bool {
    let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&part.len())
            && part
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let mut parts = text.split(':');
    let (Some(domain), Some(bus), Some(rest), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let Some((slot, function)) = rest.split_once('.') else {
        return false;
    };
    hex(domain, 4..=8)
        && hex(bus, 2..=2)
        && hex(slot, 2..=2)
        && u8::from_str_radix(slot, 16).is_ok_and(|slot| slot < 32)
        && matches!(function.as_bytes(), [b'0'..=b'7'])
}

fn layout(request: &Request) -> Result<Layout, Refusal> {
    let (kata, nodes) = (request.kata, request.guest.numa.len());
    let by_kata = matches!(request.writer, Writer::Kata { .. });
    let can_numa = !by_kata || kata.emits_numa();
    let layout = match request.layout {
        Some(layout) => layout,
        None if nodes > 1 && can_numa => Layout::Numa,
        None => Layout::RootPort,
    };
    match layout {
        Layout::Numa if !can_numa => Err(Refusal::Layout {
            kata,
            what: "expander for each NUMA node",
            instead: "root ports, or use the Go runtime of Kata 4.1 or later",
        }),
        Layout::Numa if nodes == 0 => Err(Refusal::NoNuma),
        Layout::SwitchPort if !by_kata || !kata.emits_switch() => Err(Refusal::Layout {
            kata,
            what: "switch",
            instead: "root ports: an emulated switch gives no peer-to-peer",
        }),
        layout => Ok(layout),
    }
}

/// The devices that the guest is given, and those that are left out.
fn given<'a>(
    request: &Request,
    devices: Vec<&'a Device>,
) -> Result<(Vec<&'a Device>, Vec<Skipped>), Refusal> {
    let mut given = Vec::new();
    let mut skipped = Vec::new();
    for device in devices {
        let Some(reason) = request.kata.skips(device.class) else {
            given.push(device);
            continue;
        };
        // An NVSwitch that is dropped leaves the GPUs of its board without their fabric.
        if device.class >> 8 == 0x0680 {
            return Err(Refusal::Dropped {
                address: device.address.clone(),
                kata: request.kata,
                reason: reason.to_owned(),
            });
        }
        skipped.push(Skipped {
            address: device.address.clone(),
            reason: reason.to_owned(),
        });
    }
    if given.is_empty() {
        return Err(Refusal::NoDevices);
    }
    Ok((given, skipped))
}

/// Every device must be isolated, and be reachable in the way that its guest reaches devices.
fn groups(request: &Request, given: &[&Device]) -> Result<(), Refusal> {
    for device in given {
        let address = device.address.clone();
        if device.iommu_group.is_none() {
            return Err(Refusal::NoGroup(address));
        }
        if device.cdev {
            continue;
        }
        let reason = if request.class.confidential {
            "a confidential guest".to_owned()
        } else if request.kata.always_iommufd() {
            request.kata.to_string()
        } else {
            continue;
        };
        return Err(Refusal::NoCdev { address, reason });
    }
    Ok(())
}

/// How many ports there can be. Slots 0 (host bridge) and 31 (LPC) of `pcie.0` are the machine's.
fn most_ports(request: &Request, layout: Layout) -> usize {
    let Writer::Launcher(taken) = &request.writer else {
        return request.kata.ports();
    };
    let free = (SLOTS - 2).saturating_sub(taken.slots);
    match layout {
        Layout::RootPort | Layout::SwitchPort => free,
        // Each expander needs a slot; below it, bus numbers are what ends first.
        Layout::Numa if request.guest.numa.len() > free => 0,
        Layout::Numa => usize::from(BUSES),
    }
}

fn empty(request: &Request, layout: Layout, skipped: Vec<Skipped>) -> Plan {
    Plan {
        kata: request.kata,
        class: request.class,
        guest: request.guest.clone(),
        layout,
        expanders: Vec::new(),
        switches: Vec::new(),
        ports: Vec::new(),
        iommufd: Vec::new(),
        devices: Vec::new(),
        skipped,
        told: Told {
            cold_plug_vfio: match layout {
                Layout::SwitchPort => "switch-port",
                Layout::RootPort | Layout::Numa => "root-port",
            },
            pcie_root_port: match request.writer {
                Writer::Kata { pool } => pool,
                Writer::Launcher(_) => 0,
            },
            pcie_switch_port: None,
            enable_numa: request.kata.emits_numa().then_some(layout == Layout::Numa),
            timeout_seconds: timeouts::FLOOR,
        },
        notes: Vec::new(),
    }
}

/// Bus numbers on `pcie.0` that are given before the first port's.
fn first_bus(writer: &Writer) -> u16 {
    1 + match writer {
        Writer::Kata { .. } => u16::from(BRIDGES),
        Writer::Launcher(taken) => taken.buses,
    }
}

/// A bus number that must not be past the last of its range.
fn bus(place: &str, number: u16, last: u16) -> Result<u8, Refusal> {
    match u8::try_from(number) {
        Ok(bus) if number <= last => Ok(bus),
        _ => Err(Refusal::Buses {
            place: place.to_owned(),
            needed: number,
            last,
        }),
    }
}

fn root_ports(plan: &mut Plan, request: &Request, count: usize) -> Result<(), Refusal> {
    let mut ours = Chassis::beside(&request.writer);
    for (at, number) in (0..count).zip(first_bus(&request.writer)..) {
        let index = u8::try_from(at).unwrap_or(u8::MAX);
        let (id, addr, chassis, slot) = match (&request.writer, request.kata.flavor) {
            (Writer::Launcher(_), _) => {
                let (chassis, slot) = ours.next();
                (format!("km-rp{at}"), None, chassis, slot)
            }
            (Writer::Kata { .. }, Flavor::Go) => (format!("rp{at}"), None, 0, u16::from(index)),
            (Writer::Kata { .. }, Flavor::Rust) => {
                let slot = RUST_FIRST_SLOT + index;
                debug_assert!(slot <= LAST_SLOT);
                (format!("rp{at}"), Some(slot), slot + 1, u16::from(slot))
            }
        };
        plan.ports.push(Port {
            id,
            kind: PortKind::Root,
            parent: "pcie.0".to_owned(),
            addr,
            chassis,
            slot,
            bus: bus("pcie.0", number, BUSES - 1)?,
        });
    }
    Ok(())
}

/// One root port, an upstream port behind it, and downstream ports.
fn switch(plan: &mut Plan, request: &Request, count: usize) -> Result<(), Refusal> {
    let first = first_bus(&request.writer);
    plan.ports.push(Port {
        id: "srp0".to_owned(),
        kind: PortKind::Root,
        parent: "pcie.0".to_owned(),
        addr: None,
        chassis: 1,
        slot: 0,
        bus: bus("pcie.0", first, BUSES - 1)?,
    });
    plan.switches.push(Switch {
        id: "swup0".to_owned(),
        port: "srp0".to_owned(),
        bus: bus("pcie.0", first + 1, BUSES - 1)?,
    });
    for (at, number) in (0..count).zip(first + 2..) {
        plan.ports.push(Port {
            id: format!("swdp{at}"),
            kind: PortKind::Downstream,
            parent: "swup0".to_owned(),
            addr: None,
            chassis: 2,
            slot: u16::try_from(at).unwrap_or(u16::MAX),
            bus: bus("the switch", number, BUSES - 1)?,
        });
    }
    plan.told.pcie_switch_port = Some(u32::try_from(count).unwrap_or(u32::MAX));
    plan.notes.push(
        "the emulated switch gives no peer-to-peer and shows links of 2.5 GT/s x1; root ports do as well with fewer buses".to_owned(),
    );
    Ok(())
}

/// A root bus for each NUMA node of the guest, and below it a root port for each device that is there.
fn expanders(plan: &mut Plan, request: &Request, given: &[&Device]) -> Result<(), Refusal> {
    let nodes = &request.guest.numa;
    // The last expander whose range ends below 256.
    let most = usize::from(BUSES / EXPANDER_BUSES) - 1;
    if nodes.len() > most {
        return Err(Refusal::Expanders {
            nodes: nodes.len(),
            most,
        });
    }
    let ours = match &request.writer {
        Writer::Kata { .. } => "",
        Writer::Launcher(taken) if taken.expanders => return Err(Refusal::ExpandersThere),
        Writer::Launcher(_) => "km-",
    };
    for device in given {
        match device.numa_node {
            None => {
                return Err(Refusal::NumaUnknown(device.address.clone(), request.kata));
            }
            Some(node) if !nodes.contains(&node) => {
                return Err(Refusal::NumaUncovered {
                    address: device.address.clone(),
                    node,
                    covered: nodes.clone(),
                });
            }
            Some(_) => {}
        }
    }
    // What hangs on pcie.0 must be numbered below the first expander.
    bus("pcie.0", first_bus(&request.writer) - 1, EXPANDER_BUSES - 1)?;
    let mut chassis = Chassis::beside(&request.writer);
    for (guest_node, host_node) in (0_u16..).zip(nodes) {
        let first = EXPANDER_BUSES * (guest_node + 1);
        let last = first + EXPANDER_BUSES - 1;
        let id = format!("{ours}pxb-numa{guest_node}");
        // Two guest nodes on one host node: its devices go to the first.
        let theirs = match nodes.iter().position(|node| node == host_node) {
            Some(at) if at == usize::from(guest_node) => given
                .iter()
                .filter(|device| device.numa_node == Some(*host_node))
                .count(),
            _ => 0,
        };
        plan.expanders.push(Expander {
            id: id.clone(),
            bus: bus(&id, first, BUSES - 1)?,
            last_bus: bus(&id, last, BUSES - 1)?,
            guest_node,
            host_node: *host_node,
        });
        for (at, number) in (0..theirs).zip(first + 1..) {
            let (chassis, slot) = match &request.writer {
                Writer::Launcher(_) => chassis.next(),
                Writer::Kata { .. } => (
                    EXPANDER_CHASSIS.saturating_add(u8::try_from(guest_node).unwrap_or(u8::MAX)),
                    u16::try_from(at).unwrap_or(u16::MAX),
                ),
            };
            plan.ports.push(Port {
                id: format!("{ours}rp-numa{guest_node}-{at}"),
                kind: PortKind::Root,
                parent: id.clone(),
                addr: None,
                chassis,
                slot,
                bus: bus(&id, number, last)?,
            });
        }
    }
    Ok(())
}

/// Puts each device behind its port, and gives it its way to the IOMMU.
fn place(plan: &mut Plan, request: &Request, given: Vec<&Device>) {
    let mut used = BTreeSet::new();
    let launcher = matches!(request.writer, Writer::Launcher(_));
    for (at, device) in given.into_iter().enumerate() {
        let parent = match plan.layout {
            Layout::RootPort => Some("pcie.0"),
            Layout::SwitchPort => Some("swup0"),
            Layout::Numa => plan
                .expanders
                .iter()
                .find(|expander| Some(expander.host_node) == device.numa_node)
                .map(|expander| expander.id.as_str()),
        };
        let port = plan
            .ports
            .iter()
            .find(|port| Some(port.parent.as_str()) == parent && !used.contains(&port.id));
        // There are as many ports as devices on each parent.
        let Some(port) = port else { continue };
        used.insert(port.id.clone());
        let id = format!("{}vfio-{at}", if launcher { "km-" } else { "" });
        let iommufd = device.cdev.then(|| match (launcher, plan.kata.flavor) {
            (true, _) => "km-iommufd".to_owned(),
            (false, Flavor::Go) => format!("iommufd{id}"),
            (false, Flavor::Rust) => format!("iommufd{}", port.id),
        });
        let guest_path = port.addr.map(|addr| format!("{addr:02x}/00"));
        let port = port.id.clone();
        if let Some(id) = &iommufd {
            match plan.iommufd.iter_mut().find(|object| object.id == *id) {
                Some(object) => object.devices += 1,
                None => plan.iommufd.push(IommuFd {
                    id: id.clone(),
                    devices: 1,
                }),
            }
        }
        plan.devices.push(Placed {
            address: device.address.clone(),
            class: device.class,
            host_node: device.numa_node,
            id,
            port,
            iommufd,
            guest_path,
        });
    }
}

/// What Kata is told, and what a person should know.
fn tell(plan: &mut Plan) {
    let gpus = plan.devices.iter().filter(|d| is_gpu(d.class)).count();
    let legacy = plan.devices.iter().any(|device| device.iommufd.is_none());
    let mappings = plan.iommufd.len() + usize::from(legacy);
    let memory = plan.guest.memory_mib;
    plan.told.timeout_seconds = timeouts::seconds(plan.class.confidential, gpus, memory, mappings);
    let seconds = plan.told.timeout_seconds;
    plan.notes.push(format!(
        "kubelet waits for a sandbox twice its runtimeRequestTimeout: set that to {} s or more",
        seconds.div_ceil(2)
    ));
    let nodes = plan.guest.numa.len();
    if plan.layout == Layout::Numa && usize::try_from(plan.guest.vcpus).is_ok_and(|n| n < nodes) {
        plan.notes.push(format!(
            "the guest has {} processors on {nodes} NUMA nodes, so some nodes have none: give it {nodes} or more",
            plan.guest.vcpus
        ));
    }
    if plan.iommufd.len() > 1 {
        let gib = memory.div_ceil(1024);
        plan.notes.push(format!(
            "{} gives each device an iommufd object of its own, so the guest's {gib} GiB are mapped and pinned {mappings} times; \
             kata-manager-qemu's `tune` makes one of them where the guest is not confidential",
            plan.kata
        ));
    }
}

fn is_gpu(class: u32) -> bool {
    matches!(class >> 8, 0x0300 | 0x0302)
}

/// Pairs of chassis and slot that nobody has.
struct Chassis<'a> {
    taken: Option<&'a Taken>,
    slot: u16,
}

impl<'a> Chassis<'a> {
    fn beside(writer: &'a Writer) -> Chassis<'a> {
        let taken = match writer {
            Writer::Launcher(taken) => Some(taken),
            Writer::Kata { .. } => None,
        };
        Chassis { taken, slot: 0 }
    }

    fn next(&mut self) -> (u8, u16) {
        loop {
            let pair = (OUR_CHASSIS, self.slot);
            self.slot += 1;
            let taken = self
                .taken
                .is_some_and(|taken| taken.chassis.contains(&pair));
            if !taken {
                return pair;
            }
        }
    }
}
