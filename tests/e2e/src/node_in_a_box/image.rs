//! What a node boots from: the disk and kernel of `hack/node-image`, an initrd, and the tar with what the tests bring.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::shape::Kernel;
use crate::cpio;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The node's first program.
const INIT: &str = include_str!("../../node-in-a-box/init");

/// systemd's description of the agent. It starts as early as it can: nothing that it does needs another service.
const AGENT_UNIT: &str = "\
[Unit]
Description=Runs programs for the tests outside
DefaultDependencies=no
After=systemd-tmpfiles-setup-dev.service

[Service]
ExecStart=/usr/local/bin/node-agent
WorkingDirectory=/root
Environment=HOME=/root PATH=/usr/local/bin:/usr/sbin:/usr/bin
Restart=always
RestartSec=0
OOMScoreAdjust=-1000
";

/// The node's network: one card with the address that QEMU expects. It waits for the card itself and not for systemd's unit of it,
/// which fails after ninety seconds, and without a failed unit: a busy machine may need longer.
const NETWORK_UNIT: &str = "\
[Unit]
Description=Address of the only network card

[Service]
Type=oneshot
RemainAfterExit=yes
TimeoutStartSec=infinity
ExecStartPre=/usr/bin/bash -c 'until test -e /sys/class/net/eth0; do sleep 0.1; done'
ExecStart=/usr/sbin/ip address add 10.0.2.15/24 dev eth0
ExecStart=/usr/sbin/ip link set eth0 up
ExecStart=/usr/sbin/ip route add default via 10.0.2.2
";

/// A door to containerd's socket for CRI clients outside.
const DOOR_UNIT: &str = "\
[Unit]
Description=containerd's socket for the tests outside

[Service]
ExecStart=/usr/lib/systemd/systemd-socket-proxyd /run/containerd/containerd.sock
";

/// The units that a node gets: name, text, and what starts it.
fn units() -> [(&'static str, String, Option<&'static str>); 4] {
    let door = format!(
        "[Unit]\nDescription=Port of containerd's socket\n\n[Socket]\nListenStream={}\n",
        super::machine::CONTAINERD
    );
    [
        (
            "node-agent.service",
            AGENT_UNIT.to_owned(),
            Some("sysinit.target"),
        ),
        (
            "node-network.service",
            NETWORK_UNIT.to_owned(),
            Some("multi-user.target"),
        ),
        ("containerd-door.socket", door, Some("sockets.target")),
        ("containerd-door.service", DOOR_UNIT.to_owned(), None),
    ]
}

/// The folder that `hack/node-image` has made, and the kernel.
#[derive(Clone, Debug)]
pub struct Image {
    folder: PathBuf,
    kernel: PathBuf,
    /// Whether the kernel has modules, so that some must be loaded before the disk is there.
    modular: bool,
}

impl Image {
    /// Makes the image, which needs the network the first time alone, and root. Progress goes to standard error.
    ///
    /// # Errors
    /// When `hack/node-image` fails; it has said why on standard error.
    pub fn make() -> Result<()> {
        run("hack/node-image")
    }

    /// Builds the kernel with iommufd, as [`Self::make`] does the rest.
    ///
    /// # Errors
    /// When `hack/node-kernel-iommufd` fails; it has said why on standard error.
    pub fn make_iommufd_kernel() -> Result<()> {
        run("hack/node-kernel-iommufd")
    }

    /// The image that lies in a folder of parts, with one of the kernels.
    ///
    /// # Errors
    /// When there is none.
    pub fn at(parts: &Path, kernel: Kernel) -> Result<Self> {
        let made = |name: &str, script: &str| {
            let path = parts.join(name);
            fs::canonicalize(&path)
                .with_context(|| format!("{}: make it with {script}", path.display()))
        };
        let folder = made("node/current", "hack/node-image")?;
        let kernel_folder = match kernel {
            Kernel::Debian => folder.clone(),
            Kernel::Iommufd => made("node-iommufd/current", "hack/node-kernel-iommufd")?,
        };
        Ok(Self {
            folder,
            kernel: kernel_folder.join("vmlinuz"),
            modular: kernel == Kernel::Debian,
        })
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.kernel.clone()
    }

