//! `apply`: make the node as the configuration says.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Global;
use crate::failure::{Failure, Kind};
use crate::journal::Journal;
use crate::node::Node;
use crate::output::{self, Format};
use crate::plan::{Allowed, Plan};
use crate::{execute, observe};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// A plan saved by "plan --out"; it is refused when something that it was made from has changed.
    file: Option<PathBuf>,
    /// Take over handlers that somebody else registered; they are given back at uninstall.
    #[arg(long)]
    adopt: bool,
    /// Leave handlers of ours as somebody edited them since; without it they are put right.
    #[arg(long)]
    keep_drift: bool,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let node = global.node()?;
    let client = node.registry()?;
    let saved = arguments.file.as_deref().map(load).transpose()?;
    // Read first: a node that cannot be planned for gets no folders of ours.
    let fresh = !node.store.state_dir().exists();
    if fresh {
        super::plan::prepare(
            &node,
            &client,
            &Journal::open(&node.root, &node.store.state_dir())?,
            allowed(arguments, saved.as_ref()),
        )
        .await?;
    }
    let (_lock, mut journal) = node.lock()?;
    execute::settle(&node, &mut journal).await?;
    execute::clean_up(&node, &mut journal)?;
    let (seen, prepared) =
        super::plan::prepare(&node, &client, &journal, allowed(arguments, saved.as_ref())).await?;
    if let Some(saved) = &saved {
        require_same(saved, &prepared.plan)?;
    }
    for warning in &prepared.plan.warnings {
        output::to_stderr(&format!("warning: {warning}"));
    }
    if prepared.plan.is_empty() {
        node.store.end_session()?;
        return output::result(
            global.output,
            "Applied",
            &prepared.plan,
            "Nothing to do: the node is as the configuration says.\n",
        );
    }
    if global.output == Format::Text {
        output::to_stdout(&prepared.plan.to_text())?;
    }
    let executed = execute::execute(&node, &client, &mut journal, &seen, &prepared).await;
    let ended = node.store.end_session();
    executed?;
    ended?;
    let handlers: Vec<&str> = seen
        .containerd
        .wanted
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    output::result(
        global.output,
        "Applied",
        &prepared.plan,
        &format!("Done. {}\n", live_words(&node, &handlers)),
    )
}

fn live_words(node: &Node, handlers: &[&str]) -> String {
    let names = handlers.join(", ");
    if node.config.containerd.restart.mode == crate::config::RestartMode::None {
        format!("Registered: {names}. Restart containerd to make them live.")
    } else {
        format!("Live in containerd: {names}.")
    }
}

/// A saved plan adopts if it was made so.
fn allowed(arguments: &Arguments, saved: Option<&Plan>) -> Allowed {
    let saved = saved.is_some_and(|plan| {
        plan.steps.iter().any(|step| matches!(step, crate::plan::Step::Containerd { adopted, .. } if !adopted.is_empty()))
    });
    Allowed {
        adopt: arguments.adopt || saved,
        keep_drift: arguments.keep_drift,
    }
}

fn load(path: &Path) -> Result<Plan> {
    let bytes = observe::read(path)?.ok_or_else(|| {
        Failure::new(
            Kind::Configuration,
            format!(
                "there is no plan {}: make one with \"plan --out\"",
                path.display()
            ),
        )
    })?;
    let text = std::str::from_utf8(&bytes).context("a plan is UTF-8 text");
    text.and_then(|text| {
        serde_json::from_str(text).context("it is not as \"plan --out\" writes it")
    })
    .with_context(|| {
        Failure::new(
            Kind::Configuration,
            format!("{} is no plan", path.display()),
        )
    })
}

fn require_same(saved: &Plan, now: &Plan) -> Result<()> {
    let what = if saved.inputs.configuration != now.inputs.configuration {
        "kata-manager's configuration has changed"
    } else if saved.inputs.containerd != now.inputs.containerd {
        "containerd's configuration has changed"
    } else if saved.steps != now.steps {
        "the node or a tag in the registry has changed"
    } else {
        return Ok(());
    };
    Err(Failure::refused(format!(
        "the plan is out of date: {what} since it was made; make a new one and look at it"
    ))
    .into())
}
