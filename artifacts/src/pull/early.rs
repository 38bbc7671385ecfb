//! Unpacks an archive while its blob is still being fetched, so that decompression does not wait for the network's end.
//!
//! What comes of it lies in temporary files until the blob's digest is verified; whatever goes wrong before, they go. It must
//! not place anything.

use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::Job;
use crate::error::{Error, Result};
use crate::store::{PartialBlob, Store, UnpackedLayer, blocking};
use crate::unpack::Limits;

/// What became of it; none when the bytes did not come, or changed, so that nothing can be said of the archive.
type Outcome = Option<Result<UnpackedLayer>>;

/// What the thread gives back. The permit goes last, when the temporary files are gone: also when nobody waits any more.
type Ended = (Outcome, Option<OwnedSemaphorePermit>);

/// An archive that is being unpacked. It ends with the blob that it follows, also when that is dropped.
pub(super) struct Early {
    task: JoinHandle<Ended>,
    ended: Option<Outcome>,
}

impl Early {
    /// Begins to follow the blob; none when it is no archive. The thread holds one of the workers' permits to its end.
    pub(super) async fn start(
        store: &Store,
        job: &Job,
        blob: &PartialBlob,
        limits: &Limits,
        workers: &Arc<Semaphore>,
    ) -> Option<Early> {
        let (format, content) = job.archive.clone()?;
        let following = blob.follow();
        let lost = following.lost();
        let limits = limits.of_layer(format, job.size);
        let (store, layer) = (store.clone(), job.digest.clone());
        // The semaphore is never closed.
        let worker = Arc::clone(workers).acquire_owned().await.ok();
        let task = tokio::task::spawn_blocking(move || {
            let unpacked =
                store.unpack_stream(following, &layer, format, content.as_ref(), &limits);
            let judged = unpacked.is_ok() || !lost.load(Ordering::Acquire);
            (judged.then_some(unpacked), worker)
        });
        Some(Early { task, ended: None })
    }

    /// Fetches, and stops when the archive turns out to be hostile meanwhile.
    ///
    /// An archive that is damaged is no reason to stop: whether the registry has it so or it came so is known by its digest.
    pub(super) async fn unless_hostile(
        &mut self,
        fetch: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        tokio::select! {
            biased;
            fetched = fetch => fetched,
            refused = self.hostile() => Err(refused),
        }
    }

    /// Why the archive is refused; never returns when it is not.
    async fn hostile(&mut self) -> Error {
        if self.ended.is_none() {
            self.ended = Some(Self::join(&mut self.task).await);
        }
        if matches!(self.ended, Some(Some(Err(Error::Hostile { .. }))))
            && let Some(Some(Err(error))) = self.ended.take()
        {
            return error;
        }
        pending().await
    }

    async fn join(task: &mut JoinHandle<Ended>) -> Outcome {
        match task.await {
            Ok((outcome, _permit)) => outcome,
            Err(source) => Some(Err(Error::Worker {
                what: "unpacking a layer",
                source,
            })),
        }
    }

    /// What the archive was made into, once all of its blob is there. None when the blob began again on its way: then it is
    /// still to be unpacked.
    pub(super) async fn finish(mut self) -> Outcome {
        match self.ended.take() {
            Some(ended) => ended,
            None => Self::join(&mut self.task).await,
        }
    }
}

/// Keeps a blob that is verified, and what was made of it meanwhile.
pub(super) async fn keep(
    store: &Store,
    job: Job,
    blob: PartialBlob,
    unpacked: Result<UnpackedLayer>,
    workers: &Arc<Semaphore>,
) -> Result<()> {
    let store = store.clone();
    let worker = Arc::clone(workers).acquire_owned().await.ok();
    blocking("storing a layer", move || {
        let _until_done = worker;
        // The blob has done its work, or is of no use; after a full disk it need not be fetched again.
        let spent = unpacked
            .as_ref()
            .map_or_else(Error::is_verification, |_| !store.keeps_blobs());
        if job.raw || !spent {
            store.place_blob(blob.path(), &job.digest)?;
            blob.placed();
            if job.raw {
                store.join_raw(&job.digest, job.size)?;
            }
            return unpacked.and_then(|layer| store.keep_unpacked(layer).map(drop));
        }
        // Until the contents are in place the blob stays, if only to be taken up again.
        let kept = unpacked.and_then(|layer| store.keep_unpacked(layer).map(drop));
        if kept.as_ref().map_or_else(Error::is_verification, |()| true) {
            blob.discard();
        }
        kept
    })
    .await
}

#[cfg(test)]
#[path = "early_tests.rs"]
mod tests;
