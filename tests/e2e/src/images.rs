//! Two small container images, made by hand from static busybox, as OCI archives that `ctr images import` takes.
//!
//! Layout: OCI image specification, `image-layout.md`, in a tar; containerd reads the image's name from the annotation
//! `io.containerd.image.name`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::parts::Parts;

/// The image of the sandbox container. It sleeps.
pub const PAUSE: &str = "localhost/test/pause:1";

/// An image with busybox's programs in `/bin`.
pub const BUSYBOX: &str = "localhost/test/busybox:1";

/// busybox's programs that get a name of their own in `/bin`.
const PROGRAMS: &[&str] = &["sh", "sleep", "echo", "cat", "ls", "env", "true"];

/// Writes `pause.tar` and `busybox.tar` into a folder and gives their paths.
///
/// # Errors
/// When busybox cannot be read or an archive cannot be written.
pub fn write(parts: &Parts, folder: &Path) -> Result<Vec<PathBuf>> {
    let busybox =
        fs::read(parts.busybox()).with_context(|| format!("read {}", parts.busybox().display()))?;
    let layer = layer(&busybox).context("make an image layer")?;
    let mut written = Vec::new();
    for (file, name, entrypoint) in [
        ("pause.tar", PAUSE, ["/bin/sleep", "2147483647"]),
        ("busybox.tar", BUSYBOX, ["/bin/sh", "-c"]),
    ] {
        let path = folder.join(file);
        let archive = archive(name, &entrypoint, &layer).context("make an image archive")?;
        fs::write(&path, archive).with_context(|| format!("write {}", path.display()))?;
        written.push(path);
    }
    Ok(written)
}

/// `sha256:` and the digest of some bytes in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    let hex: String = digest(&SHA256, bytes)
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

fn layer(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for folder in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        let mut header = header(tar::EntryType::Directory, 0o755, 0)?;
        tar.append_data(&mut header, format!("{folder}/"), std::io::empty())?;
    }
    let mut program = header(tar::EntryType::Regular, 0o755, busybox.len())?;
    tar.append_data(&mut program, "bin/busybox", busybox)?;
    for name in PROGRAMS {
        let mut link = header(tar::EntryType::Symlink, 0o777, 0)?;
        tar.append_link(&mut link, format!("bin/{name}"), "busybox")?;
    }
    Ok(tar.into_inner()?)
}

fn header(kind: tar::EntryType, mode: u32, size: usize) -> Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(u64::try_from(size)?);
    Ok(header)
}

fn archive(name: &str, entrypoint: &[&str], layer: &[u8]) -> Result<Vec<u8>> {
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Entrypoint": entrypoint, "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [sha256(layer)] },
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
    }))?;
    let mut listed = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    listed["annotations"] = json!({ "io.containerd.image.name": name });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [listed] }))?;

    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, bytes: &[u8]| -> Result<()> {
        let mut header = header(tar::EntryType::Regular, 0o644, bytes.len())?;
        tar.append_data(&mut header, path, bytes)?;
        Ok(())
    };
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    add("index.json", &index)?;
    for blob in [&manifest[..], &config, layer] {
        add(&format!("blobs/{}", sha256(blob).replace(':', "/")), blob)?;
    }
    Ok(tar.into_inner()?)
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": sha256(bytes), "size": bytes.len() })
}
