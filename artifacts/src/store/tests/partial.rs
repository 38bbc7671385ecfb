//! Blobs that are taken up again.

#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, of which there may be one"
)]

use super::*;
use std::os::unix::fs::FileExt;

const SIZE: usize = (5 << 20) + 123;

fn bytes() -> Vec<u8> {
    (0..SIZE as u32).map(|n| (n % 251) as u8).collect()
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.init().unwrap();
    (dir, store)
}

fn write(blob: &PartialBlob, range: Range<usize>, bytes: &[u8]) -> u64 {
    let mut writer = PartWriter::new(range.start as u64);
    let mut kept = 0;
    for piece in bytes[range].chunks(70_001) {
        kept += writer.write(blob, piece).unwrap();
    }
    kept + writer.end(blob).unwrap()
}

#[tokio::test]
async fn parts_in_any_order_make_the_whole() {
    let (_dir, store) = store();
    let (bytes, digest) = (bytes(), Digest::of(&bytes()));
    let mib = 1 << 20;
    let orders: [&[Range<usize>]; 3] = [
        &[0..SIZE],
        &[3 * mib..SIZE, mib..2 * mib, 0..mib, 2 * mib..3 * mib],
        &[0..mib, 2 * mib..SIZE, mib..2 * mib],
    ];
    for order in orders {
        let blob = PartialBlob::open(&store, &digest, SIZE as u64).unwrap();
        assert_eq!(blob.missing(), [0..SIZE as u64]);
        for range in order {
            assert_eq!(write(&blob, range.clone(), &bytes), range.len() as u64);
        }
        assert!(blob.missing().is_empty());
        assert_eq!(blob.digest().await.unwrap(), digest);
        assert!(fs::read(blob.path()).unwrap() == bytes);
        blob.discard();
    }
    assert!(names(&store.partial_dir()).unwrap().is_empty());
}

#[tokio::test]
async fn what_was_written_is_taken_up_and_verified() {
    let (_dir, store) = store();
    let (bytes, digest) = (bytes(), Digest::of(&bytes()));
    let blob = PartialBlob::open(&store, &digest, SIZE as u64).unwrap();
    // It ends within a block, which does not count.
    assert_eq!(write(&blob, 0..(2 << 20) + 5, &bytes), 2 << 20);
    write(&blob, 3 << 20..4 << 20, &bytes);
    drop(blob);
    let again = PartialBlob::open(&store, &digest, SIZE as u64).unwrap();
    if !again.tells {
        return; // The temporary folder's file system cannot tell.
    }
    assert_eq!(again.kept(), 3 << 20);
    assert_eq!(again.missing(), [2 << 20..3 << 20, 4 << 20..SIZE as u64]);
    write(&again, 2 << 20..3 << 20, &bytes);
    write(&again, 4 << 20..SIZE, &bytes);
    assert_eq!(again.digest().await.unwrap(), digest);
    drop(again);

    // What somebody changed meanwhile shows.
    let path = store.partial_path(&digest);
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"changed", 1000).unwrap();
    let damaged = PartialBlob::open(&store, &digest, SIZE as u64).unwrap();
    assert!(damaged.missing().is_empty());
    assert_ne!(damaged.digest().await.unwrap(), digest);
    damaged.restart().unwrap();
    assert_eq!(damaged.missing(), [0..SIZE as u64]);
    write(&damaged, 0..SIZE, &bytes);
    assert_eq!(damaged.digest().await.unwrap(), digest);
}

#[tokio::test]
async fn a_part_of_another_size_is_no_beginning() {
    let (_dir, store) = store();
    let (bytes, digest) = (bytes(), Digest::of(&bytes()));
    let blob = PartialBlob::open(&store, &digest, SIZE as u64).unwrap();
    write(&blob, 0..2 << 20, &bytes);
    drop(blob);
    let other = PartialBlob::open(&store, &digest, SIZE as u64 - 1).unwrap();
    assert_eq!(other.kept(), 0);
    // Too little to keep.
    drop(other);
    assert!(names(&store.partial_dir()).unwrap().is_empty());
}

#[tokio::test]
async fn more_than_the_blob_has_is_an_error() {
    let (_dir, store) = store();
    let blob = PartialBlob::open(&store, &Digest::of(b"abc"), 3).unwrap();
    let mut writer = PartWriter::new(0);
    assert!(writer.write(&blob, b"abcd").unwrap_err().is_verification());
    let empty = PartialBlob::open(&store, &Digest::of(b""), 0).unwrap();
    assert!(empty.missing().is_empty());
    assert_eq!(empty.digest().await.unwrap(), Digest::of(b""));
}

#[test]
fn old_parts_go_and_so_do_those_that_are_in_the_way() {
    let (_dir, store) = store();
    let (bytes, digest) = (bytes(), Digest::of(&bytes()));
    let leave = || {
        let blob = PartialBlob::open(&store, &digest, SIZE as u64).unwrap();
        write(&blob, 0..2 << 20, &bytes);
        blob.tells
    };
    if !leave() {
        return;
    }
    let path = store.partial_path(&digest);
    store.sweep_partial().unwrap();
    assert!(path.exists(), "it is young");
    let old = SystemTime::now() - STALE - Duration::from_secs(60);
    let file = fs::File::open(&path).unwrap();
    file.set_modified(old).unwrap();
    store.sweep_partial().unwrap();
    assert!(!path.exists());

    leave();
    let (small, huge) = (Digest::of(b"small"), Digest::of(b"huge"));
    store.make_room(&[(&small, 1)]).unwrap();
    assert!(path.exists());
    assert!(store.make_room(&[(&huge, 1 << 60)]).is_err());
    assert!(!path.exists());
}
