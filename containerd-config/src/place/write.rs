//! The texts to write, once it is chosen which file has the handlers: out of every other file, and into that one.

use km_host::HostPath;

use super::choose::{DropIn, Planner};
use super::proof::Draft;
use super::{DROP_IN, FileEdit, PlaceError, Placed, text_of};
use crate::edit::{self, Document, EditError, Edited, SetOptions};
use crate::effective::Files;
use crate::handler::{Handler, Settings};

impl Planner<'_> {
    pub(super) fn carry_out<F: Files>(
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
    pub(super) fn bare(&self, text: &str) -> Result<Edited, EditError> {
        edit::remove_all(&edit::remove_cri_settings(text)?, self.request.recorded)
    }

    /// The edited text with the settings of the CRI plugin that no other file has.
    pub(super) fn with_cri(
        &self,
        mut edited: Edited,
        path: &HostPath,
    ) -> Result<Edited, EditError> {
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
    pub(super) fn own_entries(&self) -> Vec<String> {
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
pub(super) fn joined(mut edited: Edited, others: Vec<Edited>, wanted: &[Handler]) -> Edited {
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
