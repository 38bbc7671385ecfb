//! A real process that is really killed, again and again, in the middle of whatever it does.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::*;
use crate::digest::Algorithm;
use crate::store::check::hash_file;
use crate::unpack::{Format, Limits};

/// Tells a copy of this test program to be the victim, and where.
const VICTIM: &str = "KM_STORE_VICTIM";

/// How many are killed.
const KILLS: u64 = 12;

fn layer(store: &Store, round: u64) -> Digest {
    let mut builder = tar::Builder::new(Vec::new());
    for file in 0..4 {
        let bytes = format!("content {file} of round {}", round % 5).repeat(4000);
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        builder
            .append_data(&mut header, format!("file-{file}"), bytes.as_bytes())
            .unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let digest = Digest::of(&tar);
    let (mut file, temp) = store.temp_file("layer").unwrap();
    file.write_all(&tar).unwrap();
    store.place_blob(temp.path(), &digest).unwrap();
    digest
}

/// Everything that changes the store, for ever.
fn victim(dir: tempfile::TempDir, top: &Path) {
    let store = Store::open(top).unwrap();
    store.init().unwrap();
    let _lock = store.lock(Duration::from_secs(10)).unwrap();
    let fixture = Fixture { dir, store };
    for round in 0.. {
        let store = &fixture.store;
        let layer = layer(store, round);
        let record = store
            .unpack_layer(&layer, Format::Tar, None, &Limits::default())
            .unwrap();
        store.drop_blob(&layer).unwrap();
        assert_eq!(record.files.len(), 4);
        let descriptor = format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":100}}"#
        );
        let manifest = fixture.manifest(&[descriptor]);
        let artifact = store.artifact(&manifest).unwrap().unwrap();
        let generation = fixture.create(CLASS, &artifact);
        store.activate(CLASS, generation.number()).unwrap();
        for old in store.numbers(CLASS).unwrap() {
            if old + 1 < generation.number() {
                store.remove_generation(CLASS, old).unwrap();
            }
        }
        store.remove_unreferenced().unwrap();
        if round % 4 == 3 {
            store.remove_class(CLASS).unwrap();
        }
    }
}

fn examine(top: &Path) -> bool {
    let store = Store::open(top).unwrap();
    for (dir, algorithm) in [
        ("files/sha256", Algorithm::Sha256),
        ("oci/blobs/sha256", Algorithm::Sha256),
    ] {
        for name in names(&store.under(dir)).unwrap() {
            let digest = hash_file(&store.under(dir).join(&name), algorithm).unwrap();
            assert_eq!(digest.hex(), name, "a final name has other bytes");
        }
    }
    for generation in store.generations(CLASS).unwrap() {
        assert_eq!(store.check(&generation, true).unwrap(), []);
    }
    let live = store.live(CLASS).unwrap();
    let kept = store
        .displaced(CLASS)
        .unwrap()
        .unwrap_or_else(|| store.class_link(CLASS));
    assert_eq!(
        fs::read(kept.join("theirs")).unwrap(),
        b"kept",
        "the foreign folder is in one place"
    );
    drop(store.lock(Duration::from_secs(10)).unwrap());
    let tmp = store.under("tmp");
    assert_eq!(names(&tmp).unwrap(), Vec::<String>::new());
    live.is_some()
}

#[test]
fn killed_at_any_moment_the_store_is_right() {
    let dir = tempfile::tempdir().unwrap();
    if let Some(top) = std::env::var_os(VICTIM) {
        return victim(dir, Path::new(&top));
    }
    let top = dir.path().join("artifacts");
    fs::create_dir_all(top.join(CLASS)).unwrap();
    fs::write(top.join(CLASS).join("theirs"), b"kept").unwrap();
    let (mut live, mut kill) = (0, 0);
    // On a busy machine the first activation may come later than all of them.
    while kill < KILLS || (live == 0 && kill < 4 * KILLS) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::tests::killed::killed_at_any_moment_the_store_is_right",
            ])
            .env(VICTIM, &top)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It works: from here on any moment is as good as another.
        let deadline = Instant::now() + Duration::from_secs(30);
        let tmp = top.join(".store/tmp");
        while names(&tmp).unwrap().is_empty() {
            assert!(
                child.try_wait().unwrap().is_none(),
                "the victim gave up by itself"
            );
            assert!(Instant::now() < deadline, "the victim does not start");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(kill * 7));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        live += u32::from(examine(&top));
        kill += 1;
    }
    assert!(live > 0, "no kill came after the first activation");
}
