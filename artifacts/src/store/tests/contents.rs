//! Artifacts, generations, checks and the OCI layout.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::generation::{Damage, Problem, Removed};
use crate::store::verity;
use crate::unpack::Refusal;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn writable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

#[test]
fn a_raw_layer_is_one_inode_as_blob_content_and_generation_file() {
    let fixture = Fixture::new();
    let artifact = fixture.raw(&[("vmlinuz", b"kernel"), ("share/kata.image", b"image")]);
    assert_eq!(artifact.bytes(), 11);
    let generation = fixture.create(CLASS, &artifact);
    let file = artifact.file("share/kata.image").unwrap();
    let inodes = [
        fixture.store.blob_path(&file.digest),
        fixture.store.file_path(file),
        generation.dir.join("share/kata.image"),
    ]
    .map(|path| {
        assert_eq!(mode(&path), 0o444);
        fs::metadata(path).unwrap().ino()
    });
    assert_eq!(inodes[0], inodes[1]);
    assert_eq!(inodes[1], inodes[2]);
    assert_eq!(
        tree(&generation.dir),
        [
            ".generation.json",
            "configuration.toml",
            "share",
            "share/kata.image",
            "vmlinuz"
        ]
    );
    assert_eq!(mode(&generation.dir), 0o755);
    assert_eq!(mode(&generation.dir.join("share")), 0o755);
    assert_eq!(mode(&generation.dir.join("configuration.toml")), 0o444);
}

#[test]
fn an_artifact_is_complete_only_with_every_part() {
    let fixture = Fixture::new();
    let artifact = fixture.raw(&[("vmlinuz", b"kernel")]);
    let file = artifact.files[0].clone();
    let again = |digest| fixture.store.artifact(digest).unwrap();
    for path in [
        fixture.store.file_path(&file),
        fixture.store.blob_path(&file.digest),
        fixture.store.blob_path(&Digest::of(b"{}")),
        fixture.store.blob_path(&artifact.manifest),
    ] {
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(again(&artifact.manifest).is_none(), "without {path:?}");
        // Cut short is not there either.
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(again(&artifact.manifest).is_none(), "with half of {path:?}");
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        assert_eq!(again(&artifact.manifest).as_ref(), Some(&artifact));
    }
}

#[test]
fn unpacked_layers_are_complete_by_their_record() {
    let fixture = Fixture::new();
    let manifest = fixture.archive(
        &[("bin/tool", b"tool", true), ("bin/same", b"tool", false)],
        &[("latest", "bin/tool")],
    );
    let artifact = fixture.store.artifact(&manifest).unwrap().unwrap();
    let generation = fixture.create(CLASS, &artifact);
    assert_eq!(mode(&generation.dir.join("bin/tool")), 0o555);
    assert_eq!(mode(&generation.dir.join("bin/same")), 0o444);
    assert_eq!(
        fs::read_link(generation.dir.join("latest")).unwrap(),
        Path::new("bin/tool")
    );
    assert!(fixture.store.check(&generation, true).unwrap().is_empty());

    fs::write(
        fixture
            .store
            .record_path(&artifact.layers[0].digest)
            .with_extension("x"),
        b"",
    )
    .unwrap();
    let record = fixture.store.record_path(&artifact.layers[0].digest);
    writable(&record);
    fs::write(&record, b"{ not json").unwrap();
    assert!(fixture.store.artifact(&manifest).unwrap().is_none());
}

#[test]
fn layers_that_do_not_fit_together_are_refused() {
    let fixture = Fixture::new();
    let digest = fixture.put(b"x", true, false);
    fixture.store.join_raw(&digest, 1).unwrap();
    let layer = |title: &str| {
        format!(
            r#"{{"mediaType":"application/octet-stream","digest":"{digest}","size":1,
            "annotations":{{"org.opencontainers.image.title":"{title}"}}}}"#
        )
    };
    for (titles, entry, reason) in [
        (["a", "./a"], "a", Refusal::Duplicate),
        (
            ["a", "a/b"],
            "a/b",
            Refusal::UnderNonFolder { via: "a".into() },
        ),
    ] {
        let manifest = fixture.manifest(&titles.map(layer));
        let error = fixture.store.artifact(&manifest).unwrap_err();
        assert!(error.is_verification());
        let Error::Hostile { source, .. } = error else {
            panic!("{error}");
        };
        assert_eq!((source.entry.as_str(), source.reason), (entry, reason));
    }
}

