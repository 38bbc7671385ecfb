//! Ways to a registry: the mirrors that containerd's `hosts.toml` files name, and the registry itself; tried in turn.
//!
//! Folders and their order are containerd's (docs/hosts.md, "Registry Host Namespace"; core/remotes/docker/config/hosts.go).
//! Each way is a session of its own, with its own trust, credentials and tokens: what is known for one host never goes to
//! another. Whatever a mirror gives is verified as if it came from the registry.
//!
//! It must not know what is asked.

use std::collections::{HashMap, HashSet};
use std::error::Error as StdError;
use std::io::Read as _;
use std::mem::Discriminant;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use km_host::{HostPath, Root};

use super::authorize::Session;
use super::error::HostsCause;
use super::hosts::{self, Capabilities, FILE_MAX, Host, HostsFile};
use super::options::{ClientCertificate, ClientOptions, Endpoint};
use super::pace::Limiter;
use super::transport::Via;
use super::{Error, Result};

/// The folder for registries without one of their own (containerd, docs/hosts.md).
const DEFAULT_FOLDER: &str = "_default";

/// The largest file of certificates or a key that is read, in bytes.
const PEM_MAX: u64 = 1 << 20;

/// The most files that are looked at in a folder without `hosts.toml`.
const FOLDER_MAX: usize = 256;

/// How long a mirror that cannot be reached is left alone. One that is down costs a timeout once, not once for each blob.
const DOWN: Duration = Duration::from_secs(30);

/// How often a mirror is tried before the next way is.
const MIRROR_TRIES: u32 = 1;

/// What a server is to be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// What a tag means.
    Resolve,
    /// Content by its digest.
    Pull,
    /// To take content.
    Push,
}

/// One way to a registry.
#[derive(Debug)]
struct Way {
    session: Arc<Session>,
    /// Host and port, to name it.
    host: String,
    capabilities: Capabilities,
    /// Kinds of errors that a person was told of.
    told: Mutex<HashSet<Discriminant<Error>>>,
    down_until: Mutex<Option<Instant>>,
}

impl Way {
    fn can(&self, need: Need) -> bool {
        match need {
            Need::Resolve => self.capabilities.resolve,
            Need::Pull => self.capabilities.pull,
            Need::Push => self.capabilities.push,
        }
    }

