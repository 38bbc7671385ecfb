//! The symlink under a class's name, and what was there before.

use super::*;
use crate::generation::Activation;

fn foreign(fixture: &Fixture) {
    fs::create_dir_all(fixture.link(CLASS)).unwrap();
    fs::write(fixture.link(CLASS).join("theirs"), b"kept").unwrap();
}

fn prepared() -> Fixture {
    let fixture = Fixture::new();
    let artifact = fixture.raw(&[("vmlinuz", b"kernel")]);
    fixture.create(CLASS, &artifact);
    fixture.create(CLASS, &artifact);
    fixture
}

#[test]
fn activation_is_one_relative_symlink() {
    let fixture = prepared();
    let store = &fixture.store;
    assert!(store.live(CLASS).unwrap().is_none());
    assert_eq!(store.activate(CLASS, 1).unwrap(), Activation::Created);
    assert_eq!(
        fs::read_link(fixture.link(CLASS)).unwrap(),
        Path::new(".store/generations/kata-qemu-nvidia-gpu/1")
    );
    assert_eq!(store.activate(CLASS, 1).unwrap(), Activation::Unchanged);
    assert_eq!(
        store.activate(CLASS, 2).unwrap(),
        Activation::Switched { from: 1 }
    );
    assert_eq!(store.live(CLASS).unwrap().unwrap().number(), 2);
    assert_eq!(
        fs::read(fixture.link(CLASS).join("vmlinuz")).unwrap(),
        b"kernel"
    );
    // Back again, as a rollback does.
    assert_eq!(
        store.activate(CLASS, 1).unwrap(),
        Activation::Switched { from: 2 }
    );
    assert!(matches!(
        store.activate(CLASS, 7),
        Err(Error::NoGeneration { number: 7, .. })
    ));
    assert_eq!(store.live(CLASS).unwrap().unwrap().number(), 1);
    // The whole tree may be elsewhere: the symlink still holds.
    let moved = fixture.dir.path().join("moved");
    fs::rename(store.dir(), &moved).unwrap();
    assert_eq!(
        Store::open(&moved)
            .unwrap()
            .live(CLASS)
            .unwrap()
            .unwrap()
            .number(),
        1
    );
}

#[test]
fn a_real_folder_is_kept_and_comes_back() {
    let fixture = prepared();
    let store = &fixture.store;
    foreign(&fixture);
    assert!(store.live(CLASS).unwrap().is_none());
    let Activation::Displaced { kept } = store.activate(CLASS, 1).unwrap() else {
        panic!("not displaced");
    };
    assert_eq!(fs::read(kept.join("theirs")).unwrap(), b"kept");
    assert_eq!(store.displaced(CLASS).unwrap(), Some(kept));
    assert_eq!(store.live(CLASS).unwrap().unwrap().number(), 1);
    assert_eq!(
        store.activate(CLASS, 2).unwrap(),
        Activation::Switched { from: 1 }
    );
    store.remove_unreferenced().unwrap();
    assert!(store.remove_all().unwrap_err().is_refused());

    store.remove_class(CLASS).unwrap();
    assert_eq!(tree(&fixture.link(CLASS)), ["theirs"]);
    assert!(store.displaced(CLASS).unwrap().is_none());
    assert!(store.classes().unwrap().is_empty());
    store.remove_class(CLASS).unwrap();
    store.remove_all().unwrap();
    store.remove_state().unwrap();
    assert_eq!(
        tree(store.dir()),
        [CLASS.to_owned(), format!("{CLASS}/theirs")]
    );
}

