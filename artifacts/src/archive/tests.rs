//! Files from one store to another, and files that are hostile.

use std::fs;

use serde_json::Value;

use super::*;
use crate::progress::Silent;

struct Site {
    _dir: tempfile::TempDir,
    store: Store,
    _lock: km_host::lock::Lock,
}

fn site() -> Site {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("artifacts")).unwrap();
    store.init().unwrap();
    let lock = store.lock(std::time::Duration::from_secs(5)).unwrap();
    Site {
        _dir: dir,
        store,
        _lock: lock,
    }
}

/// A layout as another tool would write it.
struct Written {
    dir: tempfile::TempDir,
    entries: Vec<(String, Vec<u8>)>,
    index: Vec<Value>,
}

impl Written {
    fn new() -> Written {
        Written {
            dir: tempfile::tempdir().unwrap(),
            entries: vec![("oci-layout".to_owned(), LAYOUT.to_vec())],
            index: Vec::new(),
        }
    }

    fn blob(&mut self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.entries.push((blob_name(&digest), bytes.to_vec()));
        digest
    }

    /// An artifact of raw files.
    fn artifact(&mut self, name: &str, files: &[(&str, &[u8])]) -> Digest {
        let config = self.blob(b"{}");
        let layers: Vec<_> = files
            .iter()
            .map(|(path, bytes)| {
                serde_json::json!({
                    "mediaType": "application/octet-stream", "digest": self.blob(bytes), "size": bytes.len(),
                    "annotations": { layers::TITLE: path },
                })
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": "application/vnd.example",
            "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2 },
            "layers": layers,
        })
        .to_string();
        let digest = self.blob(manifest.as_bytes());
        self.index.push(serde_json::json!({
            "mediaType": MANIFEST_TYPE, "digest": digest, "size": manifest.len(), "annotations": { REF_NAME: name },
        }));
        digest
    }

    fn file(&self) -> PathBuf {
        let path = self.dir.path().join("layout.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": self.index }).to_string();
        for (name, bytes) in &self.entries {
            append(&mut tar, name, bytes.len() as u64, &bytes[..]).unwrap();
        }
        // Last, as some tools have it.
        append(&mut tar, "index.json", index.len() as u64, index.as_bytes()).unwrap();
        tar.finish().unwrap();
        path
    }
}

async fn take(site: &Site, file: &Path) -> Result<Vec<Imported>> {
    import(&site.store, file, &Limits::default(), &Silent).await
}

const NAME: &str = "registry.example/kata/guest:v1";

