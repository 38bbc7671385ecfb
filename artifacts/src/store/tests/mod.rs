//! The store over prepared folders: completeness, generations, activation, removal, damage.

mod activation;
mod contents;
mod invariants;
mod killed;
mod unpacked;

use std::fs;
use std::io::Write;
use std::path::Path;

use super::*;
use crate::generation::{
    Artifact, ArtifactFile, ArtifactLink, DerivedFile, Generation, GenerationMeta,
};

pub(super) const CLASS: &str = "kata-qemu-nvidia-gpu";

/// A store in a temporary folder, initialised.
pub(super) struct Fixture {
    pub(super) dir: tempfile::TempDir,
    pub(super) store: Store,
}

impl Fixture {
    pub(super) fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("artifacts")).unwrap();
        store.init().unwrap();
        Fixture { dir, store }
    }

    pub(super) fn put(&self, bytes: &[u8], blob: bool, executable: bool) -> Digest {
        let digest = Digest::of(bytes);
        let (mut file, temp) = self.store.temp_file("test").unwrap();
        file.write_all(bytes).unwrap();
        if blob {
            self.store.place_blob(temp.path(), &digest).unwrap();
        } else {
            self.store
                .place_content(temp.path(), &digest, executable)
                .unwrap();
        }
        digest
    }

    /// An artifact of raw layers, placed as a pull places it.
    pub(super) fn raw(&self, files: &[(&str, &[u8])]) -> Artifact {
        let layers: Vec<_> = files
            .iter()
            .map(|(path, bytes)| {
                let digest = self.put(bytes, true, false);
                assert!(self.store.join_raw(&digest, bytes.len() as u64).unwrap());
                format!(
                    r#"{{"mediaType":"application/octet-stream","digest":"{digest}","size":{},
                    "annotations":{{"org.opencontainers.image.title":"{path}"}}}}"#,
                    bytes.len()
                )
            })
            .collect();
        let manifest = self.manifest(&layers);
        self.store.artifact(&manifest).unwrap().unwrap()
    }

    pub(super) fn manifest(&self, layers: &[String]) -> Digest {
        let config = self.put(b"{}", true, false);
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "artifactType":"application/vnd.example","config":{{"mediaType":"application/vnd.oci.empty.v1+json",
            "digest":"{config}","size":2}},"layers":[{}]}}"#,
            layers.join(",")
        );
        let digest = self.put(manifest.as_bytes(), true, false);
        self.store
            .name_manifest(&NamedManifest {
                reference: "registry.example/guest:1",
                digest: &digest,
                size: manifest.len() as u64,
                media_type: "application/vnd.oci.image.manifest.v1+json",
                artifact_type: Some("application/vnd.example"),
            })
            .unwrap();
        digest
    }

    /// The artifact of one archive layer, unpacked already.
    pub(super) fn archive(&self, files: &[(&str, &[u8], bool)], links: &[(&str, &str)]) -> Digest {
        let layer = Digest::of(format!("{files:?}{links:?}").as_bytes());
        let files = files.iter().map(|(path, bytes, executable)| ArtifactFile {
            path: (*path).to_owned(),
            digest: self.put(bytes, false, *executable),
            size: bytes.len() as u64,
            executable: *executable,
        });
        let links = links.iter().map(|(path, target)| ArtifactLink {
            path: (*path).to_owned(),
            target: (*target).to_owned(),
        });
        self.store
            .write_record(&Record {
                layer: layer.clone(),
                content: Digest::of(b"the tar"),
                files: files.collect(),
                links: links.collect(),
            })
            .unwrap();
        self.manifest(&[format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{layer}","size":100}}"#
        )])
    }

    pub(super) fn create(&self, class: &str, artifact: &Artifact) -> Generation {
        let number = self.store.next_number(class).unwrap();
        let derived = [derived(
            "configuration.toml",
            &format!("# {class} {number}\n"),
        )];
        self.store
            .create_generation(class, number, artifact, &derived, meta())
            .unwrap()
    }

    pub(super) fn link(&self, class: &str) -> std::path::PathBuf {
        self.store.class_link(class)
    }
}

