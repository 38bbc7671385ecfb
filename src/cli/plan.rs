//! `plan`: show what `apply` would change.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::Global;
use crate::journal::Journal;
use crate::node::Node;
use crate::observe::{self, Observation};
use crate::output;
use crate::plan::{self, Allowed, Plan, Prepared};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Save the plan, for "apply FILE".
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// End with exit code 2 when there is something to do.
    #[arg(long)]
    exit_code: bool,
    /// Take over handlers that somebody else registered; they are given back at uninstall.
    #[arg(long)]
    adopt: bool,
    /// Leave handlers of ours as somebody edited them since.
    #[arg(long)]
    keep_drift: bool,
}

impl Arguments {
    fn allowed(&self) -> Allowed {
        Allowed {
            adopt: self.adopt,
            keep_drift: self.keep_drift,
        }
    }
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<u8> {
    let node = global.node()?;
    let journal = Journal::open(&node.root, &node.store.state_dir())?;
    let (_, prepared) = prepare(&node, &node.registry()?, &journal, arguments.allowed()).await?;
    let mut plan = prepared.plan;
    if journal.record().owed.is_some() {
        plan.warnings.push(
            "an earlier run was killed while it changed containerd: \"apply\" finishes that first"
                .to_owned(),
        );
    }
    if let Some(path) = &arguments.out {
        let text = format!("{:#}\n", output::object("Plan", &plan)?);
        km_host::atomic::write(path, text.as_bytes(), 0o644)?;
    }
    output::result(global.output, "Plan", &plan, &text(&plan))?;
    Ok(if arguments.exit_code && !plan.is_empty() {
        2
    } else {
        0
    })
}

/// Observes and plans.
pub(super) async fn prepare(
    node: &Node,
    client: &km_artifacts::registry::Client,
    journal: &Journal,
    allowed: Allowed,
) -> Result<(Observation, Prepared)> {
    let seen = observe::observe(node, client, journal).await?;
    let prepared = plan::make(&node.config, &node.config_bytes, &seen, allowed)
        .context("cannot make a plan")?;
    Ok((seen, prepared))
}

/// The plan for people, with its last line.
fn text(plan: &Plan) -> String {
    let warnings: String = plan
        .warnings
        .iter()
        .map(|warning| format!("warning: {warning}\n"))
        .collect();
    if plan.is_empty() {
        return format!("{warnings}Nothing to do: the node is as the configuration says.\n");
    }
    let count = plan.steps.len();
    format!(
        "{warnings}kata-manager would change this node:\n\n{}\nPlan: {count} steps. \"kata-manager apply\" carries them out.\n",
        plan.to_text()
    )
}
