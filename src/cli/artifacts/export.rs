//! `artifacts export`: artifacts of the store in one file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use km_artifacts::archive::{self, Export};
use serde_json::json;

use super::{Global, parse};
use crate::failure::Failure;
use crate::node::Node;
use crate::output;
use crate::progress::Shown;

/// Write artifacts of the store into one file, for sites without a network.
///
/// The file is a tar of an OCI image layout: oras and skopeo read it, too. Signatures that belong to the artifacts go along.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// The file to write; one that is there is replaced.
    file: PathBuf,
    /// Classes whose live generation to export, or references that were pulled; every live generation when left out.
    #[arg(value_name = "CLASS|REFERENCE")]
    what: Vec<String>,
}

pub(super) fn run(global: &Global, node: &Node, arguments: &Arguments) -> Result<()> {
    let mut what = arguments.what.clone();
    if what.is_empty() {
        for class in node.store.classes()? {
            if node.store.live_number(&class)?.is_some() {
                what.push(class);
            }
        }
    }
    let wanted = what
        .iter()
        .map(|name| find(node, name))
        .collect::<Result<BTreeSet<Export>>>()?;
    if wanted.is_empty() {
        return Err(
            Failure::refused("no class has a live generation: there is nothing to export").into(),
        );
    }
    let wanted: Vec<_> = wanted.into_iter().collect();
    let file: &Path = &arguments.file;
    let exported = archive::export(&node.store, &wanted, file, &Shown::new("written"))
        .with_context(|| format!("cannot export to {}", file.display()))?;
    let artifacts: Vec<_> = wanted
        .iter()
        .map(|one| json!({ "reference": one.reference.to_string(), "manifest": one.manifest }))
        .collect();
    let mut text = String::new();
    for one in &wanted {
        text.push_str(&format!("{} {}\n", one.manifest, one.reference));
    }
    text.push_str(&format!(
        "{}: {} in {} blobs, {} signatures. \"kata-manager artifacts import\" takes it.\n",
        file.display(),
        output::bytes(exported.bytes),
        exported.blobs,
        exported.signatures
    ));
    let body = json!({ "file": file, "bytes": exported.bytes, "signatures": exported.signatures, "artifacts": artifacts });
    output::result(global.output, "Exported", body, &text)
}

/// A class's live generation, or what was pulled by a reference.
fn find(node: &Node, name: &str) -> Result<Export> {
    if km_artifacts::check_class(name).is_ok()
        && let Some(live) = node.store.live(name)?
    {
        let manifest = live.manifest;
        return Ok(Export {
            reference: parse(&manifest.reference)?,
            manifest: manifest.manifest,
            source: manifest.source,
        });
    }
    let reference = parse(name)?;
    let resolved = node.store.resolved(&reference)?.ok_or_else(|| {
        Failure::refused(format!(
            "{name} is neither a class with a live generation nor a reference that was pulled: \"kata-manager artifacts pull {name}\" brings it"
        ))
    })?;
    Ok(Export {
        reference,
        manifest: resolved.manifest.digest,
        source: resolved.digest,
    })
}
