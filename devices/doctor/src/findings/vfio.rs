//! VFIO and iommufd in the kernel.

use km_vfio::Function;

use super::{Case, list, name, node};
use crate::fact::Node;
use crate::finding::{Check, Finding, State};
use crate::modules::Presence;

/// What VFIO needs: the driver, and the keeper of mappings for `/dev/vfio/vfio`.
const NEEDED: [&str; 2] = ["vfio_pci", "vfio_iommu_type1"];

pub(super) fn modules(case: Case<'_>) -> Finding {
    let check = Check::VfioModules;
    let all = NEEDED.map(|module| (module, case.host.modules.get(module)));
    // iommufd stands in for the keeper of mappings.
    let has_iommufd = case.host.iommufd.get() == Some(&Node::Device);
    let matters = |module: &str| module == "vfio_pci" || !has_iommufd;
    let missing = all
        .iter()
        .filter(|(module, (_, presence))| *presence == Presence::Missing && matters(module));
    let missing: Vec<&str> = missing.map(|(module, _)| *module).collect();
    let unknown = all
        .iter()
        .find_map(|(module, (_, presence))| match presence {
            Presence::Unknown(reason) if matters(module) => Some(format!("{module}: {reason}")),
            _ => None,
        });
    let finding = if !missing.is_empty() {
        let release = super::text(&case.host.modules.release);
        Finding::failed(check, format!("The running kernel {release} has no {}.", list(&missing)))
            .fix("Install the package with the kernel's other modules (Ubuntu: linux-modules-extra-$(uname -r)), or a kernel with CONFIG_VFIO_PCI and CONFIG_VFIO_IOMMU_TYPE1.")
    } else if let Some(reason) = unknown {
        Finding::unknown(check, reason)
    } else {
        let loaded = all
            .iter()
            .all(|(_, (_, presence))| *presence == Presence::Loaded);
        Finding::ok(
            check,
            match loaded {
                true => "VFIO is loaded.",
                false => "VFIO is installed, and is loaded when it is needed.",
            },
        )
    };
    all.iter()
        .fold(finding, |finding, (module, (source, presence))| {
            finding.seen(*source, format!("{module}: {}", words(presence)))
        })
}

pub(super) fn words(presence: &Presence) -> &'static str {
    match presence {
        Presence::Loaded => "loaded",
        Presence::Installed => "installed, not loaded",
        Presence::Missing => "not installed",
        Presence::Unknown(_) => "not known",
    }
}

/// Kata's confidential guests take devices through iommufd alone, and its shim in Rust takes all so.
pub(super) fn iommufd(case: Case<'_>) -> Finding {
    let check = Check::Iommufd;
    let fact = &case.host.iommufd;
    let classes = list(case.wants.snp.iter().chain(&case.wants.tdx));
    let needed = case.wants.is_confidential();
    if let Some(reason) = fact.unknown() {
        return Finding::unknown(check, reason);
    }
    let bound = case.wanted();
    let bound = bound.iter().filter(|function| function.on_vfio());
    let without: Vec<&&Function> = bound.filter(|function| !function.cdev).collect();
    match (fact.get(), needed) {
        (Some(Node::Device), _) if without.is_empty() => {
            Finding::ok(check, "The kernel has iommufd.").seen(&fact.source, node(fact))
        }
        (Some(Node::Device), needed) => {
            let state = if needed { State::Failed } else { State::Warning };
            Finding::new(
                check,
                state,
                format!("The kernel has iommufd, and gives no node of their own in /dev/vfio/devices to: {}.", list(without.iter().map(|f| name(f)))),
            )
            .seen(&fact.source, node(fact))
            .fix("Use a kernel with CONFIG_VFIO_DEVICE_CDEV (6.6 or later).")
        }
        (_, false) => Finding::not_applicable(
            check,
            "No configured class has confidential guests. Kata's shim in Rust (runtime-rs) needs it for all.",
        )
        .seen(&fact.source, node(fact)),
        (_, true) => {
            let (source, presence) = case.host.modules.get("iommufd");
            let finding = Finding::failed(
                check,
                format!("Confidential guests ({classes}) take devices through iommufd, and {} is not there.", fact.source),
            )
            .seen(&fact.source, node(fact))
            .seen(source, format!("iommufd: {}", words(&presence)));
            match presence {
                Presence::Missing => finding.fix("Use a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV (6.6 or later)."),
                _ => finding.fix("modprobe iommufd; for every boot: echo iommufd >/etc/modules-load.d/iommufd.conf"),
            }
        }
    }
}
