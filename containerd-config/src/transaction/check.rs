//! The dry run: containerd's own reading of the new file, before anything is changed.
//!
//! `containerd config dump` shows what is in force after `imports`, defaults and migration. An `imports` file that has the
//! CRI plugin's table replaces the whole of it on containerd 1.x: the dump shows that, the file alone does not.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use km_host::atomic;
use serde_json::Value;

use super::ready::within;
use super::{BoxError, Change, Daemon, Progress, Reporter, TransactionError};
use crate::edit::{Document, FoundHandler, Owner, unlike};

/// Mode of the copy that containerd reads.
const COPY_MODE: u32 = 0o600;
/// Settings of a dump that say how the file was read, not what is in force: which files it was made from, and the version
/// that it was migrated to.
const NOT_COMPARED: [&str; 2] = ["imports", "version"];
/// The handler that containerd has without being told.
const DEFAULT_HANDLER: &str = "runc";
/// How many differing settings an error lists.
const SHOWN: usize = 8;
/// What most often makes a dump differ from the file.
const REPLACED: &str = "Most likely an imported file (`imports`) replaces the table: containerd 1.x takes the whole CRI \
    plugin's table from the last file that has one. Move the handlers of that file into the main one, or take it out of \
    `imports`";

/// Has containerd read the new file, and refuses it unless all wanted handlers are in force and everything else still is.
pub(super) async fn check<D: Daemon>(
    change: &Change,
    daemon: &D,
    report: Reporter<'_>,
) -> Result<(), TransactionError> {
    report(Progress::Checking);
    let told = change.told_path.as_deref().unwrap_or(&change.path);
    let Some(candidate) = dump_candidate(change, daemon, told).await? else {
        report(Progress::NotChecked);
        return Ok(());
    };
    let candidate = parsed(change, &candidate)?;
    let found = in_force(&candidate);
    has_wanted(change, &found)?;
    has_settings(change, &found)?;
    has_none_unwanted(change, &found)?;
    if let Some(understood) = &change.understood {
        as_understood(change, &understood.then, &found, "would be")?;
    }
    match within(change.deadlines.dump, daemon.dump(told)).await {
        Ok(Some(current)) => {
            let current = parsed(change, &current)?;
            if let Some(understood) = &change.understood {
                as_understood(change, &understood.now, &in_force(&current), "are")?;
            }
            keeps_the_rest(change, &current, &candidate)
        }
        Ok(None) => Ok(()),
        Err(error) => {
            // The old file is refused and the new one is not: there is nothing to compare with, and nothing to lose.
            tracing::warn!(%error, "containerd does not read the present configuration");
            Ok(())
        }
    }
}

/// Has a copy of the new file dumped. Where there is no file containerd uses its defaults, and so does its dump.
async fn dump_candidate<D: Daemon>(
    change: &Change,
    daemon: &D,
    told: &Path,
) -> Result<Option<String>, TransactionError> {
    let copy = copy_path(told);
    let mut copies: Vec<(&Path, &[u8])> = Vec::new();
    if let Some(dry_run) = &change.dry_run {
        copies.push((&copy, &dry_run.main));
        let more = dry_run.copies.iter();
        copies.extend(more.map(|(path, bytes)| (path.as_path(), bytes.as_slice())));
    } else if let Some(after) = &change.after {
        copies.push((&copy, after));
    }
    if !copies.is_empty() && !copy.parent().is_some_and(Path::is_dir) {
        // The folder is made only when the file is written.
        return Ok(None);
    }
    let dump = match copies
        .iter()
        .try_for_each(|(path, bytes)| atomic::write(path, bytes, COPY_MODE))
    {
        Ok(()) => Ok(within(change.deadlines.dump, daemon.dump(&copy)).await),
        Err(error) => Err(error),
    };
    for (path, _) in &copies {
        atomic::remove_file(path)?;
    }
    let dump = dump?;
    dump.map_err(|error| failed(change, "containerd refuses it".to_owned(), Some(error)))
}

/// The handlers in force by containerd's own reading are those of ours. Its default ones may be there besides.
fn as_understood(
    change: &Change,
    understood: &[String],
    found: &[FoundHandler],
    are: &str,
) -> Result<(), TransactionError> {
    let counts = |name: &&str| *name != DEFAULT_HANDLER;
    let ours: Vec<&str> = understood
        .iter()
        .map(String::as_str)
        .filter(counts)
        .collect();
    let theirs = found.iter().map(|handler| handler.name.as_str());
    let theirs: Vec<&str> = theirs.filter(counts).collect();
    let only = |these: &[&str], those: &[&str]| -> Vec<String> {
        let these = these.iter().filter(|name| !those.contains(name));
        these.map(|name| (*name).to_owned()).collect()
    };
    let (missing, extra) = (only(&ours, &theirs), only(&theirs, &ours));
    if missing.is_empty() && extra.is_empty() {
        return Ok(());
    }
    let words = |names: &[String]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let problem = format!(
        "by the files and their imports other handlers {are} in force than `containerd config dump` shows. Only in the files: \
         {}. Only in the dump: {}. Look at `kata-manager containerd show`: most often two files have different versions, or \
         an import is not there",
        words(&missing),
        words(&extra)
    );
    Err(failed(change, problem, None))
}