pub(super) fn meta() -> GenerationMeta {
    GenerationMeta {
        reference: "registry.example/guest:1".to_owned(),
        source: Digest::of(b"index"),
        inputs: Digest::of(b"inputs"),
        signers: Vec::new(),
    }
}

pub(super) fn derived(path: &str, text: &str) -> DerivedFile {
    DerivedFile {
        path: path.to_owned(),
        bytes: text.as_bytes().to_vec(),
    }
}

/// Every path below a folder, relative, sorted; symlinks are not followed.
pub(super) fn tree(dir: &Path) -> Vec<String> {
    fn walk(top: &Path, dir: &Path, into: &mut Vec<String>) {
        for name in names(dir).unwrap() {
            let path = dir.join(name);
            into.push(path.strip_prefix(top).unwrap().to_str().unwrap().to_owned());
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                walk(top, &path, into);
            }
        }
    }
    let mut paths = Vec::new();
    walk(dir, dir, &mut paths);
    paths.sort();
    paths
}

#[test]
fn class_names_are_folder_names_and_runtime_class_names() {
    for name in ["kata", "kata-qemu-nvidia-gpu-snp", "a.b-c", "0"] {
        check_class(name).unwrap();
    }
    let long = "a".repeat(254);
    for name in [
        "", ".store", "..", "a/b", "A", "a_b", "-a", "a-", "a.", "a..b", "a\n", &long,
    ] {
        assert!(
            matches!(check_class(name), Err(Error::ClassName { .. })),
            "{name:?}"
        );
    }
}

#[test]
fn an_absent_store_is_empty_and_stays_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("none")).unwrap();
    assert_eq!(store.classes().unwrap(), Vec::<String>::new());
    assert!(store.live(CLASS).unwrap().is_none());
    assert!(store.displaced(CLASS).unwrap().is_none());
    assert!(store.generations(CLASS).unwrap().is_empty());
    assert_eq!(store.next_number(CLASS).unwrap(), 1);
    assert!(store.artifact(&Digest::of(b"x")).unwrap().is_none());
    store.remove_class(CLASS).unwrap();
    store.remove_unreferenced().unwrap();
    assert!(names(dir.path()).unwrap().is_empty());

    fs::write(dir.path().join("file"), b"").unwrap();
    assert!(Store::open(&dir.path().join("file")).is_err());
}

#[test]
fn init_tells_what_it_made_and_changes_nothing_the_second_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("a/b")).unwrap();
    let made = store.init().unwrap();
    assert_eq!(made[0], dir.path().join("a"));
    assert_eq!(made[1], dir.path().join("a/b"));
    assert!(made.iter().all(|path| path.is_dir()));
    let index = fs::metadata(store.oci_dir().join("index.json"))
        .unwrap()
        .modified()
        .unwrap();
    assert!(store.init().unwrap().is_empty());
    assert_eq!(
        fs::metadata(store.oci_dir().join("index.json"))
            .unwrap()
            .modified()
            .unwrap(),
        index
    );
    assert_eq!(
        fs::read_to_string(store.oci_dir().join("oci-layout")).unwrap(),
        r#"{"imageLayoutVersion":"1.0.0"}"#
    );
}

#[test]
fn the_lock_sweeps_what_others_left_and_nothing_of_ours() {
    let fixture = Fixture::new();
    let tmp = fixture.store.under("tmp");
    fs::create_dir_all(tmp.join("0000-1/3-generation/sub")).unwrap();
    fs::write(tmp.join("0000-1/2-blob"), b"half a blob").unwrap();
    let (_file, mine) = fixture.store.temp_file("mine").unwrap();
    let lock = fixture.store.lock(Duration::ZERO).unwrap();
    assert!(!tmp.join("0000-1").exists());
    assert!(mine.path().exists());
    assert!(matches!(
        fixture.store.lock(Duration::ZERO),
        Err(LockError::Held { .. })
    ));
    drop(lock);
    let path = mine.path().to_owned();
    drop(mine);
    assert!(!path.exists());
}
