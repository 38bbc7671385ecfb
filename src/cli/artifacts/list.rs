//! `artifacts list`: the generations in the store.

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::Global;
use crate::node::Node;
use crate::output;

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

pub(super) fn run(global: &Global, node: &Node) -> Result<()> {
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
