//! What is on the node and in the registries now. Reads only.

mod containerd;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use km_artifacts::digest::Digest;
use km_artifacts::reference::Reference;
use km_artifacts::registry::{Client, Platform, Resolved};
use km_artifacts::trust::Verified;
use km_artifacts::{Damage, Generation};
use km_host::HostPath;

pub(crate) use containerd::{SeenContainerd, containerd, files};

use crate::additions::{self, Addition};
use crate::config::{Artifacts, RuntimeClass, Update};
use crate::failure::{self, Failure, Kind};
use crate::journal::Journal;
use crate::node::Node;
use crate::programs::{self, SeenPrograms};
use crate::{sizing, wanted};

/// Everything that a plan is made from.
#[derive(Debug)]
pub(crate) struct Observation {
    /// The configured classes, in order.
    pub(crate) classes: Vec<SeenClass>,
    /// Classes in the store that the configuration does not have.
    pub(crate) surplus: Vec<String>,
    /// containerd and its configuration.
    pub(crate) containerd: SeenContainerd,
    /// Our programs on the host.
    pub(crate) programs: SeenPrograms,
    /// What is missing: files of the provider, shims. Each says what to do.
    pub(crate) missing: Vec<String>,
    /// What a person should know.
    pub(crate) warnings: Vec<String>,
}

/// A configured class.
#[derive(Debug)]
pub(crate) struct SeenClass {
    pub(crate) class: RuntimeClass,
    /// The live generation, if it can be read.
    pub(crate) live: Option<Generation>,
    /// The generation that `rollback` holds it at.
    pub(crate) held: Option<u64>,
    /// What is wrong with the live generation's files.
    pub(crate) damages: Vec<Damage>,
    /// Generations that are there and not live, newest last.
    pub(crate) others: Vec<Generation>,
    /// The number of the next generation.
    pub(crate) next: u64,
    /// A folder or file of somebody else's under the class's name.
    pub(crate) displaces: Option<PathBuf>,
    /// What its reference leads to.
    pub(crate) artifact: SeenArtifact,
    /// See [`wanted::inputs`].
    pub(crate) inputs: Digest,
    /// What the node and the user add to its Kata configuration.
    pub(crate) additions: Vec<Addition>,
    /// The text of the live generation's.
    pub(crate) live_additions: String,
    /// The generations whose signatures, as the store has them, are what is demanded now; all where nothing is.
    pub(crate) trusted: BTreeSet<u64>,
}

/// What an artifact's reference leads to.
#[derive(Debug)]
pub(crate) enum SeenArtifact {
    /// The class has none.
    None,
    /// What is live is what is wanted: nothing to fetch.
    Live,
    /// `rollback` holds the class at this generation, which is there and not live.
    Held(u64),
    /// This is wanted, and `stored` says whether all of it is in the store.
    Wanted {
        reference: Reference,
        resolved: Box<Resolved>,
        stored: bool,
        /// Its signatures, where they are demanded.
        verified: Box<Verified>,
    },
}

/// Looks at everything.
pub(crate) async fn observe(
    node: &Node,
    client: &Client,
    journal: &Journal,
) -> Result<Observation> {
    let mut warnings = Vec::new();
    let mut missing = missing_provider_files(node)?;
    let containerd = containerd::containerd(node, journal).await?;
    missing.extend(containerd::missing_shims(node, &containerd)?);
    let programs = programs::observe(node, containerd.version)?;
    missing.extend(programs::missing(node)?);
    warnings.extend(programs.warnings.iter().cloned());
    let mut digests = Digests {
        client,
        known: BTreeMap::new(),
    };
    let sized = sizing::observe(node)?;
    let mut classes = Vec::new();
    for class in &node.config.runtime_classes {
        let held = journal.record().held.get(&class.name).copied();
        let launcher = programs::launcher(&node.config, class)?;
        let drop_in = sized.drop_in(node, class, launcher.as_ref());
        for warning in drop_in.iter().flat_map(|made| &made.warnings) {
            if !warnings.contains(warning) {
                warnings.push(warning.clone());
            }
        }
        let text = drop_in.map(|made| made.text);
        let added = additions::observe(node, class, text, launcher.is_some())?;
        classes.push(self::class(node, &mut digests, class, held, added, &mut warnings).await?);
    }
    let surplus = node
        .store
        .classes()?
        .into_iter()
        .filter(|name| {
            node.config
                .runtime_classes
                .iter()
                .all(|class| class.name != *name)
        })
        .collect();
    Ok(Observation {
        classes,
        surplus,
        containerd,
        programs,
        missing,
        warnings,
    })
}

