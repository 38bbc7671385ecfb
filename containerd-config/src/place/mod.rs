//! Where our handlers are written: the main file, or a drop-in that the main file imports.
//!
//! On containerd 1.x an imported table of the CRI plugin replaces the main file's, so only the main file will do. On 2.x tables
//! are merged, and a drop-in of the main file's version leaves the main file alone but for one entry in `imports`, or
//! wholly where that imports the folder already.
//!
//! [`plan`] is a function of the files as they are read: it gives the texts to write, and proves on a merged reading of them
//! that what is wanted would be in force and everything else still is.

mod error;
mod proof;
mod rendered;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use km_host::HostPath;
use serde::{Deserialize, Serialize};

pub use error::PlaceError;

use crate::edit::{self, Document, Drift, EditError, Edited, Owner, SetOptions};
use crate::effective::{Changed, Effective, Files};
use crate::handler::{Handler, Settings};
use crate::transaction::copy_path;

/// The name of our drop-in. The number leaves room before and after it: the container toolkit's is `99-nvidia.toml`.
pub const DROP_IN: &str = "60-kata-manager.toml";
/// The folder beside the main file for it, where the main file imports none.
const FOLDER: &str = "conf.d";

/// Where handlers are to be written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Placement {
    /// Where they are; else in a drop-in on containerd 2.x with a main file that has settings, and in the main file otherwise.
    #[default]
    Auto,
    /// In the main file.
    Main,
    /// In a drop-in.
    DropIn,
}

/// What is wanted, and what may be done for it.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    /// The handlers that are to be ours; none to take out everything.
    pub wanted: &'a [Handler],
    /// Where.
    pub placement: Placement,
    /// Names of foreign handlers that may be set aside for one of ours.
    pub adopt: &'a [String],
    /// Handlers as they were last written.
    pub recorded: &'a [Handler],
    /// Leave handlers of ours as somebody edited them since.
    pub keep_drift: bool,
    /// Settings of the CRI plugin (`enable_cdi`, `cdi_spec_dirs`) to write where nobody set them.
    pub cri: Settings,
    /// The main file is rendered from a template at each start, as k3s and RKE2 do.
    pub rendered: bool,
}

/// A file that is to be written or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEdit {
    /// The file.
    pub path: HostPath,
    /// Its bytes as they were read; `None` if it is absent.
    pub before: Option<Vec<u8>>,
    /// Its bytes as they are to be; `None` if it is to be absent.
    pub after: Option<Vec<u8>>,
}

impl FileEdit {
    /// Whether there is anything to do.
    pub fn differs(&self) -> bool {
        self.before != self.after
    }
}

/// What a dry run reads where a drop-in is not written yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DryText {
    /// The main file, importing copies in place of drop-ins.
    pub main: String,
    /// The copies, beside the main file.
    pub copies: Vec<(HostPath, Vec<u8>)>,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Placed {
    /// The main file, whether it changes or not.
    pub main: FileEdit,
    /// The drop-ins that change.
    pub drop_ins: Vec<FileEdit>,
    /// What changes for the handlers. Its `text` and `remove_file` are those of the file that has them.
    pub edited: Edited,
    /// The handlers as they will be in force: as wanted, or as somebody edited them where that is kept.
    pub live: Vec<Handler>,
    /// The file that has the handlers.
    pub target: HostPath,
    /// What the dry run is to read in place of the main file; `None` where the new main file does.
    pub dry_run: Option<DryText>,
    /// Names of the handlers in force, before and after.
    pub understood: (Vec<String>, Vec<String>),
    /// What a person should know.
    pub warnings: Vec<String>,
}

impl Placed {
    /// Whether any file changes.
    pub fn differs(&self) -> bool {
        self.main.differs() || self.drop_ins.iter().any(FileEdit::differs)
    }
}

/// Plans the edit of every file that it takes.
///
/// # Errors
/// [`PlaceError`] says what stands in the way, in which file, and what to do. Nothing is changed by planning.
pub fn plan<F: Files>(
    files: &F,
    effective: &Effective,
    main: &HostPath,
    request: &Request<'_>,
) -> Result<Placed, PlaceError> {
    if request.rendered {
        return rendered::plan(files, effective, main, request);
    }
    let planner = Planner::new(files, effective, main, request)?;
    planner.refuse_foreign()?;
    let drop_in = planner.choose()?;
    planner.carry_out(files, drop_in)
}

