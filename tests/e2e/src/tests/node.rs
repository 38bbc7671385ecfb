//! A node to set up: a containerd, a registry with a network in front of it, and kata-manager's configuration for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Instance, Options};
use km_tests_e2e::images;
use km_tests_e2e::km::Km;
use km_tests_e2e::process::Finished;
use km_tests_e2e::proxy::Proxy;
use km_tests_e2e::registry::{self, Registry};
use km_tests_e2e::sandbox::Sandbox;

/// The class that most tests use: runc runs its pods, so that it needs no Kata.
pub(crate) const DEMO: &str = "demo";

/// The repository and tag of the small artifact that [`Node::start`] publishes.
pub(crate) const SMALL: &str = "kata/small:v1";

/// A configured class.
#[derive(Clone, Debug)]
pub(crate) struct Class {
    name: String,
    reference: String,
    runtime_type: Option<&'static str>,
}

impl Class {
    /// A class of the catalogue: it needs the provider.
    pub(crate) fn catalogue(name: &str, reference: String) -> Self {
        Self {
            name: name.to_owned(),
            reference,
            runtime_type: None,
        }
    }

    /// A class with runc behind it.
    pub(crate) fn runc(name: &str, reference: String) -> Self {
        Self {
            runtime_type: Some("io.containerd.runc.v2"),
            ..Self::catalogue(name, reference)
        }
    }
}

/// The node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) registry: Registry,
    pub(crate) proxy: Proxy,
    pub(crate) containerd: Instance,
    /// `artifactsDir`; it is not there before the first apply.
    pub(crate) artifacts: PathBuf,
    /// kata-manager's configuration file.
    pub(crate) config: PathBuf,
    pub(crate) km: Km,
    /// The provider's prefix: empty, unless a test fills it.
    pub(crate) prefix: PathBuf,
}

impl Node {
    /// A node with a plain registry; see [`Self::with_registry`].
    pub(crate) fn start(sandbox: &Sandbox, options: &Options) -> Result<Self> {
        Self::with_registry(sandbox, options, registry::Options::default())
    }

    /// Starts everything, publishes a small artifact as [`SMALL`], and configures [`DEMO`] with it, through the proxy.
    pub(crate) fn with_registry(
        sandbox: &Sandbox,
        options: &Options,
        access: registry::Options,
    ) -> Result<Self> {
        let registry = Registry::start(sandbox, access.clone())?;
        let proxy = Proxy::start(sandbox, registry.port())?;
        let folder = sandbox.folder("node")?;
        let config = folder.join("config.yaml");
        let node = Self {
            containerd: Instance::start(sandbox, options)?,
            artifacts: folder.join("opt/artifacts"),
            km: Km::find()?.config(&config),
            prefix: folder.join("kata"),
            registry,
            proxy,
            config,
        };
        if access.user.is_some() {
            let credentials = node.registry.docker_config(&node.registry.host())?;
            node.configure_with(
                &[],
                &format!("registry: {{credentialsFile: {}}}\n", credentials.display()),
            )?;
        } else {
            node.configure(&[])?;
        }
        let small = sandbox.folder("small")?;
        fs::create_dir(small.join("share"))?;
        fs::write(small.join("vmlinuz"), "a kernel")?;
        fs::write(small.join("share/kata.img"), vec![7; 300_000])?;
        node.push(&small, SMALL)?;
        node.configure(&[Class::runc(DEMO, node.proxy.reference(SMALL))])?;
        Ok(node)
    }

    /// Publishes a folder.
    pub(crate) fn push(&self, folder: &Path, name_and_tag: &str) -> Result<()> {
        let folder = folder.display().to_string();
        let reference = self.registry.reference(name_and_tag);
        self.km
            .expect(&["artifacts", "push", &folder, &reference], 0)?;
        Ok(())
    }

    /// Writes the configuration.
    pub(crate) fn configure(&self, classes: &[Class]) -> Result<()> {
        self.configure_with(classes, "")
    }

