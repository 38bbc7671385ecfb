//! The proof of a plan: the files as they would be, read and merged as containerd does.

use std::collections::BTreeMap;

use km_host::HostPath;
use serde_json::Value;

use super::choose::Planner;
use super::{DROP_IN, DryText, FileEdit, PlaceError, Placed, text_of};
use crate::edit::{self, Edited};
use crate::effective::{Changed, Effective, Files, InForce};
use crate::handler::Handler;
use crate::transaction::copy_path;

/// A plan that is not proved yet; fields as in [`Placed`].
pub(super) struct Draft {
    pub(super) main: FileEdit,
    pub(super) drop_ins: Vec<FileEdit>,
    pub(super) edited: Edited,
    pub(super) live: Vec<Handler>,
    pub(super) target: HostPath,
}

impl Planner<'_> {
    pub(super) fn prove<F: Files>(
        &self,
        files: &F,
        draft: Draft,
        is_drop_in: bool,
    ) -> Result<Placed, PlaceError> {
        let Draft {
            main,
            drop_ins,
            edited,
            live,
            target,
        } = draft;
        let after = changed(files, &main, &drop_ins);
        let then = Effective::load(&after, self.main, self.effective.version)?;
        let now = self.effective.handlers();
        let in_force = then.handlers();
        let differs = main.differs() || drop_ins.iter().any(FileEdit::differs);
        if differs {
            wanted_are_in_force(&in_force, &live)?;
            others_stay(&now, &in_force, &live, &edited)?;
            default_runtime(self.effective, &then, &edited)?;
        }
        let dry_run = if is_drop_in || !drop_ins.is_empty() {
            self.dry_run(&main, &drop_ins, &then)?
        } else {
            None
        };
        let names = |handlers: Vec<InForce>| handlers.into_iter().map(|h| h.name).collect();
        Ok(Placed {
            warnings: self.warnings(),
            main,
            drop_ins,
            edited,
            live,
            target,
            dry_run,
            understood: (names(now), names(in_force)),
        })
    }

    fn warnings(&self) -> Vec<String> {
        let others = self.effective.other_versions();
        let others = others.iter().map(|file| {
            format!(
                "{} is version {} and {} is not: containerd drops the CRI settings of one of them, or does not start",
                file.path,
                file.document.version().unwrap_or(1),
                self.main
            )
        });
        others.collect()
    }

    /// The main file for the dry run: its imports as a list of files, with the copy of our drop-in in the drop-in's place.
    fn dry_run(
        &self,
        main: &FileEdit,
        drop_ins: &[FileEdit],
        then: &Effective,
    ) -> Result<Option<DryText>, PlaceError> {
        let (Some(bytes), Some(copy)) = (&main.after, copy_beside(self.main)) else {
            return Ok(None);
        };
        let text = text_of(self.main, Some(bytes))?;
        let written = drop_ins.iter().find(|edit| edit.after.is_some());
        let first_imports = then.files.iter().filter(|file| file.imported_by == Some(0));
        let paths: Vec<&str> = first_imports
            .map(|file| match written {
                Some(edit) if edit.path == file.path => copy.as_str(),
                _ => file.path.as_str(),
            })
            .collect();
        let text = edit::with_imports(text, &paths).map_err(|source| PlaceError::Edit {
            path: self.main.clone(),
            source,
        })?;
        let copies = written.and_then(|edit| Some((copy, edit.after.clone()?)));
        Ok(Some(DryText {
            main: text,
            copies: copies.into_iter().collect(),
        }))
    }
}

fn not_in_force(problem: String) -> PlaceError {
    PlaceError::NotInForce { problem }
}

fn wanted_are_in_force(in_force: &[InForce], live: &[Handler]) -> Result<(), PlaceError> {
    for handler in live {
        let Some(found) = in_force.iter().find(|found| found.name == handler.name) else {
            let problem = format!("the handler {:?} would not be in force", handler.name);
            return Err(not_in_force(problem));
        };
        for (key, wanted) in handler.settings() {
            if found.settings.get(&key) != Some(&wanted) {
                let found = found
                    .settings
                    .get(&key)
                    .map_or("nothing".into(), Value::to_string);
                let problem = format!(
                    "the handler {:?} would have {key} = {found} instead of {wanted}",
                    handler.name
                );
                return Err(not_in_force(problem));
            }
        }
    }
    Ok(())
}

/// Every handler that is in force and not ours still is, as it was.
fn others_stay(
    now: &[InForce],
    then: &[InForce],
    live: &[Handler],
    edited: &Edited,
) -> Result<(), PlaceError> {
    let ours = |name: &String| {
        let names = edited
            .removed
            .iter()
            .chain(&edited.restated)
            .chain(&edited.given_back);
        live.iter().any(|handler| handler.name == *name) || names.into_iter().any(|n| n == name)
    };
    for handler in now.iter().filter(|handler| !ours(&handler.name)) {
        let after = then.iter().find(|found| found.name == handler.name);
        if after.map(|found| &found.settings) != Some(&handler.settings) {
            let lost = if after.is_some() {
                "other settings"
            } else {
                "no table"
            };
            let file = handler.files.last().map_or("containerd", HostPath::as_str);
            let problem = format!("the handler {:?} of {file} would have {lost}", handler.name);
            return Err(not_in_force(problem));
        }
    }
    Ok(())
}

/// The handler of pods that name none is not among those that go.
fn default_runtime(now: &Effective, then: &Effective, edited: &Edited) -> Result<(), PlaceError> {
    let merged = then.merged();
    let name = merged
        .get("plugins")
        .and_then(|plugins| plugins.get(then.plugin())?.get("containerd"))
        .and_then(|table| table.get("default_runtime_name")?.as_str());
    let Some(name) = name else { return Ok(()) };
    let has = |effective: &Effective| effective.handlers().iter().any(|h| h.name == name);
    let default = edited.restated.iter().any(|restated| restated == name);
    if has(now) && !has(then) && !default {
        return Err(PlaceError::DefaultRuntime {
            name: name.to_owned(),
        });
    }
    Ok(())
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
