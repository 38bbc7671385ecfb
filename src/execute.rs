//! Carries a plan out: fetch, make generations, switch, register; and undoes the switches when registering fails.

mod containerd;

use anyhow::{Context as _, Result};
use km_artifacts::registry::Client;
use km_artifacts::{Artifact, DerivedFile, GenerationMeta, Limits};
use km_host::HostPath;
use km_runtimeclasses::{GuestFile, Rendered};
use km_shim::launch::generation::{self, Generation};

pub(crate) use containerd::{change, report, settle};

use crate::collect;
use crate::config::Artifacts;
use crate::failure::{Failure, Kind};
use crate::journal::Journal;
use crate::node::Node;
use crate::observe::{self, Observation, SeenArtifact, SeenClass};
use crate::output;
use crate::plan::{ClassWork, Prepared};
use crate::progress::Shown;
use crate::{programs, wanted};

/// The largest configuration of an artifact that is read, in bytes.
pub(crate) const CONFIGURATION_LIMIT: u64 = 1 << 20;

/// Carries out what was prepared. The lock is held.
pub(crate) async fn execute(
    node: &Node,
    client: &Client,
    journal: &mut Journal,
    seen: &Observation,
    prepared: &Prepared,
) -> Result<()> {
    for (class, work) in seen.classes.iter().zip(&prepared.classes) {
        if let ClassWork::Make(number) = work {
            make_generation(node, client, class, *number)
                .await
                .with_context(|| format!("{} stays as it was", class.class.name))?;
        }
    }
    let moves = prepared.classes.iter().any(|work| *work != ClassWork::Keep);
    if moves || !seen.surplus.is_empty() {
        // Garbage looks like what a guest still holds: who is killed before it is removed has to leave word of it.
        journal.update(|record| record.collect = true)?;
    }
    let mut switched = Vec::new();
    let result = switch_and_register(node, journal, seen, prepared, &mut switched).await;
    if result.is_err() {
        undo(node, &switched);
        return result;
    }
    for class in &seen.surplus {
        node.store.remove_class(class)?;
    }
    if seen.programs.change.is_some() {
        programs::clean(node, &seen.programs)?;
    }
    forget(journal, seen)?;
    clean_up(node, journal)
}

/// After a change, or after one that was killed or failed, removes what nothing needs any more. The lock is held.
pub(crate) fn clean_up(node: &Node, journal: &mut Journal) -> Result<()> {
    if !journal.record().collect {
        return Ok(());
    }
    collect::find(node, journal.record())
        .and_then(|found| collect::remove(node, &found))
        .context(
            "what is not needed any more could not be removed; the next apply goes on with that",
        )?;
    journal.update(|record| record.collect = false)
}

/// Drops what held classes that are gone, or at generations that are.
fn forget(journal: &mut Journal, seen: &Observation) -> Result<()> {
    journal.update(|record| {
        record.held.retain(|name, number| {
            seen.classes.iter().any(|class| {
                let mut there = class.others.iter().chain(&class.live);
                class.class.name == *name && there.any(|one| one.number() == *number)
            })
        });
    })
}

async fn switch_and_register<'a>(
    node: &Node,
    journal: &mut Journal,
    seen: &'a Observation,
    prepared: &Prepared,
    switched: &mut Vec<&'a SeenClass>,
) -> Result<()> {
    // A generation may name the launcher, which must be there first.
    programs::install(node, &seen.programs)?;
    for (class, work) in seen.classes.iter().zip(&prepared.classes) {
        if let ClassWork::Make(number) | ClassWork::Reuse(number) = work {
            switched.push(class);
            node.store.activate(&class.class.name, *number)?;
        }
    }
    containerd::register(node, journal, &seen.containerd, prepared).await
}

/// Points classes back at what they pointed at. Each failure is said: the first error is the one that is returned.
fn undo(node: &Node, switched: &[&SeenClass]) {
    for seen in switched.iter().rev() {
        let name = &seen.class.name;
        let undone = match &seen.live {
            Some(live) => node.store.activate(name, live.number()).map(|_| ()),
            None => node.store.remove_class(name),
        };
        if let Err(error) = undone {
            output::to_stderr(&format!("warning: {name} could not be put back: {error}"));
        }
    }
}

async fn make_generation(
    node: &Node,
    client: &Client,
    seen: &SeenClass,
    number: u64,
) -> Result<()> {
    let (
        SeenArtifact::Wanted {
            reference,
            resolved,
            verified,
            ..
        },
        Some(artifacts),
    ) = (&seen.artifact, &seen.class.artifacts)
    else {
        return Ok(());
    };
    // What is damaged is fetched again.
    node.store.discard(&seen.damages)?;
    output::to_stderr(&format!("{}: {reference}", seen.class.name));
    // It is kept under the configured reference, not under the pinned one: so the name moves with its tag, and is the one that is
    // looked for when the registry cannot be reached.
    let kept_as = &artifacts.url.reference;
    let (store, limits, shown) = (&node.store, Limits::default(), Shown::new("fetched"));
    let artifact = match &artifacts.image_folder {
        Some(folder) => {
            km_artifacts::pull_image(store, client, kept_as, resolved, folder, &limits, &shown)
                .await?
        }
        None => km_artifacts::pull(store, client, kept_as, resolved, &limits, &shown).await?,
    };
    let index = resolved.index.as_ref();
    let index = index.map(|(digest, bytes)| (digest, bytes.as_slice()));
    node.store
        .keep_signatures(kept_as, index, &verified.evidence)?;
    let derived = derive(node, seen, &artifact, number)?;
    let mut meta = meta(artifacts, seen, resolved.digest.clone());
    meta.signers.clone_from(&verified.signers);
    node.store
        .create_generation(&seen.class.name, number, &artifact, &derived, meta)?;
    Ok(())
}

