//! A small real guest artifact: Debian's cloud kernel, and an initrd that says that it lives and switches the machine off.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::cpio;
use crate::parts::Parts;

/// The kernel's name in the artifact's folder.
pub const KERNEL: &str = "vmlinuz";
/// The initrd's name in the artifact's folder.
pub const INITRD: &str = "initrd.img";
/// The Kata configuration's name in the artifact's folder, where it carries one.
pub const CONFIGURATION: &str = "configuration.toml";

/// The line that a guest prints when it has booted, without its end of line.
pub fn alive(generation: &str) -> String {
    format!("kata-manager guest: generation {generation} is alive")
}

/// Fills a folder with an artifact: kernel and initrd.
///
/// `generation` is a word that the booted guest prints (see [`alive`]), so that two artifacts can be told apart.
///
/// # Errors
/// When a part is missing or a file cannot be written.
pub fn build(parts: &Parts, folder: &Path, generation: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let kernel = parts.kernel()?;
    fs::copy(&kernel, folder.join(KERNEL))
        .with_context(|| format!("copy {} to {}", kernel.display(), folder.display()))?;
    write(&folder.join(INITRD), &initrd(parts, generation)?)
}

/// Adds a Kata configuration to an artifact, whose paths name a folder of the machine that it was built on.
///
/// # Errors
/// When it cannot be written.
pub fn add_configuration(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(CONFIGURATION);
    let text = format!(
        r#"# A guest's own Kata configuration, as its builder left it.

[hypervisor.qemu]
path   = "/opt/kata/bin/qemu-system-x86_64"
kernel = "/build/out/{KERNEL}"     # re-rooted when the artifact is installed
initrd = "/build/out/{INITRD}"
machine_type = "q35"
kernel_params = "console=ttyS0"
default_memory = 2048

[agent.kata]

[runtime]
"#
    );
    write(&path, text.as_bytes())?;
    Ok(path)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

/// A gzip-compressed initramfs of busybox and one script.
fn initrd(parts: &Parts, generation: &str) -> Result<Vec<u8>> {
    let busybox =
        fs::read(parts.busybox()).with_context(|| format!("read {}", parts.busybox().display()))?;
    let init = format!(
        "#!/bin/sh\n\
         /bin/busybox mount -t proc none /proc\n\
         echo \"{line} on $(/bin/busybox uname -sr)\"\n\
         exec /bin/busybox poweroff -f\n",
        line = alive(generation)
    );
    let mut archive = cpio::Archive::new();
    archive
        .folder("bin")
        .folder("dev")
        .folder("proc")
        .device("dev/console", 5, 1)
        .file("bin/busybox", 0o755, &busybox)
        .link("bin/sh", "busybox")
        .file("init", 0o755, init.as_bytes());
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(&archive.finish())
        .and_then(|()| gzip.finish())
        .context("compress the initrd")
}
