//! `artifacts pull`: what references lead to comes into the store, and nothing is switched.

use anyhow::{Context as _, Result};
use km_artifacts::registry::Platform;
use km_artifacts::{Limits, trust};
use serde_json::json;

use super::{Global, parse};
use crate::node::Node;
use crate::output;
use crate::progress::Shown;

pub(super) async fn run(global: &Global, node: &Node, references: &[String]) -> Result<()> {
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
        let mut evidence = Vec::new();
        for keys in node
            .policies_for(&reference)
            .iter()
            .filter_map(|policy| policy.keys())
        {
            let verified = trust::fetch(&client, &reference, &resolved, keys)
                .await
                .with_context(|| format!("{reference} is not pulled"))?;
            evidence.extend(verified.evidence);
        }
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
        let index = resolved.index.as_ref();
        let index = index.map(|(digest, bytes)| (digest, bytes.as_slice()));
        node.store.keep_signatures(&reference, index, &evidence)?;
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
