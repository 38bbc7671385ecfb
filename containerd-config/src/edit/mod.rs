//! The edit of containerd's configuration: text in, text out.
//!
//! Our tables stand in one block between two comment lines (see `marks`). An edit first takes everything of ours out,
//! which gives the text without us, then puts in what is wanted; where the text already says what is wanted it is handed
//! back untouched. Every edit is checked before it is handed out: the result is parsed, it must differ from the text
//! before by our handlers only, and taking them out again must give the same bytes.
//!
//! This module reads and writes no files, and does not know which file of an `imports` tree it is given.

mod compose;
mod cri;
mod document;
mod error;
mod imports;
mod lines;
mod marks;
mod read;
mod strip;
mod template;
#[cfg(test)]
mod tests;
mod verify;

use std::collections::{BTreeMap, BTreeSet};

pub use cri::{add_cri_settings, remove_cri_settings};
pub use document::Document;
pub(crate) use document::{PLUGIN_V2, PLUGIN_V3};
pub use error::{EditError, ParseError};
pub use imports::{EditedImport, add_import, remove_import};
pub(crate) use imports::{own_import, with_imports};
pub(crate) use marks::BEGIN_HANDLERS as BLOCK;
pub use template::{BASE as TEMPLATE_BASE, set_template};

use crate::digest::Digest;
use crate::handler::{Handler, Settings};
use strip::Stripped;
pub(crate) use verify::unlike;

/// The one default handler of containerd 1.x and its type (`DefaultConfig` in containerd's
/// `pkg/cri/config/config_unix.go`, 1.4 to 1.7).
const DEFAULT_HANDLER: (&str, &str) = ("runc", "io.containerd.runc.v2");

/// A runtime handler found in a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundHandler {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub owner: Owner,
    /// Its table, as JSON values by TOML key; [`Handler::from_settings`] reads it.
    pub settings: Settings,
    /// The line of its first header, from 1.
    pub line: usize,
}

/// Whose a handler is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Its table stands in our block.
    Ours,
    /// Somebody else's.
    Foreign,
    /// A default of containerd's, written out in our block because containerd 1.x drops it once a file names a handler.
    Restated,
    /// Somebody else's, set aside in comments while one of ours has its name.
    Adopted,
}

/// What [`set_handlers`] may do and what it knows beside the text.
#[derive(Debug, Clone, Default)]
pub struct SetOptions<'a> {
    /// Names of foreign handlers that may be set aside for one of ours.
    pub adopt: &'a [String],
    /// The configuration version of this containerd: 2 for 1.x, 3 for 2.x
    /// ([`crate::ContainerdVersion::config_version`]). Anything below 2 counts as 2.
    ///
    /// A file without any settings gets it as its `version`. And where it is 2, a file that names no handler also gets
    /// containerd's default one, `runc`: containerd 1.x replaces its default handlers by those of the file, and its CRI
    /// plugin then does not start for want of the default (measured with 1.6.20 and 1.7.24; 2.x merges them).
    pub assume_version: u32,
    /// The text is a drop-in that containerd 2.x merges into the main file: nothing of containerd's is written out in it.
    pub drop_in: bool,
    /// Leave handlers of ours as somebody edited them since. Tables that are gone are put back all the same.
    pub keep_drift: bool,
    /// There is no file: `text` is empty, and [`remove_all`] will say that the file is to be removed.
    pub absent: bool,
    /// Handlers as they were last written, if the caller has a record: tables that say exactly this are ours even where
    /// another program rewrote the file and dropped our comments.
    pub recorded: &'a [Handler],
}

/// A configuration after an edit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Edited {
    /// The text. The same as before when there was nothing to do.
    pub text: String,
    /// Handlers that were not there.
    pub added: Vec<String>,
    /// Handlers of ours that got other settings, because other settings are wanted.
    pub changed: Vec<String>,
    /// Handlers of ours that are gone.
    pub removed: Vec<String>,
    /// Foreign handlers that were set aside now.
    pub adopted: Vec<String>,
    /// Foreign handlers that had been set aside and are back.
    pub given_back: Vec<String>,
    /// Handlers of ours that somebody edited or removed since, and that are now as wanted again.
    pub drifted: Vec<Drift>,
    /// Handlers of ours that somebody edited since and that stay so ([`SetOptions::keep_drift`]).
    pub kept: Vec<Drift>,
    /// Defaults of containerd that are written out in the text, or were in the text before.
    pub restated: Vec<String>,
    /// We created the file and nothing is left in it: it is to be removed.
    pub remove_file: bool,
}

