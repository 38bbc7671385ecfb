//! What virtual machines need of the host, GPUs or not.

use super::vfio::words;
use super::{Case, node};
use crate::fact::{Fact, Found, Node};
use crate::finding::{Check, Finding, State};
use crate::host::Vendor;
use crate::modules::Presence;

pub(super) fn kvm(case: Case<'_>) -> Finding {
    let check = Check::Kvm;
    let fact = &case.host.kvm;
    if let Some(reason) = fact.unknown() {
        return Finding::unknown(check, reason);
    }
    if fact.get() == Some(&Node::Device) {
        return Finding::ok(check, "KVM is there.").seen(&fact.source, node(fact));
    }
    let cpu = case.host.cpu.get();
    let finding = Finding::failed(check, "KVM is not there: no virtual machine can run.")
        .seen(&fact.source, node(fact));
    let finding = match cpu {
        Some(cpu) => finding.seen(
            &case.host.cpu.source,
            match cpu.virtualization {
                true => "flags: has vmx or svm",
                false => "flags: neither vmx nor svm",
            },
        ),
        None => finding,
    };
    match cpu.map(|cpu| (cpu.vendor, cpu.virtualization)) {
        Some((Vendor::Intel, true)) => finding.fix("modprobe kvm_intel"),
        Some((Vendor::Amd, true)) => finding.fix("modprobe kvm_amd"),
        Some((Vendor::Intel, false)) => finding.fix("Firmware: switch on \"Intel Virtualization Technology\" (\"VT-x\")."),
        Some((Vendor::Amd, false)) => finding.fix("Firmware: switch on \"SVM Mode\"."),
        _ => finding.fix("Switch virtualization on in the firmware (VT-x, SVM), then modprobe kvm_intel or kvm_amd."),
    }
}

pub(super) fn vhost_vsock(case: Case<'_>) -> Finding {
    let finding = loaded(
        case,
        Check::VhostVsock,
        &case.host.vhost_vsock,
        "vhost_vsock",
        State::Failed,
    );
    match finding.state {
        State::Failed => finding.fix("modprobe vhost_vsock; for every boot: echo vhost_vsock >/etc/modules-load.d/vhost_vsock.conf"),
        _ => finding,
    }
}

pub(super) fn vhost_net(case: Case<'_>) -> Finding {
    let finding = loaded(
        case,
        Check::VhostNet,
        &case.host.vhost_net,
        "vhost_net",
        State::Warning,
    );
    match finding.state {
        State::Warning => finding.fix("modprobe vhost_net; for every boot: echo vhost_net >/etc/modules-load.d/vhost_net.conf"),
        _ => finding,
    }
}

/// A device node that a module brings. The node alone is enough: opening it loads the module.
fn loaded(
    case: Case<'_>,
    check: Check,
    fact: &Fact<Node>,
    module: &str,
    otherwise: State,
) -> Finding {
    if let Some(reason) = fact.unknown() {
        return Finding::unknown(check, reason);
    }
    if fact.get() == Some(&Node::Device) {
        return Finding::ok(check, format!("{} is there.", fact.source))
            .seen(&fact.source, node(fact));
    }
    let (source, presence) = case.host.modules.get(module);
    let why = match presence {
        Presence::Loaded => "although its module is loaded: udev or the container's /dev hides it",
        Presence::Missing => "and the running kernel has no such module",
        Presence::Installed | Presence::Unknown(_) => "for its module is not loaded",
    };
    let finding = Finding::new(
        check,
        otherwise,
        format!("{} is not there, {why}.", fact.source),
    );
    finding
        .seen(&fact.source, node(fact))
        .seen(source, format!("{module}: {}", words(&presence)))
}

/// VFIO pins all of a guest's memory, on account of QEMU's process, which has its limits from containerd's.
pub(super) fn memlock(case: Case<'_>) -> Finding {
    let check = Check::Memlock;
    let fact = &case.host.limits;
    let limits = match &fact.found {
        Found::Is(limits) => limits,
        Found::Unknown(reason) => {
            return Finding::unknown(check, format!("{}: {reason}", fact.source));
        }
        Found::Absent => {
            return Finding::unknown(
                check,
                "No process of containerd is there, from which virtual machines have their limits.",
            );
        }
    };
    let shown = match limits.memlock {
        None => "Max locked memory: unlimited".to_owned(),
        Some(bytes) => format!("Max locked memory: {bytes} bytes"),
    };
    if limits.memlock.is_none() {
        return Finding::ok(check, "Virtual machines may pin all memory.")
            .seen(&fact.source, shown);
    }
    if limits.ipc_lock {
        return Finding::ok(
            check,
            "Virtual machines have CAP_IPC_LOCK, and may pin all memory.",
        )
        .seen(&fact.source, format!("{shown}; CAP_IPC_LOCK"));
    }
    Finding::failed(check, "Virtual machines may pin little memory, and VFIO pins all of a guest's.")
        .seen(&fact.source, format!("{shown}; no CAP_IPC_LOCK"))
        .fix("systemctl edit containerd: under [Service] write LimitMEMLOCK=infinity; then systemctl restart containerd")
}
