//! Brings an artifact into the store: what lacks is fetched, verified, unpacked, and only then given its final name.
//!
//! Order: layers and configuration first (each complete and verified by itself), then a check of all layers together, then
//! the manifest, by which the artifact becomes complete. So a killed or failed pull leaves verified parts that the next one
//! need not fetch, and never an artifact.
//!
//! An archive is unpacked while it is fetched, into temporary files that are placed once its digest is verified.
//!
//! It must not know of classes and generations.

mod early;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::{self, TryStreamExt};
use tokio::sync::Semaphore;

use self::early::Early;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::Artifact;
use crate::layers::{self, Part, Role};
use crate::progress::{Item, Progress};
use crate::reference::Reference;
use crate::registry::{self, BlobPart, BlobParts, BlobSink, Client, Resolved};
use crate::store::{FileSink, NamedManifest, PartWriter, PartialBlob, Store, blocking, part_error};
use crate::unpack::{Format, Limits};

/// Layers fetched at the same time.
const CONCURRENT: usize = 3;

/// A blob that lacks, or that is here and still packed.
#[derive(Clone, Debug)]
struct Job {
    item: usize,
    name: String,
    digest: Digest,
    size: u64,
    fetch: bool,
    /// Its blob is a file of the artifact, too.
    raw: bool,
    archive: Option<(Format, Option<Digest>)>,
}

/// Fetches what the store lacks of a resolved artifact, and returns it complete. Blobs that are here are not fetched. The
/// store must be initialised and its lock held.
///
/// # Errors
/// [`Error::DiskFull`] before the first byte when there is no room; the registry's errors; content that does not verify
/// ([`Error::is_verification`]); the disk's errors. Nothing of what failed is under a final name then; what was verified
/// before stays, and the next pull need not fetch it.
pub async fn pull(
    store: &Store,
    client: &Client,
    reference: &Reference,
    resolved: &Resolved,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Artifact> {
    let name = reference.to_string();
    let root = Root {
        reference: &name,
        digest: &resolved.manifest.digest,
        media_type: &resolved.manifest.media_type,
        bytes: &resolved.manifest.bytes,
    };
    pull_from(
        store,
        &Registry { client, reference },
        root,
        limits,
        progress,
    )
    .await
}

/// Where blobs come from. The registry is one; memory in a test is another.
pub(crate) trait Blobs: Sync {
    /// Streams a blob into the download. When this returns `Ok`, the bytes are what the digest says.
    fn fetch(
        &self,
        digest: &Digest,
        size: u64,
        into: &mut Download<'_>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Whether there is nobody else to ask: bytes that are of no use are the only ones then, before they are all there.
    fn is_only_source(&self) -> bool;
}

struct Registry<'a> {
    client: &'a Client,
    reference: &'a Reference,
}

impl Blobs for Registry<'_> {
    async fn fetch(&self, digest: &Digest, size: u64, into: &mut Download<'_>) -> Result<()> {
        let fetched = self
            .client
            .fetch_parts(self.reference, digest, size, into)
            .await;
        fetched.map_err(|error| match error {
            // Our own error, which went through the client as an I/O error.
            registry::Error::Sink { what, source } => match source.downcast::<Error>() {
                Ok(ours) => ours,
                Err(source) => registry::Error::Sink { what, source }.into(),
            },
            other => other.into(),
        })
    }

    fn is_only_source(&self) -> bool {
        self.client.has_one_way(self.reference)
    }
}

/// A manifest that a reference was resolved to; its digest is verified.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Root<'a> {
    pub(crate) reference: &'a str,
    pub(crate) digest: &'a Digest,
    pub(crate) media_type: &'a str,
    pub(crate) bytes: &'a [u8],
}

/// See [`pull`], which is this with a registry.
pub(crate) async fn pull_from(
    store: &Store,
    blobs: &impl Blobs,
    root: Root<'_>,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Artifact> {
    let jobs = jobs(store, root.digest, root.bytes)?;
    bring_all(store, blobs, jobs, limits, progress).await?;
    finish(store, root)
}

