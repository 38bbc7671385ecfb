//! Where our handlers are written: the main file, or a drop-in that the main file imports.
//!
//! On containerd 1.x an imported table of the CRI plugin replaces the main file's, so only the main file will do. On 2.x tables
//! are merged, and a drop-in of the main file's version leaves the main file alone but for one entry in `imports`, or
//! wholly where that imports the folder already.
//!
//! [`plan`] is a function of the files as they are read: it gives the texts to write, and proves on a merged reading of them
//! that what is wanted would be in force and everything else still is.

mod choose;
mod error;
mod proof;
mod rendered;
#[cfg(test)]
pub(crate) mod tests;
mod write;

use km_host::HostPath;
use serde::{Deserialize, Serialize};

pub use error::PlaceError;

use choose::Planner;

use crate::edit::{self, Document, Drift, Edited, Owner};
use crate::effective::{Effective, Files};
use crate::handler::{Handler, Settings};

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
