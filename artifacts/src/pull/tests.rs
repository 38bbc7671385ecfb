//! Pulls from blobs in memory that can misbehave.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::progress::Silent;

#[derive(Default)]
struct Memory {
    blobs: HashMap<String, Vec<u8>>,
    fetched: Mutex<Vec<String>>,
    /// Breaks off once in the middle of every blob and starts over.
    breaks: bool,
    /// Of a large blob only the first half ever comes.
    hangs: bool,
}

impl Memory {
    fn add(&mut self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.blobs.insert(digest.to_string(), bytes.to_vec());
        digest
    }

    fn fetched(&self) -> Vec<String> {
        let mut fetched = std::mem::take(&mut *self.fetched.lock().unwrap());
        fetched.sort();
        fetched
    }
}

impl Blobs for Memory {
    fn is_only_source(&self) -> bool {
        true
    }

    async fn fetch(&self, digest: &Digest, size: u64, into: &mut Download<'_>) -> Result<()> {
        self.fetched.lock().unwrap().push(digest.to_string());
        let bytes = &self.blobs[&digest.to_string()];
        let ours = |error: io::Error| error.downcast::<Error>().unwrap();
        if self.breaks {
            into.write(&bytes[..bytes.len() / 2]).map_err(ours)?;
            into.restart().map_err(ours)?;
        }
        if self.hangs && bytes.len() > 1 << 20 {
            into.write(&bytes[..bytes.len() / 2]).map_err(ours)?;
            return std::future::pending().await;
        }
        for piece in bytes.chunks(5) {
            into.write(piece).map_err(ours)?;
        }
        let got = Digest::of(bytes);
        if got != *digest && bytes.len() as u64 == size {
            return Err(registry::Error::DigestMismatch {
                what: "blob".to_owned(),
                expected: digest.clone(),
                got,
            }
            .into());
        }
        Ok(())
    }
}

struct Guest {
    memory: Memory,
    manifest: Vec<u8>,
}

fn layer(
    digest: &Digest,
    size: usize,
    media_type: &str,
    annotations: &serde_json::Value,
) -> serde_json::Value {
    serde_json::json!({
        "mediaType": media_type, "digest": digest, "size": size, "annotations": annotations,
    })
}

fn guest(layers: Vec<serde_json::Value>, mut memory: Memory) -> Guest {
    let config = memory.add(b"{}");
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.example",
        "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2 },
        "layers": layers,
    });
    Guest {
        memory,
        manifest: manifest.to_string().into_bytes(),
    }
}

fn raw(files: &[(&str, &[u8])]) -> Guest {
    let mut memory = Memory::default();
    let layers = files
        .iter()
        .map(|(path, bytes)| {
            let digest = memory.add(bytes);
            let annotations = serde_json::json!({ layers::TITLE: path });
            layer(
                &digest,
                bytes.len(),
                "application/octet-stream",
                &annotations,
            )
        })
        .collect();
    guest(layers, memory)
}

/// Bytes that do not compress.
pub(super) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        // Marsaglia, "Xorshift RNGs" (2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

pub(super) fn gzip_tar(files: &[(&str, &[u8])]) -> (Vec<u8>, Digest) {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&tar).unwrap();
    (encoder.finish().unwrap(), Digest::of(&tar))
}

/// What `oras push ref folder/` makes.
fn packed(files: &[(&str, &[u8])], content: Option<&Digest>) -> (Guest, Digest) {
    let mut memory = Memory::default();
    let (gzip, tar) = gzip_tar(files);
    let digest = memory.add(&gzip);
    let annotations = serde_json::json!({
        layers::TITLE: "folder",
        layers::UNPACK: "true",
        layers::CONTENT_DIGEST: content.unwrap_or(&tar),
    });
    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    (
        guest(
            vec![layer(&digest, gzip.len(), media_type, &annotations)],
            memory,
        ),
        digest,
    )
}

pub(super) fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.init().unwrap();
    (dir, store)
}

