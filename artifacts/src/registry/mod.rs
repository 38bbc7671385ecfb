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
//! Mirrors are those of containerd's `hosts.toml` files; see `mirrors`. They are tried in turn, around everything else.
//!
//! It must not know of stores, classes or our own configuration file.

mod answer;
mod authorize;
mod blob;
mod challenge;
mod credentials;
mod dns;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod helper;
mod hosts;
mod manifest;
mod mirrors;
mod options;
mod pace;
mod parts;
mod platform;
mod push;
mod referrers;
mod retry;
mod tls;
mod transport;

#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;

use oci_spec::image::ImageManifest;

use crate::digest::Digest;
use crate::reference::Reference;
use authorize::Access;
use mirrors::{Mirrors, Need, Walk};

pub(crate) use answer::clean;
pub use credentials::{Credentials, CredentialsError};
pub use error::{Error, HostsCause};
pub use hosts::HostsError;
pub use options::{ClientCertificate, ClientOptions, HostsDir};
pub use parts::{BlobPart, BlobParts};
pub use platform::Platform;

/// What this module's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

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

/// A manifest or index as it came, verified against its digest and not parsed.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
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

/// A client for any number of registries. It is made once and shared by reference: it keeps connections and tokens.
///
/// Every function retries what is worth it (`ClientOptions::tries`), waits no longer than the options say for a sign of life,
/// and names host and reference in its errors. Futures may be dropped at any time.
#[derive(Debug)]
pub struct Client(Mirrors);

impl Client {
    /// Makes a client; no request is sent.
    ///
    /// # Errors
    /// [`Error::Ca`] or [`Error::ClientCertificate`] when the certificates in the options cannot be used.
    pub fn new(options: ClientOptions) -> Result<Client> {
        Mirrors::new(options).map(Client)
    }

    /// The ways to a reference's registry, for reading what the reference itself names.
    fn walk(&self, reference: &Reference) -> Result<Walk> {
        let need = match reference.digest() {
            Some(_) => Need::Pull,
            None => Need::Resolve,
        };
        self.0.walk(reference.registry(), need)
    }

    /// The digest that a reference has now: one request when the registry knows us by name and password, or not at all; two
    /// more for the first token. A reference with a digest costs none. It is the registry's word, not verified.
    ///
    /// # Errors
    /// The registry's and the network's.
    pub async fn digest(&self, reference: &Reference) -> Result<Digest> {
        let mut walk = self.walk(reference)?;
        loop {
            match walk.session().digest(reference).await {
                Ok(digest) => return Ok(digest),
                Err(error) => walk.on(error)?,
            }
        }
    }

    /// The image manifest of a reference, verified; if the reference names an index, the one for the platform.
    ///
    /// # Errors
    /// The registry's and the network's; [`Error::NoPlatform`]; content that does not verify or is not usable
    /// ([`Error::is_verification`]).
    pub async fn resolve(&self, reference: &Reference, platform: &Platform) -> Result<Resolved> {
        self.resolve_again(reference, platform, None).await
    }

    /// As [`Client::resolve`], when `known` is what the reference led to last and all of it is at hand: if it still does, that
    /// costs one small answer, and nothing for a reference with a digest.
    ///
    /// # Errors
    /// As [`Client::resolve`].
    pub async fn resolve_again(
        &self,
        reference: &Reference,
        platform: &Platform,
        known: Option<&Resolved>,
    ) -> Result<Resolved> {
        let mut walk = self.walk(reference)?;
        loop {
            let session = walk.session();
            match session.resolve(reference, platform, known).await {
                Ok(resolved) => return Ok(resolved),
                Err(error) => walk.on(error)?,
            }
        }
    }

