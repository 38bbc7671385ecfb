//! The IOMMU, and which devices it can tell apart.

use km_vfio::{Function, Kind, Member};

use super::{Case, list, name, text};
use crate::fact::Found;
use crate::finding::{Check, Finding};
use crate::host::{PCI, Vendor};
use crate::ports::Acs;

/// Words of the kernel's command line that switch an IOMMU off (Documentation/admin-guide/kernel-parameters.txt).
const OFF: [&str; 4] = [
    "iommu=off",
    "intel_iommu=off",
    "amd_iommu=off",
    "iommu=soft",
];

/// The patch that makes groups look isolated; no upstream kernel has it.
const OVERRIDE: &str = "pcie_acs_override=";

pub(super) fn iommu(case: Case<'_>) -> Finding {
    let check = Check::Iommu;
    let groups = &case.host.groups;
    if let Some(reason) = groups.unknown() {
        return Finding::unknown(check, reason);
    }
    let count = groups.get().map_or(0, |names| names.len());
    let seen = format!("{count} groups");
    let without: Vec<&Function> = case
        .wanted()
        .into_iter()
        .filter(|function| function.iommu_group.is_none())
        .collect();
    if count > 0 && without.is_empty() {
        return Finding::ok(check, format!("The IOMMU is on: {count} groups."))
            .seen(&groups.source, seen);
    }
    let message = match count {
        0 => "The IOMMU is off: without it no device can be given to a virtual machine.".to_owned(),
        _ => format!(
            "The IOMMU is on, and {} is in no group.",
            list(without.iter().map(|f| name(f)))
        ),
    };
    let finding = Finding::failed(check, message)
        .seen(&groups.source, seen)
        .seen(&case.host.cmdline.source, text(&case.host.cmdline));
    let words = case.host.cmdline.get().cloned().unwrap_or_default();
    let off: Vec<&str> = words
        .split_whitespace()
        .filter(|word| OFF.contains(word))
        .collect();
    let finding = match off.is_empty() {
        true => finding,
        false => finding.fix(format!("Take {} off the kernel's command line.", list(off))),
    };
    switch_on(finding, case.vendor())
}

fn switch_on(finding: Finding, vendor: Option<Vendor>) -> Finding {
    let intel = "Firmware: switch on \"Intel VT-d\" (\"VT for Directed I/O\"). Kernel's command line: add intel_iommu=on, in /etc/default/grub as GRUB_CMDLINE_LINUX, then update-grub (or grub2-mkconfig -o /boot/grub2/grub.cfg) and reboot.";
    let amd =
        "Firmware: switch on \"IOMMU\" (\"AMD-Vi\") and reboot; the kernel uses it by itself.";
    match vendor {
        Some(Vendor::Intel) => finding.fix(intel),
        Some(Vendor::Amd) => finding.fix(amd),
        _ => finding
            .fix(format!("Intel: {intel}"))
            .fix(format!("AMD: {amd}")),
    }
}

