//! What a store looks like, for comparing where two ways have led; and copies of stores.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use km_tests_e2e::images;
use km_tests_e2e::tracer::Call;
use serde_json::Value;

use super::super::node::{names, walk};

/// Every path with its kind, mode and content, and the bytes that the disk holds for all of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Picture {
    paths: BTreeMap<PathBuf, String>,
    bytes: u64,
}

impl Picture {
    /// Of everything below a folder. When a generation was made and which inodes it has is left out: that is never the same.
    pub(super) fn take(top: &Path) -> Result<Picture> {
        let mut paths = BTreeMap::new();
        let mut inodes = BTreeMap::new();
        for path in walk(top)? {
            let meta = fs::symlink_metadata(&path)?;
            let mode = meta.permissions().mode() & 0o7777;
            let what = if meta.is_dir() {
                format!("folder {mode:o}")
            } else if meta.is_symlink() {
                format!("link to {}", fs::read_link(&path)?.display())
            } else {
                let bytes = fs::read(&path)?;
                let content = match path.file_name().and_then(|name| name.to_str()) {
                    Some(".generation.json") => timeless(&bytes)?,
                    _ => images::sha256(&bytes),
                };
                inodes.insert((meta.dev(), meta.ino()), bytes.len() as u64);
                format!("file {mode:o} {content}")
            };
            paths.insert(path.strip_prefix(top)?.to_owned(), what);
        }
        // Manifests of generations are of one length but for their numbers' digits.
        let bytes = inodes.into_values().filter(|bytes| *bytes > 100_000).sum();
        Ok(Picture { paths, bytes })
    }

    /// What another one has that this one has not, or otherwise, a line each.
    pub(super) fn differences(&self, other: &Picture) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, what) in &self.paths {
            match other.paths.get(path) {
                None => lines.push(format!("  lacks {}", path.display())),
                Some(now) if now != what => {
                    lines.push(format!("  {} is {now}, not {what}", path.display()));
                }
                Some(_) => {}
            }
        }
        let more = other
            .paths
            .keys()
            .filter(|path| !self.paths.contains_key(*path));
        lines.extend(more.map(|path| format!("  left over: {}", path.display())));
        if self.bytes != other.bytes {
            lines.push(format!(
                "  {} bytes on disk, not {}",
                other.bytes, self.bytes
            ));
        }
        lines
    }
}

fn timeless(manifest: &[u8]) -> Result<String> {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for name in ["created", "stamp", "inode", "modifiedNs"] {
                    fields.remove(name);
                }
                fields.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_slice(manifest).context("a generation's manifest")?;
    strip(&mut value);
    Ok(value.to_string())
}

/// The kinds of calls that concern files, and how many there are of each.
pub(super) fn kinds(calls: &[Call]) -> BTreeMap<&'static str, usize> {
    let mut kinds = BTreeMap::new();
    for call in calls.iter().filter(|call| call.path.is_some()) {
        *kinds.entry(call.name).or_default() += 1;
    }
    kinds
}

/// Copies a folder with everything that makes up a store: modes, links, and which names are one inode.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut known = BTreeMap::new();
    copy_into(from, to, &mut known)
        .with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

fn copy_into(from: &Path, to: &Path, known: &mut BTreeMap<(u64, u64), PathBuf>) -> Result<()> {
    let meta = fs::symlink_metadata(from)?;
    if meta.is_symlink() {
        return Ok(symlink(fs::read_link(from)?, to)?);
    }
    if meta.is_dir() {
        fs::create_dir(to)?;
        for name in names(from)? {
            copy_into(&from.join(&name), &to.join(&name), known)?;
        }
        return Ok(fs::set_permissions(to, meta.permissions())?);
    }
    match known.get(&(meta.dev(), meta.ino())) {
        Some(first) => fs::hard_link(first, to)?,
        None => {
            fs::copy(from, to)?;
            known.insert((meta.dev(), meta.ino()), to.to_owned());
        }
    }
    Ok(())
}