/// The name of the copy of a file. It does not end in `.toml`, so that no `imports` pattern for such files picks it up.
pub fn copy_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".kata-manager.check");
    path.with_file_name(name)
}

fn failed(change: &Change, problem: String, source: Option<BoxError>) -> TransactionError {
    TransactionError::ValidationFailed {
        path: change.path.clone(),
        problem,
        source,
    }
}

fn parsed(change: &Change, dump: &str) -> Result<Document, TransactionError> {
    Document::parse(dump).map_err(|error| {
        let problem = "what `containerd config dump` prints cannot be read".to_owned();
        failed(change, problem, Some(error.into()))
    })
}

/// The handlers of a dump. A program in containerd's place that prints comments too would show adopted ones.
fn in_force(document: &Document) -> Vec<FoundHandler> {
    let mut handlers = document.handlers();
    handlers.retain(|handler| handler.owner != Owner::Adopted);
    handlers
}

fn has(found: &[FoundHandler], name: &str) -> bool {
    found.iter().any(|handler| handler.name == name)
}

fn has_wanted(change: &Change, found: &[FoundHandler]) -> Result<(), TransactionError> {
    let wanted = change.want_live.iter().map(|handler| &handler.name);
    let mut wanted = wanted.chain(&change.given_back);
    match wanted.find(|name| !has(found, name)) {
        None => Ok(()),
        Some(name) => {
            let problem = format!("the handler {name:?} would not be in force. {REPLACED}");
            Err(failed(change, problem, None))
        }
    }
}

/// Every wanted handler is in force with the settings that were written for it.
fn has_settings(change: &Change, found: &[FoundHandler]) -> Result<(), TransactionError> {
    for handler in &change.want_live {
        let Some(table) = found.iter().find(|found| found.name == handler.name) else {
            continue;
        };
        for (key, wanted) in handler.settings() {
            let in_force = table.settings.get(&key);
            if in_force.is_some_and(|found| includes(found, &wanted)) {
                continue;
            }
            let found = in_force.map_or_else(|| "nothing".to_owned(), Value::to_string);
            let problem = format!(
                "the handler {:?} would have {key} = {found} instead of {wanted}: an imported file or this version of \
                 containerd changes it",
                handler.name
            );
            return Err(failed(change, problem, None));
        }
    }
    Ok(())
}

fn has_none_unwanted(change: &Change, found: &[FoundHandler]) -> Result<(), TransactionError> {
    match change.want_gone.iter().find(|name| has(found, name)) {
        None => Ok(()),
        Some(name) => {
            let problem = format!(
                "the handler {name:?} would still be in force: an imported file has it too"
            );
            Err(failed(change, problem, None))
        }
    }
}

/// Whether `found` says at least what `wanted` says: a dump adds defaults to tables.
fn includes(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, wanted)| found.get(key).is_some_and(|found| includes(found, wanted))),
        _ => found == wanted,
    }
}

/// Every handler and every setting that is in force now would still be, ours apart.
fn keeps_the_rest(
    change: &Change,
    current: &Document,
    candidate: &Document,
) -> Result<(), TransactionError> {
    let live = change.want_live.iter().map(|handler| handler.name.clone());
    let other = change.want_gone.iter().chain(&change.given_back).cloned();
    let mut ours: Vec<String> = live.chain(other).collect();
    let left = in_force(candidate);
    let now = in_force(current).into_iter().map(|handler| handler.name);
    let lost: Vec<String> = now
        .filter(|name| !has(&left, name) && !ours.contains(name))
        .collect();
    if !lost.is_empty() {
        let problem = format!(
            "the handlers {} would no longer be in force. {REPLACED}",
            lost.join(", ")
        );
        return Err(failed(change, problem, None));
    }
    // Written out or not, a default handler is in force; only what containerd fills in at start-up differs in a dump.
    ours.extend(change.restated.iter().cloned());
    let mut differ = unlike(current, candidate, &ours, &NOT_COMPARED);
    differ.retain(|line| {
        let path = line.split(" (").next().unwrap_or_default();
        let key = path.rsplit('.').next().unwrap_or_default();
        !change.settings.iter().any(|setting| setting == key)
    });
    if differ.is_empty() {
        return Ok(());
    }
    let shown = differ[..differ.len().min(SHOWN)].join(", ");
    if change.accept_other_settings {
        tracing::warn!(settings = %shown, "containerd will read other settings differently");
        return Ok(());
    }
    let problem = format!(
        "other settings would change too: {shown}. This containerd reads the file differently once it names a handler. Write \
         these settings into the file as they are in force now, or let `containerd config migrate` rewrite it, then try again"
    );
    Err(failed(change, problem, None))
}
