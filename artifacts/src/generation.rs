//! What the store keeps and hands out: artifacts (complete, by manifest digest) and generations (immutable folders made
//! from them).
//!
//! Data only; the store reads and writes it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::trust::Signer;

/// The format of `.generation.json`; a reader refuses a newer one.
pub(crate) const FORMAT: u32 = 1;

/// Mode of a file in the store.
pub(crate) const FILE_MODE: u32 = 0o444;
/// Mode of a file that its archive marked executable.
pub(crate) const EXECUTABLE_MODE: u32 = 0o555;

/// An artifact whose every file is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Digest of the manifest; for a multi-platform reference that of the chosen platform.
    pub manifest: Digest,
    /// The manifest's `artifactType`.
    pub artifact_type: Option<String>,
    /// The manifest's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its layers, in order; those that hold no file are left out.
    pub layers: Vec<Layer>,
    /// Regular files of all layers, by path.
    pub files: Vec<ArtifactFile>,
    /// Symlinks of all layers, by path.
    pub links: Vec<ArtifactLink>,
}

impl Artifact {
    /// The file at a path inside the artifact.
    pub fn file(&self, path: &str) -> Option<&ArtifactFile> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// A layer of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Layer {
    /// Digest of the layer as the registry has it.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
    /// Whether it was an archive, whose blob is dropped once unpacked.
    pub unpacked: bool,
}

/// A regular file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ArtifactFile {
    /// Relative, normalised.
    pub path: String,
    /// Of the content.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// Whether its archive marked it executable.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

impl ArtifactFile {
    /// The mode that the file has in the store.
    pub fn mode(&self) -> u32 {
        if self.executable {
            EXECUTABLE_MODE
        } else {
            FILE_MODE
        }
    }
}

/// A symlink of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ArtifactLink {
    /// Relative, normalised.
    pub path: String,
    /// As written; relative, and inside the artifact.
    pub target: String,
}

/// A file that is made on this node: a Kata configuration, a drop-in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DerivedFile {
    /// Relative to the generation. It takes the place of an artifact's file or symlink of the same path.
    pub path: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// What a generation is made from besides the artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerationMeta {
    /// The reference as the user wrote it.
    pub reference: String,
    /// The digest that the reference had: of the index if there is one, else of the manifest. What a registry answers to
    /// "has it changed?" is compared with it.
    pub source: Digest,
    /// Digest of everything that the derived files were made from.
    pub inputs: Digest,
    /// The signatures that were verified; none where none was demanded.
    pub signers: Vec<Signer>,
}

/// An immutable folder `.store/generations/<class>/<number>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The folder, as this process sees it.
    pub dir: PathBuf,
    /// Its `.generation.json`.
    pub manifest: GenerationManifest,
}

impl Generation {
    /// The class that it belongs to.
    pub fn class(&self) -> &str {
        &self.manifest.class
    }

    /// Its number; higher is newer.
    pub fn number(&self) -> u64 {
        self.manifest.number
    }
}

/// `.generation.json`: where a generation came from and what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GenerationManifest {
    /// Version of this format: 1.
    pub format: u32,
    /// The class.
    pub class: String,
    /// The number.
    pub number: u64,
    /// RFC 3339, UTC.
    pub created: String,
    /// The reference as the user wrote it.
    pub reference: String,
    /// See [`GenerationMeta::source`].
    pub source: Digest,
    /// Digest of the artifact's manifest.
    pub manifest: Digest,
    /// The artifact's type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// See [`GenerationMeta::inputs`].
    pub inputs: Digest,
    /// See [`GenerationMeta::signers`]. The signatures themselves are in `.store/oci`, so that they can be verified again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signers: Vec<Signer>,
    /// The artifact's layers.
    pub layers: Vec<Layer>,
    /// Files that are hard links into `.store/files`.
    pub files: Vec<StoredFile>,
    /// Symlinks.
    pub links: Vec<ArtifactLink>,
    /// Files that were made on this node.
    pub derived: Vec<StoredDerived>,
    /// Files of the artifact whose place a derived file took.
    pub replaced: Vec<ArtifactFile>,
}

impl GenerationManifest {
    /// When it was made; nothing when `created` is no time.
    pub fn created_at(&self) -> Option<SystemTime> {
        humantime::parse_rfc3339(&self.created).ok()
    }
}

/// A file as it was when the generation was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredFile {
    /// Path, digest, size, mode.
    #[serde(flatten)]
    pub file: ArtifactFile,
    /// For a cheap check.
    pub stamp: Stamp,
}

/// A derived file as it was when the generation was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoredDerived {
    /// Relative to the generation.
    pub path: String,
    /// Of the content.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// For a cheap check.
    pub stamp: Stamp,
}

/// What changes when a file is replaced or written: while it is the same, so is the content. When it differs the content is
/// hashed, so a store that was copied elsewhere is slower to check and not wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stamp {
    /// The inode's number.
    pub inode: u64,
    /// Time of the last write, in nanoseconds since 1970.
    pub modified_ns: i64,
}

/// What [`crate::Store::activate`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The class pointed there already.
    Unchanged,
    /// The class was not there.
    Created,
    /// The class pointed at another generation.
    Switched {
        /// Its number.
        from: u64,
    },
    /// Something that is not ours was there.
    Displaced {
        /// Where it is kept now.
        kept: PathBuf,
    },
}

/// What [`crate::Store::remove_unreferenced`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names removed.
    pub files: u64,
    /// Bytes given back to the file system.
    pub bytes: u64,
}

/// What is wrong with one path of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The path, as this process sees it.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: Problem,
    /// The artifact's file that is affected, when it is one.
    pub file: Option<ArtifactFile>,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.problem)
    }
}

/// How a path differs from the generation's manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is gone.
    #[error("is missing")]
    Missing,
    /// It is a folder, a link, a device.
    #[error("is not {expected}")]
    Kind {
        /// In words, with its article.
        expected: &'static str,
    },
    /// It is longer or shorter.
    #[error("has {got} bytes where {expected} are recorded")]
    Size {
        /// Recorded bytes.
        expected: u64,
        /// Bytes found.
        got: u64,
    },
    /// Its permissions differ.
    #[error("has mode {got:04o} where {expected:04o} is recorded")]
    Mode {
        /// Recorded permission bits.
        expected: u32,
        /// Those found.
        got: u32,
    },
    /// Its bytes differ.
    #[error("has digest {got} where {expected} is recorded")]
    Content {
        /// Recorded.
        expected: Digest,
        /// Found.
        got: Digest,
    },
    /// The kernel refuses to read it.
    #[error("cannot be read: it was changed on the disk, or the disk has failed")]
    Unreadable,
    /// A symlink that leads elsewhere.
    #[error("points to {got} where {expected} is recorded")]
    Target {
        /// Recorded.
        expected: String,
        /// Found.
        got: String,
    },
    /// Nobody recorded it.
    #[error("is not part of the generation")]
    Unexpected,
}

/// A time as `.generation.json` has it, RFC 3339 in UTC, to the second.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn times_are_rfc_3339() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), want);
        }
    }
}