#[test]
fn a_foreign_symlink_or_file_is_kept_too() {
    for make in [
        (|path: &Path| std::os::unix::fs::symlink("/data/guest", path).unwrap()) as fn(&Path),
        |path| fs::write(path, b"a file").unwrap(),
        // Like ours, and yet not.
        |path| std::os::unix::fs::symlink(".store/generations/other/1", path).unwrap(),
        |path| std::os::unix::fs::symlink(format!(".store/generations/{CLASS}/01"), path).unwrap(),
    ] {
        let fixture = prepared();
        make(&fixture.link(CLASS));
        let before = fs::symlink_metadata(fixture.link(CLASS)).unwrap();
        assert!(matches!(
            fixture.store.activate(CLASS, 1).unwrap(),
            Activation::Displaced { .. }
        ));
        fixture.store.remove_class(CLASS).unwrap();
        let after = fs::symlink_metadata(fixture.link(CLASS)).unwrap();
        assert_eq!(
            std::os::unix::fs::MetadataExt::ino(&before),
            std::os::unix::fs::MetadataExt::ino(&after)
        );
    }
}

#[test]
fn a_second_foreign_folder_is_refused_and_both_are_kept() {
    let fixture = prepared();
    foreign(&fixture);
    fixture.store.activate(CLASS, 1).unwrap();
    fs::remove_file(fixture.link(CLASS)).unwrap();
    fs::create_dir(fixture.link(CLASS)).unwrap();
    fs::write(fixture.link(CLASS).join("second"), b"").unwrap();
    for error in [
        fixture.store.activate(CLASS, 2).unwrap_err(),
        fixture.store.remove_class(CLASS).unwrap_err(),
    ] {
        assert!(
            matches!(error, Error::Occupied { .. }) && error.is_refused(),
            "{error}"
        );
    }
    assert_eq!(tree(&fixture.link(CLASS)), ["second"]);
    assert_eq!(
        tree(&fixture.store.displaced(CLASS).unwrap().unwrap()),
        ["theirs"]
    );
}

#[test]
fn a_symlink_that_somebody_removed_does_not_hold_the_folder_back() {
    let fixture = prepared();
    foreign(&fixture);
    fixture.store.activate(CLASS, 1).unwrap();
    fs::remove_file(fixture.link(CLASS)).unwrap();
    fixture.store.remove_class(CLASS).unwrap();
    assert_eq!(tree(&fixture.link(CLASS)), ["theirs"]);
}

/// The states in which a killed process can leave a displacement and its undoing: each converges forwards and backwards.
#[test]
fn killed_between_two_steps_nothing_is_lost() {
    let links = |fixture: &Fixture, number: u64| {
        let target = format!(".store/generations/{CLASS}/{number}");
        fs::create_dir_all(fixture.store.under("displaced")).unwrap();
        std::os::unix::fs::symlink(target, fixture.store.displaced_path(CLASS)).unwrap();
    };
    for forwards in [true, false] {
        // The symlink was staged, the exchange did not happen; or it happened back and the symlink was not removed.
        let fixture = prepared();
        foreign(&fixture);
        links(&fixture, 2);
        assert!(fixture.store.displaced(CLASS).unwrap().is_none());
        if forwards {
            assert!(matches!(
                fixture.store.activate(CLASS, 1).unwrap(),
                Activation::Displaced { .. }
            ));
            assert_eq!(fixture.store.live(CLASS).unwrap().unwrap().number(), 1);
        }
        fixture.store.remove_class(CLASS).unwrap();
        assert_eq!(tree(&fixture.link(CLASS)), ["theirs"]);
        fixture.store.remove_all().unwrap();
        fixture.store.remove_state().unwrap();
    }
}

#[test]
fn a_dangling_symlink_is_damage_and_not_absence() {
    let fixture = prepared();
    fixture.store.activate(CLASS, 2).unwrap();
    fs::remove_dir_all(fixture.store.generation_dir(CLASS, 2)).unwrap();
    assert!(fixture.store.live(CLASS).unwrap_err().is_damage());
    assert_eq!(fixture.store.live_number(CLASS).unwrap(), Some(2));
    assert_eq!(
        fixture.store.next_number(CLASS).unwrap(),
        3,
        "a VM may still name 2"
    );
    assert_eq!(
        fixture.store.activate(CLASS, 1).unwrap(),
        Activation::Switched { from: 2 }
    );
}