/// Ports without Access Control Services put what is below them into one group.
pub(super) fn acs(case: Case<'_>) -> Finding {
    let check = Check::Acs;
    let wanted = case.wanted();
    if wanted.is_empty() {
        return case.without_devices(check);
    }
    if wanted.iter().all(|function| function.iommu_group.is_none()) {
        return Finding::not_applicable(check, "Without an IOMMU there are no groups to isolate.");
    }
    let words = case.host.cmdline.get().cloned().unwrap_or_default();
    if let Some(word) = words
        .split_whitespace()
        .find(|word| word.starts_with(OVERRIDE))
    {
        return Finding::warning(
            check,
            "The kernel is told to believe in isolation that the hardware does not give: a guest can reach other devices.",
        )
        .seen(&case.host.cmdline.source, word)
        .fix(format!("Take {word} off the kernel's command line, and move cards to slots of their own."));
    }
    let shared: Vec<&&Function> = wanted
        .iter()
        .filter(|function| !case.strangers(function).is_empty())
        .collect();
    if shared.is_empty() {
        let ports = case.host.ports.values();
        return ports.filter_map(|fact| Some((fact, fact.get()?))).fold(
            Finding::ok(check, "Each device is in a group of its own slot alone."),
            |finding, (fact, acs)| finding.seen(&fact.source, acs.words()),
        );
    }
    let paths = shared.iter().flat_map(|function| &function.path);
    let mut facts: Vec<_> = paths.filter_map(|port| case.host.ports.get(port)).collect();
    facts.sort_by(|a, b| a.source.cmp(&b.source));
    facts.dedup();
    let lacks = |acs: Option<&Acs>| acs.is_some_and(|acs| *acs != Acs::On);
    let message = format!(
        "{} shares its group with devices of other slots",
        list(shared.iter().map(|f| name(f)))
    );
    let finding = if facts.iter().any(|fact| lacks(fact.get())) {
        Finding::failed(check, format!("{message}: a port above does not isolate what is below it."))
            .fix("Firmware: switch on \"ACS\" (\"Access Control Services\"); on some AMD machines it comes with \"AER\" (Advanced Error Reporting).")
            .fix("Or move the card to a slot with a port of its own.")
    } else if let Some(reason) = facts.iter().find_map(|fact| fact.unknown()) {
        Finding::unknown(
            check,
            format!("{message}, and whether its ports have ACS cannot be read: {reason}"),
        )
        .fix("Run it as root.")
    } else {
        Finding::warning(check, format!("{message}, although the ports above have ACS: there is an old bridge or a device of several functions between."))
            .fix("Move the card to another slot.")
    };
    facts.iter().fold(finding, |finding, fact| {
        let value = match &fact.found {
            Found::Is(acs) => acs.words().to_owned(),
            Found::Absent => "not there".to_owned(),
            Found::Unknown(reason) => reason.clone(),
        };
        finding.seen(&fact.source, value)
    })
}

/// A group goes into one virtual machine as a whole.
pub(super) fn groups(case: Case<'_>) -> Finding {
    let check = Check::Groups;
    let wanted = case.wanted();
    if wanted.is_empty() {
        return case.without_devices(check);
    }
    if wanted.iter().all(|function| function.iommu_group.is_none()) {
        return Finding::not_applicable(check, "Without an IOMMU there are no groups.");
    }
    let mut blocking: Vec<(&Function, &Member)> = Vec::new();
    let mut along: Vec<(&Function, &Member)> = Vec::new();
    for function in &wanted {
        for member in case.strangers(function) {
            let foreign = member.kind == Some(Kind::Foreign);
            match foreign && member.driver.as_deref().is_some_and(is_the_hosts) {
                true => blocking.push((*function, member)),
                false => along.push((*function, member)),
            }
        }
    }
    let finding = if let Some((function, member)) = blocking.first() {
        Finding::failed(
            check,
            format!("{} shares its IOMMU group with {}, which the host uses: neither can be given away without the other.", name(function), member.address),
        )
        .fix("Move one of them to another slot, or switch ACS on in the firmware.")
        .fix(format!("If the host can do without it: kata-manager devices bind --whole-group {}", function.address.short()))
    } else if let Some((function, member)) = along.first() {
        Finding::warning(
            check,
            format!("{} shares its IOMMU group with {}: they can only go into one virtual machine together.", name(function), member.address),
        )
        .fix("Move one of them to another slot, or switch ACS on in the firmware, if they are to go into different ones.")
    } else {
        return Finding::ok(check, "No group has a device of another slot.");
    };
    blocking
        .iter()
        .chain(&along)
        .fold(finding, |finding, (function, member)| {
            let group = function.iommu_group.unwrap_or_default();
            let driver = member.driver.as_deref().unwrap_or("no driver");
            let class = member.class >> 8;
            finding.seen(
                format!("/sys/kernel/iommu_groups/{group}/devices"),
                format!(
                    "{} beside {}: class {class:04x}, {driver}",
                    member.address, function.address
                ),
            )
        })
        .seen(
            PCI,
            list(wanted.iter().map(|f| {
                format!(
                    "{} group {}",
                    f.address,
                    f.iommu_group.map_or("none".to_owned(), |id| id.to_string())
                )
            })),
        )
}

/// Whether a driver is one of the host's, and no keeper for VFIO.
fn is_the_hosts(driver: &str) -> bool {
    !driver.contains("vfio") && driver != "pci-stub"
}
