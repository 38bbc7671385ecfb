//! Why an artifact was not pulled, stored, activated or published.
//!
//! A caller maps an error to an exit code by asking: was it the content ([`Error::is_verification`]), the registry
//! ([`Error::is_registry`]), the user's settings ([`Error::is_configuration`]), or has a person to decide first
//! ([`Error::is_refused`])? What is left is the host.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::registry;
use crate::trust::Rejected;
use crate::unpack::Refused;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused something.
    #[error(transparent)]
    Host(#[from] km_host::Error),
    /// The registry, or the way to it.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Not enough room, known before or while writing.
    #[error(
        "not enough space under {}: {needed} bytes are needed and {free} are free; free some space or set artifactsDir to a larger file system",
        path.display()
    )]
    DiskFull {
        /// A path on the full file system.
        path: PathBuf,
        /// Bytes wanted.
        needed: u64,
        /// Bytes available to us.
        free: u64,
    },
    /// A class's name that cannot be a folder's name here.
    #[error(
        "class name {name:?} is not usable: lower-case letters, digits, '-' and '.', at most 253, starting and ending with a letter or digit"
    )]
    ClassName {
        /// The name.
        name: String,
    },
    /// The bytes are not what their digest says.
    #[error("{what} has digest {got} where {expected} was expected; nothing of it was kept")]
    Digest {
        /// What was hashed: a layer, an unpacked tar, a file.
        what: String,
        /// From the manifest.
        expected: Digest,
        /// Computed here.
        got: Digest,
    },
    /// Content that is longer or shorter than announced; longer is not read to its end.
    #[error("{got} bytes came for {} where {expected} were announced; nothing of it was kept", path.display())]
    Size {
        /// The temporary file.
        path: PathBuf,
        /// Bytes announced by the manifest or the archive.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The manifest cannot be used as an artifact.
    #[error("manifest {manifest} is not usable: {problem}")]
    Manifest {
        /// Its digest.
        manifest: Digest,
        /// What is wrong with it.
        problem: String,
    },
    /// An image does not have what was asked for.
    #[error("nothing can be taken from the image {image}: {problem}")]
    Image {
        /// Its reference.
        image: String,
        /// What is wrong, and what helps.
        problem: String,
    },
    /// Nobody whom the user trusts has signed it.
    #[error("{}", untrusted(what, sign, keys, rejected))]
    Untrusted {
        /// The reference, or the generation.
        what: String,
        /// What is to be signed: repository and digest.
        sign: String,
        /// The ids of the keys that were tried.
        keys: Vec<Digest>,
        /// The signatures that were found.
        rejected: Vec<Rejected>,
    },
    /// A layer, or all layers together, hold what must not reach a host.
    #[error("artifact content from {origin} is refused; nothing of it was activated")]
    Hostile {
        /// The layer or manifest.
        origin: String,
        /// Which entry and why.
        source: Refused,
    },
    /// An archive that cannot be decoded.
    #[error("layer {layer} cannot be unpacked: it is damaged near entry {entry:?}")]
    Archive {
        /// The layer's digest.
        layer: Digest,
        /// The last entry whose name was read.
        entry: String,
        /// The decoder's answer.
        source: io::Error,
    },
    /// A file of ours in the store is not as we wrote it.
    #[error("{} is damaged: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong and what helps.
        problem: String,
    },
    /// There is a generation of that number.
    #[error("generation {number} of {class} is there already, at {}", path.display())]
    GenerationExists {
        /// The class.
        class: String,
        /// The number.
        number: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// There is no generation of that number.
    #[error("{class} has no generation {number} under {}", path.display())]
    NoGeneration {
        /// The class.
        class: String,
        /// The number.
        number: u64,
        /// Where it would be.
        path: PathBuf,
    },
    /// A derived file cannot be placed.
    #[error("derived file {path:?} of {class} cannot be placed: {source}")]
    Derived {
        /// The class.
        class: String,
        /// The file's path in the generation.
        path: String,
        /// Why.
        source: crate::unpack::Refusal,
    },
    /// Two foreign things want the same place; only a person can choose.
    #[error(
        "{} is not ours and one like it is kept at {} already; move one of them away",
        path.display(),
        kept.display()
    )]
    Occupied {
        /// The path under the class's name.
        path: PathBuf,
        /// Where an earlier one is kept.
        kept: PathBuf,
    },
    /// The store still holds something that somebody needs.
    #[error("{} is still needed: {why}", path.display())]
    InUse {
        /// What is needed.
        path: PathBuf,
        /// By whom, and what to do.
        why: String,
    },
    /// Blobs that an export needs were dropped after they had been unpacked.
    #[error(
        "{reference} cannot be exported: {} of its blobs are not here any more ({}); set keepBlobs: true and pull it again",
        blobs.len(),
        blobs.first().map(ToString::to_string).unwrap_or_default()
    )]
    Dropped {
        /// The artifact.
        reference: String,
        /// Their digests.
        blobs: Vec<Digest>,
    },
    /// A file that is no OCI image layout, or holds what is none of one.
    #[error("{} cannot be imported: {problem}", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A folder cannot be published.
    #[error("{} cannot be published: {problem}", path.display())]
    Publish {
        /// The folder or file.
        path: PathBuf,
        /// Why, and what helps.
        problem: String,
    },
    /// A worker thread died.
    #[error("internal error while {what}")]
    Worker {
        /// What it did.
        what: &'static str,
        /// How it ended.
        source: tokio::task::JoinError,
    },
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the content is to blame: a digest, a limit, a hostile or unusable artifact.
    pub fn is_verification(&self) -> bool {
        match self {
            Error::Digest { .. }
            | Error::Size { .. }
            | Error::Manifest { .. }
            | Error::Layout { .. }
            | Error::Untrusted { .. }
            | Error::Hostile { .. }
            | Error::Archive { .. } => true,
            Error::Registry(error) => error.is_verification(),
            _ => false,
        }
    }

    /// Whether the registry or the network is to blame.
    pub fn is_registry(&self) -> bool {
        match self {
            Error::Registry(error) => {
                !(error.is_verification() || error.is_local() || error.is_configuration())
            }
            _ => false,
        }
    }

    /// Whether the user's settings are to blame.
    pub fn is_configuration(&self) -> bool {
        match self {
            Error::Registry(error) => error.is_configuration(),
            Error::ClassName { .. } | Error::Publish { .. } | Error::Image { .. } => true,
            _ => false,
        }
    }

    /// Whether a person has to decide first.
    pub fn is_refused(&self) -> bool {
        matches!(
            self,
            Error::Occupied { .. } | Error::InUse { .. } | Error::Dropped { .. }
        )
    }

    /// Whether something in the store is not as we wrote it; making a new generation helps.
    pub fn is_damage(&self) -> bool {
        matches!(self, Error::Damaged { .. } | Error::NoGeneration { .. })
    }

    /// Turns a host error into a plain "disk full" when that is what it is.
    pub(crate) fn host_on(dir: &Path, needed: u64, error: km_host::Error) -> Error {
        if error.kind() != io::ErrorKind::StorageFull {
            return Error::Host(error);
        }
        Error::DiskFull {
            path: dir.to_owned(),
            needed,
            free: free_bytes(dir).unwrap_or(0),
        }
    }
}

/// The most rejected signatures that a message lists.
const LISTED: usize = 8;

/// How to sign with a key of one's own and nothing of sigstore's public services. cosign 2 knows no `--use-signing-config`.
const SIGN: &str = "cosign sign --key cosign.key --use-signing-config=false --tlog-upload=false";

fn untrusted(what: &str, sign: &str, keys: &[Digest], rejected: &[Rejected]) -> String {
    if rejected.is_empty() {
        return format!(
            "{what} is not signed, and its policy demands a signature; sign it with \"{SIGN} {sign}\""
        );
    }
    let mut text = format!("{what} has no signature that counts; found were:");
    for one in rejected.iter().take(LISTED) {
        text.push_str(&format!("\n  {one}"));
    }
    if rejected.len() > LISTED {
        text.push_str(&format!("\n  and {} more", rejected.len() - LISTED));
    }
    let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
    text.push_str(&format!(
        "\nTrusted keys: {}. If one of them should have signed it: \"{SIGN} {sign}\"",
        keys.join(", ")
    ));
    text
}

/// Bytes that this process may still write on the file system of `dir` (statvfs(3), `f_bavail`).
pub(crate) fn free_bytes(dir: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(dir).map_err(km_host::Error::io("read free space of", dir))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
