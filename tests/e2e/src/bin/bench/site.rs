//! Registries with the artifacts in them, and the programs that fetch them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use km_tests_e2e::km::Km;
use km_tests_e2e::registry::{Options, Registry};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::{images, process};

use crate::measure::{self, Cost};
use crate::{Arguments, mix};

/// Layers as they are.
pub(crate) const PLAIN: &str = "kata/gpu-artifacts:plain";
/// One layer, tar and gzip, as oras makes it of a folder.
pub(crate) const GZIP: &str = "kata/gpu-artifacts:targz";
/// One layer, tar and zstd.
pub(crate) const ZSTD: &str = "kata/gpu-artifacts:tarzst";
/// As [`PLAIN`], and small.
pub(crate) const SMALL: &str = "kata/gpu-artifacts:small";
/// As [`PLAIN`], with an image of 2 GiB; only in a full run.
pub(crate) const LARGE: &str = "kata/gpu-artifacts:large";

/// Image sizes in MiB.
const QUICK: u64 = 256;
const FULL: u64 = 600;

/// The longest that it may take to publish something.
const PUBLISH: Duration = Duration::from_secs(600);

/// See the module's documentation.
pub(crate) struct Site {
    parts: km_tests_e2e::parts::Parts,
    /// With TLS, as registries are.
    pub(crate) registry: Registry,
    /// Without, where bytes are counted.
    pub(crate) plain: Registry,
    pub(crate) km: Km,
    /// As it reaches the plain one.
    pub(crate) km_plain: Km,
    /// The files as they were published.
    pub(crate) guest: PathBuf,
    /// Where everything is fetched to.
    pub(crate) pulled: PathBuf,
    home: PathBuf,
}

impl Site {
    /// Makes the artifacts and publishes them.
    ///
    /// # Errors
    /// When a program fails, or the disk.
    pub(crate) fn start(sandbox: &Sandbox, arguments: &Arguments) -> Result<Self> {
        let tls = Options {
            tls: true,
            ..Options::default()
        };
        let home = sandbox.folder("home")?;
        let registry = Registry::start(sandbox, tls)?;
        let config = home.join("config.yaml");
        let text = format!(
            "artifactsDir: {}\nregistry:\n  https: [127.0.0.1]\n  caFile: {}\n",
            home.join("artifacts").display(),
            registry.ca().display()
        );
        fs::write(&config, text)?;
        let source = sandbox.folder("source")?;
        let site = Self {
            parts: sandbox.parts().clone(),
            plain: Registry::start(sandbox, Options::default())?,
            km: Km::find()?.config(&config),
            km_plain: Km::find()?,
            guest: source.join("guest"),
            pulled: sandbox.folder("pulled")?,
            registry,
            home,
        };
        site.publish(&source, arguments)?;
        Ok(site)
    }

    fn publish(&self, source: &Path, arguments: &Arguments) -> Result<()> {
        let size = if arguments.full { FULL } else { QUICK };
        fs::create_dir(&self.guest)?;
        mix::write(&self.parts, &self.guest, size << 20)?;
        let raw = mix::FILES.map(|name| format!("{name}:application/octet-stream"));
        self.push(&self.guest, &self.registry.reference(PLAIN), &raw)?;
        if arguments.wants("targz") || arguments.wants("tarzst") {
            self.push(
                source,
                &self.registry.reference(GZIP),
                &["guest/".to_owned()],
            )?;
        }
        if arguments.wants("tarzst") {
            mix::pack_zstd(&self.guest, "guest", &source.join("guest.tar.zst"))?;
            let layer = "guest.tar.zst:application/vnd.oci.image.layer.v1.tar+zstd".to_owned();
            self.push(source, &self.registry.reference(ZSTD), &[layer])?;
        }
        if arguments.wants("noop") {
            let small = source.join("small");
            fs::create_dir(&small)?;
            mix::write(&self.parts, &small, 1 << 20)?;
            self.push(&small, &self.plain.reference(SMALL), &raw)?;
        }
        if arguments.full && arguments.wants("rss") {
            let large = source.join("large");
            fs::create_dir(&large)?;
            mix::write(&self.parts, &large, 2 << 30)?;
            self.push(&large, &self.registry.reference(LARGE), &raw)?;
            fs::remove_dir_all(&large)?;
        }
        Ok(())
    }

    fn push(&self, folder: &Path, reference: &str, files: &[String]) -> Result<()> {
        let mut command = self.oras();
        command.arg("push").arg("--no-tty").current_dir(folder);
        if reference.starts_with(&self.plain.host()) {
            command.arg("--plain-http");
        }
        command.arg(reference).args(files);
        process::run(&mut command, PUBLISH)?.success()?;
        Ok(())
    }

    /// oras as it trusts the registry.
    fn oras(&self) -> Command {
        self.dressed(&self.parts.oras())
    }

    fn dressed(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", &self.home)
            .env("SSL_CERT_FILE", self.registry.ca());
        command
    }

    /// The processes that serve.
    pub(crate) fn servers(&self) -> [u32; 2] {
        [self.registry.pid(), self.plain.pid()]
    }

    fn empty(&self) -> Result<PathBuf> {
        let to = self.pulled.join("to");
        if to.exists() {
            fs::remove_dir_all(&to).context("empty the folder for what is fetched")?;
        }
        Ok(to)
    }

    /// `oras pull` into an empty folder.
    pub(crate) fn oras_pulls(&self, reference: &str) -> Result<Cost> {
        let to = self.empty()?;
        let mut command = self.oras();
        command
            .args(["pull", "--no-tty", "-o"])
            .arg(to)
            .arg(reference);
        measure::run(&mut command, &self.servers())
    }

    /// `skopeo copy` into an empty folder.
    pub(crate) fn skopeo_pulls(&self, reference: &str) -> Result<Cost> {
        let to = self.empty()?;
        let mut command = self.dressed(&self.parts.skopeo());
        command.args(["--insecure-policy", "copy"]);
        command.arg(format!("docker://{reference}"));
        command.arg(format!("dir:{}", to.display()));
        measure::run(&mut command, &self.servers())
    }

    /// `kata-manager artifacts pull --to` into an empty folder.
    pub(crate) fn km_pulls(&self, reference: &str, more: &[&str]) -> Result<Cost> {
        let to = self.empty()?.display().to_string();
        let words = [&["artifacts", "pull", reference, "--to", &to], more].concat();
        measure::run(&mut self.km.command(&words), &self.servers())
    }

    /// That what was fetched last is what was published.
    ///
    /// # Errors
    /// When it is not.
    pub(crate) fn pulled_right(&self, below: &str) -> Result<()> {
        for name in mix::FILES {
            let (is, was) = (
                self.pulled.join("to").join(below).join(name),
                self.guest.join(name),
            );
            let digest = |path: &Path| -> Result<String> {
                let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
                Ok(images::sha256(&bytes))
            };
            anyhow::ensure!(
                digest(&is)? == digest(&was)?,
                "{} is not what was published",
                is.display()
            );
        }
        Ok(())
    }

    /// The image that is fetched.
    pub(crate) fn image(&self) -> PathBuf {
        self.guest.join(mix::FILES[1])
    }

    /// All files of the artifact.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        mix::FILES
            .iter()
            .map(|name| self.guest.join(name))
            .collect()
    }
}