/// A plan that is not proved yet; fields as in [`Placed`].
struct Draft {
    main: FileEdit,
    drop_ins: Vec<FileEdit>,
    edited: Edited,
    live: Vec<Handler>,
    target: HostPath,
}

/// A drop-in of ours, or the place for one.
#[derive(Debug, Clone)]
struct DropIn {
    path: HostPath,
    before: Option<Vec<u8>>,
}

struct Planner<'a> {
    effective: &'a Effective,
    main: &'a HostPath,
    request: &'a Request<'a>,
    /// Files of ours beside the main one that are there.
    drop_ins: Vec<DropIn>,
    /// Where a new one would go.
    default_path: HostPath,
}

impl<'a> Planner<'a> {
    fn new<F: Files>(
        files: &F,
        effective: &'a Effective,
        main: &'a HostPath,
        request: &'a Request<'a>,
    ) -> Result<Planner<'a>, PlaceError> {
        let folder = main.parent().unwrap_or_else(|| main.clone());
        let beside = folder.join(FOLDER).join(DROP_IN);
        let imported = effective.imported_folder(DROP_IN);
        let mut drop_ins = Vec::new();
        for file in effective.files.iter().filter(|file| file.path != *main) {
            let named_so = file
                .path
                .as_path()
                .file_name()
                .is_some_and(|name| name == DROP_IN);
            if named_so || has_ours(&file.document) {
                drop_ins.push(DropIn {
                    path: file.path.clone(),
                    before: Some(file.bytes.clone()),
                });
            }
        }
        for path in imported.iter().chain([&beside]) {
            let known = drop_ins.iter().any(|drop_in| drop_in.path == *path);
            if !known && let Some(before) = files.read(path)? {
                drop_ins.push(DropIn {
                    path: path.clone(),
                    before: Some(before),
                });
            }
        }
        Ok(Planner {
            effective,
            main,
            request,
            drop_ins,
            default_path: imported.unwrap_or(beside),
        })
    }

    fn document(&self) -> Option<&Document> {
        self.effective.main().map(|file| &file.document)
    }

    fn is_ours(&self, path: &HostPath) -> bool {
        self.drop_ins.iter().any(|drop_in| drop_in.path == *path)
    }

    /// Refuses what no placement can do: a wanted handler in an imported file of somebody else, a main table that is not in
    /// force, an import that ends the reading.
    fn refuse_foreign(&self) -> Result<(), PlaceError> {
        if self.request.wanted.is_empty() {
            return Ok(());
        }
        let imported = self
            .effective
            .files
            .iter()
            .filter(|file| file.path != *self.main);
        for file in imported.filter(|file| !self.is_ours(&file.path)) {
            for handler in file.document.handlers_at(self.effective.plugin()) {
                let wanted = self.request.wanted.iter().any(|w| w.name == handler.name);
                if wanted && handler.owner != Owner::Adopted {
                    return Err(PlaceError::InImport {
                        name: handler.name,
                        path: file.path.clone(),
                        line: handler.line,
                    });
                }
            }
            edit::refuse_disabled(&file.document).map_err(|source| PlaceError::Edit {
                path: file.path.clone(),
                source,
            })?;
        }
        if let Some(winner) = self.effective.replaces_main() {
            return Err(PlaceError::MainReplaced {
                main: self.main.clone(),
                path: winner.path.clone(),
                version: self.effective.version,
            });
        }
        let dangling = self.effective.missing.iter();
        let mut dangling = dangling.filter(|missing| missing.path != self.default_path);
        match dangling.find(|missing| !missing.path.as_str().ends_with(DROP_IN)) {
            None => Ok(()),
            Some(missing) => Err(PlaceError::Dangling {
                path: missing.path.clone(),
                by: missing.by.clone(),
            }),
        }
    }

    /// The drop-in to write the handlers to; `None` for the main file.
    fn choose(&self) -> Result<Option<DropIn>, PlaceError> {
        if self.request.wanted.is_empty() {
            return Ok(None);
        }
        let merges = self.effective.version.major >= 2;
        let in_main: Vec<&str> = self.foreign_in_main();
        match self.request.placement {
            Placement::Main => Ok(None),
            Placement::DropIn if !merges => Err(PlaceError::Unsafe {
                version: self.effective.version,
            }),
            Placement::DropIn => match in_main.first() {
                Some(name) => Err(PlaceError::InMain {
                    name: (*name).to_owned(),
                    path: self.main.clone(),
                }),
                None => Ok(self.drop_in_to_use()),
            },
            Placement::Auto => {
                let main_has_ours = self.document().is_some_and(has_ours);
                let usable = self
                    .document()
                    .is_some_and(|main| main.version() >= Some(2));
                let beside = merges && usable && !main_has_ours && in_main.is_empty();
                Ok(self.drop_in_to_use().filter(|_| beside))
            }
        }
    }

    /// Our drop-in that is imported, else the one that is there, else a new one.
    fn drop_in_to_use(&self) -> Option<DropIn> {
        let loaded = |drop_in: &&DropIn| self.effective.file(&drop_in.path).is_some();
        let there = self.drop_ins.iter().find(loaded);
        let there = there.or_else(|| {
            let mut drop_ins = self.drop_ins.iter();
            drop_ins.find(|drop_in| drop_in.path == self.default_path)
        });
        Some(there.cloned().unwrap_or_else(|| DropIn {
            path: self.default_path.clone(),
            before: None,
        }))
    }

    /// Wanted handlers that somebody else has in the main file.
    fn foreign_in_main(&self) -> Vec<&str> {
        let handlers = self.document().map(Document::handlers).unwrap_or_default();
        let wanted = self.request.wanted.iter();
        wanted
            .map(|handler| handler.name.as_str())
            .filter(|name| {
                let mut handlers = handlers.iter();
                handlers.any(|found| found.name == *name && found.owner == Owner::Foreign)
            })
            .collect()
    }

    fn carry_out<F: Files>(
        &self,
        files: &F,
        drop_in: Option<DropIn>,
    ) -> Result<Placed, PlaceError> {
        let at = |path: &HostPath| {
            let path = path.clone();
            move |source| PlaceError::Edit { path, source }
        };
        let before = self.effective.main().map(|file| file.bytes.clone());
        let text = text_of(self.main, before.as_deref())?;
        let mut edits = Vec::new();
        let mut reports = Vec::new();
        let mut kept_import = None;
        for other in &self.drop_ins {
            if drop_in
                .as_ref()
                .is_some_and(|drop_in| drop_in.path == other.path)
            {
                continue;
            }
            let text = text_of(&other.path, other.before.as_deref())?;
            let edited = self.bare(text).map_err(at(&other.path))?;
            if !edited.remove_file && drop_in.is_none() {
                kept_import = Some(other.path.clone());
            }
            edits.push(FileEdit {
                path: other.path.clone(),
                before: other.before.clone(),
                after: (!edited.remove_file).then(|| edited.text.clone().into_bytes()),
            });
            reports.push(edited);
        }
        let mut main_text = edit::remove_cri_settings(text).map_err(at(self.main))?;
        let mut remove_main = false;
        let stays = drop_in
            .as_ref()
            .map(|drop_in| &drop_in.path)
            .or(kept_import.as_ref());
        for entry in self.own_entries() {
            if stays.is_some_and(|stays| stays.as_str() == entry) {
                continue;
            }
            let edited = edit::remove_import(&main_text, &entry).map_err(at(self.main))?;
            main_text = edited.text;
            remove_main |= edited.remove_file;
        }
        let (edited, target) = match &drop_in {
            None => {
                let edited = self.edit_main(&main_text, before.is_none() || remove_main);
                let edited = self.with_cri(edited.map_err(at(self.main))?, self.main);
                let edited = edited.map_err(at(self.main))?;
                main_text.clone_from(&edited.text);
                remove_main = if self.request.wanted.is_empty() {
                    remove_main || edited.remove_file
                } else {
                    false
                };
                (edited, self.main.clone())
            }
            Some(drop_in) => {
                let out = edit::remove_all(&main_text, self.request.recorded);
                let out = out.map_err(at(self.main))?;
                main_text.clone_from(&out.text);
                let absent = before.is_none() || out.remove_file || remove_main;
                reports.push(out);
                remove_main = false;
                if self.effective.imported_folder(DROP_IN).as_ref() != Some(&drop_in.path) {
                    let version = self.effective.version.config_version();
                    let added =
                        edit::add_import(&main_text, drop_in.path.as_str(), version, absent);
                    main_text = added.map_err(at(self.main))?.text;
                }
                let edited = self.edit_drop_in(drop_in, &main_text)?;
                edits.push(FileEdit {
                    path: drop_in.path.clone(),
                    before: drop_in.before.clone(),
                    after: (!edited.remove_file).then(|| edited.text.clone().into_bytes()),
                });
                (edited, drop_in.path.clone())
            }
        };
        let after = if remove_main || (before.is_none() && main_text.is_empty()) {
            None
        } else {
            Some(main_text.into_bytes())
        };
        let main = FileEdit {
            path: self.main.clone(),
            before,
            after,
        };
        edits.retain(FileEdit::differs);
        let live = live(self.request.wanted, &edited);
        let edited = joined(edited, reports, self.request.wanted);
        let draft = Draft {
            main,
            drop_ins: edits,
            edited,
            live,
            target,
        };
        self.prove(files, draft, drop_in.is_some())
    }

    fn edit_main(&self, text: &str, absent: bool) -> Result<Edited, EditError> {
        if self.request.wanted.is_empty() {
            return edit::remove_all(text, self.request.recorded);
        }
        let options = SetOptions {
            adopt: self.request.adopt,
            assume_version: self.effective.version.config_version(),
            absent,
            recorded: self.request.recorded,
            keep_drift: self.request.keep_drift,
            drop_in: false,
        };
        edit::set_handlers(text, self.request.wanted, &options)
    }

    /// The drop-in with the wanted handlers, in the version of the main file.
    fn edit_drop_in(&self, drop_in: &DropIn, main: &str) -> Result<Edited, PlaceError> {
        let at = |source| PlaceError::Edit {
            path: drop_in.path.clone(),
            source,
        };
        let main = Document::parse(main).map_err(|error| {
            let path = self.main.clone();
            PlaceError::Edit {
                path,
                source: error.into(),
            }
        })?;
        edit::refuse_disabled(&main).map_err(|source| PlaceError::Edit {
            path: self.main.clone(),
            source,
        })?;
        let version = main.version().unwrap_or(1);
        if version < 2 {
            return Err(PlaceError::Edit {
                path: self.main.clone(),
                source: EditError::OldVersion {
                    found: main.version(),
                },
            });
        }
        let before = text_of(&drop_in.path, drop_in.before.as_deref())?;
        let mut before = edit::remove_cri_settings(before).map_err(at)?;
        let mut absent = drop_in.before.is_none();
        let found = Document::parse(&before).map_err(|error| at(error.into()))?;
        if found.version().is_some_and(|found| found != version) {
            let bare = self.bare(&before).map_err(at)?;
            if !bare.remove_file {
                return Err(PlaceError::OtherVersion {
                    path: drop_in.path.clone(),
                    version: found.version().unwrap_or(1),
                    main: self.main.clone(),
                    wanted: version,
                });
            }
            before = String::new();
            absent = true;
        }
        let options = SetOptions {
            adopt: &[],
            assume_version: version,
            absent,
            recorded: self.request.recorded,
            keep_drift: self.request.keep_drift,
            drop_in: true,
        };
        let edited = edit::set_handlers(&before, self.request.wanted, &options).map_err(at)?;
        self.with_cri(edited, &drop_in.path).map_err(at)
    }

    /// A text without anything of ours.
    fn bare(&self, text: &str) -> Result<Edited, EditError> {
        edit::remove_all(&edit::remove_cri_settings(text)?, self.request.recorded)
    }

    /// The edited text with the settings of the CRI plugin that no other file has.
    fn with_cri(&self, mut edited: Edited, path: &HostPath) -> Result<Edited, EditError> {
        let plugin = self.effective.plugin();
        let mut missing = self.request.cri.clone();
        let others = self.effective.files.iter();
        for file in others.filter(|file| file.path != *path && !self.is_ours(&file.path)) {
            missing.retain(|key, _| !file.document.sets(plugin, key));
        }
        if !self.request.wanted.is_empty() && !missing.is_empty() {
            let version = self.effective.version.config_version();
            edited.text = edit::add_cri_settings(&edited.text, &missing, version)?;
        }
        Ok(edited)
    }

    /// Entries of the main file's `imports` that are for a drop-in of ours.
    fn own_entries(&self) -> Vec<String> {
        let Some(main) = self.document() else {
            return Vec::new();
        };
        let block = edit::own_import(main);
        let ours = |import: &String| {
            block.as_ref() == Some(import)
                || self
                    .drop_ins
                    .iter()
                    .any(|drop_in| drop_in.path.as_str() == import)
                || import.ends_with(&format!("/{DROP_IN}"))
        };
        main.imports().into_iter().filter(ours).collect()
    }
}

