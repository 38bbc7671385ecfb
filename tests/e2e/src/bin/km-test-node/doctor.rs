//! `kata-manager doctor` on a real kernel: what it finds is held against the shape, before and after its devices are bound.

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::node_in_a_box::Node;
use serde::Deserialize;

/// The whole answer, as far as it is looked at.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    healthy: bool,
    findings: Vec<Finding>,
}

#[derive(Debug, Deserialize)]
struct Finding {
    check: String,
    state: String,
    message: String,
}

/// What the node has of its own: its kernel, and no Kata.
const ALWAYS: [(&str, &str); 4] = [
    ("vfio-modules", "ok"),
    ("containerd-cdi", "ok"),
    ("kata", "failed"),
    ("handlers", "ok"),
];

fn report(node: &mut Node) -> Result<Report> {
    // Kata is not there, which is a failure.
    let said = node.kata_manager(&["doctor", "--output", "json"], 9)?;
    serde_json::from_str(&said.stdout).with_context(|| format!("read {}", said.stdout))
}

/// That these checks say this, and the report says what they do.
fn says(node: &mut Node, expected: &[(&str, &str)]) -> Result<()> {
    let report = report(node)?;
    let finding = |check: &str| {
        let found = report
            .findings
            .iter()
            .find(|finding| finding.check == check);
        found.with_context(|| format!("{check} is not told"))
    };
    for (check, state) in ALWAYS.iter().chain(expected) {
        let said = finding(check)?;
        ensure!(
            said.state == *state,
            "{check}: {state} is wanted, and it is {}: {}",
            said.state,
            said.message
        );
    }
    let failed = report
        .findings
        .iter()
        .any(|finding| finding.state == "failed");
    ensure!(report.healthy != failed, "healthy and failed: {report:?}");
    Ok(())
}

fn ready(node: &mut Node, expected: bool) -> Result<()> {
    node.kata_manager(&["doctor", "--write-ready"], 9)?;
    let files =
        node.shell("ls /run/nvidia/validations; cat /run/nvidia/validations/workload-type")?;
    ensure!(files.contains("vm-passthrough"), "there is {files}");
    ensure!(
        files.contains("vfio-pci-ready") == expected,
        "there is {files}"
    );
    Ok(())
}

/// Nothing is bound yet: everything else is as the shape says.
pub(crate) fn unbound(node: &mut Node) -> Result<()> {
    let iommu = if node.shape().iommu { "ok" } else { "failed" };
    let grouped = if node.shape().iommu {
        "ok"
    } else {
        "notApplicable"
    };
    says(
        node,
        &[
            ("devices", "ok"),
            ("iommu", iommu),
            ("acs", grouped),
            // A companion in the slot of its GPU goes with it.
            ("groups", grouped),
            ("bar-space", "ok"),
            ("drivers", "warning"),
        ],
    )?;
    ready(node, false)
}

/// Everything is bound: the GPU Operator is told so.
pub(crate) fn bound(node: &mut Node) -> Result<()> {
    says(
        node,
        &[("drivers", "ok"), ("groups", "ok"), ("devices", "ok")],
    )?;
    ready(node, true)
}

/// A GPU that has fallen off the bus.
pub(crate) fn dead(node: &mut Node, name: &str) -> Result<()> {
    node.emulator().kill(name)?;
    says(node, &[("devices", "failed")])?;
    node.emulator().revive(name)?;
    says(node, &[("devices", "ok")])
}
