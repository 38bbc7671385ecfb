//! Publishes a folder as an artifact: one raw layer a file, named by its path, under an OCI 1.1 manifest with an artifact
//! type (image specification, manifest.md, "Guidelines for Artifact Usage").
//!
//! The same files give the same manifest, byte for byte: nothing in it depends on time, order or machine.

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::{self, TryStreamExt};
use km_host::Error as HostError;
use serde_json::json;

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layers::TITLE;
use crate::progress::{Item, Progress};
use crate::reference::Reference;
use crate::registry::{BlobSource, Client};
use crate::store::{STORE, blocking, hash_file};
use crate::unpack::{Shape, normalise};

/// The type of a Kata guest artifact.
pub const ARTIFACT_TYPE: &str = "application/vnd.kata-manager.guest.v1";

/// A guest artifact of more files than this is a mistake, such as publishing `/`.
const FILES_MAX: usize = 10_000;

/// Files pushed at the same time.
const CONCURRENT: usize = 3;

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// The empty descriptor's type and content (image specification, manifest.md, "Guidance for an Empty Descriptor").
pub(crate) const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
pub(crate) const EMPTY: &[u8] = b"{}";
/// A file as it is.
const FILE_TYPE: &str = "application/octet-stream";

/// How a folder is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The manifest's `artifactType`.
    pub artifact_type: String,
    /// The manifest's annotations.
    pub annotations: BTreeMap<String, String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            artifact_type: ARTIFACT_TYPE.to_owned(),
            annotations: BTreeMap::new(),
        }
    }
}

/// What was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Digest of the manifest; a reference with it never changes its meaning.
    pub digest: Digest,
    /// Bytes of all files.
    pub bytes: u64,
    /// The files' paths and sizes, in the manifest's order.
    pub files: Vec<PublishedFile>,
}

/// A published file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedFile {
    /// Its path in the artifact.
    pub path: String,
    /// Of its content.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
}

struct Source {
    at: PathBuf,
    file: PublishedFile,
}

/// Finds the files of a folder, in path order. Symlinks to regular files are published as the files that they lead to. The
/// store of what was pulled into the folder is left out.
fn find(dir: &Path) -> Result<Vec<(String, PathBuf, u64)>> {
    let mut found = Vec::new();
    let mut shape = Shape::new(FILES_MAX);
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(HostError::io("list", &folder))?;
        for entry in entries {
            let at = entry.map_err(HostError::io("list", &folder))?.path();
            let meta = fs::symlink_metadata(&at).map_err(HostError::io("look at", &at))?;
            if meta.is_dir() {
                if at != dir.join(STORE) {
                    folders.push(at);
                }
                continue;
            }
            let meta = fs::metadata(&at).map_err(HostError::io("look at", &at))?;
            if !meta.is_file() {
                return Err(unfit(&at, "it is no regular file and no link to one"));
            }
            let path = title(dir, &at)?;
            shape
                .file(&path)
                .map_err(|reason| unfit(&at, &reason.to_string()))?;
            found.push((path, at, meta.len()));
        }
    }
    if found.is_empty() {
        return Err(unfit(dir, "there is no file in it"));
    }
    found.sort();
    Ok(found)
}

/// A file's title: its path in the folder, which must be one that a pull accepts.
fn title(dir: &Path, at: &Path) -> Result<String> {
    let relative = at.strip_prefix(dir).unwrap_or(at);
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(relative.as_os_str());
    normalise(bytes).map_err(|reason| unfit(at, &reason.to_string()))
}

fn unfit(path: &Path, problem: &str) -> Error {
    Error::Publish {
        path: path.to_owned(),
        problem: problem.to_owned(),
    }
}

fn hash_all(dir: &Path) -> Result<Vec<Source>> {
    find(dir)?
        .into_iter()
        .map(|(path, at, size)| {
            let digest = hash_file(&at, Algorithm::Sha256)?;
            Ok(Source {
                at,
                file: PublishedFile { path, digest, size },
            })
        })
        .collect()
}

fn manifest(sources: &[Source], options: &Options) -> Vec<u8> {
    let layers: Vec<_> = sources
        .iter()
        .map(|source| {
            json!({
                "mediaType": FILE_TYPE,
                "digest": source.file.digest,
                "size": source.file.size,
                "annotations": { TITLE: source.file.path },
            })
        })
        .collect();
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": options.artifact_type,
        "config": {
            "mediaType": EMPTY_TYPE,
            "digest": Digest::of(EMPTY),
            "size": EMPTY.len(),
            // The content in base64.
            "data": "e30=",
        },
        "layers": layers,
    });
    if !options.annotations.is_empty() {
        manifest["annotations"] = json!(options.annotations);
    }
    manifest.to_string().into_bytes()
}