    /// The root file system.
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk.ext4")
    }

    /// Writes the initrd: busybox, the first program, and the modules that it loads.
    ///
    /// # Errors
    /// When a part is missing or the file cannot be written.
    pub fn write_initrd(&self, to: &Path) -> Result<()> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        let mut archive = cpio::Archive::new();
        for folder in ["bin", "dev", "modules", "proc", "root", "sys"] {
            archive.folder(folder);
        }
        archive
            .device("dev/console", 5, 1)
            .file("bin/busybox", 0o755, &read(&self.folder.join("busybox"))?)
            .link("bin/sh", "busybox")
            .file("init", 0o755, INIT.as_bytes());
        if !self.modular {
            return write(to, archive);
        }
        let modules = self.folder.join("modules");
        let mut paths: Vec<PathBuf> = fs::read_dir(&modules)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .with_context(|| format!("list {}", modules.display()))?;
        paths.sort();
        for path in paths {
            let name = path.file_name().context("a file has a name")?;
            let name = format!("modules/{}", name.to_string_lossy());
            archive.file(&name, 0o644, &read(&path)?);
        }
        write(to, archive)
    }
}

fn write(to: &Path, archive: cpio::Archive) -> Result<()> {
    fs::write(to, archive.finish()).with_context(|| format!("write {}", to.display()))
}

/// Runs a script that makes a part, with its progress on standard error.
fn run(script: &str) -> Result<()> {
    let script = Path::new(REPOSITORY).join(script);
    let output = Command::new(&script)
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", script.display()))?;
    ensure!(
        output.status.success(),
        "{} failed ({}); its reason is above",
        script.display(),
        output.status
    );
    Ok(())
}

/// What the tests bring into the node: programs in `/usr/local/bin`, the agent among them, and files.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    programs: Vec<(String, PathBuf)>,
}

impl Payload {
    /// A payload of the agent and its companions alone.
    ///
    /// # Errors
    /// When they are not built.
    pub fn new() -> Result<Self> {
        let mut payload = Self::default();
        for name in ["node-agent", "vfio-hold", "file-block"] {
            payload.program(name, &beside(name)?);
        }
        Ok(payload)
    }

    /// Adds the kata-manager binary under test.
    ///
    /// # Errors
    /// When there is none.
    pub fn kata_manager(&mut self) -> Result<&mut Self> {
        let binary = crate::km::Km::find()?;
        Ok(self.program("kata-manager", binary.binary()))
    }

    /// Adds a program under a name.
    pub fn program(&mut self, name: &str, path: &Path) -> &mut Self {
        self.programs.push((name.to_owned(), path.to_owned()));
        self
    }

    /// Writes the tar.
    ///
    /// # Errors
    /// When a program cannot be read or the file cannot be written.
    pub fn write(&self, to: &Path) -> Result<()> {
        let what = || format!("write {}", to.display());
        let mut archive = tar::Builder::new(File::create(to).with_context(what)?);
        for (name, path) in &self.programs {
            let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            let mut header = header(file.metadata()?.len(), 0o755);
            archive
                .append_data(&mut header, format!("usr/local/bin/{name}"), &mut file)
                .with_context(what)?;
        }
        for (name, text, wanted_by) in units() {
            let unit = format!("etc/systemd/system/{name}");
            archive
                .append_data(
                    &mut header(text.len() as u64, 0o644),
                    &unit,
                    text.as_bytes(),
                )
                .with_context(what)?;
            let Some(target) = wanted_by else { continue };
            let mut wants = header(0, 0o777);
            wants.set_entry_type(tar::EntryType::Symlink);
            let link = format!("etc/systemd/system/{target}.wants/{name}");
            archive
                .append_link(&mut wants, link, format!("/{unit}"))
                .with_context(what)?;
        }
        archive.finish().with_context(what)
    }
}

fn header(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header
}

/// A program of this workspace that lies beside the running one.
///
/// # Errors
/// When it is not built.
pub fn beside(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    let path = me.with_file_name(name);
    ensure!(
        path.is_file(),
        "{} is not built: `cargo build -p km-gpu-emulator -p km-node-agent`",
        path.display()
    );
    Ok(path)
}