fn meta(
    artifacts: &Artifacts,
    seen: &SeenClass,
    source: km_artifacts::digest::Digest,
) -> GenerationMeta {
    GenerationMeta {
        reference: artifacts.url.clone().into(),
        source,
        inputs: seen.inputs.clone(),
        signers: Vec::new(),
    }
}

/// The Kata configuration of a generation, with every file that it names checked.
fn derive(
    node: &Node,
    seen: &SeenClass,
    artifact: &Artifact,
    number: u64,
) -> Result<Vec<DerivedFile>> {
    let Some(kind) = wanted::class_kind(&seen.class) else {
        return Ok(Vec::new());
    };
    let name = &seen.class.name;
    let dir = node.store.generation_dir(name, number);
    let dir = node
        .root
        .host_path(&dir)
        .with_context(|| format!("{} is not below the host's root", dir.display()))?;
    let files: Vec<GuestFile> = artifact
        .files
        .iter()
        .map(|file| GuestFile {
            path: file.path.clone(),
        })
        .collect();
    let own = km_runtimeclasses::pick_configuration(
        name,
        artifact.files.iter().map(|file| file.path.as_str()),
    )?;
    let own = own
        .map(|path| Ok::<_, anyhow::Error>((path, read_own(node, artifact, path)?)))
        .transpose()?;
    let own = own.as_ref().map(|(path, text)| (*path, text.as_str()));
    let rendered = km_runtimeclasses::configuration(
        kind,
        &wanted::provider(&node.config),
        dir.as_str(),
        &files,
        own,
    )?;
    for reference in &rendered.references {
        let path = HostPath::new(&reference.path).map_err(|error| {
            Failure::refused(format!(
                "{} of {name}'s Kata configuration: {error}",
                reference.key
            ))
        })?;
        if path.as_path().starts_with(dir.as_path()) {
            continue;
        }
        if let Some(problem) = observe::lacks(node, &path, reference.executable)? {
            return Err(Failure::refused(format!(
                "{} of {name}'s Kata configuration names {path}, which {problem}: install it, or publish an artifact that brings it",
                reference.key
            ))
            .into());
        }
    }
    let mut made = Vec::new();
    if programs::launcher(&node.config, &seen.class)?.is_some() {
        later_files(node, seen, artifact)?;
        made.push(launches(
            &rendered,
            wanted::provider(&node.config).path(kind.qemu),
        )?);
    }
    made.push(DerivedFile {
        path: wanted::CONFIGURATION.to_owned(),
        bytes: rendered.text.into_bytes(),
    });
    made.extend(seen.additions.iter().map(|added| DerivedFile {
        path: added.path.clone(),
        bytes: added.text.clone().into_bytes(),
    }));
    Ok(made)
}

/// Files of the artifact that Kata reads after ours may not put another program in the launcher's place.
fn later_files(node: &Node, seen: &SeenClass, artifact: &Artifact) -> Result<()> {
    let drop_in = seen.additions.first().map_or("", |added| &added.text);
    let later = |path: &str| path.starts_with("config.d/") && path > km_runtimeclasses::DROP_IN;
    let refuse = |path: &str, problem: &str| {
        let name = &seen.class.name;
        Failure::refused(format!(
            "{path} in the artifact of {name} {problem}: publish it without, or set launch.mode of {name} to \"none\""
        ))
    };
    if let Some(link) = artifact.links.iter().find(|link| later(&link.path)) {
        return Err(refuse(&link.path, "is a link, and Kata reads it after ours").into());
    }
    for file in artifact.files.iter().filter(|file| later(&file.path)) {
        let text = read_own(node, artifact, &file.path)?;
        km_runtimeclasses::check_own(&text, drop_in, true)
            .map_err(|error| refuse(&file.path, &error.to_string()))?;
    }
    Ok(())
}

/// What the launcher must know of the generation that it is named in: the QEMU that its configuration means.
fn launches(rendered: &Rendered, class_qemu: String) -> Result<DerivedFile> {
    let mut named = rendered.references.iter();
    let named = named.find(|reference| reference.key == "hypervisor.qemu.path");
    let qemu = named.map_or(class_qemu, |named| named.path.clone());
    let launches = Generation {
        qemu: HostPath::new(qemu)?,
    };
    Ok(DerivedFile {
        path: generation::FILE.to_owned(),
        bytes: launches.render()?,
    })
}

fn read_own(node: &Node, artifact: &Artifact, path: &str) -> Result<String> {
    let file = artifact
        .file(path)
        .with_context(|| format!("{path} is in the artifact"))?;
    if file.size > CONFIGURATION_LIMIT {
        return Err(Failure::new(
            Kind::Verification,
            format!(
                "the artifact's {path} has {}, and a Kata configuration at most {}",
                output::bytes(file.size),
                output::bytes(CONFIGURATION_LIMIT)
            ),
        )
        .into());
    }
    let at = node.store.file_path(file);
    Ok(std::fs::read_to_string(&at).map_err(km_host::Error::io("read", &at))?)
}