async fn run(store: &Store, guest: &Guest) -> Result<Artifact> {
    run_with(store, guest, &Limits::default(), &Silent).await
}

async fn run_with(
    store: &Store,
    guest: &Guest,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Artifact> {
    let root = Root {
        reference: "registry.example/guest:1",
        digest: &Digest::of(&guest.manifest),
        media_type: "application/vnd.oci.image.manifest.v1+json",
        bytes: &guest.manifest,
    };
    pull_from(store, &guest.memory, root, limits, progress).await
}

/// Names of all regular files below a folder.
pub(super) fn files(dir: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path.file_name().unwrap().to_str().unwrap().to_owned());
        }
    }
    found.sort();
    found
}

/// Contents, blobs, records: what is under a final name.
pub(super) fn final_names(store: &Store) -> Vec<String> {
    let top = store.store_dir();
    assert_eq!(
        files(&top.join("tmp")),
        Vec::<String>::new(),
        "nothing unfinished is left"
    );
    ["files", "oci/blobs", "unpacked"]
        .iter()
        .flat_map(|name| files(&top.join(name)))
        .collect()
}

#[tokio::test]
async fn a_pull_makes_the_artifact_complete_and_the_next_fetches_nothing() {
    let (_dir, store) = store();
    let guest = raw(&[("vmlinuz", b"kernel"), ("share/kata.image", b"image")]);
    let artifact = run(&store, &guest).await.unwrap();
    assert_eq!(guest.memory.fetched().len(), 3);
    assert_eq!(
        store.artifact(&artifact.manifest).unwrap().as_ref(),
        Some(&artifact)
    );
    let path = store.file_path(artifact.file("share/kata.image").unwrap());
    assert_eq!(std::fs::read(path).unwrap(), b"image");
    let before = final_names(&store);
    assert_eq!(run(&store, &guest).await.unwrap(), artifact);
    assert!(guest.memory.fetched().is_empty());
    assert_eq!(final_names(&store), before);
}

#[tokio::test]
async fn only_what_lacks_is_fetched() {
    let (_dir, store) = store();
    run(
        &store,
        &raw(&[("vmlinuz", b"kernel"), ("kata.image", b"old")]),
    )
    .await
    .unwrap();
    let new = raw(&[("vmlinuz", b"kernel"), ("kata.image", b"new")]);
    run(&store, &new).await.unwrap();
    assert_eq!(new.memory.fetched(), [Digest::of(b"new").to_string()]);

    // A content that an archive brought is a raw layer's blob as well.
    let (folder, _) = packed(&[("folder/x", b"from an archive")], None);
    run(&store, &folder).await.unwrap();
    let again = raw(&[("y", b"from an archive")]);
    run(&store, &again).await.unwrap();
    assert_eq!(again.memory.fetched(), Vec::<String>::new());
}

#[tokio::test]
async fn an_archive_is_unpacked_and_its_blob_dropped() {
    let (_dir, store) = store();
    let (guest, layer) = packed(&[("folder/vmlinuz", b"kernel"), ("folder/b", b"b")], None);
    let artifact = run(&store, &guest).await.unwrap();
    assert_eq!(artifact.files[1].path, "folder/vmlinuz");
    assert!(!store.blob_path(&layer).exists());
    guest.memory.fetched();
    run(&store, &guest).await.unwrap();
    assert!(guest.memory.fetched().is_empty());
    // One of its contents is lost: the layer is fetched again.
    std::fs::remove_file(store.file_path(&artifact.files[0])).unwrap();
    assert_eq!(run(&store, &guest).await.unwrap(), artifact);
    assert_eq!(guest.memory.fetched(), [layer.to_string()]);
}

