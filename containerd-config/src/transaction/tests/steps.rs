//! One run, from the plan to live handlers or all the way back.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_change_is_made_live_once_and_taken_back_to_the_byte() {
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    let mut seen = Vec::new();
    let outcome = run(&change, &node.fake, &mut node.book, &mut |step| {
        seen.push(step)
    })
    .await
    .unwrap();
    assert_eq!(
        outcome,
        Outcome::Live {
            written: true,
            made_folders: vec![]
        }
    );
    assert_eq!(
        seen,
        [Progress::Checking, Progress::Writing, Progress::Restarting]
    );
    assert_eq!(node.book.entries, ["restoration", "restart", "settled"]);
    assert_eq!(node.live().unwrap(), ["km", "runc"]);
    assert_eq!(fs::read_to_string(&change.backup).unwrap(), BEFORE);
    node.nothing_beside();

    let again = node.set(&[handler("km")]);
    assert_eq!(node.run(&again).await.unwrap(), Outcome::Unchanged);
    assert_eq!(node.fake.restarts(), 1);
    assert_eq!(node.book.entries.len(), 3);

    let remove = node.remove();
    node.run(&remove).await.unwrap();
    node.is_as_before();
}

#[tokio::test(start_paused = true)]
async fn a_restart_that_is_owed_is_made_though_the_file_is_right() {
    let mut node = Node::new(Some(BEFORE));
    let mut change = node.set(&[handler("km")]);
    change.restart = Restart::Never;
    let outcome = node.run(&change).await.unwrap();
    assert_eq!(
        outcome,
        Outcome::Written {
            made_folders: vec![]
        }
    );
    assert_eq!((node.fake.restarts(), node.live().unwrap().len()), (0, 1));

    let mut change = node.set(&[handler("km")]);
    change.restart_owed = true;
    let outcome = node.run(&change).await.unwrap();
    assert_eq!(
        outcome,
        Outcome::Live {
            written: false,
            made_folders: vec![]
        }
    );
    assert_eq!(node.live().unwrap(), ["km", "runc"]);
}

