//! Carries out the part of a plan that changes containerd, as one transaction over all of its files.

use anyhow::{Context as _, Result};
use km_containerd_config::Handler;
use km_containerd_config::place::{DROP_IN, DryText, FileEdit, Placed};
use km_containerd_config::transaction::{
    self, Change, Deadlines, DryRun, OtherFile, Progress, Understood,
};

use crate::config::RestartMode;
use crate::journal::Journal;
use crate::node::Node;
use crate::observe::SeenContainerd;
use crate::output;
use crate::plan::Prepared;

/// Settings of the CRI plugin that an edit of ours may write or take out ([`crate::wanted::cri_settings`]).
const CRI_SETTINGS: [&str; 2] = ["enable_cdi", "cdi_spec_dirs"];

/// Settles what a process that was killed left owing. The lock is held.
pub(crate) async fn settle(node: &Node, journal: &mut Journal) -> Result<()> {
    let (path, told) = node.containerd_config()?;
    let Some(owed) = journal.record().owed.clone() else {
        let beside = told.with_file_name(DROP_IN);
        for path in [path, told, beside] {
            transaction::remove_leftovers(&path)?;
        }
        return Ok(());
    };
    output::to_stderr("finishing what an earlier run was killed in");
    let recorded = owed.want_live.clone();
    let resumed = transaction::resume(&owed, &node.daemon()?, journal, &mut report).await?;
    let others = owed.others.iter().map(|file| file.path.as_path());
    for path in others.chain([path.as_path(), &told.with_file_name(DROP_IN)]) {
        transaction::remove_leftovers(path)?;
    }
    if resumed == transaction::Resumed::Finished {
        journal.update(|record| record.handlers = recorded)?;
    }
    Ok(())
}

/// Makes the handlers live.
pub(super) async fn register(
    node: &Node,
    journal: &mut Journal,
    seen: &SeenContainerd,
    prepared: &Prepared,
) -> Result<()> {
    let mut change = change(node, seen, &prepared.placed, journal)?;
    change.restart_owed = prepared.restart_owed;
    transaction::run(&change, &node.daemon()?, journal, &mut report).await?;
    let wanted: Vec<Handler> = seen.wanted.clone();
    journal.update(|record| record.handlers = wanted)
}

/// The change of containerd's configuration that a plan stands for.
pub(crate) fn change(
    node: &Node,
    seen: &SeenContainerd,
    placed: &Placed,
    journal: &Journal,
) -> Result<Change> {
    let state = node.store.state_dir();
    let mut change = Change::from_edit(
        seen.path.clone(),
        placed.main.before.clone(),
        &placed.edited,
        placed.live.clone(),
        state.join("containerd-config.backup"),
    );
    change.after.clone_from(&placed.main.after);
    for (index, edit) in placed.drop_ins.iter().enumerate() {
        let name = match index {
            0 => "containerd-drop-in.backup".to_owned(),
            index => format!("containerd-drop-in-{index}.backup"),
        };
        change
            .others
            .push(other_file(node, edit, state.join(name))?);
    }
    if let Some(DryText { main, copies }) = &placed.dry_run {
        let copies = copies.iter().map(|(path, bytes)| {
            let folder = path.parent().context("a copy lies in a folder")?;
            let name = path.as_path().file_name().context("a copy has a name")?;
            Ok((node.root.resolve(&folder)?.join(name), bytes.clone()))
        });
        change.dry_run = Some(DryRun {
            main: main.clone().into_bytes(),
            copies: copies.collect::<Result<_>>()?,
        });
    }
    change.understood = Some(Understood {
        now: placed.understood.0.clone(),
        then: placed.understood.1.clone(),
    });
    change.path = node.root.resolve(&placed.main.path)?;
    change.told_path = (seen.told != change.path).then(|| seen.told.clone());
    change.settings = CRI_SETTINGS.map(str::to_owned).to_vec();
    change
        .made_folders
        .clone_from(&journal.record().config_folders);
    if node.config.containerd.restart.mode == RestartMode::None {
        change.restart = transaction::Restart::Never;
    }
    change.deadlines = Deadlines {
        ready: std::time::Duration::from_secs(node.config.containerd.restart.ready_timeout_seconds),
        ..Deadlines::default()
    };
    Ok(change)
}

fn other_file(node: &Node, edit: &FileEdit, backup: std::path::PathBuf) -> Result<OtherFile> {
    Ok(OtherFile {
        path: node.root.resolve(&edit.path)?,
        before: edit.before.clone(),
        after: edit.after.clone(),
        backup,
    })
}

/// Says how far the transaction is.
pub(crate) fn report(progress: Progress) {
    let line = match progress {
        Progress::Checking => "containerd: reads the new configuration in a dry run".to_owned(),
        Progress::NotChecked => {
            "containerd: its program cannot be run from here, so there is no dry run".to_owned()
        }
        Progress::Writing => "containerd: configuration is backed up and replaced".to_owned(),
        Progress::Restarting => "containerd: restarts".to_owned(),
        Progress::Waiting(what) => format!("containerd: waits until {what}"),
        Progress::Restoring => "containerd: puts the old configuration back".to_owned(),
    };
    output::to_stderr(&line);
}
