//! `artifacts verify`: what is live, byte for byte against what was written down, and its signatures against the keys that
//! are trusted now. It needs no network, and changes nothing but that the next `apply` looks closer at what is damaged.

use anyhow::Result;
use km_artifacts::{Damage, Generation, Problem};
use serde_json::{Value, json};

use super::Global;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::output;

/// What was found out about a class.
struct Found {
    generation: Generation,
    damages: Vec<Damage>,
    /// How many of its files the kernel guards (fs-verity), and how many there are.
    sealed: (usize, usize),
    /// The keys that signed it; or why none counts. `None` where no signature is demanded.
    signed: Option<Result<Vec<String>, String>>,
}

impl Found {
    fn is_good(&self) -> bool {
        self.damages.is_empty() && !matches!(self.signed, Some(Err(_)))
    }
}

pub(super) fn run(global: &Global, node: &Node, classes: &[String]) -> Result<()> {
    let live = live(node, classes)?;
    let damages = node.store.verify(&live)?;
    let mut all = Vec::new();
    for (generation, damages) in live.into_iter().zip(damages) {
        let policy = node.policy(generation.class());
        let signed = match node.store.signers(&generation, policy) {
            Ok(_) if policy.keys().is_none() => None,
            Ok(signers) => Some(Ok(crate::plan::keys_of(&signers))),
            Err(error) if error.is_verification() => Some(Err(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        if let Err(error) = node.store.doubt(&damages) {
            tracing::warn!("the next apply cannot be told of it: {error}");
        }
        all.push(Found {
            sealed: node.store.sealed(&generation)?,
            generation,
            damages,
            signed,
        });
    }
    let good = all.iter().all(Found::is_good);
    let body = json!({ "good": good, "classes": all.iter().map(to_json).collect::<Vec<_>>() });
    let mut text: String = all.iter().map(to_text).collect();
    if all.is_empty() {
        text.push_str("Nothing is live.\n");
    } else {
        text.push_str(&guard(&all));
    }
    output::result(global.output, "Verified", body, &text)?;
    if good {
        return Ok(());
    }
    let bad: Vec<&str> = all
        .iter()
        .filter(|found| !found.is_good())
        .map(|found| found.generation.class())
        .collect();
    Err(Failure::new(
        Kind::Verification,
        format!(
            "{}: what is live is not what it should be; \"kata-manager apply\" makes damaged files again and looks for signatures in the registry",
            bad.join(", ")
        ),
    )
    .into())
}

fn live(node: &Node, classes: &[String]) -> Result<Vec<Generation>> {
    let names = if classes.is_empty() {
        node.store.classes()?
    } else {
        classes.to_vec()
    };
    let mut live = Vec::new();
    for name in names {
        match node.store.live(&name)? {
            Some(generation) => live.push(generation),
            None if classes.is_empty() => {}
            None => {
                return Err(Failure::new(
                    Kind::Configuration,
                    format!("no generation of {name} is live; \"kata-manager artifacts list\" shows what there is"),
                )
                .into());
            }
        }
    }
    Ok(live)
}

/// Whether the kernel guards what is live, said once for all classes.
fn guard(all: &[Found]) -> String {
    let sealed: usize = all.iter().map(|found| found.sealed.0).sum();
    let files: usize = all.iter().map(|found| found.sealed.1).sum();
    if sealed == files {
        return "The kernel guards every file: nobody can write to it, and each read is checked (fs-verity).\n".to_owned();
    }
    format!(
        "The kernel guards {sealed} of {files} files (fs-verity): the artifacts folder's file system cannot, or could not when they were made.\n"
    )
}

fn to_json(found: &Found) -> Value {
    let manifest = &found.generation.manifest;
    let damages: Vec<Value> = found.damages.iter().map(damage).collect();
    json!({
        "class": manifest.class,
        "generation": manifest.number,
        "reference": manifest.reference,
        "files": manifest.files.len() + manifest.derived.len(),
        "bytes": bytes(&found.generation),
        "damages": damages,
        "sealedFiles": found.sealed.0,
        "signers": found.signed.as_ref().and_then(|signed| signed.as_ref().ok()),
        "untrusted": found.signed.as_ref().and_then(|signed| signed.as_ref().err()),
    })
}

fn damage(damage: &Damage) -> Value {
    let mut value = json!({ "path": damage.path, "problem": damage.problem.to_string() });
    if let Problem::Content { expected, got } = &damage.problem {
        value["wanted"] = json!(expected);
        value["found"] = json!(got);
    }
    value
}

fn bytes(generation: &Generation) -> u64 {
    let manifest = &generation.manifest;
    let files = manifest.files.iter().map(|stored| stored.file.size);
    files
        .chain(manifest.derived.iter().map(|stored| stored.size))
        .sum()
}

fn to_text(found: &Found) -> String {
    let manifest = &found.generation.manifest;
    let mut text = format!(
        "{} generation {}: {} files, {}",
        manifest.class,
        manifest.number,
        manifest.files.len() + manifest.derived.len(),
        output::bytes(bytes(&found.generation))
    );
    text.push_str(if found.damages.is_empty() {
        ", as they were written\n"
    } else {
        "\n"
    });
    for damage in &found.damages {
        text.push_str(&format!("  {damage}\n"));
    }
    match &found.signed {
        None => {}
        Some(Ok(keys)) => {
            for key in keys {
                text.push_str(&format!("  signed by key {key}\n"));
            }
        }
        Some(Err(why)) => text.push_str(&format!("  {}\n", why.replace('\n', "\n  "))),
    }
    text
}