#[test]
fn derived_files_take_the_place_of_the_artifact_s() {
    let fixture = Fixture::new();
    let artifact = fixture.raw(&[
        ("configuration.toml", b"kernel = \"/x\""),
        ("vmlinuz", b"k"),
    ]);
    let number = fixture.store.next_number(CLASS).unwrap();
    let files = [
        derived("configuration.toml", "ours"),
        derived("config.d/60-km.toml", "more"),
    ];
    let generation = fixture
        .store
        .create_generation(CLASS, number, &artifact, &files, meta())
        .unwrap();
    assert_eq!(
        fs::read(generation.dir.join("configuration.toml")).unwrap(),
        b"ours"
    );
    assert_eq!(
        fs::read(generation.dir.join("config.d/60-km.toml")).unwrap(),
        b"more"
    );
    assert_eq!(generation.manifest.replaced[0].path, "configuration.toml");
    assert!(fixture.store.check(&generation, true).unwrap().is_empty());
    assert_eq!(fixture.store.generation(CLASS, number).unwrap(), generation);
    // What was replaced is still needed for the artifact to be complete.
    fixture.store.remove_unreferenced().unwrap();
    assert!(
        fixture
            .store
            .artifact(&artifact.manifest)
            .unwrap()
            .is_some()
    );

    for path in ["../up", "vmlinuz/x", ".generation.json", "/abs", ""] {
        let error = fixture
            .store
            .create_generation(CLASS, 9, &artifact, &[derived(path, "x")], meta())
            .unwrap_err();
        assert!(matches!(error, Error::Derived { .. }), "{path}: {error}");
    }
    let twice = [derived("a", "1"), derived("./a", "2")];
    assert!(
        fixture
            .store
            .create_generation(CLASS, 9, &artifact, &twice, meta())
            .is_err()
    );
    assert_eq!(
        fixture.store.numbers(CLASS).unwrap(),
        [number],
        "a refused one leaves nothing"
    );
}

#[test]
fn numbers_are_not_reused_and_not_overwritten() {
    let fixture = Fixture::new();
    let artifact = fixture.raw(&[("vmlinuz", b"kernel")]);
    let first = fixture.create(CLASS, &artifact);
    let second = fixture.create(CLASS, &artifact);
    assert_eq!((first.number(), second.number()), (1, 2));
    let error = fixture
        .store
        .create_generation(CLASS, 2, &artifact, &[], meta())
        .unwrap_err();
    assert!(matches!(error, Error::GenerationExists { number: 2, .. }));
    // An unreadable one holds its number too, and says what it is.
    writable(&second.dir.join(".generation.json"));
    fs::write(second.dir.join(".generation.json"), b"{}").unwrap();
    assert_eq!(fixture.store.next_number(CLASS).unwrap(), 3);
    let error = fixture.store.generations(CLASS).unwrap_err();
    assert!(
        error.is_damage() && error.to_string().contains("a new generation replaces it"),
        "{error}"
    );
    assert!(fixture.store.remove_unreferenced().unwrap_err().is_damage());
    fixture.store.remove_class(CLASS).unwrap();
    assert_eq!(fixture.store.next_number(CLASS).unwrap(), 1);
}

fn one(damages: Vec<Damage>) -> Problem {
    assert_eq!(damages.len(), 1, "{damages:?}");
    damages.into_iter().next().unwrap().problem
}

