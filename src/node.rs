//! The node that a command works on: its root, the configuration, the store, and clients made from them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use km_artifacts::Store;
use km_artifacts::reference::Reference;
use km_artifacts::registry::{Client, ClientOptions, Credentials};
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
}

impl Node {
    /// Opens what a configuration, as it was read, names; changes nothing.
    pub(crate) fn open(
        (mut config, config_bytes): (Config, Vec<u8>),
        root: &std::path::Path,
        lock_wait: Duration,
        flavor: Option<config::Flavor>,
    ) -> Result<Node> {
        let root = Root::new(root)?;
        if let Some(flavor) = flavor {
            config.containerd.flavor = flavor;
        }
        // What is not supported is refused by the commands that concern containerd, not by those that do not.
        let flavor = flavor::settle(&root, &mut config.containerd);
        let store =
            Store::open(&root.resolve(&config.artifacts_dir)?)?.with_blobs_kept(config.keep_blobs);
        let mut node = Node {
            root,
            config,
            config_bytes,
            flavor: flavor.map_err(|refused| refused.to_string()),
            store,
            policies: BTreeMap::new(),
            policy: Policy::None,
            lock_wait,
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
        let mut journal = Journal::open(&self.store.state_dir())?;
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
        self.registry_limited(self.config.registry.rate_limit)
    }

    /// As [`Node::registry`], with another limit in bytes a second.
    pub(crate) fn registry_limited(&self, rate_limit: Option<u64>) -> Result<Client> {
        let settings = &self.config.registry;
        let credentials = match &settings.credentials_file {
            Some(path) => {
                Credentials::from_docker_config(&self.small_file("registry.credentialsFile", path)?)
                    .map_err(|error| {
                        Failure::because(
                            Kind::Configuration,
                            format!("registry.credentialsFile {path} cannot be used"),
                            error,
                        )
                    })?
            }
            None => Credentials::anonymous(),
        };
        let ca_pem = settings
            .ca_file
            .as_ref()
            .map(|path| self.small_file("registry.caFile", path))
            .transpose()?;
        let options = ClientOptions {
            ca_pem,
            credentials,
            plain_http: settings.plain_http.clone(),
            https: settings.https.clone(),
            rate_limit,
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
                    format!("{path}, which {setting} names, cannot be used"),
                    error,
                )
            })?;
            keys.extend(read);
        }
        Ok(Policy::Keys(keys))
    }

    fn small_file(&self, key: &str, path: &HostPath) -> Result<Vec<u8>> {
        let read = || -> Result<Vec<u8>> {
            use std::io::Read as _;
            let mut bytes = Vec::new();
            std::fs::File::open(self.root.resolve(path)?)?
                .take(SMALL_FILE)
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().with_context(|| {
            Failure::new(
                Kind::Configuration,
                format!("cannot read {path}, which {key} names"),
            )
        })
    }
}
