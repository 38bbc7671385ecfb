//! `artifacts list`: the generations in the store.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::Global;
use crate::journal::Journal;
use crate::node::Node;
use crate::output;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    class: String,
    generation: u64,
    /// `live`, `previous` (where rollback would go), `held` (by rollback).
    state: Vec<&'static str>,
    created: String,
    /// In seconds; nothing when the clock was behind.
    age: Option<u64>,
    /// The reference as the user wrote it, with its tag.
    reference: String,
    /// What the reference led to: the digest of the index or manifest.
    digest: String,
    /// The manifest's digest.
    manifest: String,
    bytes: u64,
    files: usize,
    /// The ids of the keys whose signatures were verified when it was made.
    signers: Vec<String>,
}

pub(super) fn run(global: &Global, node: &Node) -> Result<()> {
    let journal = Journal::open(&node.root, &node.store.state_dir())?;
    let mut rows = Vec::new();
    for class in node.store.classes()? {
        let live = node.store.live_number(&class)?;
        let held = journal.record().held.get(&class).copied();
        let generations = node.store.generations(&class)?;
        let previous = generations
            .iter()
            .map(km_artifacts::Generation::number)
            .rfind(|number| live.is_some_and(|live| *number < live));
        for generation in generations {
            let number = Some(generation.number());
            let states = [
                ("live", live == number),
                ("previous", previous == number),
                ("held", held == number),
            ];
            let manifest = &generation.manifest;
            rows.push(Row {
                class: class.clone(),
                generation: generation.number(),
                state: states
                    .into_iter()
                    .filter_map(|(state, is)| is.then_some(state))
                    .collect(),
                created: manifest.created.clone(),
                age: manifest
                    .created_at()
                    .and_then(|at| SystemTime::now().duration_since(at).ok())
                    .map(|age| age.as_secs()),
                reference: manifest.reference.clone(),
                digest: manifest.source.to_string(),
                manifest: manifest.manifest.to_string(),
                bytes: manifest.files.iter().map(|file| file.file.size).sum(),
                files: manifest.files.len() + manifest.derived.len(),
                signers: crate::plan::keys_of(&manifest.signers),
            });
        }
    }
    let text = text(&rows);
    output::result(
        global.output,
        "Artifacts",
        json!({ "generations": rows }),
        &text,
    )
}

fn text(rows: &[Row]) -> String {
    let mut out = format!(
        "{:<28} {:>3} {:<13} {:>10} {:>5}  ARTIFACT\n",
        "CLASS", "GEN", "STATE", "SIZE", "AGE"
    );
    for row in rows {
        let age = row
            .age
            .map_or("-".to_owned(), |age| output::age(Duration::from_secs(age)));
        out.push_str(&format!(
            "{:<28} {:>3} {:<13} {:>10} {age:>5}  {} ({})\n",
            row.class,
            row.generation,
            row.state.join(","),
            output::bytes(row.bytes),
            row.reference,
            row.digest.get(..19).unwrap_or(&row.digest)
        ));
        for signer in &row.signers {
            out.push_str(&format!("{:<28}     signed by key {signer}\n", ""));
        }
    }
    out
}