#[tokio::test(start_paused = true)]
async fn a_file_that_someone_else_changed_is_left_alone() {
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    fs::write(&node.fake.config, format!("{BEFORE}# mine\n")).unwrap();
    let error = node.run(&change).await.unwrap_err();
    assert!(matches!(error, TransactionError::Stale { .. }), "{error}");
    assert_eq!(node.text().unwrap(), format!("{BEFORE}# mine\n"));
    assert!(node.book.entries.is_empty() && node.fake.calls.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_containerd_that_does_not_answer_is_not_changed_unless_only_the_file_is_wanted() {
    let mut node = Node::new(Some(BEFORE));
    *node.fake.live.lock().unwrap() = None;
    let mut change = node.set(&[handler("km")]);
    let error = node.run(&change).await.unwrap_err();
    assert!(
        matches!(error, TransactionError::NotRunning { .. }),
        "{error}"
    );
    assert_eq!(node.text().as_deref(), Some(BEFORE));
    assert!(node.book.entries.is_empty());
    change.restart = Restart::Never;
    assert!(matches!(
        node.run(&change).await.unwrap(),
        Outcome::Written { .. }
    ));
    assert_eq!(node.book.entries, ["restoration", "settled"]);
}

#[tokio::test(start_paused = true)]
async fn what_containerd_would_read_differently_is_refused_before_anything_is_written() {
    const RUNC: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n";
    const KM: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km]\nruntime_type = \"io.containerd.kata.v2\"\n\
        [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km.options]\nConfigPath = \"/opt/km.toml\"\n";
    for (dump, wanted) in [
        (
            "=refuse".to_owned(),
            "containerd refuses it: invalid plugin config",
        ),
        ("=[".to_owned(), "cannot be read"),
        (
            format!("=version = 2\nimports = [\"/etc/x.toml\"]\n{RUNC}"),
            "\"km\" would not be in force. Most likely an imported file",
        ),
        (
            format!("=version = 2\n{KM}"),
            "the handlers runc would no longer be in force",
        ),
        (
            format!(
                "=version = 2\n{RUNC}{}",
                KM.replace("/opt/km", "/opt/other")
            ),
            "would have options = {\"ConfigPath\":\"/opt/other.toml\"} instead of",
        ),
        (
            format!("=version = 2\noom_score = 3\n{RUNC}{KM}"),
            "other settings would change too: oom_score (nothing -> 3)",
        ),
    ] {
        let mut node = Node::new(Some(BEFORE));
        let change = node.set(&[handler("km")]);
        *node.fake.dump_edit.lock().unwrap() = dump;
        let error = node.run(&change).await.unwrap_err();
        assert!(
            matches!(error, TransactionError::ValidationFailed { .. }),
            "{error:?}"
        );
        assert!(told(&error).contains(wanted), "{}", told(&error));
        node.is_as_before();
        assert!(node.book.entries.is_empty());
        assert!(!change.backup.exists());
    }
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    *node.fake.dump_edit.lock().unwrap() = format!(
        "=version = 2\nimports = [\"/x\"]\n{RUNC}extra = 1\n{}",
        KM.replace("km.toml\"", "km.toml\"\nTypeUrl = \"\"")
    )
    .replace("extra = 1\n", "");
    node.run(&change).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_a_binary_to_ask_the_change_goes_on_and_says_so() {
    let mut node = Node::new(Some(BEFORE));
    *node.fake.dumps.lock().unwrap() = false;
    let change = node.set(&[handler("km")]);
    let mut seen = Vec::new();
    run(&change, &node.fake, &mut node.book, &mut |step| {
        seen.push(step)
    })
    .await
    .unwrap();
    assert!(seen.contains(&Progress::NotChecked));
}

#[tokio::test(start_paused = true)]
async fn a_containerd_that_does_not_start_again_is_put_back() {
    for (next, wanted) in [
        (Restarted::Fails, "could not be restarted: job failed"),
        (
            Restarted::Hangs,
            "could not be restarted: no end of it within 180 s",
        ),
        (
            Restarted::Silent,
            "not as wanted within 60 s: it does not answer: unknown service",
        ),
    ] {
        let mut node = Node::new(Some(BEFORE));
        let change = node.set(&[handler("km")]);
        node.restarts_will(&[next]);
        let error = node.run(&change).await.unwrap_err();
        let text = told(&error);
        assert!(text.contains(wanted), "{text}");
        assert!(
            text.contains("The old configuration was restored"),
            "{text}"
        );
        assert_eq!(node.fake.restarts(), 2);
        assert_eq!(node.book.entries, ["restoration", "restart", "settled"]);
        node.is_as_before();
    }
}

#[tokio::test(start_paused = true)]
async fn handlers_that_do_not_come_live_are_taken_back() {
    let mut node = Node::new(Some(BEFORE));
    let mut change = node.set(&[handler("km")]);
    change.want_live.push(handler("never"));
    *node.fake.dumps.lock().unwrap() = false;
    let mut seen = Vec::new();
    let error = run(&change, &node.fake, &mut node.book, &mut |step| {
        seen.push(step)
    })
    .await
    .unwrap_err();
    assert!(
        told(&error).contains("never is missing"),
        "{}",
        told(&error)
    );
    assert_eq!(seen.last(), Some(&Progress::Restoring));
    let waits = seen
        .iter()
        .filter(|step| matches!(step, Progress::Waiting(_)))
        .count();
    assert_eq!(waits, 1, "the same problem is told once");
    node.is_as_before();
}

#[tokio::test(start_paused = true)]
async fn a_restoration_that_fails_is_told_too_and_stays_owed() {
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    node.restarts_will(&[Restarted::Fails, Restarted::Fails]);
    let error = node.run(&change).await.unwrap_err();
    let text = told(&error);
    assert!(
        text.contains("FAILED too: the old file is back, but containerd could not be restarted"),
        "{text}"
    );
    assert!(
        text.ends_with("containerd could not be restarted: job failed"),
        "{text}"
    );
    assert_eq!(node.text().as_deref(), Some(BEFORE));
    assert!(node.book.owed.as_ref().unwrap().restarting);

    assert_eq!(node.resume().await.unwrap(), Resumed::NotBegun);
    node.is_as_before();
    assert!(node.book.owed.is_none());

    node.restarts_will(&[Restarted::Silent, Restarted::Silent]);
    let error = node.run(&change).await.unwrap_err();
    assert!(
        told(&error).contains("it was not as before: it does not answer"),
        "{}",
        told(&error)
    );
}

#[tokio::test(start_paused = true)]
async fn a_damaged_backup_is_never_restored() {
    let mut node = Node::new(Some(BEFORE));
    let change = node.set(&[handler("km")]);
    node.restarts_will(&[Restarted::Fails]);
    node.run(&change).await.unwrap_err();
    // The same again, with the backup spoilt between the crash and the way back.
    node.book = Book {
        fail_at: Some(2),
        ..Book::default()
    };
    node.run(&change).await.unwrap_err();
    fs::write(&change.backup, "spoilt").unwrap();
    node.restarts_will(&[Restarted::Fails]);
    node.book.fail_at = None;
    *node.fake.live.lock().unwrap() = None;
    let error = node.resume().await.unwrap_err();
    assert!(
        told(&error).contains("is not what was backed up"),
        "{}",
        told(&error)
    );
    assert_eq!(
        node.text().unwrap().as_bytes(),
        change.after.as_deref().unwrap()
    );
}

#[tokio::test(start_paused = true)]
async fn an_absent_file_is_created_with_its_folders_and_removed_with_them() {
    let mut node = Node::new(None);
    let change = node.set(&[handler("km")]);
    node.restarts_will(&[Restarted::Fails]);
    node.run(&change).await.unwrap_err();
    assert!(
        !node.dir.path().join("etc").exists(),
        "rolled back with its folders"
    );

    let outcome = node.run(&change).await.unwrap();
    let folders = ["etc", "etc/containerd"]
        .map(|name| node.dir.path().join(name))
        .to_vec();
    assert_eq!(
        outcome,
        Outcome::Live {
            written: true,
            made_folders: folders.clone()
        }
    );
    assert_eq!(node.live().unwrap(), ["km"]);

    let mut remove = node.remove();
    assert_eq!(remove.after, None);
    remove.made_folders = folders;
    node.run(&remove).await.unwrap();
    assert_eq!(node.live().unwrap(), Vec::<String>::new());
    assert!(!node.dir.path().join("etc").exists());

    fs::create_dir_all(node.fake.config.parent().unwrap()).unwrap();
    let outcome = node.run(&change).await.unwrap();
    assert_eq!(
        outcome,
        Outcome::Live {
            written: true,
            made_folders: vec![]
        }
    );
}

#[tokio::test(start_paused = true)]
async fn an_adopted_handler_is_live_as_its_owner_wrote_it_once_it_is_given_back() {
    let theirs = BEFORE.replace(".runc]", ".km]");
    let mut node = Node::new(Some(&theirs));
    let options = SetOptions {
        adopt: &["km".to_owned()],
        ..SetOptions::default()
    };
    let edited = set_handlers(&theirs, &[handler("km")], &options).unwrap();
    let change = node.change(&edited, vec![handler("km")]);
    node.run(&change).await.unwrap();
    let remove = node.remove();
    assert_eq!((remove.want_gone.len(), remove.given_back.len()), (0, 1));
    node.run(&remove).await.unwrap();
    assert_eq!(node.text().unwrap(), theirs);
    assert_eq!(node.live().unwrap(), ["km"]);
}