#[tokio::test]
async fn what_one_store_exports_another_imports() {
    let (one, other) = (site(), site());
    let mut written = Written::new();
    let digest = written.artifact(
        NAME,
        &[("vmlinuz", b"kernel"), ("a/kata.img", &[7; 70_000])],
    );
    let imported = take(&one, &written.file()).await.unwrap();
    assert_eq!(imported[0].manifest, digest);
    assert_eq!(imported[0].bytes, 70_006);
    let export_one = Export {
        reference: NAME.parse().unwrap(),
        manifest: digest.clone(),
        source: digest.clone(),
    };
    let file = written.dir.path().join("out.tar");
    let wanted = [export_one.clone()];
    let exported = export(&one.store, &wanted, &file, &Silent).unwrap();
    assert_eq!(exported.blobs, 4);
    assert_eq!(exported.bytes, fs::metadata(&file).unwrap().len());
    let again = written.dir.path().join("again.tar");
    export(
        &one.store,
        &[export_one.clone(), export_one],
        &again,
        &Silent,
    )
    .unwrap();
    assert_eq!(
        fs::read(&file).unwrap(),
        fs::read(&again).unwrap(),
        "the same bytes each time"
    );
    assert_eq!(take(&other, &file).await.unwrap(), imported);
    let artifact = other.store.artifact(&digest).unwrap().unwrap();
    let kernel = artifact.file("vmlinuz").unwrap();
    assert_eq!(fs::read(other.store.file_path(kernel)).unwrap(), b"kernel");
    let resolved = other
        .store
        .resolved(&NAME.parse().unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(resolved.manifest.digest, digest);
    assert!(
        other
            .store
            .resolved(&"registry.example/kata/guest:v2".parse().unwrap())
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn a_blob_that_is_not_its_digest_is_refused_and_nothing_stays() {
    for damaged in 0..4 {
        let site = site();
        let mut written = Written::new();
        written.artifact(NAME, &[("vmlinuz", b"kernel"), ("kata.img", b"image")]);
        // oci-layout, then config, kernel, image and manifest.
        let bytes = &mut written.entries[damaged + 1].1;
        bytes[0] ^= 1;
        let error = take(&site, &written.file()).await.unwrap_err();
        assert!(error.is_verification(), "{error}");
        assert!(
            site.store
                .resolved(&NAME.parse().unwrap())
                .unwrap()
                .is_none()
        );
        let found = site.store.unreferenced().unwrap();
        for path in found.paths {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(
                Digest::of(&fs::read(&path).unwrap()).hex(),
                name.trim_end_matches(".x")
            );
        }
    }
}

type Change = Box<dyn Fn(&mut Written)>;

#[tokio::test]
async fn files_that_are_no_layouts_are_refused_with_a_reason() {
    let damage = |change: &dyn Fn(&mut Written)| {
        let mut written = Written::new();
        written.artifact(NAME, &[("vmlinuz", b"kernel")]);
        change(&mut written);
        (written.file(), written)
    };
    let cases: [(&str, Change); 8] = [
        (
            "oci-layout of version",
            Box::new(|w| drop(w.entries.remove(0))),
        ),
        (
            "none of a layout's",
            Box::new(|w| w.entries.push(("etc/passwd".into(), b"x".to_vec()))),
        ),
        (
            "no blob's",
            Box::new(|w| {
                w.entries
                    .push(("blobs/sha256/../../x".into(), b"x".to_vec()))
            }),
        ),
        ("is not in it", Box::new(|w| drop(w.entries.remove(2)))),
        ("names no artifact", Box::new(|w| w.index.clear())),
        (
            "whole reference",
            Box::new(|w| w.index[0]["annotations"][REF_NAME] = "v1 !".into()),
        ),
        (
            "export the manifest of one platform",
            Box::new(|w| {
                w.index[0]["mediaType"] = "application/vnd.oci.image.index.v1+json".into();
            }),
        ),
        (
            "index.json",
            Box::new(|w| w.index.push(serde_json::json!(7))),
        ),
    ];
    for (wanted, change) in cases {
        let site = site();
        let (file, _written) = match wanted {
            // The tar crate refuses to write such a name; what reads it must not rely on that.
            "no blob's" => {
                let mut written = Written::new();
                written
                    .entries
                    .push(("blobs/sha256/short".into(), b"x".to_vec()));
                (written.file(), written)
            }
            _ => damage(&*change),
        };
        let error = take(&site, &file).await.unwrap_err();
        assert!(error.is_verification(), "{wanted}: {error}");
        assert!(error.to_string().contains(wanted), "{wanted}: {error}");
    }
    let site = site();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![b'x'; 5000]).unwrap();
    let error = take(&site, file.path()).await.unwrap_err();
    assert!(error.to_string().contains("as a tar"), "{error}");
}

#[tokio::test]
async fn links_in_a_layout_are_refused() {
    let written = Written::new();
    let path = written.dir.path().join("links.tar");
    let mut tar = tar::Builder::new(File::create(&path).unwrap());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "oci-layout", "/etc/passwd")
        .unwrap();
    tar.finish().unwrap();
    let error = take(&site(), &path).await.unwrap_err();
    assert!(error.to_string().contains("no regular file"), "{error}");
}

#[tokio::test]
async fn an_archive_layer_is_exported_only_while_its_blob_is_kept() {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "vmlinuz", 6, &b"kernel"[..]).unwrap();
    let layer = tar.into_inner().unwrap();
    let mut written = Written::new();
    let digest = Digest::of(&layer);
    written.artifact(NAME, &[("vmlinuz", b"kernel")]);
    let mut manifest: Value = serde_json::from_slice(&written.entries.pop().unwrap().1).unwrap();
    manifest["layers"] = serde_json::json!([{
        "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len(),
    }]);
    let manifest = manifest.to_string();
    written.blob(&layer);
    let digest = written.blob(manifest.as_bytes());
    written.index[0]["digest"] = digest.to_string().into();
    written.index[0]["size"] = manifest.len().into();
    let file = written.file();
    let wanted = [Export {
        reference: NAME.parse().unwrap(),
        manifest: digest.clone(),
        source: digest,
    }];
    let out = written.dir.path().join("out.tar");

    let dropping = site();
    take(&dropping, &file).await.unwrap();
    let error = export(&dropping.store, &wanted, &out, &Silent).unwrap_err();
    assert!(error.to_string().contains("keepBlobs"), "{error}");
    assert!(!out.exists(), "nothing is written then");

    // The very store again, which keeps them from now on: the next import brings the blob back.
    let keeping = dropping.store.clone().with_blobs_kept(true);
    import(&keeping, &file, &Limits::default(), &Silent)
        .await
        .unwrap();
    export(&keeping, &wanted, &out, &Silent).unwrap();
    take(&site(), &out).await.unwrap();
}