    fn is_down(&self) -> bool {
        lock(&self.down_until).is_some_and(|until| until > Instant::now())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of them is whole between any two calls.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All ways to one registry, in the order in which they are tried; the last is the registry, or what stands in its place.
#[derive(Debug)]
struct Ways(Vec<Way>);

/// The ways to every registry that was asked for, made when it first is.
#[derive(Debug)]
pub(super) struct Mirrors {
    /// To all registries that have no folder.
    plain: Arc<Session>,
    known: Mutex<HashMap<String, Arc<Ways>>>,
}

impl Mirrors {
    pub(super) fn new(options: ClientOptions) -> Result<Mirrors> {
        Ok(Mirrors {
            plain: Arc::new(Session::new(options)?),
            known: Mutex::default(),
        })
    }

    /// The ways to a registry that may be asked for something.
    ///
    /// # Errors
    /// When its `hosts.toml` cannot be used, or names nothing that may be asked for this.
    pub(super) fn walk(&self, registry: &str, need: Need) -> Result<Walk> {
        let ways = self.ways(registry)?;
        let last = ways.0.len().saturating_sub(1);
        let mut order: Vec<usize> = (0..ways.0.len())
            .filter(|at| ways.0[*at].can(need) && (*at == last || !ways.0[*at].is_down()))
            .collect();
        if need == Need::Push {
            // A blob and its manifest must go to the same place. The registry takes what nobody else is listed for.
            order = vec![order.first().copied().unwrap_or(last)];
        }
        if order.is_empty() {
            // All that could are down: they are better than nothing.
            order = (0..=last).filter(|at| ways.0[*at].can(need)).collect();
        }
        if order.is_empty() {
            let dir = self.plain.transport.options.hosts_dir.as_ref();
            return Err(Error::Hosts {
                path: dir.map_or_else(slash, |dir| dir.path.clone()),
                registry: registry.to_owned(),
                problem: Some(format!(
                    "no host may be asked for it: none has the capability {:?}",
                    if need == Need::Resolve {
                        "resolve"
                    } else {
                        "pull"
                    }
                )),
                source: None,
            });
        }
        Ok(Walk {
            ways,
            order,
            at: 0,
            registry: registry.to_owned(),
        })
    }

    fn ways(&self, registry: &str) -> Result<Arc<Ways>> {
        let mut known = lock(&self.known);
        if let Some(ways) = known.get(registry) {
            return Ok(Arc::clone(ways));
        }
        let ways = Arc::new(self.find(registry)?);
        known.insert(registry.to_owned(), Arc::clone(&ways));
        Ok(ways)
    }

    fn find(&self, registry: &str) -> Result<Ways> {
        let options = &self.plain.transport.options;
        if let (Some(root), Some(dir)) = (&options.root, &options.hosts_dir) {
            let reader = Reader {
                root,
                registry,
                options,
                limiter: &self.plain.transport.limiter,
            };
            match reader.all(&dir.path) {
                Ok(Some(ways)) => return Ok(ways),
                Ok(None) => {}
                Err(error) if dir.strict => return Err(error),
                Err(error) => {
                    tracing::warn!("{registry} itself is asked: {}", chain(&error));
                }
            }
        }
        Ok(Ways(vec![Way {
            session: Arc::clone(&self.plain),
            host: registry.to_owned(),
            capabilities: Capabilities {
                pull: true,
                resolve: true,
                push: true,
            },
            told: Mutex::default(),
            down_until: Mutex::default(),
        }]))
    }
}

/// A path that always is one.
fn slash() -> HostPath {
    #[expect(clippy::expect_used, reason = "a constant of this file")]
    HostPath::new("/").expect("an absolute path")
}

/// The ways to one registry for one question, and which of them is at hand.
#[derive(Debug)]
pub(super) struct Walk {
    ways: Arc<Ways>,
    order: Vec<usize>,
    at: usize,
    registry: String,
}

impl Walk {
    fn way(&self) -> &Way {
        // `order` is never empty, and `at` stays below its length.
        &self.ways.0[self.order[self.at]]
    }

    /// Whether there is nobody else to ask.
    pub(super) fn is_single(&self) -> bool {
        self.order.len() == 1
    }

    /// Whom to ask now.
    pub(super) fn session(&self) -> &Session {
        &self.way().session
    }

    /// Goes on to the next way without a word; false when there is none.
    pub(super) fn skip(&mut self) -> bool {
        let more = self.at + 1 < self.order.len();
        self.at += usize::from(more);
        more
    }

    /// Goes on to the next way, and tells a person once for each kind of trouble that a mirror has.
    ///
    /// # Errors
    /// The error itself, when there is no other way or none would help.
    pub(super) fn on(&mut self, error: Error) -> Result<()> {
        let Some(next) = self.order.get(self.at + 1) else {
            return Err(error);
        };
        if error.is_local() {
            return Err(error);
        }
        let (way, next) = (self.way(), &self.ways.0[*next].host);
        let down = matches!(
            error,
            Error::Unreachable { .. } | Error::Timeout { .. } | Error::Tls { .. }
        );
        if down {
            *lock(&way.down_until) = Some(Instant::now() + DOWN);
        }
        let (mirror, registry) = (&way.host, &self.registry);
        let why = chain(&error);
        if lock(&way.told).insert(std::mem::discriminant(&error)) {
            tracing::warn!(
                "the mirror {mirror} of {registry} does not help, {next} is asked: {why}"
            );
        } else {
            tracing::debug!(
                "the mirror {mirror} of {registry} does not help, {next} is asked: {why}"
            );
        }
        self.at += 1;
        Ok(())
    }
}

/// An error with its causes, on one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// Reads what is written of one registry.
struct Reader<'a> {
    root: &'a Root,
    registry: &'a str,
    options: &'a ClientOptions,
    limiter: &'a Option<Arc<Limiter>>,
}

impl Reader<'_> {
    /// The ways that are written down; none when nothing is.
    fn all(&self, dir: &HostPath) -> Result<Option<Ways>> {
        match self.file(dir)? {
            Some((folder, file)) => self.ways(&folder, file).map(Some),
            None => Ok(None),
        }
    }

    /// The registry's folder and what its `hosts.toml` says; certificates alone where there is none.
    fn file(&self, dir: &HostPath) -> Result<Option<(HostPath, HostsFile)>> {
        let mut names = vec![self.registry.to_owned(), DEFAULT_FOLDER.to_owned()];
        if let Some((host, port)) = self.registry.rsplit_once(':')
            && !port.ends_with(']')
        {
            names.insert(0, format!("{host}_{port}_"));
        }
        for name in names {
            let folder = dir.join(&name);
            if !self.found(&folder)?.is_dir() {
                continue;
            }
            let path = folder.join("hosts.toml");
            let text = match self.found(&path)?.is_file() {
                true => self.read(&path, FILE_MAX + 1)?,
                false => Vec::new(),
            };
            if text.is_empty() {
                let file = self.certificates(&folder)?;
                return Ok(Some((folder, file)));
            }
            let file = std::str::from_utf8(&text)
                .map_err(|_| self.wrong(&path, "it is not UTF-8 text"))
                .and_then(|text| hosts::parse(text).map_err(|e| self.because(&path, e)))?;
            for key in &file.unknown {
                tracing::warn!("{path}: {key} is not known, and ignored");
            }
            return Ok(Some((folder, file)));
        }
        Ok(None)
    }