/// Publishes a folder under a reference: the files first, the manifest last. Files that the repository has are not sent.
///
/// # Errors
/// [`Error::Publish`] when the folder holds what a pull would refuse; the registry's errors; a file that cannot be read.
pub async fn publish(
    client: &Client,
    dir: &Path,
    reference: &Reference,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Published> {
    publish_to(&Registry { client, reference }, dir, options, progress).await
}

struct Registry<'a> {
    client: &'a Client,
    reference: &'a Reference,
}

impl Target for Registry<'_> {
    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        content: BlobSource<'_>,
        sent: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let pushed = self
            .client
            .push_blob(self.reference, digest, size, content, sent);
        Ok(pushed.await?)
    }

    async fn manifest(&self, media_type: &str, bytes: Vec<u8>) -> Result<Digest> {
        let pushed = self.client.push_manifest(self.reference, media_type, bytes);
        Ok(pushed.await?)
    }
}

/// Where blobs and manifests go. The registry is one; a list in a test is another.
pub(crate) trait Target: Sync {
    /// Uploads a blob unless it is there; `sent` is told how many bytes of it have passed in this try.
    fn blob(
        &self,
        digest: &Digest,
        size: u64,
        content: BlobSource<'_>,
        sent: &(dyn Fn(u64) + Send + Sync),
    ) -> impl Future<Output = Result<()>> + Send;

    /// Uploads the manifest, under the reference's tag, and returns its digest.
    fn manifest(
        &self,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> impl Future<Output = Result<Digest>> + Send;
}

/// See [`publish`], which is this with a registry.
pub(crate) async fn publish_to(
    target: &impl Target,
    dir: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Published> {
    let from = dir.to_owned();
    let sources = blocking("reading what is to be published", move || hash_all(&from)).await?;
    let manifest = manifest(&sources, options);
    let items: Vec<_> = sources
        .iter()
        .map(|source| Item {
            name: source.file.path.clone(),
            bytes: source.file.size,
        })
        .collect();
    progress.begin(&items);
    target
        .blob(
            &Digest::of(EMPTY),
            EMPTY.len() as u64,
            BlobSource::Bytes(EMPTY),
            &|_| {},
        )
        .await?;
    stream::iter(sources.iter().enumerate().map(Ok))
        .try_for_each_concurrent(CONCURRENT, |(item, source)| {
            push(target, item, source, progress)
        })
        .await?;
    let digest = target.manifest(MANIFEST_TYPE, manifest).await?;
    let files: Vec<_> = sources.into_iter().map(|source| source.file).collect();
    Ok(Published {
        digest,
        bytes: files.iter().map(|file| file.size).sum(),
        files,
    })
}

async fn push(
    target: &impl Target,
    item: usize,
    source: &Source,
    progress: &dyn Progress,
) -> Result<()> {
    let file = &source.file;
    let sent = Sent {
        progress,
        item,
        before: AtomicU64::new(0),
    };
    let content = BlobSource::File(&source.at);
    target
        .blob(&file.digest, file.size, content, &|bytes| sent.tell(bytes))
        .await?;
    progress.done(item);
    Ok(())
}

/// Turns "so many bytes so far in this try" into steps and restarts.
struct Sent<'a> {
    progress: &'a dyn Progress,
    item: usize,
    before: AtomicU64,
}

impl Sent<'_> {
    fn tell(&self, so_far: u64) {
        let mut before = self.before.swap(so_far, Ordering::Relaxed);
        if so_far < before {
            self.progress.restart(self.item);
            before = 0;
        }
        self.progress.advance(self.item, so_far - before);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::progress::Silent;

    #[derive(Default)]
    struct Recorder {
        pushed: Mutex<Vec<(String, Vec<u8>)>>,
    }

    impl Target for Recorder {
        async fn blob(
            &self,
            digest: &Digest,
            size: u64,
            content: BlobSource<'_>,
            sent: &(dyn Fn(u64) + Send + Sync),
        ) -> Result<()> {
            let bytes = match content {
                BlobSource::File(path) => fs::read(path).unwrap(),
                BlobSource::Bytes(bytes) => bytes.to_vec(),
            };
            assert_eq!(
                (Digest::of(&bytes), bytes.len() as u64),
                (digest.clone(), size)
            );
            sent(size);
            self.pushed
                .lock()
                .unwrap()
                .push((digest.to_string(), bytes));
            Ok(())
        }

        async fn manifest(&self, _: &str, bytes: Vec<u8>) -> Result<Digest> {
            let digest = Digest::of(&bytes);
            self.pushed
                .lock()
                .unwrap()
                .push((digest.to_string(), bytes));
            Ok(digest)
        }
    }

    fn guest(dir: &Path) {
        fs::create_dir_all(dir.join("share/deep")).unwrap();
        fs::write(dir.join("vmlinuz"), b"kernel").unwrap();
        fs::write(dir.join("share/deep/kata.image"), b"image").unwrap();
        std::os::unix::fs::symlink("vmlinuz", dir.join("latest")).unwrap();
    }

    #[tokio::test]
    async fn files_come_first_and_the_manifest_last_and_always_the_same() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        guest(one.path());
        guest(two.path());
        let options = Options {
            annotations: BTreeMap::from([("org.example".to_owned(), "x".to_owned())]),
            ..Options::default()
        };
        let recorder = Recorder::default();
        let published = publish_to(&recorder, one.path(), &options, &Silent)
            .await
            .unwrap();
        let again = publish_to(&Recorder::default(), two.path(), &options, &Silent)
            .await
            .unwrap();
        assert_eq!(published, again);
        assert_eq!(published.bytes, 17);
        let paths: Vec<_> = published
            .files
            .iter()
            .map(|file| file.path.as_str())
            .collect();
        assert_eq!(paths, ["latest", "share/deep/kata.image", "vmlinuz"]);

        let pushed = recorder.pushed.into_inner().unwrap();
        let (digest, bytes) = pushed.last().unwrap();
        assert_eq!(*digest, published.digest.to_string());
        let parsed = crate::layers::parse(bytes).unwrap();
        let json: serde_json::Value = serde_json::from_slice(bytes).unwrap();
        assert_eq!(json["artifactType"], ARTIFACT_TYPE);
        assert_eq!(json["annotations"]["org.example"], "x");
        assert_eq!(
            json["layers"][1]["annotations"][TITLE],
            "share/deep/kata.image"
        );
        let blobs: Vec<_> = pushed.iter().map(|(digest, _)| digest.clone()).collect();
        assert!(blobs.contains(&parsed.config().digest().to_string()));
        // What is published is what a pull makes files of.
        let parts = crate::layers::parts(&parsed).unwrap();
        assert!(
            parts
                .iter()
                .all(|part| blobs.contains(&part.digest.to_string()))
        );
        assert_eq!(parts.len(), 3);
    }

