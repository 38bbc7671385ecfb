//! The devices themselves: whether they are there, have room for their BARs, and which driver has them.

use std::collections::BTreeSet;

use km_vfio::{Function, Kind};

use super::{Case, list, name};
use crate::fact::Found;
use crate::finding::{Check, Finding};
use crate::host::PCI;

/// `IORESOURCE_UNSET` and `IORESOURCE_PREFETCH` (include/linux/ioport.h of the kernel).
const UNSET: u64 = 0x2000_0000;
const PREFETCH: u64 = 0x2000;

pub(super) fn devices(case: Case<'_>) -> Finding {
    let check = Check::Devices;
    let count = match &case.host.pci.found {
        Found::Unknown(reason) => return Finding::unknown(check, format!("{PCI}: {reason}")),
        Found::Absent => {
            return Finding::unknown(
                check,
                format!("{PCI} is not there: is the host's root where --host-root says?"),
            );
        }
        Found::Is(count) => *count,
    };
    let wanted = case.wanted();
    let here: BTreeSet<_> = wanted.iter().map(|function| function.address).collect();
    let named = case.wants.devices.iter();
    let missing: Vec<_> = named.filter(|address| !here.contains(address)).collect();
    if !missing.is_empty() {
        return Finding::failed(
            check,
            format!("No NVIDIA GPU or NVSwitch is at {}.", list(missing)),
        )
        .seen(PCI, format!("{count} functions"))
        .fix("kata-manager devices list");
    }
    if wanted.is_empty() {
        return Finding::failed(check, "The machine has no NVIDIA GPU or NVSwitch.")
            .seen(PCI, format!("{count} functions, none of them a GPU or NVSwitch of vendor 10de"))
            .fix("Look for the card in the firmware's list of devices; seat it anew; check its power cables.");
    }
    let dead: Vec<&&Function> = wanted.iter().filter(|function| function.dead).collect();
    if dead.is_empty() {
        let of = |kind| {
            wanted
                .iter()
                .filter(|function| function.kind == kind)
                .count()
        };
        let (gpus, switches) = (of(Kind::Gpu), of(Kind::NvSwitch));
        return Finding::ok(check, format!("GPUs: {gpus}, NVSwitches: {switches}."))
            .seen(PCI, list(wanted.iter().map(|function| name(function))));
    }
    let finding = Finding::failed(
        check,
        "A device has fallen off the bus: it answers all ones and cannot be used until it is reset.",
    );
    dead.iter()
        .fold(finding, |finding, function| {
            finding.seen(format!("{PCI}/{}/config", function.address), "ff ff ff ff")
        })
        .fix("Power-cycle the machine: a warm reboot does not always reset a card. If it comes back, look for Xid messages in the kernel's log, and at the card's cooling and power.")
}

/// Room for BARs: a function without addresses cannot be used by anybody.
pub(super) fn bar_space(case: Case<'_>) -> Finding {
    let check = Check::BarSpace;
    let wanted = case.wanted();
    if wanted.is_empty() {
        return case.without_devices(check);
    }
    let mut without = Vec::new();
    let mut unread = Vec::new();
    for function in &wanted {
        let Some(fact) = case.host.resources.get(&function.address) else {
            continue;
        };
        match fact.get().map(|text| bars(text, function.kind)) {
            Some(Some(None)) => {}
            Some(Some(Some(problem))) => without.push((fact.source.clone(), problem)),
            Some(None) => unread.push(format!(
                "{}: it has another form than the kernel's",
                fact.source
            )),
            None => unread.push(
                fact.unknown()
                    .unwrap_or(format!("{} is not there", fact.source)),
            ),
        }
    }
    if without.is_empty() {
        return match unread.first() {
            Some(reason) => Finding::unknown(check, reason),
            None => Finding::ok(check, "Each BAR of each device has an address."),
        };
    }
    let finding = Finding::failed(
        check,
        "The firmware has no room for the BARs of every device. Data-centre GPUs need more than 4 GiB of address space each, most of it above 4 GiB.",
    );
    without
        .into_iter()
        .fold(finding, |finding, (source, problem)| finding.seen(source, problem))
        .fix("Firmware: switch on \"Above 4G Decoding\" (also \"64-bit MMIO\"), and raise \"MMIO High Size\" where there is such a setting.")
        .fix("If the firmware has no such setting: add pci=realloc to the kernel's command line and reboot.")
}

