//! `artifacts pull`: what references lead to comes into the store, and nothing is switched; or into a folder of the user's.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use km_artifacts::digest::Digest;
use km_artifacts::reference::Reference;
use km_artifacts::registry::{Client, Platform, Resolved};
use km_artifacts::trust::Evidence;
use km_artifacts::{Artifact, Limits, Store};
use serde_json::json;

use super::{Global, on_one_thread, on_threads, parse};
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

/// A reference to fetch, and which folder of it when it is a container image.
type Wanted = (Reference, Option<String>);

/// What a reference leads to, with the signatures that are demanded.
struct Found {
    wanted: Wanted,
    resolved: Resolved,
    evidence: Vec<Evidence>,
}

impl Found {
    /// Whether it is what is there already.
    fn is(&self, known: Option<&Resolved>) -> bool {
        known.is_some_and(|known| known.manifest.digest == self.resolved.manifest.digest)
    }
}

pub(super) fn run(global: &Global, node: &Node, arguments: &Arguments) -> Result<()> {
    let store = match &arguments.to {
        Some(dir) => Store::open(dir)?,
        None => node.store.clone(),
    };
    let wanted = wanted(node, arguments)?;
    let limit = arguments.rate_limit.or(node.config.registry.rate_limit);
    let client = || node.registry_limited(limit, arguments.streams.into());
    let known: Vec<_> = wanted.iter().map(|one| known(&store, one)).collect();
    let (mut found, mut pulled) = (None, None);
    if known.iter().all(Option::is_some) {
        // Most likely there is nothing to fetch, and to start threads would take longer than to find out.
        let client = client()?;
        on_one_thread(async {
            let all = look_up(node, &store, &client, &wanted, &known).await?;
            if all
                .iter()
                .zip(&known)
                .all(|(one, known)| one.is(known.as_ref()))
            {
                pulled = Some(bring(node, arguments, &store, &client, &all).await?);
            }
            found = Some(all);
            Ok(())
        })?;
    }
    let pulled = match pulled {
        Some(pulled) => pulled,
        None => {
            let client = client()?;
            on_threads(async {
                let found = match found {
                    Some(found) => found,
                    None => look_up(node, &store, &client, &wanted, &known).await?,
                };
                bring(node, arguments, &store, &client, &found).await
            })?
        }
    };
    let mut text = String::new();
    let mut artifacts = Vec::new();
    for (reference, digest, artifact) in pulled {
        text.push_str(&format!(
            "{digest} {reference}: {} files, {}\n",
            artifact.files.len(),
            output::bytes(artifact.bytes())
        ));
        artifacts.push(json!({ "reference": reference.to_string(), "digest": digest, "bytes": artifact.bytes() }));
    }
    output::result(
        global.output,
        "Pulled",
        json!({ "artifacts": artifacts }),
        &text,
    )
}

/// What the command line names, or else the configuration.
fn wanted(node: &Node, arguments: &Arguments) -> Result<Vec<Wanted>> {
    let references = arguments.references.iter().map(|text| (text, None));
    let image = arguments.image.iter();
    let image = image.map(|text| (text, Some(arguments.path.clone())));
    let mut wanted = references
        .chain(image)
        .map(|(text, folder)| Ok((parse(text)?, folder)))
        .collect::<Result<Vec<_>>>()?;
    if wanted.is_empty() {
        let classes = node.config.runtime_classes.iter();
        let artifacts = classes.filter_map(|class| class.artifacts.as_ref());
        wanted = artifacts
            .map(|artifacts| {
                (
                    artifacts.url.reference.clone(),
                    artifacts.image_folder.clone(),
                )
            })
            .collect();
        wanted.sort();
        wanted.dedup();
    }
    match &arguments.to {
        Some(dir) if wanted.len() > 1 => Err(Failure::new(
            Kind::Configuration,
            format!(
                "--to {} takes one artifact: the files of several would mix",
                dir.display()
            ),
        )
        .into()),
        _ => Ok(wanted),
    }
}

/// Asks what each reference leads to, and finds the signatures that are demanded.
async fn look_up(
    node: &Node,
    store: &Store,
    client: &Client,
    wanted: &[Wanted],
    known: &[Option<Resolved>],
) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (one, known) in wanted.iter().zip(known) {
        let reference = &one.0;
        let resolved = client
            .resolve_again(reference, &Platform::host(), known.as_ref())
            .await
            .with_context(|| format!("cannot look up {reference}"))?;
        let mut evidence = Vec::new();
        let policies = node.policies_for(reference);
        for keys in policies.iter().filter_map(|policy| policy.keys()) {
            let verified = km_artifacts::verify(store, client, reference, &resolved, keys)
                .await
                .with_context(|| format!("{reference} is not pulled"))?;
            evidence.extend(verified.evidence);
        }
        all.push(Found {
            wanted: one.clone(),
            resolved,
            evidence,
        });
    }
    Ok(all)
}

/// Brings what lacks, and returns what each reference led to and what is there now.
async fn bring(
    node: &Node,
    arguments: &Arguments,
    store: &Store,
    client: &Client,
    all: &[Found],
) -> Result<Vec<(Reference, Digest, Artifact)>> {
    let _lock = match &arguments.to {
        Some(_) => {
            store.init()?;
            (store.lock(node.lock_wait)?, None)
        }
        None => {
            let (lock, journal) = node.lock()?;
            (lock, Some(journal))
        }
    };
    let (limits, mut pulled) = (Limits::default(), Vec::new());
    for found in all {
        let ((reference, folder), resolved) = (&found.wanted, &found.resolved);
        let shown = Shown::new("fetched");
        let artifact = match folder {
            Some(folder) => {
                km_artifacts::pull_image(
                    store, client, reference, resolved, folder, &limits, &shown,
                )
                .await
            }
            None => km_artifacts::pull(store, client, reference, resolved, &limits, &shown).await,
        };
        let artifact = artifact.with_context(|| format!("cannot pull {reference}"))?;
        let index = resolved.index.as_ref();
        let index = index.map(|(digest, bytes)| (digest, bytes.as_slice()));
        store.keep_signatures(reference, index, &found.evidence)?;
        if arguments.to.is_some() {
            store.lay_out(&artifact)?;
        }
        pulled.push((reference.clone(), resolved.digest.clone(), artifact));
    }
    store.end_session()?;
    Ok(pulled)
}

/// What a reference led to when it was last pulled to the same place, if all of it is there.
fn known(store: &Store, (reference, folder): &Wanted) -> Option<Resolved> {
    if folder.is_some() {
        // Of a container image's layers nothing is kept.
        return None;
    }
    // What is damaged there is told of when it is mended.
    store.resolved(reference).unwrap_or_default()
}
