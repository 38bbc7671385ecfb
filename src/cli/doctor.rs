//! `doctor`: what keeps this host from passing GPUs through, and what to do about it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use km_doctor::ready::{self, Readiness, Step};
use km_doctor::{Case, Finding, Host, State, examine};
use km_vfio::Address;
use serde::Serialize;

use super::Global;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::specs::{self, Settings};
use crate::{neighbours, output};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The GPUs and NVSwitches that are to be passed through, such as 0000:41:00.0 or 41:00.0; all of them when none is named.
    #[arg(value_name = "ADDRESS")]
    addresses: Vec<Address>,
    /// Tell NVIDIA's GPU Operator whether the node is ready: write its validator's files in /run/nvidia/validations, and remove
    /// those that are true no more.
    #[arg(long)]
    write_ready: bool,
    #[command(flatten)]
    specs: specs::Options,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    /// Whether nothing failed.
    healthy: bool,
    /// Configured classes whose guests are confidential, for which more is needed.
    confidential_classes: Vec<&'a str>,
    findings: Vec<Told<'a>>,
    readiness: Option<Ready>,
}

#[derive(Debug, Serialize)]
struct Told<'a> {
    title: &'static str,
    #[serde(flatten)]
    finding: &'a Finding,
}

/// What the GPU Operator has been told.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Ready {
    vfio_pci: bool,
    cc_manager: bool,
    /// Why not, each a sentence.
    reasons: Vec<String>,
    steps: Vec<Step>,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let node = global.node_if_configured()?;
    let settings = Settings::new(&arguments.specs, &node.config.devices)?;
    let wants = neighbours::wants(&node.config, &arguments.addresses);
    let host = Host::observe(&node.root);
    let devices = settings.find(&node.root, &host.inventory);
    let software = neighbours::look(&node, &settings, &devices).await;
    let findings = examine(Case {
        host: &host,
        software: &software,
        wants: &wants,
    });
    let readiness = match arguments.write_ready {
        true => Some(write_ready(&node, &host, &wants, global.lock_wait())?),
        false => None,
    };
    let failed: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.state == State::Failed)
        .map(|finding| finding.check.name())
        .collect();
    let report = Report {
        healthy: failed.is_empty(),
        confidential_classes: wants
            .snp
            .iter()
            .chain(&wants.tdx)
            .map(String::as_str)
            .collect(),
        findings: findings
            .iter()
            .map(|finding| Told {
                title: finding.check.title(),
                finding,
            })
            .collect(),
        readiness,
    };
    output::result(global.output, "Doctor", &report, &text(&report))?;
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!(
        "{} of {} checks failed: {}",
        failed.len(),
        findings.len(),
        failed.join(", ")
    );
    Err(Failure::new(Kind::Device, message).into())
}

/// `wait` is how long another command may take that changes devices.
fn write_ready(
    node: &Node,
    host: &Host,
    wants: &km_doctor::Wants,
    wait: Duration,
) -> Result<Ready> {
    if let Some(reason) = host.pci.unknown() {
        let message = format!("cannot look at the PCI bus ({reason}), so nothing is told");
        return Err(Failure::new(Kind::Host, message).into());
    }
    let _lock = specs::lock(&node.root, wait)?;
    let Readiness { vfio, cc } = ready::judge(&node.root, &host.inventory, wants);
    let steps = ready::plan(
        &node.root,
        &Readiness {
            vfio: vfio.clone(),
            cc: cc.clone(),
        },
    )?;
    ready::apply(&node.root, &steps).context("cannot tell the GPU Operator")?;
    Ok(Ready {
        vfio_pci: vfio.is_none(),
        cc_manager: cc.is_none(),
        reasons: vfio.into_iter().chain(cc).collect(),
        steps,
    })
}

fn text(report: &Report<'_>) -> String {
    let findings = || {
        report
            .findings
            .iter()
            .map(|told| (told.title, told.finding))
    };
    let mut rows = vec![["STATE", "CHECK", "SHOULD BE"].map(str::to_owned)];
    rows.extend(findings().map(|(title, finding)| {
        [
            finding.state.word().to_owned(),
            finding.check.name().to_owned(),
            title.to_owned(),
        ]
    }));
    let mut out = output::table(&rows);
    for (_, finding) in findings() {
        if matches!(finding.state, State::Ok | State::NotApplicable) {
            continue;
        }
        out.push_str(&format!(
            "\n{}: {}\n    {}\n",
            finding.check.name(),
            finding.state.word(),
            finding.message
        ));
        for seen in &finding.evidence {
            out.push_str(&format!("    seen: {}: {}\n", seen.source, seen.value));
        }
        for fix in &finding.fix {
            out.push_str(&format!("    do:   {fix}\n"));
        }
    }
    if let Some(ready) = &report.readiness {
        out.push_str(&told_of(ready));
    }
    let count = |state| {
        findings()
            .filter(|(_, finding)| finding.state == state)
            .count()
    };
    out.push_str(&format!(
        "\nfailed: {}, warnings: {}, could not check: {}, ok: {}, not applicable: {}\n",
        count(State::Failed),
        count(State::Warning),
        count(State::CouldNotCheck),
        count(State::Ok),
        count(State::NotApplicable)
    ));
    out
}

fn told_of(ready: &Ready) -> String {
    let mut out = match ready.reasons.is_empty() {
        true => "\nThe GPU Operator is told that this node is ready.\n".to_owned(),
        false => format!(
            "\nThe GPU Operator is not told that this node is ready: {}.\n",
            ready.reasons.join("; ")
        ),
    };
    for step in &ready.steps {
        match step {
            Step::Write { path, .. } => out.push_str(&format!("    wrote {path}\n")),
            Step::Remove { path, reason } => {
                out.push_str(&format!("    removed {path}: {reason}\n"));
            }
        }
    }
    out
}