/// Asks each reference's digest once, however many classes have it.
struct Digests<'a> {
    client: &'a Client,
    known: BTreeMap<Reference, Digest>,
}

impl Digests<'_> {
    async fn of(&mut self, reference: &Reference) -> Result<Digest, km_artifacts::registry::Error> {
        if let Some(digest) = self.known.get(reference) {
            return Ok(digest.clone());
        }
        let digest = self.client.digest(reference).await?;
        self.known.insert(reference.clone(), digest.clone());
        Ok(digest)
    }
}

async fn class(
    node: &Node,
    digests: &mut Digests<'_>,
    class: &RuntimeClass,
    held: Option<u64>,
    additions: Vec<Addition>,
    warnings: &mut Vec<String>,
) -> Result<SeenClass> {
    let store = &node.store;
    let live_number = store.live_number(&class.name)?;
    let all = match store.generations(&class.name) {
        Err(error) if error.is_damage() => {
            warnings.push(format!(
                "a generation of {} cannot be read and is made again: {error}",
                class.name
            ));
            Vec::new()
        }
        result => result?,
    };
    let mut trusted = BTreeSet::new();
    for generation in &all {
        match store.signers(generation, node.policy(&class.name)) {
            Ok(_) => {
                trusted.insert(generation.number());
            }
            Err(error) if error.is_verification() => {
                if Some(generation.number()) == live_number {
                    warnings.push(format!(
                        "generation {} of {}, which is live, is signed by none of the keys that are trusted now",
                        generation.number(),
                        class.name
                    ));
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    let (live, others): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|generation| Some(generation.number()) == live_number);
    let live = live.into_iter().next();
    let damages = live
        .as_ref()
        .map(|live| store.check(live, false))
        .transpose()?
        .unwrap_or_default();
    for damage in &damages {
        warnings.push(format!("{}: {damage}; it is made again", class.name));
    }
    let link = store.class_link(&class.name);
    let displaces = (live_number.is_none() && link.symlink_metadata().is_ok()).then_some(link);
    let mut seen = SeenClass {
        class: class.clone(),
        next: store.next_number(&class.name)?,
        live,
        held,
        damages,
        others,
        displaces,
        artifact: SeenArtifact::None,
        inputs: wanted::inputs(&node.config, class, &additions),
        live_additions: live_number
            .map(|number| additions::live(node, &class.name, number))
            .unwrap_or_default(),
        additions,
        trusted,
    };
    if let Some(artifacts) = &class.artifacts {
        if !artifacts.pull_secret.is_empty() {
            warnings.push(format!(
                "{}: pullSecret {:?} is a Kubernetes secret and is not looked up here; credentials come from registry.credentialsFile",
                class.name, artifacts.pull_secret
            ));
        }
        seen.artifact = match self::held(node, &seen, warnings)? {
            Some(held) => held,
            None => artifact(node, digests, &seen, artifacts, warnings).await?,
        };
    }
    Ok(seen)
}

/// What a class that `rollback` holds is to have; nothing for one that it does not hold.
fn held(node: &Node, seen: &SeenClass, warnings: &mut Vec<String>) -> Result<Option<SeenArtifact>> {
    let name = &seen.class.name;
    let Some(number) = seen.held else {
        return Ok(None);
    };
    let release = format!("\"kata-manager rollback {name} --release\"");
    let live = seen.live.as_ref().map(Generation::number);
    if live == Some(number) && !seen.damages.is_empty() {
        let damages: Vec<_> = seen.damages.iter().map(ToString::to_string).collect();
        return Err(Failure::new(
            Kind::Verification,
            format!(
                "{name} is held at generation {number}, which is damaged:\n  {}\nlet it go with {release}, then apply makes it again",
                damages.join("\n  ")
            ),
        )
        .into());
    }
    let there = seen.others.iter().any(|other| other.number() == number);
    if live != Some(number) && !there {
        warnings.push(format!(
            "{name} was held at generation {number}, which is gone: it is held no more"
        ));
        return Ok(None);
    }
    let mut all = seen.others.iter().chain(&seen.live);
    if let Some(generation) = all.find(|one| one.number() == number) {
        programs::refuse_unlaunchable(&node.config, generation)
            .with_context(|| format!("{name} is held there: let it go with {release}"))?;
    }
    if !seen.trusted.contains(&number) {
        return Err(Failure::new(
            Kind::Verification,
            format!(
                "{name} is held at generation {number}, which none of the keys that are trusted now has signed: let it go with {release}"
            ),
        )
        .into());
    }
    warnings.push(format!(
        "{name} is held at generation {number} by rollback; {release} lets apply move it again"
    ));
    Ok(Some(if live == Some(number) {
        SeenArtifact::Live
    } else {
        SeenArtifact::Held(number)
    }))
}

async fn artifact(
    node: &Node,
    digests: &mut Digests<'_>,
    seen: &SeenClass,
    artifacts: &Artifacts,
    warnings: &mut Vec<String>,
) -> Result<SeenArtifact> {
    let reference = &artifacts.url.reference;
    let name = &seen.class.name;
    let text = String::from(artifacts.url.clone());
    let usable = seen
        .live
        .as_ref()
        .filter(|live| seen.damages.is_empty() && live.manifest.inputs == seen.inputs)
        .filter(|live| seen.trusted.contains(&live.number()));
    let same = usable.filter(|live| live.manifest.reference == text);
    if same.is_some() && seen.class.update == Update::Never {
        return Ok(SeenArtifact::Live);
    }
    let look_up = |error: anyhow::Error| {
        error.context(format!("cannot look up {text}, the artifact of {name}"))
    };
    // What never moves keeps its digest when it is to be made again, for a signature or another input.
    let held = seen
        .live
        .as_ref()
        .filter(|live| seen.class.update == Update::Never && live.manifest.reference == text);
    let asked = match held {
        Some(live) => Ok(live.manifest.source.clone()),
        None => digests.of(reference).await,
    };
    let digest = match asked {
        Ok(digest) => digest,
        Err(error) => {
            let error = anyhow::Error::from(error);
            return match same {
                Some(live) if failure::kind(&error) == Kind::Registry => {
                    warnings.push(format!(
                        "{name}: {error}; generation {} stays",
                        live.number()
                    ));
                    Ok(SeenArtifact::Live)
                }
                _ if failure::kind(&error) == Kind::Registry => {
                    match imported(node, seen, reference)? {
                        Some(found) => {
                            warnings.push(format!(
                                "{name}: {error}; what is here under {text} is taken"
                            ));
                            Ok(found)
                        }
                        None => Err(look_up(error)),
                    }
                }
                _ => Err(look_up(error)),
            };
        }
    };
    if usable.is_some_and(|live| live.manifest.source == digest) {
        return Ok(SeenArtifact::Live);
    }
    let pinned = reference.with_digest(digest);
    // What is damaged here is fetched again.
    let known = node.store.resolved(reference).unwrap_or_default();
    let resolved = digests
        .client
        .resolve_again(&pinned, &Platform::host(), known.as_ref())
        .await
        .with_context(|| format!("cannot read the manifest of {text}, the artifact of {name}"))?;
    let verified = verify(node, digests.client, seen, &pinned, &resolved).await?;
    let stored =
        seen.damages.is_empty() && node.store.artifact(&resolved.manifest.digest)?.is_some();
    Ok(SeenArtifact::Wanted {
        reference: pinned,
        resolved: Box::new(resolved),
        stored,
        verified: Box::new(verified),
    })
}

/// Finds the signatures that a class demands, before anything of the artifact is fetched.
async fn verify(
    node: &Node,
    client: &Client,
    seen: &SeenClass,
    reference: &Reference,
    resolved: &Resolved,
) -> Result<Verified> {
    let name = &seen.class.name;
    let Some(keys) = node.policy(name).keys() else {
        return Ok(Verified::default());
    };
    km_artifacts::verify(&node.store, client, reference, resolved, keys)
        .await
        .with_context(|| format!("{name} takes only signed artifacts{}", stays(seen)))
}

fn stays(seen: &SeenClass) -> String {
    seen.live.as_ref().map_or_else(String::new, |live| {
        format!("; generation {} stays live", live.number())
    })
}

/// A file's bytes; `None` if it is absent.
pub(crate) fn read(path: &std::path::Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(km_host::Error::io("read", path)(error).into()),
    }
}

/// What was imported or pulled by this very reference, in place of a registry that cannot be reached.
fn imported(node: &Node, seen: &SeenClass, reference: &Reference) -> Result<Option<SeenArtifact>> {
    let Some(resolved) = node.store.resolved(reference)? else {
        return Ok(None);
    };
    let live = seen.live.as_ref().filter(|live| {
        live.manifest.manifest == resolved.manifest.digest
            && live.manifest.inputs == seen.inputs
            && seen.trusted.contains(&live.number())
    });
    if live.is_some() && seen.damages.is_empty() {
        return Ok(Some(SeenArtifact::Live));
    }
    let name = &seen.class.name;
    let verified = match node.policy(name).keys() {
        Some(keys) => node
            .store
            .verify_resolved(reference, &resolved, keys)
            .with_context(|| format!("{name} takes only signed artifacts{}", stays(seen)))?,
        None => Verified::default(),
    };
    Ok(Some(SeenArtifact::Wanted {
        reference: reference.with_digest(resolved.digest.clone()),
        resolved: Box::new(resolved),
        stored: seen.damages.is_empty(),
        verified: Box::new(verified),
    }))
}

pub(crate) fn missing_provider_files(node: &Node) -> Result<Vec<String>> {
    let provider = wanted::provider(&node.config);
    let mut missing = Vec::new();
    for class in &node.config.runtime_classes {
        let Some(kind) = wanted::class_kind(class) else {
            continue;
        };
        for file in kind.required_files(&provider) {
            let path = HostPath::new(&file.path).context("a path of the provider")?;
            if let Some(problem) = lacks(node, &path, file.executable)? {
                missing.push(format!(
                    "{} needs {} at {path}, which {problem}: install Kata there, or name its folder in provider.prefix",
                    class.name, file.what
                ));
            }
        }
    }
    Ok(missing)
}

/// What is wrong with a file that must be there.
pub(crate) fn lacks(
    node: &Node,
    path: &HostPath,
    executable: bool,
) -> Result<Option<&'static str>> {
    use std::os::unix::fs::PermissionsExt as _;
    let ours = node.root.resolve(path)?;
    Ok(match std::fs::metadata(&ours) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some("is not there"),
        Err(error) => return Err(km_host::Error::io("look at", &ours)(error).into()),
        Ok(meta) if !meta.is_file() => Some("is no file"),
        Ok(meta) if executable && meta.permissions().mode() & 0o111 == 0 => {
            Some("is not executable")
        }
        Ok(_) => None,
    })
}