/// The layers of an image as they are, which nothing refers to yet. Returns those that were not here before, also when not
/// all came.
pub(crate) async fn fetch_layers(
    store: &Store,
    client: &Client,
    reference: &Reference,
    layers: &[(Digest, u64)],
    progress: &dyn Progress,
) -> (Vec<Digest>, Result<()>) {
    let mut jobs: BTreeMap<Digest, Job> = BTreeMap::new();
    for (digest, size) in layers {
        match store.has_blob(digest, *size) {
            Ok(true) => {}
            Ok(false) => {
                let job = Job::new(digest.clone(), *size, digest.to_string());
                jobs.insert(digest.clone(), job);
            }
            Err(error) => return (Vec::new(), Err(error)),
        }
    }
    let fetched = jobs.keys().cloned().collect();
    let mut jobs: Vec<_> = jobs.into_values().collect();
    number(&mut jobs);
    let blobs = Registry { client, reference };
    let limits = Limits::default();
    let brought = bring_all(store, &blobs, jobs, &limits, progress).await;
    (fetched, brought)
}

async fn bring_all(
    store: &Store,
    blobs: &impl Blobs,
    jobs: Vec<Job>,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<()> {
    let items: Vec<_> = jobs
        .iter()
        .filter(|job| job.fetch)
        .map(|job| Item {
            name: job.name.clone(),
            bytes: job.size,
        })
        .collect();
    let fetched = jobs.iter().filter(|job| job.fetch);
    let wanted: Vec<_> = fetched.map(|job| (&job.digest, job.size)).collect();
    if !wanted.is_empty() {
        store.make_room(&wanted)?;
    }
    progress.begin(&items);
    let workers = Arc::new(Semaphore::new(CONCURRENT));
    let brought = stream::iter(jobs.into_iter().map(Ok))
        .try_for_each_concurrent(CONCURRENT, |job| {
            bring(store, blobs, job, limits, progress, &workers)
        })
        .await;
    // A worker thread outlives the future that waits for it. None may when the caller gives up the lock.
    let _idle = workers.acquire_many(CONCURRENT as u32).await;
    brought
}

/// Gives the artifact its manifest, by which it is complete.
pub(crate) fn finish(store: &Store, root: Root<'_>) -> Result<Artifact> {
    let Some(artifact) = store.assemble(root.digest, root.bytes)? else {
        return Err(Error::Damaged {
            path: store.store_dir(),
            problem:
                "a layer vanished while it was pulled; is another program at work there? Pull again"
                    .to_owned(),
        });
    };
    if !store.has_blob(root.digest, root.bytes.len() as u64)? {
        let mut sink = FileSink::create(store, "manifest", root.bytes.len() as u64)?;
        sink.write(root.bytes)?;
        let (temp, _) = sink.finish()?;
        store.place_blob(temp.path(), root.digest)?;
    }
    store.name_manifest(&NamedManifest {
        reference: root.reference,
        digest: root.digest,
        size: root.bytes.len() as u64,
        media_type: root.media_type,
        artifact_type: artifact.artifact_type.as_deref(),
    })?;
    drop_spent(store, &artifact)?;
    Ok(artifact)
}

/// Drops the blobs of archives that are unpacked. Each goes as soon as it is, unless the process ends between the two.
fn drop_spent(store: &Store, artifact: &Artifact) -> Result<()> {
    if store.keeps_blobs() {
        return Ok(());
    }
    let layers = || artifact.layers.iter();
    let raw: BTreeSet<_> = layers()
        .filter(|layer| !layer.unpacked)
        .map(|layer| &layer.digest)
        .collect();
    for layer in layers().filter(|layer| layer.unpacked && !raw.contains(&layer.digest)) {
        if store.has_blob(&layer.digest, layer.size)? {
            store.drop_blob(&layer.digest)?;
        }
        store.drop_partial(&layer.digest)?;
    }
    Ok(())
}

/// Streams that fetch one blob at the same time, at the most: each has a buffer, and a registry serves others as well.
const STREAMS: usize = 8;

/// One blob on its way, counted as its bytes come to be kept. The registry's client writes it in parts; every other source
/// in order, as a [`BlobSink`].
pub(crate) struct Download<'a> {
    blob: PartialBlob,
    digest: Digest,
    in_order: Option<PartWriter>,
    item: usize,
    progress: &'a dyn Progress,
}

