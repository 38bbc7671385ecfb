//! A folder that looks like `/opt/kata`, made of real programs that stand where Kata's would.
//!
//! QEMU and the firmware are Debian's real builds. Kata's shim is no Debian package: runc's shim stands in for it, under its
//! name, which is enough to see that every file a class needs is found and executable. A README beside it says so.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::containerd::Version;
use crate::parts::{Firmware, Parts};

/// The names that Kata's shipped configurations give QEMU (`[hypervisor.qemu].path`): plain, SNP, TDX.
const QEMU_NAMES: &[&str] = &[
    "qemu-system-x86_64",
    "qemu-system-x86_64-snp-experimental",
    "qemu-system-x86_64-tdx-experimental",
];

/// The names that they give the firmware (`[hypervisor.qemu].firmware`), in `share/ovmf`.
const FIRMWARE: &[(&str, Firmware)] = &[
    ("OVMF.fd", Firmware::Generic),
    ("AMDSEV.fd", Firmware::AmdSev),
    ("OVMF.inteltdx.fd", Firmware::IntelTdx),
];

const README: &str = "\
containerd-shim-kata-v2 in this folder is NOT Kata's shim. It is containerd's own shim for runc, under Kata's name, so that
a node can be set up and looked at where Kata is not installed. A pod that asks for it gets no virtual machine.
The qemu-system-x86_64* programs start Debian's real QEMU; ../share/ovmf holds Debian's real OVMF builds.
";

/// Fills a folder and gives it back.
///
/// # Errors
/// When a part is missing or a file cannot be written.
pub fn assemble(parts: &Parts, prefix: &Path) -> Result<PathBuf> {
    let (bin, ovmf) = (prefix.join("bin"), prefix.join("share/ovmf"));
    for folder in [&bin, &ovmf] {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    // 1.7's shim works under every containerd here.
    copy(
        &parts
            .containerd_dir(Version::V1_7.group())
            .join("containerd-shim-runc-v2"),
        &bin.join("containerd-shim-kata-v2"),
    )?;
    fs::write(bin.join("README"), README).context("write the provider's README")?;
    let launcher = format!("#!/bin/sh\nexec '{}' \"$@\"\n", parts.qemu().display());
    for name in QEMU_NAMES {
        let path = bin.join(name);
        fs::write(&path, &launcher)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o755)))
            .with_context(|| format!("write {}", path.display()))?;
    }
    for (name, which) in FIRMWARE {
        copy(&parts.firmware(*which), &ovmf.join(name))?;
    }
    Ok(prefix.to_owned())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
