//! `containerd show`: which files containerd reads, and which handlers they give.

use anyhow::Result;
use km_containerd_config::effective::Effective;
use km_containerd_config::live::LiveHandlers;
use km_containerd_config::{ContainerdVersion, peers, place};
use serde::Serialize;

use crate::cli::Global;
use crate::node::Node;
use crate::plan::Drifted;
use crate::{flavor, observe, output, plan, wanted};

/// Whose rules are shown where containerd cannot be asked for its version.
const ASSUMED: ContainerdVersion = ContainerdVersion::new(2, 0, 0);

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    flavor: flavor::Kind,
    /// `None` while it does not answer.
    version: Option<String>,
    problem: Option<String>,
    files: Vec<File>,
    /// Files that are imported by name and not there.
    missing: Vec<String>,
    handlers: Vec<Handler>,
    /// What somebody changed in our tables since they were written.
    drifted: Vec<Drifted>,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct File {
    path: String,
    version: Option<u32>,
    imported_by: Option<String>,
    /// Its plugin tables that are in force.
    plugins: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Handler {
    name: String,
    /// Who registered it.
    by: &'static str,
    /// The files that it comes from, the one that wins last.
    files: Vec<String>,
    /// `None` while containerd does not answer.
    live: Option<bool>,
    runtime_type: Option<String>,
}

pub(super) async fn run(global: &Global) -> Result<()> {
    let node = global.node()?;
    let shown = look(&node).await?;
    output::result(global.output, "Containerd", &shown, &text(&shown))
}

async fn look(node: &Node) -> Result<Shown> {
    let flavor = node.flavor()?;
    let asked = ask(node).await;
    let known = asked.as_ref().ok();
    let version = known.and_then(|(version, _)| version.parse().ok());
    let (_, effective) = observe::files(node, version.unwrap_or(ASSUMED))?;
    let wanted = wanted::handlers(
        &node.config,
        version.unwrap_or(ASSUMED),
        crate::programs::available(&node.config),
    );
    let drifts = place::drift(&effective, &wanted);
    Ok(Shown {
        flavor,
        version: known.map(|(version, _)| version.clone()),
        problem: asked.as_ref().err().map(|error| format!("{error:#}")),
        files: files(&effective),
        missing: effective
            .missing
            .iter()
            .map(|missing| format!("{} (imported by {})", missing.path, missing.by))
            .collect(),
        handlers: handlers(&effective, known.map(|(_, live)| live)),
        drifted: drifts.iter().map(Drifted::from).collect(),
        notes: notes(&effective),
    })
}

async fn ask(node: &Node) -> Result<(String, LiveHandlers)> {
    let cri = node.daemon()?.cri().await?;
    let version = cri.version().await?.runtime_version;
    Ok((
        version,
        LiveHandlers::from_cri_config(&cri.status().await?.config),
    ))
}

fn files(effective: &Effective) -> Vec<File> {
    let owners = effective.owners();
    let plugins = |file: &km_containerd_config::effective::LoadedFile| {
        let mine = owners
            .iter()
            .filter(|(_, files)| files.contains(&file.path));
        mine.map(|(plugin, _)| plugin.clone()).collect()
    };
    let files = effective.files.iter();
    files
        .map(|file| File {
            path: file.path.to_string(),
            version: file.document.version(),
            imported_by: file
                .imported_by
                .map(|by| effective.files[by].path.to_string()),
            plugins: plugins(file),
        })
        .collect()
}

fn handlers(effective: &Effective, live: Option<&LiveHandlers>) -> Vec<Handler> {
    let found = effective.handlers();
    let mut handlers: Vec<Handler> = found
        .iter()
        .map(|handler| Handler {
            name: handler.name.clone(),
            by: peers::who(handler).name(),
            files: handler.files.iter().map(ToString::to_string).collect(),
            live: live.map(|live| live.0.contains_key(&handler.name)),
            runtime_type: handler
                .settings
                .get("runtime_type")
                .and_then(|value| value.as_str())
                .map(str::to_owned),
        })
        .collect();
    for (name, report) in live.into_iter().flat_map(|live| &live.0) {
        if found.iter().all(|handler| handler.name != *name) {
            handlers.push(Handler {
                name: name.clone(),
                by: "no file",
                files: Vec::new(),
                live: Some(true),
                runtime_type: report.runtime_type.clone(),
            });
        }
    }
    handlers
}

fn notes(effective: &Effective) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(winner) = effective.replaces_main() {
        notes.push(format!(
            "{} has a table of the CRI plugin: this containerd takes it in place of the main file's",
            winner.path
        ));
    }
    for file in effective.other_versions() {
        notes.push(format!(
            "{} has another version than the main file: containerd drops the CRI settings of one of them, or does not start",
            file.path
        ));
    }
    notes
}

fn text(shown: &Shown) -> String {
    let mut out = match (&shown.version, &shown.problem) {
        (Some(version), _) => format!("containerd {version} ({})\n", shown.flavor.name()),
        (None, problem) => format!(
            "containerd ({}) does not answer: {}\nIts files are read as containerd 2.x reads them.\n",
            shown.flavor.name(),
            problem.as_deref().unwrap_or_default()
        ),
    };
    out.push_str("\nFILES\n");
    if shown.files.is_empty() {
        out.push_str("  none: containerd's defaults are in force\n");
    }
    for file in &shown.files {
        let version = file
            .version
            .map_or("no version".to_owned(), |v| format!("version {v}"));
        let by = file.imported_by.as_ref();
        let by = by
            .map(|by| format!(", imported by {by}"))
            .unwrap_or_default();
        out.push_str(&format!("  {} ({version}{by})\n", file.path));
    }
    for missing in &shown.missing {
        out.push_str(&format!(
            "  MISSING {missing}: containerd stops reading there\n"
        ));
    }
    out.push_str(&format!(
        "\n{:<28} {:<5} {:<29} {}\n",
        "HANDLER", "LIVE", "BY", "FROM"
    ));
    for handler in &shown.handlers {
        let live = match handler.live {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "?",
        };
        let files = handler.files.join(", ");
        out.push_str(&format!(
            "{:<28} {live:<5} {:<29} {files}\n",
            handler.name, handler.by
        ));
    }
    for drift in &shown.drifted {
        out.push_str(&format!(
            "\n{} was changed by somebody since; \"kata-manager apply\" puts it right:\n{}\n",
            drift.handler,
            plan::indented(&drift.diff, "    ")
        ));
    }
    for note in &shown.notes {
        out.push_str(&format!("\nnote: {note}\n"));
    }
    out
}
