//! Blobs that are read while they come.

use std::io::Read;

use crate::digest::Digest;
use crate::store::{PartWriter, PartialBlob, Store};

const MIB: usize = 1 << 20;
const SIZE: usize = 5 * MIB + 123;

fn bytes() -> Vec<u8> {
    (0..SIZE as u32).map(|n| (n % 251) as u8).collect()
}

fn blob() -> (tempfile::TempDir, Store, PartialBlob) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.init().unwrap();
    let blob = PartialBlob::open(&store, &Digest::of(&bytes()), SIZE as u64).unwrap();
    (dir, store, blob)
}

fn write(blob: &PartialBlob, range: std::ops::Range<usize>) {
    let mut writer = PartWriter::new(range.start as u64);
    writer.write(blob, &bytes()[range]).unwrap();
    writer.end(blob).unwrap();
}

#[test]
fn parts_in_any_order_are_read_in_order() {
    let (_dir, _store, blob) = blob();
    let mut following = blob.follow();
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        following.read_to_end(&mut got).map(|_| got)
    });
    for range in [3 * MIB..SIZE, 0..MIB, 2 * MIB..3 * MIB, MIB..2 * MIB] {
        write(&blob, range);
    }
    assert!(reader.join().unwrap().unwrap() == bytes());
}

#[test]
fn what_was_there_before_is_read_as_well() {
    let (_dir, store, blob) = blob();
    write(&blob, 0..2 * MIB);
    drop(blob);
    let blob = PartialBlob::open(&store, &Digest::of(&bytes()), SIZE as u64).unwrap();
    let mut following = blob.follow();
    let mut prefix = vec![0; 2 * MIB];
    if blob.kept() > 0 {
        following.read_exact(&mut prefix).unwrap();
        assert!(prefix == bytes()[..2 * MIB]);
    }
}

#[test]
fn a_blob_that_begins_again_or_is_given_up_ends_it() {
    for give_up in [false, true] {
        let (_dir, _store, blob) = blob();
        write(&blob, 0..MIB);
        let mut following = blob.follow();
        let lost = following.lost();
        let mut piece = vec![0; MIB];
        following.read_exact(&mut piece).unwrap();
        let reader = std::thread::spawn(move || following.read(&mut [0; 10]));
        if give_up {
            drop(blob);
            assert!(reader.join().unwrap().is_err());
        } else {
            blob.restart().unwrap();
            write(&blob, 0..SIZE);
            assert!(reader.join().unwrap().is_err());
        }
        assert!(lost.load(std::sync::atomic::Ordering::Relaxed));
    }
}
