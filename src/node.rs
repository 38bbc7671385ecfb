//! The node that a command works on: its root, the configuration, the store, and clients made from them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use km_artifacts::Store;
use km_artifacts::reference::Reference;
use km_artifacts::registry::{Client, ClientCertificate, ClientOptions, Credentials, HostsDir};
use km_artifacts::trust::{Policy, PublicKey};
use km_host::lock::Lock;
use km_host::{HostPath, Root};

use crate::config::{self, Config};
use crate::daemon::Daemon;
use crate::failure::{Failure, Kind};
use crate::flavor;
use crate::journal::Journal;

/// How long containerd may take to answer one question.
pub(crate) const ANSWER: Duration = Duration::from_secs(10);

/// The largest file of certificates or credentials that is read, in bytes.
const SMALL_FILE: u64 = 4 << 20;

/// containerd's usual folder of `hosts.toml` files (containerd, docs/hosts.md).
const CONTAINERD_HOSTS: &str = "/etc/containerd/certs.d";

/// The name of the file in a mounted secret of type `kubernetes.io/dockerconfigjson` (kubernetes.io, "Secrets", "Docker config
/// Secrets").
const KUBERNETES_SECRET: &str = ".dockerconfigjson";

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) root: Root,
    pub(crate) config: Config,
    /// The bytes of the configuration file, an input of every plan.
    pub(crate) config_bytes: Vec<u8>,
    flavor: Result<flavor::Kind, String>,
    pub(crate) store: Store,
    /// What each class demands of its artifact.
    policies: BTreeMap<String, Policy>,
    /// What is demanded of an artifact that no class names.
    policy: Policy,
    /// How long to wait for the lock.
    pub(crate) lock_wait: Duration,
    /// More certificates that are trusted, from the command line.
    pub(crate) ca_file: Option<PathBuf>,
}

impl Node {
    /// Opens what a configuration, as it was read, names; changes nothing.
    pub(crate) fn open(
        (mut config, config_bytes): (Config, Vec<u8>),
        root: &Path,
        lock_wait: Duration,
        flavor: Option<config::Flavor>,
    ) -> Result<Node> {
        let root = Root::new(root)?;
        if let Some(flavor) = flavor {
            config.containerd.flavor = flavor;
        }
        // What is not supported is refused by the commands that concern containerd, not by those that do not.
        let flavor = flavor::settle(&root, &mut config.containerd);
        let flavor = flavor.map_err(|refused| refused.to_string());
        Node::with(root, (config, config_bytes), lock_wait, flavor)
    }

    /// As [`Node::open`], for work that is not about the node: which containerd it has is not looked for.
    pub(crate) fn elsewhere(
        config: (Config, Vec<u8>),
        root: &Path,
        lock_wait: Duration,
    ) -> Result<Node> {
        let flavor = Err("which containerd this node has was not looked for".to_owned());
        Node::with(Root::new(root)?, config, lock_wait, flavor)
    }

    fn with(
        root: Root,
        (config, config_bytes): (Config, Vec<u8>),
        lock_wait: Duration,
        flavor: Result<flavor::Kind, String>,
    ) -> Result<Node> {
        let store =
            Store::open(&root.resolve(&config.artifacts_dir)?)?.with_blobs_kept(config.keep_blobs);
        let mut node = Node {
            root,
            config,
            config_bytes,
            flavor,
            store,
            policies: BTreeMap::new(),
            policy: Policy::None,
            lock_wait,
            ca_file: None,
        };
        node.read_keys()?;
        Ok(node)
    }

    /// Which distribution's containerd it runs.
    ///
    /// # Errors
    /// One that is not supported, or not clear.
    pub(crate) fn flavor(&self) -> Result<flavor::Kind> {
        match &self.flavor {
            Ok(kind) => Ok(*kind),
            Err(refused) => Err(Failure::refused(refused.clone()).into()),
        }
    }

    /// Makes what the store lacks, takes its lock and opens the journal, which remembers the folders that were made.
    pub(crate) fn lock(&self) -> Result<(Lock, Journal)> {
        let made = self.store.init()?;
        let lock = self.store.lock(self.lock_wait)?;
        let mut journal = Journal::open(&self.root, &self.store.state_dir())?;
        journal.update(|record| {
            for folder in made {
                if !record.store_folders.contains(&folder) {
                    record.store_folders.push(folder);
                }
            }
        })?;
        Ok((lock, journal))
    }

    /// containerd's configuration file and the path that it is told, as this process sees them.
    pub(crate) fn containerd_config(&self) -> Result<(PathBuf, PathBuf)> {
        let named = &self.config.containerd.config;
        let told = match (named.parent(), named.as_path().file_name()) {
            (Some(parent), Some(name)) => self.root.resolve(&parent)?.join(name),
            _ => self.root.resolve(named)?,
        };
        Ok((self.root.resolve(named)?, told))
    }

