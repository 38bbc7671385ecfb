//! `status`: how the node stands, without asking any registry.

use anyhow::Result;
use serde::Serialize;

use super::Global;
use crate::journal::Journal;
use crate::node::Node;
use crate::{observe, output, plan, programs, wanted};
use km_containerd_config::ContainerdVersion;
use km_containerd_config::edit::Owner;
use km_containerd_config::live::LiveHandlers;
use km_containerd_config::place;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    containerd: Containerd,
    classes: Vec<Class>,
    sandboxes: usize,
    /// The journal says that an earlier run was killed half way.
    unfinished: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Containerd {
    config: String,
    version: Option<String>,
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Class {
    name: String,
    handler: String,
    /// `live`, `registered` (in the file, not live), `foreign` (somebody else's) or `absent`.
    handler_state: &'static str,
    /// What somebody changed in the handler's table since: `-` lines are wanted, `+` lines stand there.
    drift: Vec<String>,
    generation: Option<u64>,
    reference: Option<String>,
    manifest: Option<String>,
    bytes: u64,
    damaged: Vec<String>,
    /// `rollback` holds it at this generation.
    held: Option<u64>,
    sandboxes: Vec<String>,
}

pub(super) async fn run(global: &Global) -> Result<()> {
    let node = global.node()?;
    let status = look(&node).await?;
    output::result(global.output, "Status", &status, &text(&status))
}

async fn look(node: &Node) -> Result<Status> {
    let asked = ask(node).await;
    let (version, live, sandboxes) = match &asked {
        Ok((version, live, sandboxes)) => (Some(version.clone()), Some(live), sandboxes.as_slice()),
        Err(_) => (None, None, &[][..]),
    };
    // A file that cannot be read shows no handlers here; `plan` says what is wrong with it.
    let rules = version.as_ref().and_then(|version| version.parse().ok());
    let rules = rules.unwrap_or(ContainerdVersion::new(2, 0, 0));
    let effective = observe::files(node, rules)
        .ok()
        .map(|(_, effective)| effective);
    let wanted = wanted::handlers(&node.config, rules, programs::available(&node.config));
    let drifts = effective
        .as_ref()
        .map(|effective| place::drift(effective, &wanted));
    let drifts = drifts.unwrap_or_default();
    let found = effective
        .map(|effective| effective.handlers())
        .unwrap_or_default();
    let journal = Journal::open(&node.root, &node.store.state_dir())?;
    let mut classes = Vec::new();
    for class in &node.config.runtime_classes {
        let handler = class.handler();
        let in_force = found.iter().find(|found| found.name == handler);
        let owner = in_force.map(|found| found.owner);
        let drift = drifts.iter().find(|drift| drift.name == handler);
        let is_live = live.is_some_and(|live| live.0.contains_key(handler));
        let generation = node.store.live(&class.name).ok().flatten();
        let damaged = generation
            .as_ref()
            .map(|live| node.store.check(live, false))
            .transpose()?
            .unwrap_or_default();
        classes.push(Class {
            name: class.name.clone(),
            handler: handler.to_owned(),
            handler_state: match owner {
                Some(Owner::Ours) if is_live => "live",
                Some(Owner::Ours) => "registered",
                Some(_) => "foreign",
                None => "absent",
            },
            drift: drift
                .map(km_containerd_config::edit::Drift::lines)
                .unwrap_or_default(),
            generation: generation.as_ref().map(km_artifacts::Generation::number),
            reference: generation
                .as_ref()
                .map(|live| live.manifest.reference.clone()),
            manifest: generation
                .as_ref()
                .map(|live| live.manifest.manifest.to_string()),
            bytes: generation.as_ref().map_or(0, |live| {
                live.manifest.files.iter().map(|file| file.file.size).sum()
            }),
            damaged: damaged.iter().map(ToString::to_string).collect(),
            held: journal.record().held.get(&class.name).copied(),
            sandboxes: sandboxes
                .iter()
                .filter(|sandbox| sandbox.handler == handler)
                .map(|sandbox| sandbox.id.clone())
                .collect(),
        });
    }
    Ok(Status {
        containerd: Containerd {
            config: node.config.containerd.config.to_string(),
            version,
            problem: asked.as_ref().err().map(|error| format!("{error:#}")),
        },
        sandboxes: sandboxes.len(),
        classes,
        unfinished: journal.record().owed.is_some(),
    })
}

async fn ask(node: &Node) -> Result<(String, LiveHandlers, Vec<km_cri::Sandbox>)> {
    let cri = node.daemon()?.cri().await?;
    let version = cri.version().await?.runtime_version;
    let live = LiveHandlers::from_cri_config(&cri.status().await?.config);
    Ok((version, live, cri.sandboxes().await?))
}

fn text(status: &Status) -> String {
    let mut out = match (&status.containerd.version, &status.containerd.problem) {
        (Some(version), _) => format!(
            "containerd {version}, {} ({} sandboxes)\n\n",
            status.containerd.config, status.sandboxes
        ),
        (None, problem) => format!(
            "containerd does not answer: {}\n\n",
            problem.as_deref().unwrap_or_default()
        ),
    };
    out.push_str(&format!(
        "{:<28} {:<11} {:>10} {:>10}  {}\n",
        "CLASS", "HANDLER", "GENERATION", "SIZE", "ARTIFACT"
    ));
    for class in &status.classes {
        let generation = class
            .generation
            .map_or("-".to_owned(), |number| number.to_string());
        let artifact = match (&class.reference, &class.manifest) {
            (Some(reference), Some(manifest)) => {
                format!("{reference} ({})", &manifest[..manifest.len().min(19)])
            }
            _ => "-".to_owned(),
        };
        let size = output::bytes(class.bytes);
        out.push_str(&format!(
            "{:<28} {:<11} {generation:>10} {size:>10}  {artifact}\n",
            class.name, class.handler_state
        ));
        if !class.drift.is_empty() {
            out.push_str(&format!(
                "  changed by somebody in containerd's configuration; \"kata-manager apply\" puts it right:\n{}\n",
                plan::indented(&class.drift, "    ")
            ));
        }
        if let Some(number) = class.held {
            out.push_str(&format!(
                "  held at generation {number}; \"kata-manager rollback {} --release\" lets apply move it\n",
                class.name
            ));
        }
        for damage in &class.damaged {
            out.push_str(&format!(
                "  damaged: {damage}; \"kata-manager apply\" makes it again\n"
            ));
        }
        for sandbox in &class.sandboxes {
            out.push_str(&format!("  in use by sandbox {sandbox}\n"));
        }
    }
    if status.unfinished {
        out.push_str("\nAn earlier run was killed while it changed containerd: \"kata-manager apply\" finishes it.\n");
    }
    out
}