    /// The certificates that docker keeps for a registry: `*.crt` to trust, `*.cert` with `*.key` to show (containerd,
    /// docs/hosts.md, "Support for Docker's Certificate File Pattern").
    fn certificates(&self, folder: &HostPath) -> Result<HostsFile> {
        // An empty text is the registry itself without any settings.
        let mut file = hosts::parse("").map_err(|error| self.because(folder, error))?;
        let read = || -> Result<Vec<String>, HostsCause> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(self.root.resolve(folder)?)?.take(FOLDER_MAX) {
                names.extend(entry?.file_name().into_string());
            }
            names.sort();
            Ok(names)
        };
        let names = read().map_err(|cause| self.because(folder, cause))?;
        for name in &names {
            if name.ends_with(".crt") {
                file.server.ca.push(name.clone());
            } else if let Some(stem) = name.strip_suffix(".cert") {
                let key = format!("{stem}.key");
                if !names.contains(&key) {
                    return Err(self.wrong(&folder.join(name), &format!("{key} is not beside it")));
                }
                file.server.client.push((name.clone(), Some(key)));
            }
        }
        Ok(file)
    }

    fn ways(&self, folder: &HostPath, file: HostsFile) -> Result<Ways> {
        let mut ways = Vec::new();
        for host in &file.hosts {
            ways.push(self.way(folder, host, true)?);
        }
        let mut server = file.server;
        server.capabilities.push = true;
        ways.push(self.way(folder, &server, false)?);
        Ok(Ways(ways))
    }

    fn way(&self, folder: &HostPath, host: &Host, mirror: bool) -> Result<Way> {
        let mut own = self.options.clone();
        own.hosts_dir = None;
        if mirror {
            own.tries = MIRROR_TRIES;
        }
        for name in &host.ca {
            let pem = self.named(folder, name)?;
            let all = own.ca_pem.get_or_insert_default();
            all.push(b'\n');
            all.extend(pem);
        }
        if let Some((certificate, key)) = host.client.first() {
            own.client_certificate = Some(ClientCertificate {
                certificate: self.named(folder, certificate)?,
                key: match key {
                    Some(key) => self.named(folder, key)?,
                    None => Vec::new(),
                },
            });
        }
        if host.client.len() > 1 {
            tracing::warn!("{folder}: only the first client certificate of a host is used");
        }
        if let Some(timeout) = host.dial_timeout {
            own.connect_timeout = timeout;
        }
        let endpoint = match &host.root {
            Some(api) => Endpoint::standing_for(self.registry, api.clone()),
            None => Endpoint::of(self.registry, &own)
                .ok_or_else(|| self.wrong(folder, "its name is not usable in a URL"))?,
        };
        let via = Via {
            endpoint: endpoint.with_headers(host.headers.clone()),
            skip_verify: host.skip_verify,
            proxy: host.proxy.clone(),
        };
        let name = via.endpoint.host();
        // What is wrong can only be a certificate of this folder: the others have been looked at before.
        let session = Session::via(own, Some(via), self.limiter.clone())
            .map_err(|error| self.because(folder, HostsCause::Certificate(Box::new(error))))?;
        Ok(Way {
            host: name,
            session: Arc::new(session),
            capabilities: host.capabilities,
            told: Mutex::default(),
            down_until: Mutex::default(),
        })
    }

    /// A file that a `hosts.toml` names: absolute, or beside it.
    fn named(&self, folder: &HostPath, name: &str) -> Result<Vec<u8>> {
        let text = if name.starts_with('/') {
            name.to_owned()
        } else {
            format!("{folder}/{name}")
        };
        let path = HostPath::new(&text)
            .map_err(|error| self.wrong(folder, &format!("it names a file: {error}")))?;
        if !self.found(&path)?.is_file() {
            return Err(self.wrong(&path, "it is not a file"));
        }
        let bytes = self.read(&path, PEM_MAX + 1)?;
        if bytes.len() as u64 > PEM_MAX {
            return Err(self.wrong(&path, &format!("it is larger than {PEM_MAX} bytes")));
        }
        Ok(bytes)
    }

    fn found(&self, path: &HostPath) -> Result<Found> {
        let look = || -> Result<Found, HostsCause> {
            match std::fs::metadata(self.root.resolve(path)?) {
                Ok(meta) if meta.is_dir() => Ok(Found::Dir),
                // A pipe would keep us waiting.
                Ok(meta) if meta.is_file() => Ok(Found::File),
                Ok(_) => Ok(Found::Nothing),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Found::Nothing),
                Err(error) => Err(error.into()),
            }
        };
        look().map_err(|cause| self.because(path, cause))
    }

    fn read(&self, path: &HostPath, limit: u64) -> Result<Vec<u8>> {
        let read = || -> Result<Vec<u8>, HostsCause> {
            let mut bytes = Vec::new();
            std::fs::File::open(self.root.resolve(path)?)?
                .take(limit)
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|cause| self.because(path, cause))
    }

    fn wrong(&self, path: &HostPath, problem: &str) -> Error {
        Error::Hosts {
            path: path.clone(),
            registry: self.registry.to_owned(),
            problem: Some(problem.to_owned()),
            source: None,
        }
    }

    fn because(&self, path: &HostPath, cause: impl Into<HostsCause>) -> Error {
        Error::Hosts {
            path: path.clone(),
            registry: self.registry.to_owned(),
            problem: None,
            source: Some(Box::new(cause.into())),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Dir,
    File,
    Nothing,
}

impl Found {
    fn is_dir(self) -> bool {
        self == Found::Dir
    }

    fn is_file(self) -> bool {
        self == Found::File
    }
}
