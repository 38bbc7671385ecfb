//! `containerd diff`: what `apply` would change in containerd's files.

use anyhow::Result;
use serde::Serialize;

use crate::cli::Global;
use crate::journal::Journal;
use crate::plan::{self, Allowed, ChangedFile, Drifted};
use crate::{observe, output};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// As with "apply": take over handlers that somebody else registered.
    #[arg(long)]
    adopt: bool,
    /// As with "apply": leave handlers of ours as somebody edited them.
    #[arg(long)]
    keep_drift: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Diff {
    files: Vec<ChangedFile>,
    /// What somebody changed in our tables since they were written.
    drifted: Vec<Drifted>,
    /// That, where it is to stay.
    kept: Vec<Drifted>,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let node = global.node()?;
    let journal = Journal::open(&node.root, &node.store.state_dir())?;
    let seen = observe::containerd(&node, &journal).await?;
    let allowed = Allowed {
        adopt: arguments.adopt,
        keep_drift: arguments.keep_drift,
    };
    let placed = plan::place(&node.config, &seen, allowed)?;
    let diff = Diff {
        files: plan::changed_files(&placed),
        drifted: placed.edited.drifted.iter().map(Drifted::from).collect(),
        kept: placed.edited.kept.iter().map(Drifted::from).collect(),
    };
    output::result(global.output, "ContainerdDiff", &diff, &text(&diff))
}

fn text(diff: &Diff) -> String {
    let mut out = String::new();
    for file in &diff.files {
        // Writing to a string does not fail.
        let _ = file.write_text(&mut out);
    }
    for (drifts, end) in [(&diff.drifted, "put right"), (&diff.kept, "left so")] {
        for drift in drifts {
            out.push_str(&format!(
                "{} was changed by somebody since, and would be {end}:\n{}\n",
                drift.handler,
                plan::indented(&drift.diff, "    ")
            ));
        }
    }
    if out.is_empty() {
        out.push_str("Nothing would change in containerd's files.\n");
    }
    out
}
