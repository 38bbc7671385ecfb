//! The checks: one pure function each, by what they are about. Must not read or write anything.

mod confidential;
mod devices;
mod iommu;
mod kubelet;
mod machine;
mod software;
mod vfio;

use km_vfio::{Function, Member};

use crate::fact::{Fact, Node};
use crate::finding::{Check, Finding};
use crate::host::{Host, Vendor};
use crate::software::{Software, Wants};

/// What every check looks at.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The host.
    pub host: &'a Host,
    /// What runs on it.
    pub software: &'a Software,
    /// What is wanted of it.
    pub wants: &'a Wants,
}

/// Every check's finding, in the order of [`Check::ALL`].
pub fn examine(case: Case<'_>) -> Vec<Finding> {
    Check::ALL.iter().map(|check| find(*check, case)).collect()
}

fn find(check: Check, case: Case<'_>) -> Finding {
    match check {
        Check::Devices => devices::devices(case),
        Check::BarSpace => devices::bar_space(case),
        Check::Drivers => devices::drivers(case),
        Check::Iommu => iommu::iommu(case),
        Check::Acs => iommu::acs(case),
        Check::Groups => iommu::groups(case),
        Check::VfioModules => vfio::modules(case),
        Check::Iommufd => vfio::iommufd(case),
        Check::Kvm => machine::kvm(case),
        Check::VhostVsock => machine::vhost_vsock(case),
        Check::VhostNet => machine::vhost_net(case),
        Check::Memlock => machine::memlock(case),
        Check::SevSnp => confidential::sev_snp(case),
        Check::Tdx => confidential::tdx(case),
        Check::PodResources => kubelet::pod_resources(case),
        Check::KubeletTimeout => kubelet::timeout(case),
        Check::ContainerdCdi => software::containerd_cdi(case),
        Check::Kata => software::kata(case),
        Check::NvidiaPlugin => software::nvidia_plugin(case),
        Check::Handlers => software::handlers(case),
    }
}

impl<'a> Case<'a> {
    /// The GPUs and NVSwitches that are wanted.
    fn wanted(self) -> Vec<&'a Function> {
        let named = &self.wants.devices;
        let primaries = self.host.inventory.primaries();
        primaries
            .filter(|function| named.is_empty() || named.contains(&function.address))
            .collect()
    }

    /// That there is none: it could not be looked for, or is not there.
    fn without_devices(self, check: Check) -> Finding {
        match self.host.pci.unknown() {
            Some(reason) => Finding::unknown(check, reason),
            None => Finding::not_applicable(check, "There is no wanted device to look at."),
        }
    }

    /// Who made the processor, if that is known.
    fn vendor(self) -> Option<Vendor> {
        self.host.cpu.get().map(|cpu| cpu.vendor)
    }

    /// The other endpoints of a device's group that are not of its slot.
    fn strangers(self, function: &Function) -> Vec<&'a Member> {
        let group = function.iommu_group;
        let Some(group) = group.and_then(|id| self.host.inventory.group(id)) else {
            return Vec::new();
        };
        let other = |member: &&Member| {
            member.kind.is_some() && !member.address.same_slot(&function.address)
        };
        group.members.iter().filter(other).collect()
    }
}

/// A function for people: `0000:41:00.0 (H100 PCIe)`.
fn name(function: &Function) -> String {
    format!("{} ({})", function.address, function.label())
}

/// A list for people.
fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let all: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    all.join(", ")
}

/// What a fact of a node says, as evidence.
fn node(fact: &Fact<Node>) -> String {
    match (&fact.found, fact.found.unknown()) {
        (_, Some(reason)) => reason.to_owned(),
        (crate::fact::Found::Is(Node::Device), _) => "a character device".to_owned(),
        (crate::fact::Found::Is(Node::Socket), _) => "a socket".to_owned(),
        (crate::fact::Found::Is(Node::Other), _) => "neither a device nor a socket".to_owned(),
        _ => "not there".to_owned(),
    }
}

/// What a fact of a text says, as evidence.
fn text(fact: &Fact<String>) -> String {
    match fact.get() {
        Some(text) => text.clone(),
        None => fact.found.unknown().unwrap_or("not there").to_owned(),
    }
}
