//! The kubelet: whether Kata can ask it, and how long it waits.

use super::{Case, node};
use crate::fact::{Found, Node};
use crate::finding::{Check, Finding};
use crate::kubelet::{DEFAULT_TIMEOUT, duration};

/// NVIDIA's "Deploy Confidential Containers", "Prerequisites": more than five minutes.
const ENOUGH: std::time::Duration = std::time::Duration::from_secs(300);

pub(super) fn pod_resources(case: Case<'_>) -> Finding {
    let check = Check::PodResources;
    let kubelet = &case.host.kubelet;
    let fact = &kubelet.pod_resources;
    match &fact.found {
        Found::Is(Node::Socket) => {
            Finding::ok(check, "The kubelet's socket is there.").seen(&fact.source, node(fact))
        }
        Found::Unknown(reason) => Finding::unknown(check, format!("{}: {reason}", fact.source)),
        _ if kubelet.is_there() => Finding::failed(
            check,
            "The kubelet's socket is not there: Kata cannot learn which devices a pod has.",
        )
        .seen(&fact.source, node(fact))
        .fix("Start the kubelet. Its feature KubeletPodResources must not be switched off; Kata asks with Get, which Kubernetes 1.34 and later answer."),
        _ => match unseen(case) {
            Some(reason) => Finding::unknown(check, reason),
            None => Finding::not_applicable(check, "This host has no kubelet: pods name their devices by annotation.")
                .seen(&fact.source, node(fact)),
        },
    }
}

/// Why a kubelet may be there although none was seen.
fn unseen(case: Case<'_>) -> Option<String> {
    let kubelet = &case.host.kubelet;
    if let Some(reason) = kubelet
        .processes
        .unknown()
        .or_else(|| kubelet.folder.unknown())
    {
        return Some(reason);
    }
    // A running system has a /proc with processes in it.
    (kubelet.processes.found == Found::Absent)
        .then(|| format!("{} is not there", kubelet.processes.source))
}

pub(super) fn timeout(case: Case<'_>) -> Finding {
    let check = Check::KubeletTimeout;
    let kubelet = &case.host.kubelet;
    if kubelet.processes.get().is_none_or(Vec::is_empty) {
        return match unseen(case) {
            Some(reason) => Finding::unknown(check, reason),
            None if kubelet.is_there() => Finding::unknown(
                check,
                "No process named kubelet runs, and so its settings are not known; k3s has its own within it.",
            )
            .fix("Where k3s runs it: give it --kubelet-arg=runtime-request-timeout=15m."),
            None => Finding::not_applicable(check, "This host has no kubelet."),
        };
    }
    let fact = &kubelet.timeout;
    let (value, written) = match &fact.found {
        Found::Unknown(reason) => {
            return Finding::unknown(check, format!("{}: {reason}", fact.source));
        }
        Found::Absent => (
            Some(DEFAULT_TIMEOUT),
            "runtimeRequestTimeout is not set: 2m0s".to_owned(),
        ),
        Found::Is(text) => (duration(text), format!("runtimeRequestTimeout: {text}")),
    };
    let Some(value) = value else {
        return Finding::unknown(
            check,
            "The kubelet's runtimeRequestTimeout could not be understood.",
        )
        .seen(&fact.source, written);
    };
    if value > ENOUGH {
        return Finding::ok(
            check,
            format!("The kubelet waits {} seconds.", value.as_secs()),
        )
        .seen(&fact.source, written);
    }
    Finding::warning(
        check,
        format!(
            "The kubelet gives up after {} seconds. A large guest takes longer to start, and one that pulls its image inside too.",
            value.as_secs()
        ),
    )
    .seen(&fact.source, written)
    .fix("Set runtimeRequestTimeout: 15m in the kubelet's configuration file (--config; kubeadm: /var/lib/kubelet/config.yaml), then systemctl restart kubelet.")
}
