//! A sandbox's `start`: look, decide, claim, write. What goes wrong refuses the start, and leaves config.json and the claims as they
//! were.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use km_host::claims::{Claim, Claims, Found, Starter};
use km_host::lock::LockError;
use km_host::{Error, Root, atomic};

use crate::bundle::{self, Bundle, BundleError, Node, Role};
use crate::call::Start;
use crate::decide::{self, Asked, Catalogue, Decision, Given, Refusal, Seen, Wanted};
use crate::kubelet::{self, AskError};
use crate::look::{self, LookError};
use crate::settings::Settings;
use crate::table::{Case, Containerd};

/// The longest that another shim is waited for that looks at claims. It takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(3);

/// Set by containerd 1.7 and later, for shims (containerd, core/runtime/v2/binary.go).
const NEWER_CONTAINERD: &str = "MAX_SHIM_VERSION";

/// Why a sandbox is not started.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The bundle has no specification.
    #[error(
        "{} has no config.json: containerd's sandboxer = \"shim\" starts a shim without one, and with that no device can be checked; take sandboxer out of the handler's table (or set it to \"podsandbox\")",
        .0.display()
    )]
    NoSpec(PathBuf),
    /// The specification cannot be used.
    #[error("cannot use {}: {why}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: BundleError,
    },
    /// It is not known what the kubelet gave.
    #[error("cannot learn which devices the kubelet gave to this pod")]
    Kubelet(#[from] AskError),
    /// The decision.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A claim that cannot be read may be on the pod's devices.
    #[error(
        "{path} is no claim that can be read ({problem}), so whose the pod's devices are cannot be told; remove it when no such sandbox runs"
    )]
    Claim {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Another shim does not let go of the claims.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The devices cannot be looked at.
    #[error(transparent)]
    Look(#[from] LookError),
    /// A node to write is none.
    #[error(
        "{node} is no device on this machine; write the CDI specs anew with \"kata-manager cdi generate\""
    )]
    NoDevice {
        /// The node.
        node: String,
    },
    /// The host.
    #[error(transparent)]
    Host(#[from] Error),
}

/// What was done.
#[derive(Debug)]
pub struct Prepared {
    /// The pod, for the log.
    pub pod: Option<(String, String)>,
    /// What was decided.
    pub decision: Decision,
}

/// Prepares a sandbox whose bundle is in `dir`; `None` for a container of a sandbox that runs.
///
/// # Errors
/// [`PrepareError`]: the sandbox must not start.
pub fn prepare(
    root: &Root,
    settings: &Settings,
    start: &Start,
    dir: &Path,
) -> Result<Option<Prepared>, PrepareError> {
    let path = dir.join(bundle::FILE);
    let text = read(&path)?;
    let spec_error = |why| PrepareError::Spec {
        path: path.clone(),
        why,
    };
    let bundle = Bundle::read(&text).map_err(spec_error)?;
    let facts = &bundle.facts;
    if facts.role == Role::Container {
        return Ok(None);
    }
    let case = case(settings);
    let claims = Claims::open(root)?;
    // What does not depend on the kubelet's answer.
    let mut ahead = None;
    let meanwhile = || ahead = Some((look::catalogue(root), claims.starter()));
    let given = kubelet::ask(root, settings, facts.pod.as_ref(), meanwhile)?;
    let asked = Asked {
        given,
        spec: facts.nodes.clone(),
        annotated: facts.annotated.clone(),
    };
    let (catalogue, starter) = match ahead {
        Some((catalogue, starter)) => (Some(catalogue), starter),
        None => (None, claims.starter()),
    };
    let wanted = wanted(root, &asked, case, catalogue)?;
    let lock = claims.lock(LOCK_WAIT)?;
    let others = claims.sweep()?;
    if let (false, Some(Found::Unreadable { path, problem })) =
        (wanted.is_empty(), others.iter().find(|one| unreadable(one)))
    {
        return Err(PrepareError::Claim {
            path: path.display().to_string(),
            problem: problem.clone(),
        });
    }
    let seen = look::look(root, &wanted, &others, look::WITHIN)?;
    let decision = decide::decide(&asked, &wanted, case, settings.companions, &seen)?;
    let nodes = nodes(root, &decision, &seen)?;
    let edited = match nodes.is_empty() {
        true => None,
        false => Some(bundle.with_nodes(&nodes).map_err(spec_error)?),
    };
    let claim = claim(root, starter?, settings, start, dir, &decision)?;
    claims.create(&claim)?;
    // From here on the claim dies with the bundle; and with this start, when it fails.
    let write = |parts: Vec<Cow<'_, str>>| {
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        atomic::write_parts(&path, &parts, 0o600)
    };
    if let Some(parts) = edited
        && let Err(error) = write(parts)
    {
        claims.remove(&start.id)?;
        return Err(error.into());
    }
    drop(lock);
    Ok(Some(Prepared {
        pod: bundle.facts.pod,
        decision,
    }))
}

