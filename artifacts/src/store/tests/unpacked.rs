//! Layers that are unpacked into the store.

use super::*;
use crate::unpack::{Format, Limits, Refusal};

/// A tar of regular files with their modes.
fn tar(files: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(*mode);
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack(fixture: &Fixture, tar: &[u8], content: Option<&Digest>) -> Result<Record> {
    let zstd = zstd::encode_all(tar, 3).unwrap();
    let layer = fixture.put(&zstd, true, false);
    fixture
        .store
        .unpack_layer(&layer, Format::TarZstd, content, &Limits::default())
}

fn contents(fixture: &Fixture) -> Vec<String> {
    names(&fixture.store.under("files/sha256")).unwrap()
}

fn no_leftovers(fixture: &Fixture) {
    for session in names(&fixture.store.under("tmp")).unwrap() {
        let left = names(&fixture.store.under("tmp").join(session)).unwrap();
        assert_eq!(left, Vec::<String>::new());
    }
}

#[test]
fn a_layer_becomes_contents_and_a_record() {
    let fixture = Fixture::new();
    let bytes = tar(&[
        ("a/vmlinuz", b"kernel", 0o600),
        ("a/copy", b"kernel", 0o644),
        ("a/tool", b"kernel", 0o700),
    ]);
    let record = unpack(&fixture, &bytes, Some(&Digest::of(&bytes))).unwrap();
    assert_eq!(record.content, Digest::of(&bytes));
    let hex = Digest::of(b"kernel").hex().to_owned();
    assert_eq!(contents(&fixture), [hex.clone(), format!("{hex}.x")]);
    let again = fixture.store.unpacked(&record.layer, None).unwrap();
    assert_eq!(again, Some(record.clone()));
    let other = Digest::of(b"another tar");
    assert!(
        fixture
            .store
            .unpacked(&record.layer, Some(&other))
            .unwrap()
            .is_none()
    );
    fs::remove_file(fixture.store.content_path(&Digest::of(b"kernel"), true)).unwrap();
    assert!(
        fixture
            .store
            .unpacked(&record.layer, None)
            .unwrap()
            .is_none()
    );
    no_leftovers(&fixture);
}

#[test]
fn of_a_refused_layer_nothing_is_kept() {
    let fixture = Fixture::new();
    let hostile = tar(&[("good", b"good", 0o644), ("../../evil", b"evil", 0o644)]);
    let error = unpack(&fixture, &hostile, None).unwrap_err();
    assert!(error.is_verification());
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        text.contains("../../evil") && text.contains("'..'"),
        "{text}"
    );
    assert!(matches!(error, Error::Hostile { source, .. } if source.reason == Refusal::Climbs));

    let good = tar(&[("good", b"good", 0o644)]);
    let error = unpack(&fixture, &good, Some(&Digest::of(b"other"))).unwrap_err();
    assert!(matches!(error, Error::Digest { .. }) && error.is_verification());

    let cut = fixture.put(&zstd::encode_all(&good[..], 3).unwrap()[..20], true, false);
    let error = fixture
        .store
        .unpack_layer(&cut, Format::TarZstd, None, &Limits::default())
        .unwrap_err();
    assert!(matches!(error, Error::Archive { .. }) && error.is_verification());

    assert!(contents(&fixture).is_empty());
    assert!(
        names(&fixture.store.under("unpacked/sha256"))
            .unwrap()
            .is_empty()
    );
    no_leftovers(&fixture);
}

#[test]
fn many_files_are_placed_as_few_are() {
    let fixture = Fixture::new();
    let files: Vec<_> = (0..500)
        .map(|n| {
            (
                format!("modules/{n}.ko"),
                format!("module {n}").into_bytes(),
            )
        })
        .collect();
    let entries: Vec<_> = files
        .iter()
        .map(|(path, bytes)| (path.as_str(), bytes.as_slice(), 0o644))
        .collect();
    let record = unpack(&fixture, &tar(&entries), None).unwrap();
    assert_eq!(
        fixture.store.unpacked(&record.layer, None).unwrap(),
        Some(record)
    );
    for (_, bytes) in &files {
        let path = fixture.store.content_path(&Digest::of(bytes), false);
        assert_eq!(fs::read(&path).unwrap(), *bytes);
        assert!(fs::metadata(&path).unwrap().permissions().readonly());
    }
    no_leftovers(&fixture);
}
