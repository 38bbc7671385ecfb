//! Killed processes, failing journals and failing writes.

use super::*;

/// The process is killed at each of the journal's entries: what is owed is settled, and the change converges.
#[tokio::test(start_paused = true)]
async fn a_process_killed_at_any_step_leaves_a_node_that_converges() {
    for killed_at in 0..3 {
        for restarted in [false, true] {
            let mut node = Node::new(Some(BEFORE));
            let change = node.set(&[handler("km")]);
            let owed = record(&change, &Some(node.fake.read()));
            let owed = Owed {
                restarting: killed_at == 2,
                ..owed
            };
            // As far as the other process came: journal; journal and backup and file; that and the restart's record.
            fs::create_dir_all(change.backup.parent().unwrap()).unwrap();
            if killed_at > 0 {
                fs::write(&change.backup, BEFORE).unwrap();
                fs::write(&change.path, change.after.as_deref().unwrap()).unwrap();
            }
            if restarted && killed_at == 2 {
                node.fake.restart().await.unwrap();
            }
            let restarts = node.fake.restarts();
            node.book.owed = Some(owed);
            let resumed = node.resume().await.unwrap();
            if killed_at == 0 {
                assert_eq!(resumed, Resumed::NotBegun);
                node.is_as_before();
            } else {
                assert_eq!(resumed, Resumed::Finished);
                assert_eq!(node.live().unwrap(), ["km", "runc"]);
                assert_eq!(node.fake.restarts(), 1, "restarted before: {restarts}");
            }
            assert!(node.book.owed.is_none());
            let again = node.set(&[handler("km")]);
            node.run(&again).await.unwrap();
            assert_eq!(node.live().unwrap(), ["km", "runc"]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_that_others_changed_after_the_crash_is_theirs() {
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    let owed = record(&change, &None);
    node.book.owed = Some(owed);
    fs::write(&change.path, "version = 2\n# new\n").unwrap();
    assert_eq!(node.resume().await.unwrap(), Resumed::ChangedByOthers);
    assert_eq!(node.text().unwrap(), "version = 2\n# new\n");
    assert!(node.book.owed.is_none() && node.fake.restarts() == 0);
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_fails_changes_nothing_or_is_rolled_back() {
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    node.book.fail_at = Some(0);
    let error = node.run(&change).await.unwrap_err();
    assert!(matches!(error, TransactionError::Journal(_)));
    node.is_as_before();
    node.book = Book {
        fail_at: Some(1),
        ..Book::default()
    };
    let error = node.run(&change).await.unwrap_err();
    assert!(
        told(&error).contains("the journal cannot be written: disk full"),
        "{}",
        told(&error)
    );
    node.is_as_before();
}

#[tokio::test(start_paused = true)]
async fn a_write_that_fails_leaves_nothing_owed() {
    let mut node = Node::new(Some(BEFORE));
    let mut change = node.set(&[handler("km")]);
    // A file where the backup's folder should be.
    fs::write(node.dir.path().join("blocked"), "").unwrap();
    change.backup = node.dir.path().join("blocked/backup");
    let error = node.run(&change).await.unwrap_err();
    assert!(matches!(error, TransactionError::Host(_)), "{error:?}");
    node.is_as_before();
    assert!(node.book.owed.is_none());
}

#[test]
fn what_is_owed_survives_the_journal_and_leftovers_are_found() {
    let node = Node::new(Some(BEFORE));
    let owed = record(&node.set(&[handler("km")]), &None);
    let text = serde_json::to_string(&owed).unwrap();
    assert_eq!(serde_json::from_str::<Owed>(&text).unwrap(), owed);

    let config = &node.fake.config;
    for name in [
        ".config.toml.kata-manager.check",
        ".config.toml.kata-manager.tmp",
    ] {
        fs::write(config.with_file_name(name), "").unwrap();
    }
    remove_leftovers(config).unwrap();
    node.nothing_beside();
}

/// The binary spawns these futures on a runtime with several threads.
#[test]
fn a_transaction_can_be_spawned() {
    fn sendable<T: Send>(_: T) {}
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    let owed = record(&change, &None);
    sendable(run(&change, &node.fake, &mut node.book, &mut |_| {}));
    sendable(resume(&owed, &node.fake, &mut node.book, &mut |_| {}));
}

/// A main file that stays and a drop-in that comes: killed after any of the writes, nothing is left half way.
#[tokio::test(start_paused = true)]
async fn several_files_are_all_written_or_none() {
    for written in 0..4 {
        let mut node = Node::new(Some(BEFORE));
        let mut change = node.set(&[handler("km")]);
        let folder = node.dir.path().join("etc/containerd/conf.d");
        let drop_in = folder.join("60-km.toml");
        let going = node.dir.path().join("etc/containerd/old.toml");
        fs::write(&going, "# old").unwrap();
        for (path, before, after) in [
            (&drop_in, None, Some(b"# new".to_vec())),
            (&going, Some(b"# old".to_vec()), None),
        ] {
            change.others.push(OtherFile {
                path: path.clone(),
                before,
                after,
                backup: node
                    .dir
                    .path()
                    .join("state")
                    .join(path.file_name().unwrap()),
            });
        }
        let mut owed = record(&change, &Some(node.fake.read()));
        files::write(&change, &mut owed, &mut node.book).unwrap();
        assert!(!going.exists() && drop_in.exists());
        assert_eq!(owed.made_folders, std::slice::from_ref(&folder));
        // Take back what a process that was killed earlier had not done.
        if written < 3 {
            fs::write(&going, "# old").unwrap();
        }
        if written < 2 {
            fs::write(&change.path, BEFORE).unwrap();
        }
        if written < 1 {
            fs::remove_file(&drop_in).unwrap();
        }
        node.book.owed = Some(owed);
        let resumed = node.resume().await.unwrap();
        if written == 3 {
            assert_eq!(resumed, Resumed::Finished);
            assert_eq!(node.live().unwrap(), ["km", "runc"]);
            continue;
        }
        assert_eq!(resumed, Resumed::NotBegun, "{written}");
        assert_eq!(fs::read_to_string(&going).unwrap(), "# old");
        assert!(!folder.exists(), "{written}");
        fs::remove_file(going).unwrap();
        node.is_as_before();
    }
}

#[tokio::test(start_paused = true)]
async fn a_rollback_puts_every_file_back() {
    let mut node = Node::new(Some(BEFORE));
    let mut change = node.set(&[handler("km")]);
    let drop_in = node.dir.path().join("etc/containerd/conf.d/60-km.toml");
    change.others.push(OtherFile {
        path: drop_in.clone(),
        before: None,
        after: Some(b"# new".to_vec()),
        backup: node.dir.path().join("state/drop-in"),
    });
    node.restarts_will(&[Restarted::Silent]);
    let error = node.run(&change).await.unwrap_err();
    assert!(told(&error).contains("was restored"), "{}", told(&error));
    node.is_as_before();
    // A drop-in that somebody put there meanwhile makes the plan stale.
    fs::create_dir_all(drop_in.parent().unwrap()).unwrap();
    fs::write(&drop_in, "# theirs").unwrap();
    let error = node.run(&change).await.unwrap_err();
    assert!(matches!(error, TransactionError::Stale { path } if path == drop_in));
}

#[tokio::test(start_paused = true)]
async fn a_reading_that_differs_from_containerds_stops_it() {
    let mut node = Node::new(Some(BEFORE));
    let mut change = node.set(&[handler("km")]);
    change.understood = Some(Understood {
        now: vec!["runc".into(), "theirs".into()],
        then: vec!["km".into(), "theirs".into()],
    });
    let error = told(&node.run(&change).await.unwrap_err());
    assert!(error.contains("Only in the files: theirs"), "{error}");
    node.is_as_before();
    change.understood = Some(Understood {
        now: Vec::new(),
        then: vec!["km".into()],
    });
    node.run(&change).await.unwrap();
}