#[tokio::test]
async fn wrong_bytes_never_get_a_final_name() {
    for change in [
        (|bytes: &mut Vec<u8>| bytes[3] ^= 1) as fn(&mut Vec<u8>),
        |bytes| bytes.truncate(3),
        |bytes| bytes.push(0),
    ] {
        let (_dir, store) = store();
        let mut guest = raw(&[("vmlinuz", b"kernel"), ("kata.image", b"image")]);
        let digest = Digest::of(b"kernel");
        change(guest.memory.blobs.get_mut(&digest.to_string()).unwrap());
        let error = run(&store, &guest).await.unwrap_err();
        assert!(error.is_verification(), "{error}");
        assert!(!final_names(&store).contains(&digest.hex().to_owned()));
        assert!(
            store
                .artifact(&Digest::of(&guest.manifest))
                .unwrap()
                .is_none()
        );
        // Once the registry is right, the pull goes through.
        guest.memory.add(b"kernel");
        run(&store, &guest).await.unwrap();
    }
}

#[tokio::test]
async fn hostile_content_leaves_nothing() {
    let (_dir, store) = store();
    let (hostile, _) = packed(&[("good", b"good"), ("../evil", b"evil")], None);
    let error = run(&store, &hostile).await.unwrap_err();
    assert!(matches!(error, Error::Hostile { .. }) && error.is_verification());
    let (lying, _) = packed(&[("good", b"good")], Some(&Digest::of(b"another tar")));
    assert!(matches!(
        run(&store, &lying).await.unwrap_err(),
        Error::Digest { .. }
    ));
    let (bomb, _) = packed(&[("zeros", &vec![0; 1 << 20])], None);
    let limits = Limits {
        ratio: 10,
        ratio_free_bytes: 1 << 10,
        ..Limits::default()
    };
    let error = run_with(&store, &bomb, &limits, &Silent).await.unwrap_err();
    assert!(matches!(error, Error::Hostile { .. }), "{error}");
    let empty_config = Digest::of(b"{}").hex().to_owned();
    assert_eq!(final_names(&store), [empty_config]);

    // A title that climbs is refused before anything is fetched.
    let climbing = raw(&[("../../etc/cron.d/x", b"x")]);
    assert!(run(&store, &climbing).await.unwrap_err().is_verification());
    assert!(climbing.memory.fetched().is_empty());
}

