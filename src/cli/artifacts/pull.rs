//! `artifacts pull`: what references lead to comes into the store, and nothing is switched; or into a folder of the user's.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use km_artifacts::digest::Digest;
use km_artifacts::reference::Reference;
use km_artifacts::registry::{Client, Platform, Resolved};
use km_artifacts::{Artifact, Limits, Store, trust};
use serde_json::json;

use super::{Global, parse};
use crate::config::RATE_LIMIT_MIN;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::output;
use crate::progress::Shown;

/// Fetch and verify artifacts into the store, and switch nothing.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").args(["references", "image"])))]
pub(in crate::cli) struct Arguments {
    /// What to fetch; everything that the configuration names when left out.
    references: Vec<String>,
    /// Put the files of one artifact into this folder, with a store of its own in it; no root is needed.
    #[arg(long, value_name = "DIR", requires = "what")]
    to: Option<PathBuf>,
    /// Take the files out of a container image in place of an artifact.
    #[arg(long, value_name = "REF", requires = "to")]
    image: Option<String>,
    /// Which folder of the image; "/" is all of it.
    #[arg(long, value_name = "FOLDER", requires = "image", default_value = "/")]
    path: String,
    /// The most bytes a second to receive, in place of the configuration's registry.rateLimit.
    #[arg(long, value_name = "BYTES", env = "KATA_MANAGER_RATE_LIMIT", value_parser = clap::value_parser!(u64).range(RATE_LIMIT_MIN..))]
    rate_limit: Option<u64>,
    /// The most streams that fetch one blob at the same time; how many are of use is measured.
    #[arg(long, value_name = "N", env = "KATA_MANAGER_STREAMS", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=8))]
    streams: u8,
}

impl Arguments {
    /// Whether the files go elsewhere than into the node's store.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.to.is_some()
    }
}

pub(super) async fn run(global: &Global, node: &Node, arguments: &Arguments) -> Result<()> {
    let references = arguments.references.iter().map(|text| (text, None));
    let image = arguments.image.iter();
    let image = image.map(|text| (text, Some(arguments.path.as_str())));
    let mut wanted = references
        .chain(image)
        .map(|(text, folder)| Ok((parse(text)?, folder)))
        .collect::<Result<Vec<_>>>()?;
    if wanted.is_empty() {
        let classes = node.config.runtime_classes.iter();
        wanted = classes
            .filter_map(|class| class.artifacts.as_ref())
            .map(|artifacts| {
                (
                    artifacts.url.reference.clone(),
                    artifacts.image_folder.as_deref(),
                )
            })
            .collect();
        wanted.sort();
        wanted.dedup();
    }
    let limit = arguments.rate_limit.or(node.config.registry.rate_limit);
    let client = node.registry_limited(limit, arguments.streams.into())?;
    let mut pulled = Vec::new();
    let mut text = String::new();
    if let Some(dir) = &arguments.to
        && wanted.len() > 1
    {
        return Err(Failure::new(
            Kind::Configuration,
            format!(
                "--to {} takes one artifact: the files of several would mix",
                dir.display()
            ),
        )
        .into());
    }
    for (reference, folder) in wanted {
        let to = arguments.to.as_deref();
        let (digest, artifact) = pull(node, &client, &reference, to, folder).await?;
        text.push_str(&format!(
            "{digest} {reference}: {} files, {}\n",
            artifact.files.len(),
            output::bytes(artifact.bytes())
        ));
        pulled.push(json!({ "reference": reference.to_string(), "digest": digest, "bytes": artifact.bytes() }));
    }
    output::result(
        global.output,
        "Pulled",
        json!({ "artifacts": pulled }),
        &text,
    )
}

/// Returns the digest that the reference leads to, and what is there now.
async fn pull(
    node: &Node,
    client: &Client,
    reference: &Reference,
    to: Option<&Path>,
    folder: Option<&str>,
) -> Result<(Digest, Artifact)> {
    let known = known(node, reference, to, folder);
    let resolved = client
        .resolve_again(reference, &Platform::host(), known.as_ref())
        .await
        .with_context(|| format!("cannot look up {reference}"))?;
    let mut evidence = Vec::new();
    for keys in node
        .policies_for(reference)
        .iter()
        .filter_map(|policy| policy.keys())
    {
        let verified = trust::fetch(client, reference, &resolved, keys)
            .await
            .with_context(|| format!("{reference} is not pulled"))?;
        evidence.extend(verified.evidence);
    }
    let (limits, shown) = (Limits::default(), Shown::new("fetched"));
    let (store, _lock) = match to {
        Some(dir) => {
            let store = Store::open(dir)?;
            store.init()?;
            let lock = store.lock(node.lock_wait)?;
            (store, (lock, None))
        }
        None => {
            let (lock, journal) = node.lock()?;
            (node.store.clone(), (lock, Some(journal)))
        }
    };
    let artifact = match folder {
        Some(folder) => {
            let (store, resolved) = (&store, &resolved);
            km_artifacts::pull_image(store, client, reference, resolved, folder, &limits, &shown)
                .await
        }
        None => km_artifacts::pull(&store, client, reference, &resolved, &limits, &shown).await,
    };
    let artifact = artifact.with_context(|| format!("cannot pull {reference}"))?;
    let index = resolved.index.as_ref();
    let index = index.map(|(digest, bytes)| (digest, bytes.as_slice()));
    store.keep_signatures(reference, index, &evidence)?;
    if to.is_some() {
        store.lay_out(&artifact)?;
    }
    store.end_session()?;
    Ok((resolved.digest, artifact))
}

/// What a reference led to when it was last pulled to the same place, if all of it is there.
fn known(
    node: &Node,
    reference: &Reference,
    to: Option<&Path>,
    folder: Option<&str>,
) -> Option<Resolved> {
    if folder.is_some() {
        // Of a container image's layers nothing is kept.
        return None;
    }
    let found = match to {
        Some(dir) => Store::open(dir).and_then(|store| store.resolved(reference)),
        None => node.store.resolved(reference),
    };
    // What is damaged there is told of when it is mended.
    found.unwrap_or_default()
}
