//! Unpacks archives that nobody trusts: tar, tar+gzip and tar+zstd, from a stream into an [`Output`].
//!
//! Everything that could hurt the host is refused with the entry's name and the reason: names that are absolute or climb,
//! links that lead out, device nodes, special mode bits, archives that blow up. What is left is regular files and relative
//! symlinks, in memory as a list; the contents went to the `Output`, which decides where they lie and makes nothing visible
//! before [`unpack`] has returned.
//!
//! This module is pure: it reads a `Read` and must not know of the disk, the store or the registry.

mod ahead;
mod archive;
mod entries;
mod flatten;
mod header;
pub(crate) mod path;
mod shape;
mod sparse;
mod stream;

use std::io;

pub use archive::{NewFile, Output, Unpacked, unpack};
pub use flatten::{Flat, FlattenError, Layers, flatten};
pub use path::normalise;
pub use shape::Shape;
pub use stream::Format;

/// How much an archive may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Paths in one artifact, the folders that they imply included.
    pub entries: usize,
    /// Bytes of one layer after decompression, headers and padding included.
    pub unpacked_bytes: u64,
    /// Bytes of all sparse files of one layer together, holes included: those take no room, but time to be hashed.
    pub sparse_bytes: u64,
    /// Decompressed bytes for each compressed byte...
    pub ratio: u64,
    /// ...looked at once this many bytes came out: small archives of zeros are harmless.
    pub ratio_free_bytes: u64,
}

impl Limits {
    /// The same for a layer of `bytes` bytes, which cannot hold more than its format lets it: so no header can claim room for a
    /// file that the layer has not.
    pub(crate) fn of_layer(&self, format: Format, bytes: u64) -> Limits {
        let most = match format {
            Format::Tar => bytes,
            Format::TarGzip | Format::TarZstd => {
                bytes.saturating_mul(self.ratio).max(self.ratio_free_bytes)
            }
        };
        Limits {
            unpacked_bytes: self.unpacked_bytes.min(most),
            ..self.clone()
        }
    }
}

impl Default for Limits {
    /// 100,000 paths and 16 GiB are far above a guest image with its kernel modules. DEFLATE itself cannot exceed 1032:1
    /// (zlib technical details, "Maximum Compression Factor"), and a disk image that reaches 1000:1 is zeros.
    fn default() -> Limits {
        Limits {
            entries: 100_000,
            unpacked_bytes: 16 << 30,
            sparse_bytes: 16 << 30,
            ratio: 1000,
            ratio_free_bytes: 64 << 20,
        }
    }
}

/// Why an entry is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It starts with a slash.
    #[error("its name is absolute")]
    AbsoluteName,
    /// It has a `..` part.
    #[error("its name has a '..' part")]
    Climbs,
    /// NUL, newline, escape and the like.
    #[error("its name or target holds a control character")]
    ControlCharacter,
    /// Bytes that are no text.
    #[error("its name is not UTF-8")]
    NotUtf8,
    /// Over 1024 bytes, or a part of it over 255.
    #[error("its name is too long")]
    NameTooLong,
    /// Nothing is left of it.
    #[error("its name is empty")]
    EmptyName,
    /// The name of our own manifest.
    #[error("its name is reserved for kata-manager")]
    Reserved,
    /// The path was there before.
    #[error("the same path is there twice")]
    Duplicate,
    /// A path through a file or a symlink.
    #[error("it lies under {via}, which is not a folder")]
    UnderNonFolder {
        /// The path that is no folder.
        via: String,
    },
    /// A target that is empty or far too long.
    #[error("it is a link with an empty or overlong target")]
    BadTarget,
    /// A link that leaves the artifact.
    #[error("it is a link that leads outside the artifact, to {target}")]
    LinkOutside {
        /// Where it leads, as written.
        target: String,
    },
    /// A symlink whose way goes through another one.
    #[error("it is a link whose way goes through another symlink, {via}")]
    LinkThroughLink {
        /// The symlink on the way.
        via: String,
    },
    /// A hard link to something that is no earlier regular file.
    #[error("it is a hard link to {target}, which is no regular file before it in the archive")]
    HardLinkTarget {
        /// Where it leads, as written.
        target: String,
    },
    /// Device nodes, fifos and what no guest artifact needs.
    #[error("it is {what}; only regular files, folders and links are accepted")]
    Kind {
        /// In words, with its article.
        what: &'static str,
    },
    /// A whiteout that hides nothing, or has something below it.
    #[error("it has the name of a whiteout, and is none")]
    Whiteout,
    /// setuid, setgid or sticky.
    #[error("its mode {mode:04o} has setuid, setgid or sticky bits")]
    SpecialBits {
        /// The permission bits as written.
        mode: u32,
    },
    /// See [`Limits::entries`].
    #[error("the artifact has more than {limit} paths")]
    TooManyEntries {
        /// The limit.
        limit: usize,
    },
    /// See [`Limits::unpacked_bytes`].
    #[error("the layer unpacks to more than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// See [`Limits::ratio`].
    #[error("the layer unpacks to more than {limit} times its size, like a decompression bomb")]
    Ratio {
        /// The limit.
        limit: u64,
    },
    /// The header breaks the format.
    #[error("its tar header is malformed: {what}")]
    Header {
        /// What is wrong.
        what: &'static str,
    },
}

/// An entry that is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {entry:?} is refused: {reason}")]
pub struct Refused {
    /// The entry's name as far as it is known; lossy when it is no text.
    pub entry: String,
    /// Why.
    pub reason: Refusal,
}

impl Refused {
    pub(crate) fn new(entry: impl Into<String>, reason: Refusal) -> Refused {
        Refused {
            entry: entry.into(),
            reason,
        }
    }
}

/// Why an archive was not unpacked. `E` is the [`Output`]'s error.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError<E: std::error::Error + 'static> {
    /// Hostile or unusable content.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The stream cannot be decoded or ends early.
    #[error("the archive is damaged near entry {entry:?}")]
    Damaged {
        /// The last entry whose name was read, or empty.
        entry: String,
        /// The decoder's answer.
        source: io::Error,
    },
    /// The output failed.
    #[error(transparent)]
    Output(E),
}