/// What somebody did to a handler of ours since it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drift {
    /// The handler.
    pub name: String,
    /// Its table is gone.
    pub removed: bool,
    /// The settings that differ: the key, what is wanted, and what stands in the text; `None` for nothing.
    pub changes: Vec<(String, Option<serde_json::Value>, Option<serde_json::Value>)>,
}

impl Drift {
    fn of(name: &str, wanted: &Settings, found: Option<&Settings>) -> Drift {
        let empty = Settings::new();
        let there = found.unwrap_or(&empty);
        let keys = wanted
            .keys()
            .chain(there.keys().filter(|key| !wanted.contains_key(*key)));
        let changes = keys.filter(|key| wanted.get(*key) != there.get(*key));
        Drift {
            name: name.to_owned(),
            removed: found.is_none(),
            changes: changes
                .map(|key| {
                    (
                        key.clone(),
                        wanted.get(key).cloned(),
                        there.get(key).cloned(),
                    )
                })
                .collect(),
        }
    }

    /// The differing settings as lines that begin with `-` (what is wanted) and `+` (what somebody wrote).
    pub fn lines(&self) -> Vec<String> {
        if self.removed {
            return vec!["- the whole table".to_owned()];
        }
        let changes = self.changes.iter().flat_map(|(key, wanted, found)| {
            let line = |sign: char, value: &serde_json::Value| format!("{sign} {key} = {value}");
            let wanted = wanted.as_ref().map(|value| line('-', value));
            wanted
                .into_iter()
                .chain(found.as_ref().map(|value| line('+', value)))
        });
        changes.collect()
    }
}

impl Edited {
    /// Handlers that are live no more once the text is in force: those removed, unless someone else's of that name is back.
    pub fn gone(&self) -> Vec<String> {
        difference(&self.removed, &self.given_back)
    }
}

/// Gives the text with exactly these handlers as ours: adds, changes and removes. Every byte outside our lines is kept.
///
/// # Errors
/// [`EditError`] says what stands in the way, and where.
pub fn set_handlers(
    text: &str,
    wanted: &[Handler],
    options: &SetOptions<'_>,
) -> Result<Edited, EditError> {
    compose::check_wanted(wanted)?;
    let document = Document::parse(text)?;
    let orphans = orphans(&document, options.recorded)?;
    let stripped = strip::strip(text, &document, &orphans)?;
    if wanted.is_empty() {
        return removed(&document, stripped);
    }
    refuse_disabled(&document)?;
    let version = version_to_use(&document, &stripped.document, options)?;
    refuse_obstacle(text, &stripped, version)?;
    let displaced = displaced(text, &stripped, wanted, options.adopt)?;
    let before = present(&document, &stripped);
    let kept = kept(&document, wanted, options, &before);
    let tables = tables(&document, wanted, &kept);
    let restated = restated(&stripped.document, wanted, options);
    let restated_are_there = restated
        .iter()
        .all(|handler| stripped.restated.contains(&handler.name));
    if restated_are_there && is_as_wanted(&document, &stripped, &tables, &before, &displaced) {
        return Ok(Edited {
            text: text.to_owned(),
            kept,
            ..Edited::default()
        });
    }
    let plan = compose::Plan {
        wanted: &tables,
        restated: &restated,
        version,
        displaced: &displaced,
        created: options.absent || document.marks.created(),
    };
    let result = compose::compose(&stripped, &plan);
    let after = verify::composed(&stripped, &result, &plan)?;
    verify::default_runtime(&document, &after, &stripped.restated)?;
    let mut edited = report(&document, &tables, options.recorded, &before);
    edited.kept = kept;
    edited.adopted = difference(&displaced, &stripped.given_back);
    edited.given_back = difference(&stripped.given_back, &displaced);
    edited.restated = restated.iter().map(|table| table.name.clone()).collect();
    let no_more = difference(&stripped.restated, &edited.restated);
    edited.restated.extend(no_more);
    edited.text = result;
    Ok(edited)
}

/// Gives the text without anything of ours: the inverse of [`set_handlers`]. Adopted tables come back.
///
/// When nobody else changed the text in between, these are the bytes from before the first edit. `recorded` is what
/// [`SetOptions::recorded`] is.
///
/// # Errors
/// [`EditError`] says what stands in the way, and where.
pub fn remove_all(text: &str, recorded: &[Handler]) -> Result<Edited, EditError> {
    let document = Document::parse(text)?;
    let orphans = orphans(&document, recorded)?;
    let stripped = strip::strip(text, &document, &orphans)?;
    removed(&document, stripped)
}