    /// Streams a blob of the reference's repository into `sink`, in order. On success exactly `size` bytes with this digest
    /// were written since the last [`BlobSink::restart`]; the sink never gets more than `size`. `sink` is called on the task
    /// that awaits this.
    ///
    /// # Errors
    /// The registry's and the network's; [`Error::DigestMismatch`] and [`Error::TooLarge`]; [`Error::Sink`]. What was
    /// written is then worthless.
    pub async fn fetch_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        sink: &mut (dyn BlobSink + Send),
    ) -> Result<()> {
        let parts = parts::InOrder::new(sink, digest, size);
        self.fetch_parts(reference, digest, size, &parts).await
    }

    /// Fetches what lacks of a blob of the reference's repository into `parts`. On success nothing lacks and the digest is
    /// right. It is one stream, which goes on where it broke, with another mirror or the registry itself if need be; where one
    /// stream is slow and more are faster there are more, up to what `parts` allows. `parts` is called on the task that awaits
    /// this.
    ///
    /// # Errors
    /// The registry's and the network's: what `parts` has then is worth keeping, and another call goes on with it, perhaps
    /// with another registry. [`Error::DigestMismatch`] and [`Error::TooLarge`]: it is worthless. [`Error::Sink`].
    pub async fn fetch_parts(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        parts: &(dyn BlobParts + '_),
    ) -> Result<()> {
        let mut walk = self.0.walk(reference.registry(), Need::Pull)?;
        loop {
            let session = walk.session();
            let error = match session.fetch_parts(reference, digest, size, parts).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let worthless = error.is_verification();
            walk.on(error)?;
            if worthless {
                let restarted = parts.restart();
                restarted.map_err(|source| Error::Sink {
                    what: format!("blob {digest}"),
                    source,
                })?;
            }
        }
    }

    /// Whether blobs of the reference's repository can come from one place only: there is no mirror.
    pub(crate) fn has_one_way(&self, reference: &Reference) -> bool {
        let walk = self.0.walk(reference.registry(), Need::Pull);
        walk.is_ok_and(|walk| walk.is_single())
    }

    /// What refers to a digest, of one artifact type: as the registry's API lists it, or the fallback tag where there is no
    /// such API. The descriptors are its word, not verified.
    ///
    /// # Errors
    /// The registry's and the network's; that there are none is no error.
    pub(crate) async fn referrers(
        &self,
        reference: &Reference,
        digest: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<oci_spec::image::Descriptor>> {
        let mut walk = self.0.walk(reference.registry(), Need::Resolve)?;
        loop {
            let session = walk.session();
            let asked = async {
                match session.referrers(reference, digest, artifact_type).await? {
                    Some(listed) => Ok(listed),
                    // Who serves the API lists there what was under the tag before (specification, "Enabling the Referrers API").
                    None => session.tagged_referrers(reference, digest).await,
                }
            };
            match asked.await {
                // A mirror may have the content without what refers to it.
                Ok(all) if all.is_empty() && walk.skip() => {}
                Ok(all) => return Ok(all),
                Err(error) => walk.on(error)?,
            }
        }
    }

    /// A manifest or index of at most `limit` bytes; `None` when it is not there.
    ///
    /// # Errors
    /// The registry's and the network's; content that does not verify.
    pub(crate) async fn small_manifest(
        &self,
        reference: &Reference,
        limit: u64,
    ) -> Result<Option<Document>> {
        let mut walk = self.walk(reference)?;
        loop {
            match walk.session().small(reference, limit).await {
                Ok(document) => return Ok(Some(document)),
                Err(error) if referrers::is_absent(&error) => {
                    if !walk.skip() {
                        return Ok(None);
                    }
                }
                Err(error) => walk.on(error)?,
            }
        }
    }

    /// A small blob, in memory; see [`Client::fetch_blob`].
    ///
    /// # Errors
    /// As [`Client::fetch_blob`].
    pub(crate) async fn small_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
    ) -> Result<Vec<u8>> {
        struct Memory(Vec<u8>);
        impl BlobSink for Memory {
            fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
                self.0.extend_from_slice(bytes);
                Ok(())
            }
            fn restart(&mut self) -> io::Result<()> {
                self.0.clear();
                Ok(())
            }
        }
        let mut memory = Memory(Vec::new());
        self.fetch_blob(reference, digest, size, &mut memory)
            .await?;
        Ok(memory.0)
    }

    /// Whether the reference's repository has a blob, as one asks before [`Client::push_blob`].
    ///
    /// # Errors
    /// The registry's and the network's.
    pub async fn has_blob(&self, reference: &Reference, digest: &Digest) -> Result<bool> {
        let walk = self.0.walk(reference.registry(), Need::Push)?;
        let session = walk.session();
        session.has_blob(reference, digest, Access::Push).await
    }

    /// Uploads a blob of `size` bytes to the reference's repository. `progress` is told now and then how many bytes have
    /// left in this try; a new try begins at 0. The registry checks the digest.
    ///
    /// # Errors
    /// The registry's and the network's; [`Error::Source`] and [`Error::SourceChanged`].
    pub async fn push_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        source: BlobSource<'_>,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let walk = self.0.walk(reference.registry(), Need::Push)?;
        let session = walk.session();
        session
            .push_blob(reference, digest, size, source, progress)
            .await
    }

    /// Uploads a manifest under the reference's tag, else under its digest, and returns the digest. Its blobs must be there.
    ///
    /// # Errors
    /// The registry's and the network's; [`Error::DigestMismatch`] when the reference is pinned to another digest, or the
    /// registry stored something else.
    pub async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Result<Digest> {
        let walk = self.0.walk(reference.registry(), Need::Push)?;
        let session = walk.session();
        session.push_manifest(reference, media_type, bytes).await
    }
}