    /// Writes the configuration, with more keys at its end.
    pub(crate) fn configure_with(&self, classes: &[Class], more: &str) -> Result<()> {
        let mut text = format!("artifactsDir: {}\n", self.artifacts.display());
        if !classes.is_empty() {
            text.push_str("runtimeClasses:\n");
        }
        for class in classes {
            let (name, reference) = (&class.name, &class.reference);
            text.push_str(&format!(
                "- name: {name}\n  artifacts:\n    url: {reference}\n"
            ));
            if let Some(kind) = class.runtime_type {
                text.push_str(&format!("  runtimeType: {kind}\n"));
            }
        }
        text.push_str(&format!(
            "provider:\n  prefix: {prefix}\n\
             containerd:\n  config: {config}\n  socket: {socket}\n  \
             restart:\n    mode: command\n    command: {command:?}\n    readyTimeoutSeconds: 20\n{more}",
            prefix = self.prefix.display(),
            config = self.containerd.config().display(),
            socket = self.containerd.socket().display(),
            command = self.containerd.restart_command(),
        ));
        fs::write(&self.config, text).context("write kata-manager's configuration")
    }

    /// Changes a part of the configuration's text, which must be there.
    pub(crate) fn reconfigure(&self, from: &str, to: &str) -> Result<()> {
        let text = fs::read_to_string(&self.config)?;
        ensure!(
            text.contains(from),
            "the configuration has no {from:?}:\n{text}"
        );
        fs::write(&self.config, text.replacen(from, to, 1))?;
        Ok(())
    }

    /// Applies, and sees that the handlers are live.
    pub(crate) fn apply(&self, live: &[&str]) -> Result<Finished> {
        let finished = self.km.expect(&["apply"], 0)?;
        let mut wanted: Vec<String> = live
            .iter()
            .chain(&["runc"])
            .map(|&n| n.to_owned())
            .collect();
        wanted.sort();
        let handlers = self.containerd.cri().handlers()?;
        ensure!(
            handlers == wanted,
            "live are {handlers:?}, not {wanted:?}; {finished}"
        );
        Ok(finished)
    }

    /// What must not change when a command fails.
    pub(crate) fn state(&self) -> Result<State> {
        Ok(State {
            config: Stamped::of(&self.containerd.config())?,
            handlers: self.containerd.cri().handlers().ok(),
            links: self.links()?,
        })
    }

