//! Adds ports and devices to a launch whose Kata attached none. Data in, data out.
//!
//! What is added comes last, so that nothing that Kata put there moves. It takes its slots from QEMU, and pairs of chassis and slot
//! that nobody has.

use std::ffi::OsString;

use km_host::claims;
use km_topology::{Class, Guest, Plan, Request, Taken, Writer};

use super::Refused;
use super::argv::Argv;
use super::check::{Wanted, number, planned};
use super::view::{Role, View};

/// What happens to a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Injected {
    /// Everything is there already: Kata attached it.
    Nothing,
    /// These arguments are added.
    Added(Box<Plan>),
}

/// Plans what is to be added.
///
/// # Errors
/// When some devices are there and some are not, for a confidential guest, or when there is no plan.
pub fn inject(view: &View, wanted: &Wanted<'_>) -> Result<Injected, Refused> {
    let given: Vec<&claims::Device> = wanted
        .devices
        .iter()
        .filter(|device| wanted.kata.skips(device.class).is_none())
        .collect();
    let there = |address: &str| {
        let address = address.parse::<km_vfio::Address>().ok();
        address.is_some() && view.vfio().any(|device| device.host().ok() == address)
    };
    let (present, missing): (Vec<&claims::Device>, Vec<&claims::Device>) =
        given.iter().partition(|device| there(&device.address));
    if missing.is_empty() {
        return Ok(Injected::Nothing);
    }
    if wanted.confidential {
        return Err(Refused::because(
            "devices are not added to a confidential guest, whose measurement that would change: use a Kata that cold-plugs them",
        ));
    }
    if let Some(first) = present.first() {
        return Err(Refused::because(format!(
            "{} is there and {} is not: this Kata attaches devices itself, so launches are to be checked, not added to",
            first.address, missing[0].address
        )));
    }
    if !view.unclear.is_empty() {
        return Err(Refused(view.unclear.clone()));
    }
    let numa = view
        .nodes
        .values()
        .filter_map(|hosts| hosts.first().copied());
    let request = Request {
        devices: wanted.devices.iter().map(planned).collect(),
        class: Class {
            confidential: false,
        },
        kata: wanted.kata,
        guest: Guest {
            numa: numa.collect(),
            ..Guest::default()
        },
        layout: None,
        writer: Writer::Launcher(taken(view)),
    };
    match km_topology::plan(&request) {
        Ok(plan) => Ok(Injected::Added(Box::new(plan))),
        Err(refusal) => Err(Refused::because(refusal.to_string())),
    }
}

/// The command line with a plan added.
pub fn add(argv: &Argv, plan: &Plan) -> Vec<OsString> {
    let more = plan.arguments().into_iter().map(OsString::from);
    argv.words.iter().cloned().chain(more).collect()
}

/// What a launch uses already.
pub fn taken(view: &View) -> Taken {
    let mut taken = Taken::default();
    let on_root = |bus: Option<&str>| matches!(bus, None | Some("pcie.0"));
    for device in &view.devices {
        let role = device.role();
        let is_port = matches!(role, Role::RootPort | Role::Downstream);
        if on_root(device.bus.as_deref()) && is_pci(&device.driver) {
            taken.slots += 1;
        }
        if is_port {
            let number = |key: &str| device.keyed.get(key).and_then(number).unwrap_or(0);
            let chassis = u8::try_from(number("chassis")).unwrap_or(u8::MAX);
            let slot = u16::try_from(number("slot")).unwrap_or(u16::MAX);
            taken.chassis.insert((chassis, slot));
        }
        if is_port || matches!(role, Role::Bridge | Role::Upstream) {
            taken.buses = taken.buses.saturating_add(1);
        }
        taken.expanders |= role == Role::Expander;
    }
    taken
}

/// Whether a device without a bus goes to `pcie.0`: those of other buses have them in their names (QEMU, `-device help`).
fn is_pci(driver: &str) -> bool {
    let elsewhere = [
        "isa-",
        "scsi-",
        "usb-",
        "ide-",
        "nvdimm",
        "pc-dimm",
        "virtserialport",
        "virtconsole",
        "tpm-",
        "vhost-user-",
        "virtio-mem",
        "pvpanic",
        "intel-iommu",
    ];
    let on_pci = driver.ends_with("-pci") || driver.contains("pci");
    on_pci || !elsewhere.iter().any(|start| driver.starts_with(start))
}
