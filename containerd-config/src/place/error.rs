//! Why handlers cannot be placed.

use km_host::HostPath;

use crate::edit::EditError;
use crate::effective::ReadError;
use crate::handler::ContainerdVersion;

/// Why a plan is refused. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// A file cannot be edited as wanted.
    #[error("cannot edit {path}")]
    Edit {
        /// The file.
        path: HostPath,
        /// Why.
        source: EditError,
    },
    /// A file is no UTF-8 text.
    #[error("{path} is not UTF-8 text, which TOML is")]
    NotText {
        /// The file.
        path: HostPath,
    },
    /// The files cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file cannot be read.
    #[error("containerd's configuration cannot be read")]
    Host(#[from] km_host::Error),
    /// A wanted handler is in an imported file of somebody else, where it cannot be set aside.
    #[error(
        "the handler {name:?} is registered in {path}, line {line}, which is imported and somebody else's: --adopt cannot help there. \
         Take it out of that file, or give the class another handler name"
    )]
    InImport {
        /// The handler.
        name: String,
        /// The file.
        path: HostPath,
        /// The line of its table.
        line: usize,
    },
    /// An imported file replaces the main file's table of the CRI plugin.
    #[error(
        "{path} has a table of the CRI plugin and is imported: containerd {version} takes it in place of the one in {main}, so \
         that no handler in {main} would be in force. Move its settings to {main} and take the table out of it, or take it \
         out of `imports`, then try again"
    )]
    MainReplaced {
        /// The main file.
        main: HostPath,
        /// The imported file.
        path: HostPath,
        /// The version whose rules these are.
        version: ContainerdVersion,
    },
    /// A file is imported by name and not there.
    #[error(
        "{by} imports {path}, which is not there: containerd 1.x does not start with that, and 2.x silently leaves out everything \
         that comes after it. Take it out of `imports`, or put it back, then try again"
    )]
    Dangling {
        /// The file that is not there.
        path: HostPath,
        /// The file that imports it.
        by: HostPath,
    },
    /// A drop-in was asked for where it would replace the main file's table.
    #[error(
        "containerd.placement is `dropIn`, and containerd {version} takes a plugin's whole table from the last file that has one: a \
         drop-in would switch off every handler and setting of the main file. Use `auto` or `main`"
    )]
    Unsafe {
        /// The version.
        version: ContainerdVersion,
    },
    /// A drop-in was asked for, and a wanted handler is in the main file.
    #[error(
        "containerd.placement is `dropIn`, and {path} has the handler {name:?}: a table can be set aside in its own file only. Use \
         `auto` or `main` with --adopt, take the table out, or give the class another handler name"
    )]
    InMain {
        /// The handler.
        name: String,
        /// The main file.
        path: HostPath,
    },
    /// Our drop-in has another version than the main file, and settings of somebody else.
    #[error(
        "{path} is version {version} and {main} version {wanted}; containerd drops the handlers of one of them. Somebody put settings of \
         theirs into it, so it is not written anew: move them to another file, then try again"
    )]
    OtherVersion {
        /// The drop-in.
        path: HostPath,
        /// Its version.
        version: u32,
        /// The main file.
        main: HostPath,
        /// The main file's version.
        wanted: u32,
    },
    /// A handler comes from a template, which is not read.
    #[error(
        "{main}, line {line}, has the handler {name:?}, from the template that it is rendered from: --adopt cannot help there. Take it out of \
         the template, or give the class another handler name"
    )]
    InTemplate {
        /// The handler.
        name: String,
        /// The rendered file.
        main: HostPath,
        /// The line of its table there.
        line: usize,
    },
    /// A drop-in was asked for and the rendered file imports no folder for one.
    #[error(
        "containerd.placement is `dropIn`, and {main} is rendered anew at each start without importing a folder for drop-ins. Use `auto` or \
         `main`, which extend the template"
    )]
    NoFolder {
        /// The rendered file.
        main: HostPath,
    },
    /// There is no rendered file yet.
    #[error(
        "{main} is not there: it is rendered when the service starts. Start it once, then try again"
    )]
    NotRendered {
        /// The rendered file.
        main: HostPath,
    },
    /// The merged reading of the new files is not as meant.
    #[error(
        "with the new files {problem}; nothing was changed. `kata-manager containerd show` tells which file has what"
    )]
    NotInForce {
        /// What would be wrong.
        problem: String,
    },
    /// The handler of pods that name none would be gone.
    #[error(
        "`default_runtime_name` is {name:?}, which would be removed, and containerd's CRI plugin does not start without its default \
         handler. Set `default_runtime_name` to another handler, then try again"
    )]
    DefaultRuntime {
        /// The handler.
        name: String,
    },
}
