//! `artifacts`: push, pull and list guest artifacts.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use km_artifacts::reference::Reference;
use km_artifacts::registry::Platform;
use km_artifacts::{Limits, PublishOptions};
use serde::Serialize;
use serde_json::json;

use super::Global;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::output;
use crate::progress::Shown;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Publish a folder as a guest artifact: each file becomes a layer.
    Push {
        /// The folder.
        dir: PathBuf,
        /// Where to: registry/repository:tag.
        reference: String,
    },
    /// Fetch and verify artifacts into the store, and switch nothing.
    Pull {
        /// What to fetch; everything that the configuration names when left out.
        references: Vec<String>,
    },
    /// List the generations in the store.
    List,
}

pub(super) async fn run(global: &Global, command: &Command) -> Result<()> {
    let node = global.node()?;
    match command {
        Command::Push { dir, reference } => push(global, &node, dir, reference).await,
        Command::Pull { references } => pull(global, &node, references).await,
        Command::List => list(global, &node),
    }
}

fn parse(text: &str) -> Result<Reference> {
    text.parse().map_err(|error| {
        Failure::because(
            Kind::Configuration,
            format!("{text:?} is no reference to an artifact"),
            error,
        )
        .into()
    })
}

async fn push(global: &Global, node: &Node, dir: &std::path::Path, reference: &str) -> Result<()> {
    let reference = parse(reference)?;
    let client = node.registry()?;
    let published = km_artifacts::publish(
        &client,
        dir,
        &reference,
        &PublishOptions::default(),
        &Shown::new("pushed"),
    )
    .await
    .with_context(|| format!("cannot publish {} as {reference}", dir.display()))?;
    let files: Vec<_> = published
        .files
        .iter()
        .map(|file| json!({ "path": file.path, "digest": file.digest, "size": file.size }))
        .collect();
    let pinned = reference.with_digest(published.digest.clone());
    let body = json!({ "reference": reference.to_string(), "digest": published.digest, "bytes": published.bytes, "files": files });
    let text = format!(
        "Pushed {} files, {}: {pinned}\n",
        published.files.len(),
        output::bytes(published.bytes)
    );
    output::result(global.output, "Pushed", body, &text)
}

async fn pull(global: &Global, node: &Node, references: &[String]) -> Result<()> {
    let mut wanted = references
        .iter()
        .map(|text| parse(text))
        .collect::<Result<Vec<_>>>()?;
    if wanted.is_empty() {
        let classes = node.config.runtime_classes.iter();
        wanted = classes
            .filter_map(|class| class.artifacts.as_ref())
            .map(|artifacts| artifacts.url.reference.clone())
            .collect();
        wanted.sort();
        wanted.dedup();
    }
    let client = node.registry()?;
    let mut pulled = Vec::new();
    let mut text = String::new();
    for reference in wanted {
        let resolved = client
            .resolve(&reference, &Platform::host())
            .await
            .with_context(|| format!("cannot look up {reference}"))?;
        let _lock = node.lock()?;
        let artifact = km_artifacts::pull(
            &node.store,
            &client,
            &reference,
            &resolved,
            &Limits::default(),
            &Shown::new("fetched"),
        )
        .await
        .with_context(|| format!("cannot pull {reference}"))?;
        node.store.end_session()?;
        text.push_str(&format!(
            "{} {reference}: {} files, {}\n",
            resolved.digest,
            artifact.files.len(),
            output::bytes(artifact.bytes())
        ));
        pulled.push(json!({ "reference": reference.to_string(), "digest": resolved.digest, "bytes": artifact.bytes() }));
    }
    output::result(
        global.output,
        "Pulled",
        json!({ "artifacts": pulled }),
        &text,
    )
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    class: String,
    generation: u64,
    live: bool,
    created: String,
    reference: String,
    manifest: String,
    bytes: u64,
}

fn list(global: &Global, node: &Node) -> Result<()> {
    let mut rows = Vec::new();
    for class in node.store.classes()? {
        let live = node.store.live_number(&class)?;
        for generation in node.store.generations(&class)? {
            let manifest = &generation.manifest;
            rows.push(Row {
                class: class.clone(),
                generation: generation.number(),
                live: live == Some(generation.number()),
                created: manifest.created.clone(),
                reference: manifest.reference.clone(),
                manifest: manifest.manifest.to_string(),
                bytes: manifest.files.iter().map(|file| file.file.size).sum(),
            });
        }
    }
    let mut text = format!(
        "{:<28} {:>10} {:<5} {:>10}  {:<20}  ARTIFACT\n",
        "CLASS", "GENERATION", "LIVE", "SIZE", "CREATED"
    );
    for row in &rows {
        let live = if row.live { "live" } else { "" };
        let size = output::bytes(row.bytes);
        text.push_str(&format!(
            "{:<28} {:>10} {live:<5} {size:>10}  {:<20}  {} ({})\n",
            row.class, row.generation, row.created, row.reference, row.manifest
        ));
    }
    output::result(
        global.output,
        "Artifacts",
        json!({ "generations": rows }),
        &text,
    )
}