fn removed(document: &Document, stripped: Stripped<'_>) -> Result<Edited, EditError> {
    verify::default_runtime(document, &stripped.document, &stripped.restated)?;
    let created = document.marks.created();
    let blank = stripped
        .text
        .trim_start_matches('\u{feff}')
        .trim()
        .is_empty();
    Ok(Edited {
        removed: difference(&stripped.removed, &stripped.restated),
        given_back: stripped.given_back.clone(),
        restated: stripped.restated,
        remove_file: created && blank,
        text: stripped.text,
        ..Edited::default()
    })
}

/// Handlers outside our block that say exactly what we once wrote: another program dropped our comments.
fn orphans(document: &Document, recorded: &[Handler]) -> Result<Vec<String>, EditError> {
    let own = document.own_names();
    let mut orphans = Vec::new();
    for table in &document.tables {
        let ours = recorded
            .iter()
            .any(|handler| handler.name == table.name && handler.settings() == table.settings);
        if !ours || own.contains(&table.name) {
            continue;
        }
        if !table.has_own_lines {
            return Err(EditError::NoOwnLines {
                name: table.name.clone(),
                line: table.line,
            });
        }
        orphans.push(table.name.clone());
    }
    Ok(orphans)
}

/// The version that decides the plugin's name: the file's own, or the one that we give it.
fn version_to_use(
    document: &Document,
    base: &Document,
    options: &SetOptions<'_>,
) -> Result<u32, EditError> {
    if let Some(value) = base.odd_version() {
        return Err(EditError::BadVersion {
            line: document.root_line("version"),
            value: value.to_owned(),
        });
    }
    match base.version() {
        None if base.is_empty() => {
            // A version that we gave the file stays: every later containerd reads it.
            let given = document.version().filter(|version| *version >= 2);
            Ok(given.unwrap_or(options.assume_version.max(2)))
        }
        Some(version) if version > 2 && options.assume_version <= 2 => {
            Err(EditError::TooNew { version })
        }
        Some(version) if version >= 2 => Ok(version),
        found => Err(EditError::OldVersion { found }),
    }
}

/// Refuses a file that switches the CRI plugin off.
pub(crate) fn refuse_disabled(document: &Document) -> Result<(), EditError> {
    let cri = ["cri", document::PLUGIN_V2, document::PLUGIN_V3];
    let mut disabled = document.disabled_plugins().into_iter();
    match disabled.find(|name| cri.contains(&name.as_str())) {
        None => Ok(()),
        Some(plugin) => Err(EditError::CriDisabled {
            line: document.root_line("disabled_plugins"),
            plugin,
        }),
    }
}

fn refuse_obstacle(text: &str, stripped: &Stripped<'_>, version: u32) -> Result<(), EditError> {
    match &stripped.document.obstacle {
        None => Ok(()),
        Some(obstacle) => Err(EditError::NotExtendable {
            line: stripped.line_before(text, obstacle.line),
            key: obstacle.key.clone(),
            what: obstacle.what,
            wanted: compose::runtimes_header(version),
        }),
    }
}

/// Names of the foreign handlers that ours take the place of; all of them must be, or have been, adopted.
fn displaced(
    text: &str,
    stripped: &Stripped<'_>,
    wanted: &[Handler],
    adopt: &[String],
) -> Result<Vec<String>, EditError> {
    let mut displaced = Vec::new();
    for table in &stripped.document.tables {
        if !wanted.iter().any(|handler| handler.name == table.name) {
            continue;
        }
        let line = || stripped.line_before(text, table.line);
        if !adopt.contains(&table.name) && !stripped.given_back.contains(&table.name) {
            return Err(EditError::Conflict {
                name: table.name.clone(),
                line: line(),
            });
        }
        if !table.has_own_lines {
            return Err(EditError::NoOwnLines {
                name: table.name.clone(),
                line: line(),
            });
        }
        displaced.push(table.name.clone());
    }
    Ok(displaced)
}

/// containerd's default handlers that would be lost, and are written out beside ours.
fn restated(
    base: &Document,
    wanted: &[Handler],
    options: &SetOptions<'_>,
) -> Vec<compose::OurTable> {
    let is_wanted = wanted
        .iter()
        .any(|handler| handler.name == DEFAULT_HANDLER.0);
    let merges = options.assume_version > 2 || options.drop_in;
    if merges || !base.tables.is_empty() || is_wanted {
        return Vec::new();
    }
    vec![compose::OurTable::new(&Handler {
        name: DEFAULT_HANDLER.0.to_owned(),
        runtime_type: DEFAULT_HANDLER.1.to_owned(),
        ..Handler::default()
    })]
}