/// What is wrong with a `resource` file: `Some(None)` nothing, `None` it is no such file.
fn bars(text: &str, kind: Kind) -> Option<Option<String>> {
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let mut assigned = Vec::new();
    for (index, line) in text.lines().take(6).enumerate() {
        let mut fields = line.split_whitespace().map(number);
        let (start, end, flags) = (fields.next()??, fields.next()??, fields.next()??);
        if start == 0 && end == 0 && flags == 0 {
            continue;
        }
        if start == 0 || flags & UNSET != 0 {
            return Some(Some(format!("BAR {index} has no address: {line}")));
        }
        assigned.push(flags);
    }
    // Older kernels write zeroes where they found no room.
    Some(match kind {
        _ if text.lines().count() < 6 => return None,
        _ if assigned.is_empty() => Some("no BAR has an address".to_owned()),
        Kind::Gpu if assigned.iter().all(|flags| flags & PREFETCH == 0) => {
            Some("the BAR of the GPU's memory has no address".to_owned())
        }
        _ => None,
    })
}

/// Which driver has the devices, with all functions of their slots.
pub(super) fn drivers(case: Case<'_>) -> Finding {
    let check = Check::Drivers;
    let wanted = case.wanted();
    if wanted.is_empty() {
        return case.without_devices(check);
    }
    let slots = |function: &&Function| {
        wanted
            .iter()
            .any(|lead| lead.address.same_slot(&function.address))
    };
    let functions: Vec<&Function> = case.host.inventory.functions.iter().filter(slots).collect();
    let of = |function: &Function| function.driver.clone().unwrap_or("no driver".to_owned());
    let rest: Vec<&&Function> = functions
        .iter()
        .filter(|function| !function.on_vfio())
        .collect();
    let held: Vec<&&&Function> = rest
        .iter()
        .filter(|function| function.driver.is_some())
        .collect();
    let finding = if rest.is_empty() {
        return Finding::ok(
            check,
            format!("VFIO has all {} functions.", functions.len()),
        )
        .seen(
            PCI,
            list(functions.iter().map(|f| format!("{} {}", f.address, of(f)))),
        );
    } else if held.is_empty() {
        Finding::warning(
            check,
            format!(
                "{} of {} functions are not with VFIO yet.",
                rest.len(),
                functions.len()
            ),
        )
    } else {
        let drivers: BTreeSet<String> = held.iter().map(|function| of(function)).collect();
        Finding::failed(
            check,
            format!(
                "{} of {} functions are with a driver of the host: {}.",
                held.len(),
                functions.len(),
                list(drivers)
            ),
        )
    };
    let finding = rest.iter().fold(finding, |finding, function| {
        finding.seen(format!("{PCI}/{}/driver", function.address), of(function))
    });
    let all = rest.len() == functions.len() && case.wants.devices.is_empty();
    let which = match all {
        true => "--all".to_owned(),
        false => {
            let leads = wanted
                .iter()
                .filter(|lead| rest.iter().any(|f| f.address.same_slot(&lead.address)));
            leads
                .map(|lead| lead.address.short())
                .collect::<Vec<_>>()
                .join(" ")
        }
    };
    let finding = finding.fix(format!(
        "kata-manager devices bind {which} (with --persist it lasts over a reboot)"
    ));
    if held.iter().any(|function| of(function) == "nouveau") {
        return finding.fix("Add modprobe.blacklist=nouveau to the kernel's command line, so that nouveau does not take them at the next boot.");
    }
    if held.iter().any(|function| of(function) == "nvidia") {
        return finding.fix("Stop what uses them first (nvidia-persistenced, DCGM); on a node of the GPU Operator set its label nvidia.com/gpu.workload.config=vm-passthrough.");
    }
    finding
}