/// Whether a block of ours stands in a file.
fn has_ours(document: &Document) -> bool {
    let mut handlers = document.handlers().into_iter();
    handlers.any(|handler| {
        matches!(
            handler.owner,
            Owner::Ours | Owner::Adopted | Owner::Restated
        )
    })
}

fn text_of<'t>(path: &HostPath, bytes: Option<&'t [u8]>) -> Result<&'t str, PlaceError> {
    std::str::from_utf8(bytes.unwrap_or_default())
        .map_err(|_| PlaceError::NotText { path: path.clone() })
}

/// The handlers as they will be in force.
fn live(wanted: &[Handler], edited: &Edited) -> Vec<Handler> {
    let document = Document::parse(&edited.text).ok();
    let as_kept = |handler: &Handler| {
        let kept = edited.kept.iter().any(|drift| drift.name == handler.name);
        let found = document.as_ref().filter(|_| kept)?;
        let settings: &Settings = found.settings(&handler.name)?;
        Some(Handler::from_settings(&handler.name, settings))
    };
    wanted
        .iter()
        .map(|handler| as_kept(handler).unwrap_or_else(|| handler.clone()))
        .collect()
}

/// One report of the edits of several files: what moves from one to another is neither added nor removed.
fn joined(mut edited: Edited, others: Vec<Edited>, wanted: &[Handler]) -> Edited {
    for other in others {
        let moved = |name: &String| other.removed.contains(name);
        let (stay, new): (Vec<String>, Vec<String>) = edited.added.drain(..).partition(moved);
        edited.added = new;
        edited.changed.extend(stay);
        let is_wanted = |name: &String| wanted.iter().any(|handler| handler.name == *name);
        let gone = other.removed.into_iter().filter(|name| !is_wanted(name));
        edited.removed.extend(gone);
        edited.given_back.extend(other.given_back);
        edited.restated.extend(other.restated);
    }
    edited.removed.sort();
    edited.removed.dedup();
    edited
}