/// What somebody did since to the handlers of ours that stand in a document, and that are wanted otherwise.
pub(crate) fn drift_in(document: &Document, wanted: &[Handler]) -> Vec<Drift> {
    let names = document.own_names();
    let drifts = wanted.iter().filter_map(|handler| {
        let written = document.marks.written_digest(&handler.name)?;
        let found = document
            .settings(&handler.name)
            .filter(|_| names.contains(&handler.name));
        let touched = found.map(settings_digest).as_deref() != Some(written);
        let differs = found != Some(&handler.settings());
        (touched && differs).then(|| Drift::of(&handler.name, &handler.settings(), found))
    });
    drifts.collect()
}

/// The handlers that somebody edited since they were written, and that are to stay so.
fn kept(
    document: &Document,
    wanted: &[Handler],
    options: &SetOptions<'_>,
    before: &BTreeMap<String, Settings>,
) -> Vec<Drift> {
    if !options.keep_drift {
        return Vec::new();
    }
    let drifted = wanted.iter().filter_map(|handler| {
        let found = before.get(&handler.name)?;
        let written = document.marks.written_digest(&handler.name)?;
        let touched = written != settings_digest(found) && *found != handler.settings();
        touched.then(|| Drift::of(&handler.name, &handler.settings(), Some(found)))
    });
    drifted.collect()
}

/// The tables to write: as wanted, or as they are where that is to stay. The digest of what we wrote stays with those, so that
/// they are still seen to differ.
fn tables(document: &Document, wanted: &[Handler], kept: &[Drift]) -> Vec<compose::OurTable> {
    let table = |handler: &Handler| {
        let stays = kept.iter().any(|drift| drift.name == handler.name);
        let found = document.settings(&handler.name).filter(|_| stays);
        let digest = document.marks.written_digest(&handler.name);
        match (found, digest) {
            (Some(settings), Some(digest)) => compose::OurTable {
                name: handler.name.clone(),
                settings: settings.clone(),
                digest: digest.to_owned(),
            },
            _ => compose::OurTable::new(handler),
        }
    };
    wanted.iter().map(table).collect()
}

/// Our handlers in the text before the edit, those that are only restated left out.
fn present(document: &Document, stripped: &Stripped<'_>) -> BTreeMap<String, Settings> {
    let names = difference(&stripped.removed, &stripped.restated);
    names
        .into_iter()
        .filter_map(|name| Some((name.clone(), document.settings(&name)?.clone())))
        .collect()
}

/// Whether the text says what is wanted already, with our lines whole: then not a byte of it changes.
fn is_as_wanted(
    document: &Document,
    stripped: &Stripped<'_>,
    wanted: &[compose::OurTable],
    before: &BTreeMap<String, Settings>,
    displaced: &[String],
) -> bool {
    let marks = &document.marks;
    let [block] = marks.blocks.as_slice() else {
        return false;
    };
    let whole = !block.end.is_empty() && block.state.is_some() && marks.strays.is_empty();
    let same_handlers = before.len() == wanted.len()
        && stripped.removed.len() == wanted.len() + stripped.restated.len()
        && wanted
            .iter()
            .all(|table| before.get(&table.name) == Some(&table.settings));
    let same: BTreeSet<_> = displaced.iter().collect();
    whole
        && same_handlers
        && !stripped.has_orphans
        && same == stripped.given_back.iter().collect()
        && document.version().is_some()
}

fn report(
    document: &Document,
    wanted: &[compose::OurTable],
    recorded: &[Handler],
    before: &BTreeMap<String, Settings>,
) -> Edited {
    let mut edited = Edited::default();
    for table in wanted {
        let name = &table.name;
        let written = document.marks.written_digest(name).map(str::to_owned);
        let written = written.or_else(|| {
            let record = recorded.iter().find(|record| record.name == *name)?;
            Some(settings_digest(&record.settings()))
        });
        match before.get(name) {
            None if document.marks.written_digest(name).is_some() => {
                edited.drifted.push(Drift::of(name, &table.settings, None));
            }
            None => edited.added.push(name.clone()),
            Some(settings) if *settings == table.settings => {}
            Some(settings) => {
                let touched = written.is_some_and(|digest| digest != settings_digest(settings));
                if touched {
                    let drift = Drift::of(name, &table.settings, Some(settings));
                    edited.drifted.push(drift);
                } else {
                    edited.changed.push(name.clone());
                }
            }
        }
    }
    let gone = |name: &&String| !wanted.iter().any(|table| table.name == **name);
    edited.removed = before.keys().filter(gone).cloned().collect();
    edited
}

/// A short digest of a table that does not depend on the order of its keys.
fn settings_digest(settings: &Settings) -> String {
    let mut value = serde_json::Value::Object(settings.clone());
    value.sort_all_objects();
    Digest::of(value.to_string().as_bytes()).short().to_owned()
}

fn difference(a: &[String], b: &[String]) -> Vec<String> {
    a.iter().filter(|name| !b.contains(name)).cloned().collect()
}