impl<'a> Download<'a> {
    fn start(store: &Store, job: &Job, progress: &'a dyn Progress) -> Result<Download<'a>> {
        let blob = PartialBlob::open(store, &job.digest, job.size)?;
        progress.advance(job.item, blob.kept());
        Ok(Download {
            blob,
            digest: job.digest.clone(),
            in_order: None,
            item: job.item,
            progress,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.in_order.is_none() {
            if self.blob.kept() > 0 {
                self.forget()?;
            }
            self.in_order = Some(PartWriter::new(0));
        }
        if let Some(writer) = &mut self.in_order {
            let kept = writer.write(&self.blob, bytes)?;
            self.progress.advance(self.item, kept);
        }
        Ok(())
    }

    fn forget(&self) -> Result<()> {
        self.progress.restart(self.item);
        self.blob.restart()
    }

    /// The blob, whole and with the digest that it should have.
    async fn finish(mut self) -> Result<PartialBlob> {
        if let Some(mut writer) = self.in_order.take() {
            let kept = writer.end(&self.blob)?;
            self.progress.advance(self.item, kept);
        }
        if !self.blob.missing().is_empty() {
            let error = self.blob.wrong_size(self.blob.kept());
            self.blob.discard();
            return Err(error);
        }
        let got = self.blob.digest().await?;
        if got == self.digest {
            return Ok(self.blob);
        }
        self.blob.discard();
        Err(Error::Digest {
            what: format!("blob {}", self.digest),
            expected: self.digest,
            got,
        })
    }
}

impl BlobSink for Download<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.append(bytes).map_err(io::Error::other)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.in_order = None;
        self.forget().map_err(io::Error::other)
    }
}

impl BlobParts for Download<'_> {
    fn missing(&self) -> Vec<Range<u64>> {
        self.blob.missing()
    }

    fn part(&self, offset: u64) -> Box<dyn BlobPart + Send + '_> {
        Box::new(DownloadPart {
            of: self,
            writer: PartWriter::new(offset),
        })
    }

    fn digest(&self) -> Pin<Box<dyn Future<Output = io::Result<Digest>> + Send + '_>> {
        Box::pin(async { self.blob.digest().await.map_err(io::Error::other) })
    }

    fn restart(&self) -> io::Result<()> {
        self.forget().map_err(io::Error::other)
    }

    fn streams(&self) -> usize {
        STREAMS
    }
}

struct DownloadPart<'a> {
    of: &'a Download<'a>,
    writer: PartWriter,
}

impl BlobPart for DownloadPart<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let of = self.of;
        let kept = self.writer.write(&of.blob, bytes);
        of.progress
            .advance(of.item, kept.map_err(io::Error::other)?);
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        let of = self.of;
        let kept = self.writer.end(&of.blob).map_err(io::Error::other)?;
        of.progress.advance(of.item, kept);
        Ok(())
    }
}

/// What is to be done, each digest once.
fn jobs(store: &Store, manifest: &Digest, bytes: &[u8]) -> Result<Vec<Job>> {
    let parsed = layers::parse(bytes).map_err(|problem| Error::Manifest {
        manifest: manifest.clone(),
        problem,
    })?;
    let parts = layers::parts(&parsed).map_err(|error| part_error(manifest, error))?;
    let config = parsed.config();
    let digest = layers::digest(config).map_err(|error| part_error(manifest, error))?;
    let mut jobs: BTreeMap<Digest, Job> = BTreeMap::new();
    if !store.has_blob(&digest, config.size())? {
        jobs.insert(
            digest.clone(),
            Job::new(digest, config.size(), "config".to_owned()),
        );
    }
    for part in &parts {
        add_part(store, part, &mut jobs)?;
    }
    let mut jobs: Vec<_> = jobs.into_values().collect();
    number(&mut jobs);
    Ok(jobs)
}