/// Drift of our handlers in the files as they are, against what is wanted; for a report that plans nothing.
pub fn drift(effective: &Effective, wanted: &[Handler]) -> Vec<Drift> {
    let mut drifts = Vec::new();
    for file in &effective.files {
        drifts.extend(edit::drift_in(&file.document, wanted));
    }
    drifts
}

/// Paths where a drop-in of ours may lie though nothing imports it: an observer reads them besides what is imported.
pub fn possible_drop_ins(effective: &Effective, main: &HostPath) -> Vec<HostPath> {
    let folder = main.parent().unwrap_or_else(|| main.clone());
    let beside = folder.join(FOLDER).join(DROP_IN);
    let mut paths: Vec<HostPath> = effective.imported_folder(DROP_IN).into_iter().collect();
    if !paths.contains(&beside) {
        paths.push(beside);
    }
    paths.extend(rendered::templates(main));
    paths
}

/// The path of the copy of our drop-in that the dry run reads, beside the main file.
fn copy_beside(main: &HostPath) -> Option<HostPath> {
    let folder = main.parent()?;
    HostPath::new(copy_path(folder.join(DROP_IN).as_path())).ok()
}

/// Files as they would be after the edits.
fn changed<'a, F: Files>(files: &'a F, main: &FileEdit, edits: &[FileEdit]) -> Changed<'a, F> {
    let all = std::iter::once(main).chain(edits);
    let changes: BTreeMap<_, _> = all
        .map(|edit| (edit.path.clone(), edit.after.clone()))
        .collect();
    Changed { files, changes }
}
