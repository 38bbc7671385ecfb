//! Which file is to have the handlers: the main one, or a drop-in of ours; and what stands in the way of either.

use km_host::HostPath;

use super::{DROP_IN, FOLDER, PlaceError, Placement, Request, has_ours};
use crate::edit::{self, Document, Owner};
use crate::effective::{Effective, Files};

/// A drop-in of ours, or the place for one.
#[derive(Debug, Clone)]
pub(super) struct DropIn {
    pub(super) path: HostPath,
    pub(super) before: Option<Vec<u8>>,
}

/// What the files are, and what is wanted of them.
pub(super) struct Planner<'a> {
    pub(super) effective: &'a Effective,
    pub(super) main: &'a HostPath,
    pub(super) request: &'a Request<'a>,
    /// Files of ours beside the main one that are there.
    pub(super) drop_ins: Vec<DropIn>,
    /// Where a new one would go.
    default_path: HostPath,
}

impl<'a> Planner<'a> {
    pub(super) fn new<F: Files>(
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

    pub(super) fn document(&self) -> Option<&Document> {
        self.effective.main().map(|file| &file.document)
    }

    pub(super) fn is_ours(&self, path: &HostPath) -> bool {
        self.drop_ins.iter().any(|drop_in| drop_in.path == *path)
    }

    /// Refuses what no placement can do: a wanted handler in an imported file of somebody else, a main table that is not in
    /// force, an import that ends the reading.
    pub(super) fn refuse_foreign(&self) -> Result<(), PlaceError> {
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
    pub(super) fn choose(&self) -> Result<Option<DropIn>, PlaceError> {
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
    pub(super) fn drop_in_to_use(&self) -> Option<DropIn> {
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
}