    /// Each visible entry of `artifactsDir` and where it leads, if it is a link.
    fn links(&self) -> Result<Vec<(String, Option<PathBuf>)>> {
        if !self.artifacts.exists() {
            return Ok(Vec::new());
        }
        let mut links = Vec::new();
        for entry in fs::read_dir(&self.artifacts)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != ".store" {
                links.push((name, fs::read_link(entry.path()).ok()));
            }
        }
        links.sort();
        Ok(links)
    }

    /// Runs a command that must fail with `code`, name each of `mentions` on standard error, and leave the node as it was.
    pub(crate) fn refuses(&self, words: &[&str], code: i32, mentions: &[&str]) -> Result<Finished> {
        let before = self.state()?;
        let failed = self.km.expect(words, code)?;
        ensure!(
            failed.stderr.starts_with("error: ") || failed.stderr.contains("\nerror: "),
            "no line begins with `error: `: {failed}"
        );
        for mention in mentions {
            ensure!(
                failed.stderr.contains(mention),
                "the error does not mention {mention:?}; it {failed}"
            );
        }
        let after = self.state()?;
        ensure!(
            after.config.bytes == before.config.bytes
                && after.handlers == before.handlers
                && after.links == before.links,
            "the node changed from {before:?} to {after:?}; the command {failed}"
        );
        Ok(failed)
    }

    /// Uninstalls and sees that nothing of ours is left, and containerd's file is what it was.
    pub(crate) fn uninstall(&self, original: &[u8], handlers: &[&str]) -> Result<Finished> {
        let finished = self.km.expect(&["uninstall"], 0)?;
        self.is_clean(original)
            .with_context(|| format!("after an uninstall that {finished}"))?;
        let live = self.containerd.cri().handlers()?;
        ensure!(live == handlers, "{live:?} are live after {finished}");
        Ok(finished)
    }

    /// As [`Self::uninstall`], where `artifactsDir` may stay as an empty folder: a process that was killed between making it
    /// and writing that down leaves no way to tell it from a folder of somebody else.
    pub(crate) fn uninstall_after_a_kill(&self, original: &[u8]) -> Result<()> {
        let finished = self.km.expect(&["uninstall"], 0)?;
        // It works on an empty folder only; what else is there fails the check below.
        drop(fs::remove_dir(&self.artifacts));
        self.is_clean(original)
            .with_context(|| format!("after an uninstall that {finished}"))?;
        let live = self.containerd.cri().handlers()?;
        ensure!(live == ["runc"], "{live:?} are live after {finished}");
        Ok(())
    }

    /// That no file of ours is left.
    pub(crate) fn is_clean(&self, original: &[u8]) -> Result<()> {
        let now = fs::read(self.containerd.config())?;
        ensure!(
            now == original,
            "containerd's configuration is not byte for byte what it was:\n{}",
            String::from_utf8_lossy(&now)
        );
        let left: Vec<PathBuf> = walk(&self.artifacts)?;
        ensure!(left.is_empty(), "files of ours are left: {left:?}");
        let beside: Vec<_> = names(&self.containerd.dir().join("etc"))?;
        ensure!(
            beside == ["conf.d", "config.toml"],
            "beside containerd's configuration lies {beside:?}"
        );
        self.is_clean_of_handlers()
    }

    /// That no drop-in of ours is left.
    pub(crate) fn is_clean_of_handlers(&self) -> Result<()> {
        let drop_ins = names(&self.containerd.dir().join("etc/conf.d"))?;
        ensure!(
            !drop_ins.iter().any(|name| name.contains("kata-manager")),
            "in conf.d lies {drop_ins:?}"
        );
        Ok(())
    }

    /// That a pod on [`DEMO`] runs.
    pub(crate) fn demo_runs(&self) -> Result<()> {
        self.demo_on(DEMO)
    }

    /// That a pod on a handler runs.
    pub(crate) fn demo_on(&self, handler: &str) -> Result<()> {
        let cri = self.containerd.cri();
        let said = cri.prove_handler(handler, images::BUSYBOX)?;
        ensure!(said.contains(handler), "the pod said {said:?}");
        Ok(())
    }

    /// That no content stands under a final name that is not its own, and no class leads nowhere: true at any moment.
    pub(crate) fn store_is_whole(&self) -> Result<()> {
        let store = self.artifacts.join(".store");
        for folder in ["files/sha256", "oci/blobs/sha256"] {
            let folder = store.join(folder);
            if !folder.exists() {
                continue;
            }
            for name in names(&folder)? {
                let bytes = fs::read(folder.join(&name))?;
                let hex = name.trim_end_matches(".x");
                ensure!(
                    images::sha256(&bytes) == format!("sha256:{hex}"),
                    "{} holds something else",
                    folder.join(&name).display()
                );
            }
        }
        for (name, target) in self.links()? {
            if target.is_some() {
                let class = self.artifacts.join(&name);
                ensure!(
                    class.is_dir(),
                    "{name} leads to {target:?}, which is not there"
                );
                let manifest = fs::read(class.join(".generation.json"))?;
                serde_json::from_slice::<serde_json::Value>(&manifest)
                    .with_context(|| format!("{name}'s .generation.json is not whole"))?;
            }
        }
        Ok(())
    }
}

/// See [`Node::state`].
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: Stamped,
    handlers: Option<Vec<String>>,
    links: Vec<(String, Option<PathBuf>)>,
}

/// A file and what tells that nobody wrote to it.
#[derive(PartialEq, Eq)]
pub(crate) struct Stamped {
    pub(crate) bytes: Vec<u8>,
    inode: u64,
    changed: SystemTime,
}

impl Stamped {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
        Ok(Self {
            bytes: fs::read(path)?,
            inode: meta.ino(),
            changed: meta.modified()?,
        })
    }
}

impl std::fmt::Debug for Stamped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "inode {} of\n{}",
            self.inode,
            String::from_utf8_lossy(&self.bytes)
        )
    }
}

/// The names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = fs::read_dir(folder)
        .with_context(|| format!("list {}", folder.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Everything below a folder and the folder itself; nothing if it is not there.
pub(crate) fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    if folder.symlink_metadata().is_err() {
        return Ok(Vec::new());
    }
    let mut found = vec![folder.to_owned()];
    if folder.is_dir() && !folder.is_symlink() {
        for name in names(folder)? {
            found.extend(walk(&folder.join(name))?);
        }
    }
    Ok(found)
}

/// The longest that a test waits for something to begin.
pub(crate) const SOON: Duration = Duration::from_secs(20);