fn number(jobs: &mut [Job]) {
    // The largest first: it decides when all are done.
    jobs.sort_by_key(|job| (!job.fetch, std::cmp::Reverse(job.size)));
    for (item, job) in jobs.iter_mut().enumerate() {
        job.item = item;
    }
}

fn add_part(store: &Store, part: &Part, jobs: &mut BTreeMap<Digest, Job>) -> Result<()> {
    let done = match &part.role {
        Role::Raw { .. } => store.join_raw(&part.digest, part.size)?,
        Role::Archive { content, .. } => {
            store.unpacked(&part.digest, content.as_ref())?.is_some()
                && (!store.keeps_blobs() || store.has_blob(&part.digest, part.size)?)
        }
    };
    if done {
        return Ok(());
    }
    let job = jobs
        .entry(part.digest.clone())
        .or_insert_with(|| Job::new(part.digest.clone(), part.size, part.name.clone()));
    job.fetch = !store.has_blob(&part.digest, part.size)?;
    match &part.role {
        Role::Raw { .. } => job.raw = true,
        Role::Archive { format, content } => job.archive = Some((*format, content.clone())),
    }
    Ok(())
}

impl Job {
    fn new(digest: Digest, size: u64, name: String) -> Job {
        Job {
            item: 0,
            name,
            digest,
            size,
            fetch: true,
            raw: false,
            archive: None,
        }
    }
}

async fn bring(
    store: &Store,
    blobs: &impl Blobs,
    job: Job,
    limits: &Limits,
    progress: &dyn Progress,
    workers: &Arc<Semaphore>,
) -> Result<()> {
    let (item, fetch) = (job.item, job.fetch);
    let mut fetched = None;
    if fetch {
        let mut download = Download::start(store, &job, progress)?;
        // What an earlier process left may be damaged, and a mirror may lie: then only the digest tells who is to blame.
        let may_stop = download.blob.kept() == 0 && blobs.is_only_source();
        let mut early = Early::start(store, &job, &download.blob, limits, workers).await;
        let fetch = blobs.fetch(&job.digest, job.size, &mut download);
        let received = match &mut early {
            Some(early) if may_stop => early.unless_hostile(fetch).await,
            _ => fetch.await,
        };
        if let Err(error) = received {
            if error.is_verification() {
                download.blob.discard();
            }
            return Err(error);
        }
        let blob = download.finish().await?;
        let unpacked = match early {
            Some(early) => early.finish().await,
            None => None,
        };
        if let Some(unpacked) = unpacked {
            early::keep(store, job, blob, unpacked, workers).await?;
            progress.done(item);
            return Ok(());
        }
        fetched = Some(blob);
    }
    let (store, limits) = (store.clone(), limits.clone());
    // The semaphore is never closed.
    let worker = Arc::clone(workers).acquire_owned().await.ok();
    blocking("storing a layer", move || {
        let _until_done = worker;
        if let Some(blob) = fetched {
            store.place_blob(blob.path(), &job.digest)?;
            blob.placed();
        }
        settle(&store, &job, &limits)
    })
    .await?;
    if fetch {
        progress.done(item);
    }
    Ok(())
}

/// Makes of a blob that is in the store what the artifact needs of it.
fn settle(store: &Store, job: &Job, limits: &Limits) -> Result<()> {
    if job.raw {
        store.join_raw(&job.digest, job.size)?;
    }
    let Some((format, content)) = &job.archive else {
        return Ok(());
    };
    let unpacked = store.unpack_layer(&job.digest, *format, content.as_ref(), limits);
    // The blob has done its work, or is of no use; after a full disk it need not be fetched again.
    let spent = unpacked
        .as_ref()
        .map_or_else(Error::is_verification, |_| true);
    if spent && !(job.raw || unpacked.is_ok() && store.keeps_blobs()) {
        store.drop_blob(&job.digest)?;
    }
    unpacked.map(|_| ())
}

#[cfg(test)]
mod tests;