#[test]
fn check_finds_every_kind_of_damage() {
    let fixture = Fixture::new();
    let manifest = fixture.archive(&[("a/image", b"image", false)], &[("link", "a/image")]);
    let artifact = fixture.store.artifact(&manifest).unwrap().unwrap();
    let check = |generation: &Generation, deep| fixture.store.check(generation, deep).unwrap();

    let generation = fixture.create(CLASS, &artifact);
    let image = generation.dir.join("a/image");
    writable(&image);
    assert_eq!(
        one(check(&generation, false)),
        Problem::Mode {
            expected: 0o444,
            got: 0o644
        }
    );
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
    // Where the file system has fs-verity, the kernel lets nobody do what follows.
    if !verity::is_sealed(&image).unwrap() {
        writable(&image);
        // A write through any of its names, of the same length and with the time set back: only deep sees it.
        let before = fs::metadata(&image).unwrap().modified().unwrap();
        fs::write(&image, b"IMAGE").unwrap();
        assert!(matches!(
            one(check(&generation, false)),
            Problem::Content { .. }
        ));
        fs::File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_modified(before)
            .unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
        assert!(check(&generation, false).is_empty());
        let damages = check(&generation, true);
        assert!(matches!(one(damages.clone()), Problem::Content { .. }));
        // What deep has seen, shallow sees from now on.
        fixture.store.doubt(&damages).unwrap();
        assert_eq!(check(&generation, false), damages);
        // Dropped from the store, it is fetched again.
        fixture.store.discard(&damages).unwrap();
        assert!(fixture.store.artifact(&manifest).unwrap().is_none());
        fixture.put(b"image", false, false);
        assert!(fixture.store.artifact(&manifest).unwrap().is_some());
    }

    let generation = fixture.create(CLASS, &artifact);
    assert!(check(&generation, true).is_empty());
    let image = generation.dir.join("a/image");
    fs::remove_file(&image).unwrap();
    assert_eq!(one(check(&generation, false)), Problem::Missing);
    fs::create_dir(&image).unwrap();
    assert_eq!(
        one(check(&generation, false)),
        Problem::Kind {
            expected: "a regular file"
        }
    );
    fs::remove_dir(&image).unwrap();
    fs::write(&image, b"longer than it was").unwrap();
    assert_eq!(
        one(check(&generation, false)),
        Problem::Size {
            expected: 5,
            got: 18
        }
    );
    // A copy of the right bytes is right, whatever its inode.
    fs::write(&image, b"image").unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
    assert!(check(&generation, false).is_empty());
    fs::remove_file(generation.dir.join("link")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", generation.dir.join("link")).unwrap();
    assert!(matches!(
        one(check(&generation, false)),
        Problem::Target { .. }
    ));

    let generation = fixture.create(CLASS, &artifact);
    fs::write(generation.dir.join("a/extra"), b"").unwrap();
    assert_eq!(one(check(&generation, false)), Problem::Unexpected);
    fs::remove_file(generation.dir.join("a/extra")).unwrap();
    fs::remove_file(generation.dir.join("configuration.toml")).unwrap();
    assert_eq!(one(check(&generation, false)), Problem::Missing);
}

#[test]
fn what_no_generation_needs_goes_and_the_rest_stays() {
    let fixture = Fixture::new();
    let old = fixture.raw(&[("vmlinuz", b"kernel"), ("kata.image", b"old image")]);
    let new = fixture.raw(&[("vmlinuz", b"kernel"), ("kata.image", b"new image")]);
    fixture.create(CLASS, &old);
    let live = fixture.create(CLASS, &new);
    fixture.store.activate(CLASS, live.number()).unwrap();
    assert_eq!(
        fixture.store.remove_unreferenced().unwrap(),
        Removed::default()
    );

    let in_use = fixture
        .store
        .remove_generation(CLASS, live.number())
        .unwrap_err();
    assert!(in_use.is_refused(), "{in_use}");
    fixture.store.remove_generation(CLASS, 1).unwrap();
    let removed = fixture.store.remove_unreferenced().unwrap();
    // The old image as blob and as content, and the old manifest.
    assert_eq!(removed.files, 3);
    assert!(removed.bytes >= b"old image".len() as u64);
    assert!(fixture.store.artifact(&old.manifest).unwrap().is_none());
    assert_eq!(
        fixture.store.artifact(&new.manifest).unwrap().as_ref(),
        Some(&new)
    );
    assert!(fixture.store.check(&live, true).unwrap().is_empty());

    let error = fixture.store.remove_all().unwrap_err();
    assert!(error.is_refused(), "{error}");
    fixture.store.remove_class(CLASS).unwrap();
    fs::write(fixture.store.state_dir().join("journal"), b"{}").unwrap();
    fixture.store.remove_all().unwrap();
    assert_eq!(
        tree(fixture.store.dir()),
        [".store", ".store/state", ".store/state/journal"]
    );
    fixture.store.remove_state().unwrap();
    assert!(names(fixture.store.dir()).unwrap().is_empty());
}

#[test]
fn a_name_in_the_layout_follows_its_newest_manifest() {
    let fixture = Fixture::new();
    let old = fixture.raw(&[("vmlinuz", b"old")]);
    let new = fixture.raw(&[("vmlinuz", b"new")]);
    let index = || -> serde_json::Value {
        serde_json::from_slice(&fs::read(fixture.store.oci_dir().join("index.json")).unwrap())
            .unwrap()
    };
    let named = |digest: &Digest| {
        let index = index();
        let entry = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["digest"] == digest.to_string())
            .cloned();
        entry.map(|entry| entry["annotations"]["org.opencontainers.image.ref.name"].clone())
    };
    assert_eq!(
        named(&new.manifest),
        Some("registry.example/guest:1".into())
    );
    assert_eq!(named(&old.manifest), Some(serde_json::Value::Null));
    // The same again changes nothing.
    let before = index();
    fixture.raw(&[("vmlinuz", b"new")]);
    assert_eq!(index(), before);
    fixture.create(CLASS, &new);
    fixture.store.remove_unreferenced().unwrap();
    assert_eq!(named(&old.manifest), None);
    assert_eq!(index()["manifests"].as_array().unwrap().len(), 1);
}

#[test]
fn a_lost_index_is_made_anew_from_the_generations() {
    let fixture = Fixture::new();
    for content in [b"one", b"two"] {
        let artifact = fixture.raw(&[("vmlinuz", content)]);
        fixture.create(CLASS, &artifact);
    }
    let path = fixture.store.oci_dir().join("index.json");
    let before = fs::read_to_string(&path).unwrap();
    assert_eq!(before.matches("\"digest\"").count(), 2);
    for damage in [None, Some(&b"{\"schemaVersion\""[..])] {
        match damage {
            None => fs::remove_file(&path).unwrap(),
            Some(bytes) => fs::write(&path, bytes).unwrap(),
        }
        fixture.store.init().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
    }
    // While a name is added, too.
    fs::remove_file(&path).unwrap();
    fixture.raw(&[("vmlinuz", b"two")]);
    assert_eq!(fs::read_to_string(&path).unwrap(), before);
}