#[tokio::test]
async fn layers_that_clash_never_become_an_artifact() {
    let (_dir, store) = store();
    let clash = raw(&[("a", b"1"), ("./a", b"2")]);
    let error = run(&store, &clash).await.unwrap_err();
    assert!(matches!(error, Error::Hostile { .. }));
    assert!(!store.blob_path(&Digest::of(&clash.manifest)).exists());
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_told_before_the_first_byte() {
    let (_dir, store) = store();
    let mut memory = Memory::default();
    let digest = memory.add(b"small");
    let annotations = serde_json::json!({ layers::TITLE: "huge" });
    let huge = layer(&digest, 1 << 60, "application/octet-stream", &annotations);
    let guest = guest(vec![huge], memory);
    let error = run(&store, &guest).await.unwrap_err();
    assert!(matches!(error, Error::DiskFull { needed, .. } if needed >= 1 << 60));
    assert!(!error.is_verification() && !error.is_registry());
    assert!(guest.memory.fetched().is_empty());
}

#[derive(Default)]
struct Counter {
    announced: AtomicU64,
    seen: Mutex<HashMap<usize, u64>>,
    done: AtomicU64,
}

impl Progress for Counter {
    fn begin(&self, items: &[Item]) {
        let total = items.iter().map(|item| item.bytes).sum();
        assert_eq!(self.announced.swap(total, Ordering::Relaxed), 0);
    }
    fn advance(&self, item: usize, bytes: u64) {
        *self.seen.lock().unwrap().entry(item).or_default() += bytes;
    }
    fn restart(&self, item: usize) {
        self.seen.lock().unwrap().remove(&item);
    }
    fn done(&self, _item: usize) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn progress_adds_up_over_broken_connections() {
    let (_dir, store) = store();
    let mut guest = raw(&[
        ("vmlinuz", b"kernel"),
        ("kata.image", b"an image of more bytes"),
    ]);
    guest.memory.breaks = true;
    let counter = Counter::default();
    run_with(&store, &guest, &Limits::default(), &counter)
        .await
        .unwrap();
    assert_eq!(counter.announced.load(Ordering::Relaxed), 2 + 6 + 22);
    assert_eq!(
        counter.seen.lock().unwrap().values().sum::<u64>(),
        2 + 6 + 22
    );
    assert_eq!(counter.done.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn an_artifact_is_laid_out_and_never_over_the_store() {
    let (dir, store) = store();
    let first = raw(&[("vmlinuz", b"kernel"), ("share/kata.image", b"image")]);
    let artifact = run(&store, &first).await.unwrap();
    store.lay_out(&artifact).unwrap();
    let image = dir.path().join("share/kata.image");
    assert_eq!(std::fs::read(&image).unwrap(), b"image");
    let inode = |path: &std::path::Path| {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
    };
    let before = inode(&image);
    assert_eq!(
        before,
        inode(&store.file_path(artifact.file("share/kata.image").unwrap()))
    );
    store.lay_out(&artifact).unwrap();
    assert_eq!(inode(&image), before);

    // What somebody has open of the old one stays as it is.
    let next = run(&store, &raw(&[("share/kata.image", b"new")]))
        .await
        .unwrap();
    let mut open = std::fs::File::open(&image).unwrap();
    store.lay_out(&next).unwrap();
    assert_eq!(std::fs::read(&image).unwrap(), b"new");
    let mut old = String::new();
    std::io::Read::read_to_string(&mut open, &mut old).unwrap();
    assert_eq!(old, "image");

    let evil = run(&store, &raw(&[(".store/state/lock", b"x")]))
        .await
        .unwrap();
    let error = store.lay_out(&evil).unwrap_err();
    assert!(error.is_verification(), "{error}");
    assert!(!dir.path().join(".store/state/lock").exists());
}

/// The configuration may have been quicker than the archive.
fn nothing_of_the_archive(store: &Store) {
    let config = Digest::of(b"{}").hex().to_owned();
    let names = final_names(store);
    assert!(names.iter().all(|name| *name == config), "{names:?}");
    assert!(files(&store.store_dir().join("partial")).is_empty());
}

#[tokio::test]
async fn a_hostile_archive_is_not_fetched_to_its_end() {
    let (_dir, store) = store();
    let (mut guest, _) = packed(&[("../evil", b"evil"), ("big", &noise(8 << 20))], None);
    guest.memory.hangs = true;
    let pulled = tokio::time::timeout(std::time::Duration::from_secs(60), run(&store, &guest));
    let error = pulled.await.expect("it stops by itself").unwrap_err();
    assert!(matches!(error, Error::Hostile { .. }), "{error}");
    nothing_of_the_archive(&store);
}

#[tokio::test]
async fn an_archive_that_does_not_verify_leaves_nothing() {
    let (_dir, store) = store();
    let (mut guest, layer) = packed(&[("vmlinuz", b"kernel"), ("b", &noise(2 << 20))], None);
    // RFC 1952: the time in the header, which nobody checks but the digest.
    let blob = guest.memory.blobs.get_mut(&layer.to_string()).unwrap();
    blob[4] ^= 1;
    let error = run(&store, &guest).await.unwrap_err();
    assert!(error.is_verification(), "{error}");
    nothing_of_the_archive(&store);
    guest.memory.blobs.get_mut(&layer.to_string()).unwrap()[4] ^= 1;
    assert_eq!(run(&store, &guest).await.unwrap().files.len(), 2);
}

#[tokio::test]
async fn an_archive_that_begins_again_is_unpacked_all_the_same() {
    let (_dir, store) = store();
    let (mut guest, _) = packed(&[("vmlinuz", b"kernel"), ("b", &noise(4 << 20))], None);
    guest.memory.breaks = true;
    let artifact = run(&store, &guest).await.unwrap();
    assert_eq!(artifact.files.len(), 2);
    final_names(&store);
}
