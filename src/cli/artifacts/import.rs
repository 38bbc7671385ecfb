//! `artifacts import`: artifacts from a file into the store.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use km_artifacts::{Limits, archive};
use serde_json::json;

use super::Global;
use crate::node::Node;
use crate::output;
use crate::progress::Shown;

/// Bring the artifacts of a file into the store, verified, and switch nothing.
///
/// The file is what "artifacts export" writes: a tar of an OCI image layout whose manifests are named by whole references.
/// An "apply" that cannot reach a registry then takes what was imported under the reference that the configuration names.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// The file.
    file: PathBuf,
}

pub(super) async fn run(global: &Global, node: &Node, arguments: &Arguments) -> Result<()> {
    let (_lock, _journal) = node.lock()?;
    let file = &arguments.file;
    let imported = archive::import(&node.store, file, &Limits::default(), &Shown::new("read"))
        .await
        .with_context(|| format!("cannot import {}", file.display()))?;
    node.store.end_session()?;
    let mut text = String::new();
    let mut artifacts = Vec::new();
    for one in imported {
        let reference = one.reference.to_string();
        text.push_str(&format!(
            "{} {reference}: {}, {} signatures\n",
            one.manifest,
            output::bytes(one.bytes),
            one.signatures
        ));
        artifacts.push(json!({ "reference": reference, "manifest": one.manifest, "bytes": one.bytes, "signatures": one.signatures }));
    }
    output::result(
        global.output,
        "Imported",
        json!({ "artifacts": artifacts }),
        &text,
    )
}
