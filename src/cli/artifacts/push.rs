//! `artifacts push`: a folder becomes an artifact in a registry.

use std::path::Path;

use anyhow::{Context as _, Result};
use km_artifacts::PublishOptions;
use serde_json::json;

use super::{Global, parse};
use crate::node::Node;
use crate::output;
use crate::progress::Shown;

pub(super) async fn run(global: &Global, node: &Node, dir: &Path, reference: &str) -> Result<()> {
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