    /// containerd, as it is asked and restarted.
    pub(crate) fn daemon(&self) -> Result<Daemon<'_>> {
        Daemon::new(&self.root, &self.config.containerd)
    }

    /// A client for the registries.
    pub(crate) fn registry(&self) -> Result<Client> {
        let streams = ClientOptions::default().streams;
        self.registry_limited(self.config.registry.rate_limit, streams)
    }

    /// As [`Node::registry`], with another limit in bytes a second, and of streams for each blob.
    pub(crate) fn registry_limited(
        &self,
        rate_limit: Option<u64>,
        streams: usize,
    ) -> Result<Client> {
        let settings = &self.config.registry;
        let credentials = match &settings.credentials_file {
            Some(path) => {
                let content = self.small_file("registry.credentialsFile", path)?;
                let secret = path.as_path().file_name() == Some(OsStr::new(KUBERNETES_SECRET));
                let read = match secret {
                    true => Credentials::from_kubernetes_secret(&content),
                    false => Credentials::from_docker_config(&content),
                };
                read.map_err(|error| {
                    Failure::because(
                        Kind::Configuration,
                        format!("registry.credentialsFile {path} cannot be used"),
                        error,
                    )
                })?
            }
            None => Credentials::anonymous(),
        };
        let options = ClientOptions {
            ca_pem: self.trusted()?,
            client_certificate: self.client_certificate()?,
            root: Some(Arc::new(Root::new(self.root.path())?)),
            hosts_dir: self.hosts_dir()?,
            credentials,
            plain_http: settings.plain_http.clone(),
            https: settings.https.clone(),
            rate_limit,
            streams,
            ..ClientOptions::default()
        };
        Ok(Client::new(options)?)
    }

    /// What a class demands of its artifact.
    pub(crate) fn policy(&self, class: &str) -> &Policy {
        self.policies.get(class).unwrap_or(&self.policy)
    }

    /// What is demanded of a reference: by every class that has it, or else by the configuration as a whole.
    pub(crate) fn policies_for(&self, reference: &Reference) -> Vec<&Policy> {
        let mut policies = Vec::new();
        for class in &self.config.runtime_classes {
            let artifacts = class.artifacts.as_ref();
            if artifacts.is_some_and(|artifacts| artifacts.url.reference == *reference) {
                policies.push(self.policy(&class.name));
            }
        }
        if policies.is_empty() {
            policies.push(&self.policy);
        }
        policies
    }

    fn read_keys(&mut self) -> Result<()> {
        self.policy = self.policy_of("verify.keys", self.config.signing_keys(None))?;
        for class in &self.config.runtime_classes {
            let own = class.artifacts.as_ref();
            let own = own.and_then(|artifacts| artifacts.verify.as_ref());
            let setting = format!("verify.keys of {}", class.name);
            let policy = self.policy_of(&setting, self.config.signing_keys(own))?;
            self.policies.insert(class.name.clone(), policy);
        }
        Ok(())
    }

    fn policy_of(&self, setting: &str, keys: Option<&[HostPath]>) -> Result<Policy> {
        let Some(paths) = keys else {
            return Ok(Policy::None);
        };
        let mut keys = Vec::new();
        for path in paths {
            let pem = self.small_file(setting, path)?;
            let read = PublicKey::from_pem(&pem).map_err(|error| {
                Failure::because(
                    Kind::Configuration,
                    format!(
                        "{path}, which {setting} names{}, cannot be used",
                        self.line_of(path)
                    ),
                    error,
                )
            })?;
            keys.extend(read);
        }
        Ok(Policy::Keys(keys))
    }

    /// The certificates that are trusted besides the system's.
    fn trusted(&self) -> Result<Option<Vec<u8>>> {
        let mut all = Vec::new();
        if let Some(path) = &self.config.registry.ca_file {
            all.push(self.small_file("registry.caFile", path)?);
        }
        if let Some(path) = &self.ca_file {
            all.push(read_small(path).with_context(|| {
                Failure::new(
                    Kind::Configuration,
                    format!("cannot read {}, which --ca-file names", path.display()),
                )
            })?);
        }
        Ok((!all.is_empty()).then(|| all.join(&b'\n')))
    }

    fn client_certificate(&self) -> Result<Option<ClientCertificate>> {
        let settings = &self.config.registry;
        let (Some(certificate), Some(key)) =
            (&settings.client_certificate_file, &settings.client_key_file)
        else {
            return Ok(None);
        };
        Ok(Some(ClientCertificate {
            certificate: self.small_file("registry.clientCertificateFile", certificate)?,
            key: self.small_file("registry.clientKeyFile", key)?,
        }))
    }

    /// The folder of `hosts.toml` files: one that is named must be there and usable; the usual one is containerd's, and what is
    /// wrong with it is to be no worse for us than for containerd.
    fn hosts_dir(&self) -> Result<Option<HostsDir>> {
        let named = self.config.registry.config_path.clone();
        let strict = named.is_some();
        let path = match named {
            Some(path) => path,
            None => HostPath::new(CONTAINERD_HOSTS)?,
        };
        if self.root.resolve(&path)?.is_dir() {
            return Ok(Some(HostsDir { path, strict }));
        }
        if strict {
            let message = format!("{path}, which registry.configPath names, is not a folder");
            return Err(Failure::new(Kind::Configuration, message).into());
        }
        Ok(None)
    }

    fn small_file(&self, key: &str, path: &HostPath) -> Result<Vec<u8>> {
        let read = || read_small(&self.root.resolve(path)?);
        read().with_context(|| {
            Failure::new(
                Kind::Configuration,
                format!(
                    "cannot read {path}, which {key} names{}",
                    self.line_of(path)
                ),
            )
        })
    }

    /// Where the configuration names a path, in words.
    fn line_of(&self, path: &HostPath) -> String {
        let text = String::from_utf8_lossy(&self.config_bytes);
        let line = text.lines().position(|line| {
            let mut words = line.split([' ', ',', '[', ']', '{', '}', '"', '\'']);
            words.any(|word| word == path.as_str())
        });
        line.map_or_else(String::new, |at| {
            format!(" in line {} of the configuration", at + 1)
        })
    }
}

/// A file of at most [`SMALL_FILE`] bytes; a larger one is cut, and then is not what it should be.
fn read_small(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(SMALL_FILE)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