    #[test]
    fn a_second_try_starts_the_item_over() {
        #[derive(Default)]
        struct Log(Mutex<Vec<String>>);
        impl Progress for Log {
            fn begin(&self, _: &[Item]) {}
            fn advance(&self, item: usize, bytes: u64) {
                self.0.lock().unwrap().push(format!("{item} +{bytes}"));
            }
            fn restart(&self, item: usize) {
                self.0.lock().unwrap().push(format!("{item} restart"));
            }
            fn done(&self, _: usize) {}
        }
        let log = Log::default();
        let sent = Sent {
            progress: &log,
            item: 7,
            before: AtomicU64::new(0),
        };
        for so_far in [5, 9, 3, 10] {
            sent.tell(so_far);
        }
        let told = log.0.into_inner().unwrap();
        assert_eq!(told, ["7 +5", "7 +4", "7 restart", "7 +3", "7 +7"]);
    }

    #[test]
    fn what_a_pull_would_refuse_is_not_published() {
        let empty = tempfile::tempdir().unwrap();
        let problem = |dir: &Path| match find(dir) {
            Err(Error::Publish { problem, .. }) => problem,
            other => panic!("{other:?}"),
        };
        assert!(problem(empty.path()).contains("no file"));
        for (make, want) in [
            (
                (|dir| std::os::unix::fs::symlink("/proc", dir.join("link")).unwrap()) as fn(&Path),
                "no regular file",
            ),
            (
                |dir| fs::write(dir.join("a\nb"), b"").unwrap(),
                "control character",
            ),
            (
                |dir| fs::write(dir.join(".generation.json"), b"").unwrap(),
                "reserved",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path());
            let problem = problem(dir.path());
            assert!(problem.contains(want), "{problem}");
        }
        let dangling = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("nowhere", dangling.path().join("link")).unwrap();
        assert!(matches!(find(dangling.path()), Err(Error::Host(_))));
    }
}
