//! Archives that are unpacked while they come.

use super::super::tests::{files, final_names, gzip_tar, noise, store};
use super::*;
use crate::store::PartWriter;
use crate::unpack::Format;

struct Fixture {
    _dir: tempfile::TempDir,
    store: Store,
    job: Job,
    bytes: Vec<u8>,
    workers: Arc<Semaphore>,
}

fn fixture() -> Fixture {
    let (dir, store) = store();
    let (bytes, tar) = gzip_tar(&[("vmlinuz", b"kernel"), ("image", &noise(4 << 20))]);
    let digest = crate::digest::Digest::of(&bytes);
    let mut job = Job::new(digest, bytes.len() as u64, "folder".to_owned());
    job.archive = Some((Format::TarGzip, Some(tar)));
    Fixture {
        _dir: dir,
        store,
        job,
        bytes,
        workers: Arc::new(Semaphore::new(1)),
    }
}

impl Fixture {
    fn open(&self) -> PartialBlob {
        PartialBlob::open(&self.store, &self.job.digest, self.job.size).unwrap()
    }

    async fn follow(&self, blob: &PartialBlob) -> Early {
        let limits = Limits::default();
        let early = Early::start(&self.store, &self.job, blob, &limits, &self.workers).await;
        early.unwrap()
    }

    fn write(&self, blob: &PartialBlob, range: std::ops::Range<usize>) {
        let mut writer = PartWriter::new(range.start as u64);
        writer.write(blob, &self.bytes[range]).unwrap();
        writer.end(blob).unwrap();
    }

    fn unfinished(&self) -> usize {
        files(&self.store.store_dir().join("tmp")).len()
    }
}

#[tokio::test]
async fn what_was_unpacked_whole_and_is_not_verified_leaves_nothing() {
    let fixture = fixture();
    let blob = fixture.open();
    let early = fixture.follow(&blob).await;
    fixture.write(&blob, 0..fixture.bytes.len());
    let layer = early.finish().await.unwrap().unwrap();
    assert_eq!(fixture.unfinished(), 2);
    drop(layer);
    blob.discard();
    assert_eq!(final_names(&fixture.store), Vec::<String>::new());
}

#[tokio::test]
async fn a_broken_transfer_is_followed_again_from_what_is_on_the_disk() {
    let fixture = fixture();
    let blob = fixture.open();
    let early = fixture.follow(&blob).await;
    fixture.write(&blob, 0..2 << 20);
    drop(blob);
    assert!(early.finish().await.is_none(), "it was not judged");
    assert_eq!(fixture.unfinished(), 0);

    let blob = fixture.open();
    let kept = usize::try_from(blob.kept()).unwrap();
    let early = fixture.follow(&blob).await;
    fixture.write(&blob, kept..fixture.bytes.len());
    assert_eq!(blob.digest().await.unwrap(), fixture.job.digest);
    let unpacked = early.finish().await.unwrap();
    let (store, workers) = (&fixture.store, &fixture.workers);
    keep(store, fixture.job.clone(), blob, unpacked, workers)
        .await
        .unwrap();
    let record = store.unpacked(&fixture.job.digest, None).unwrap().unwrap();
    assert_eq!(record.files.len(), 2);
    assert_eq!(
        files(&store.store_dir().join("partial")),
        Vec::<String>::new()
    );
    assert!(!store.blob_path(&fixture.job.digest).exists());
}

#[tokio::test]
async fn the_permit_outlives_the_temporary_files() {
    let fixture = fixture();
    let blob = fixture.open();
    let early = fixture.follow(&blob).await;
    fixture.write(&blob, 0..fixture.bytes.len());
    drop((early, blob));
    let _idle = fixture.workers.acquire().await.unwrap();
    assert_eq!(fixture.unfinished(), 0);
}
