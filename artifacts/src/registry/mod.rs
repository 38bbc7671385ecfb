//! A client for OCI registries: digests and manifests by reference, blobs as verified streams, and publishing.
//!
//! The contract is the OCI distribution specification 1.1, with the token protocol that registries share
//! (distribution/distribution, docs/content/spec/auth). It is a client of our own over reqwest, because the ready-made one,
//! oci-client, asks `/v2/` before the first request for a repository, so that finding out that nothing changed costs
//! two requests; chooses HTTP/2 where it is offered, which costs twice the time for large blobs; and leaves no hold on how
//! a broken transfer goes on.
//!
//! What a registry sends is hostile until it is verified: sizes are bounded, digests checked, texts cleaned before they
//! are shown, credentials sent only to the registry that they are for and the token server that it names.
//!
//! It must not know of stores, classes or configuration files.

mod error;

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use oci_spec::image::ImageManifest;

use crate::digest::Digest;
use crate::reference::Reference;

pub use error::Error;

/// What this module's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an image is built for, in the words of the OCI image specification (config.md, after Go's GOOS and GOARCH).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub architecture: String,
    /// Variant of the architecture, such as `v8`.
    pub variant: Option<String>,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

/// A manifest as the registry gave it, verified against its digest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Digest of `bytes`.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Exactly what the registry sent.
    pub bytes: Vec<u8>,
    /// What `bytes` say.
    pub parsed: ImageManifest,
}

/// What a reference leads to.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Digest of what the reference names: of the index if there is one, else of the manifest.
    pub digest: Digest,
    /// The image manifest: the one for the platform if there is an index.
    pub manifest: Manifest,
    /// The index that led to the manifest, with its digest.
    pub index: Option<(Digest, Vec<u8>)>,
}

/// Takes the bytes of a blob in order.
pub trait BlobSink {
    /// Appends bytes.
    ///
    /// # Errors
    /// Whatever keeps them from being stored; the transfer ends with [`Error::Sink`].
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Forgets everything written: the transfer begins again.
    ///
    /// # Errors
    /// As for [`BlobSink::write`].
    fn restart(&mut self) -> io::Result<()>;
}

/// Where a blob to publish is.
#[derive(Clone, Copy, Debug)]
pub enum BlobSource<'a> {
    /// In memory.
    Bytes(&'a [u8]),
    /// In a file, which is read as it is sent.
    File(&'a Path),
}

/// How to talk to registries.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Certificates in PEM that are trusted besides the system's.
    pub ca_pem: Option<Vec<u8>>,
    /// How long a connection may take.
    pub connect_timeout: Duration,
}

/// A client for any number of registries. Cheap to share by reference.
#[derive(Debug)]
pub struct Client {}

impl Client {
    /// Makes a client; no request is sent.
    pub fn new(_options: ClientOptions) -> Result<Client> {
        todo!()
    }

    /// The digest that a reference has now.
    pub async fn digest(&self, _reference: &Reference) -> Result<Digest> {
        todo!()
    }

    /// The manifest of a reference.
    pub async fn resolve(&self, _reference: &Reference, _platform: &Platform) -> Result<Resolved> {
        todo!()
    }

    /// Streams a blob into `sink`.
    pub async fn fetch_blob(
        &self,
        _reference: &Reference,
        _digest: &Digest,
        _size: u64,
        _sink: &mut (dyn BlobSink + Send),
    ) -> Result<()> {
        todo!()
    }

    /// Whether the repository has a blob.
    pub async fn has_blob(&self, _reference: &Reference, _digest: &Digest) -> Result<bool> {
        todo!()
    }

    /// Uploads a blob. `progress` is told the bytes sent so far in this try.
    pub async fn push_blob(
        &self,
        _reference: &Reference,
        _digest: &Digest,
        _size: u64,
        _source: BlobSource<'_>,
        _progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        todo!()
    }

    /// Uploads a manifest under the reference's tag (or digest) and returns its digest.
    pub async fn push_manifest(
        &self,
        _reference: &Reference,
        _media_type: &str,
        _bytes: Vec<u8>,
    ) -> Result<Digest> {
        todo!()
    }
}