/// Takes back what [`prepare`] left for a sandbox that is not started after all. Whether it works changes nothing: the claim dies with
/// the bundle, which containerd removes.
pub fn take_back(root: &Root, start: &Start) {
    if let Ok(claims) = Claims::open(root) {
        let _ = claims.remove(&start.id);
    }
}

fn unreadable(found: &Found) -> bool {
    matches!(found, Found::Unreadable { .. })
}

fn read(path: &Path) -> Result<String, PrepareError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(path);
            return Err(PrepareError::NoSpec(dir.to_owned()));
        }
        Err(error) => return Err(Error::io("open", path)(error).into()),
    };
    // All at once, where its size is told.
    let size = file.metadata().map_or(0, |meta| meta.len());
    let size = usize::try_from(size.min(bundle::LIMIT)).unwrap_or(0);
    let mut text = String::with_capacity(size + 1);
    file.take(bundle::LIMIT + 1)
        .read_to_string(&mut text)
        .map_err(Error::io("read", path))?;
    if text.len() as u64 > bundle::LIMIT {
        return Err(PrepareError::Spec {
            path: path.to_owned(),
            why: BundleError::Malformed(format!("it has more than {} bytes", bundle::LIMIT)),
        });
    }
    Ok(text)
}

/// The case that the table is asked with. What containerd's environment shows counts more than what was true when the settings were
/// written.
fn case(settings: &Settings) -> Case {
    let newer = std::env::var_os(NEWER_CONTAINERD).is_some();
    let containerd = match (newer, settings.containerd) {
        (true, Containerd::V1_6) => Containerd::V1_7,
        (true, told) => told,
        (false, _) => Containerd::V1_6,
    };
    Case {
        kata: settings.kata,
        confidential: settings.confidential,
        containerd,
    }
}

/// Most pods of a node may ask for no device at all; then the specs decide nothing, and are not read where they have not been.
fn wanted(
    root: &Root,
    asked: &Asked,
    case: Case,
    catalogue: Option<Result<Catalogue, Error>>,
) -> Result<Vec<Wanted>, PrepareError> {
    let given = match &asked.given {
        Given::NoKubelet => 0,
        Given::Pod { plugin, claims, .. } => plugin.len() + claims.len(),
    };
    let catalogue = match given + asked.annotated.len() {
        0 => Catalogue::new(),
        _ => catalogue.unwrap_or_else(|| look::catalogue(root))?,
    };
    Ok(decide::wanted(asked, case, &catalogue)?)
}

/// The devices to write, with the numbers that they have on the host.
fn nodes(root: &Root, decision: &Decision, seen: &Seen) -> Result<Vec<Node>, PrepareError> {
    let node = |node: &String| {
        let known = seen.numbers.get(node).copied();
        let number = known.or_else(|| look::number_of(root, node));
        let number = number.ok_or_else(|| PrepareError::NoDevice { node: node.clone() })?;
        Ok(Node {
            path: node.clone(),
            number: (rustix::fs::major(number), rustix::fs::minor(number)),
        })
    };
    decision.write.iter().map(node).collect()
}

fn claim(
    root: &Root,
    process: Starter,
    settings: &Settings,
    start: &Start,
    dir: &Path,
    decision: &Decision,
) -> Result<Claim, PrepareError> {
    let bundle = root.host_path(dir).ok_or_else(|| {
        let why = io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not below the host's root",
        );
        Error::io("name the bundle", dir)(why)
    })?;
    Ok(Claim {
        format: 1,
        sandbox: start.id.clone(),
        namespace: start.namespace.clone(),
        handler: settings.handler.clone(),
        class: settings.class.clone(),
        generation: generation(root, settings),
        devices: decision.devices.clone(),
        bundle,
        process,
    })
}

/// The generation that the class's link leads to, which is its folder's name; 0 for a class without artifacts.
fn generation(root: &Root, settings: &Settings) -> u64 {
    let number = || {
        let link = settings.class_link.as_ref()?;
        let above = root.resolve(&link.parent()?).ok()?;
        let target = std::fs::read_link(above.join(link.as_path().file_name()?)).ok()?;
        target.file_name()?.to_str()?.parse().ok()
    };
    number().unwrap_or(0)
}
