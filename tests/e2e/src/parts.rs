//! The real programs, and where each lies. `hack/parts` gets them; this module knows the shape of the folder that it fills.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The repository, whose `hack/parts` is run.
const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// All groups that `hack/parts` knows and the harness uses.
pub const ALL: &[&str] = &[
    "containerd-1.6",
    "containerd-1.7",
    "containerd-2.x",
    "tools",
    "oras",
    "skopeo",
    "cosign",
    "qemu",
    "strace",
    "firmware",
    "kernel",
];

/// The firmware builds that a Kata prefix holds (Kata's own NVIDIA configurations name one a class).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// `OVMF.fd`: any guest.
    Generic,
    /// `AMDSEV.fd`: SEV-SNP guests.
    AmdSev,
    /// `OVMF.inteltdx.fd`: TDX guests.
    IntelTdx,
}

/// A folder that `hack/parts` has filled.
#[derive(Clone, Debug)]
pub struct Parts {
    dir: PathBuf,
}

impl Parts {
    /// Gets the named groups, which needs the network only the first time. Progress goes to standard error.
    ///
    /// # Errors
    /// When `hack/parts` fails; it has said why on standard error.
    pub fn get(groups: &[&str]) -> Result<Self> {
        let dir = match std::env::var_os("KM_PARTS") {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(REPOSITORY).join(".parts"),
        };
        let script = Path::new(REPOSITORY).join("hack/parts");
        let status = Command::new(&script)
            .arg(&dir)
            .args(groups)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("start {}", script.display()))?;
        ensure!(
            status.success(),
            "{} could not get the programs that the tests run ({status}); its reason is above",
            script.display()
        );
        Self::at(&dir)
    }

    /// A folder that is filled already.
    ///
    /// # Errors
    /// When it is not there.
    pub fn at(dir: &Path) -> Result<Self> {
        let dir =
            fs::canonicalize(dir).with_context(|| format!("parts folder {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn tree(&self, group: &str, path: &str) -> PathBuf {
        self.dir.join("tree").join(group).join(path)
    }

    /// Static busybox.
    pub fn busybox(&self) -> PathBuf {
        self.tree("tools", "bin/busybox")
    }

    /// The folder that holds runc 1.1, which works under every containerd here.
    pub fn runc_dir(&self) -> PathBuf {
        self.tree("tools", "usr/sbin")
    }

    /// `docker-registry`.
    pub fn registry(&self) -> PathBuf {
        self.tree("tools", "usr/bin/docker-registry")
    }

    /// `oras`.
    pub fn oras(&self) -> PathBuf {
        self.tree("oras", "usr/bin/oras")
    }

    /// A launcher of Debian's skopeo.
    pub fn skopeo(&self) -> PathBuf {
        self.dir.join("bin/skopeo")
    }

    /// `cosign`.
    pub fn cosign(&self) -> PathBuf {
        self.tree("cosign", "usr/bin/cosign")
    }

    /// The folder with `containerd`, `ctr` and `containerd-shim-runc-v2` of one group (`containerd-1.6`...).
    pub fn containerd_dir(&self, group: &str) -> PathBuf {
        self.tree(group, "usr/bin")
    }

    /// The configuration that Debian's package of one group installs.
    pub fn packaged_containerd_config(&self, group: &str) -> PathBuf {
        self.tree(group, "etc/containerd/config.toml")
    }

    /// A launcher of Debian's real QEMU, which brings its own libraries and firmware folders.
    pub fn qemu(&self) -> PathBuf {
        self.dir.join("bin/qemu-system-x86_64")
    }

    /// A launcher of Debian's strace.
    pub fn strace(&self) -> PathBuf {
        self.dir.join("bin/strace")
    }

    /// One of Debian's real OVMF builds.
    pub fn firmware(&self, which: Firmware) -> PathBuf {
        let name = match which {
            Firmware::Generic => "OVMF.fd",
            Firmware::AmdSev => "OVMF.amdsev.fd",
            Firmware::IntelTdx => "OVMF.inteltdx.ms.fd",
        };
        self.tree("firmware", "usr/share/ovmf").join(name)
    }

    /// Debian's real cloud kernel (a bzImage).
    ///
    /// # Errors
    /// When the folder holds none.
    pub fn kernel(&self) -> Result<PathBuf> {
        let boot = self.tree("kernel", "boot");
        fs::read_dir(&boot)
            .with_context(|| format!("list {}", boot.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"))
            })
            .with_context(|| format!("{} holds no vmlinuz-*", boot.display()))
    }
}
