//! What is in force: containerd's main configuration and everything that it imports, read and merged by the rules of the
//! containerd that runs.
//!
//! The rules are those of `LoadConfig` and `mergeConfig` in containerd's `services/server/config/config.go` (2.x:
//! `cmd/containerd/server/config/config.go`), held against `containerd config dump` of 1.6.20, 1.7.24 and 2.1.9:
//!
//! - Files are read in breadth, the main one first; a path that was read is not read again, so a cycle does no harm.
//! - A pattern is one that has a `*`. A relative path counts from the folder of the file that names it, except that 1.6 looks
//!   for a relative pattern in its working folder, which is `/` under systemd.
//! - 1.x takes each plugin's whole table from the last file that has one. 2.x merges tables key by key; lists and scalars of
//!   the later file win.
//! - The runtimes are read at the plugin's name of version 3 when any file has that table (on 2.x), else at that of version 2.
//! - A file that is named and absent ends the reading: 2.x then runs silently without everything that comes after it.
//!
//! This module writes nothing, and does not know which tables are ours beyond what [`crate::edit`] tells.

mod glob;
mod merge;
#[cfg(test)]
pub(crate) mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use km_host::{HostPath, Root};

use crate::edit::{Document, Owner, ParseError};
use crate::handler::{ContainerdVersion, Settings};

/// The most files that are read. A node has a handful.
const MOST_FILES: usize = 500;
/// The most bytes that are read in all.
const MOST_BYTES: usize = 64 << 20;

/// Where files are read from.
pub trait Files {
    /// A file's bytes; `None` if it is not there.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error>;

    /// The names in a folder; empty if it is no folder.
    ///
    /// # Errors
    /// When it is there and cannot be listed.
    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error>;
}

impl Files for Root {
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error> {
        let ours = self.resolve(path)?;
        match std::fs::read(&ours) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(km_host::Error::io("read", &ours)(error)),
        }
    }

    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error> {
        let ours = self.resolve(folder)?;
        let entries = match std::fs::read_dir(&ours) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(km_host::Error::io("list", &ours)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(km_host::Error::io("list", &ours))?;
            // A name that is no text is in no configuration that we could name.
            names.extend(entry.file_name().into_string().ok());
        }
        Ok(names)
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

/// Files as they would be after a change: what is to be written or removed, before what is there.
#[derive(Debug)]
pub struct Changed<'a, F> {
    /// What is there.
    pub files: &'a F,
    /// What is to be: the new bytes, or `None` for a file that goes.
    pub changes: BTreeMap<HostPath, Option<Vec<u8>>>,
}

impl<F: Files> Files for Changed<'_, F> {
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error> {
        match self.changes.get(path) {
            Some(bytes) => Ok(bytes.clone()),
            None => self.files.read(path),
        }
    }

    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error> {
        let mut names = self.files.names(folder)?;
        for (path, bytes) in &self.changes {
            let name = path
                .as_path()
                .file_name()
                .and_then(|name| name.to_str())
                .filter(|_| path.parent().as_ref() == Some(folder));
            if let Some(name) = name {
                names.retain(|other| other != name);
                if bytes.is_some() {
                    names.push(name.to_owned());
                }
            }
        }
        Ok(names)
    }
}

/// What was read, kept: a plan that is made from it later sees the same, and touches no file.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    files: BTreeMap<HostPath, Option<Vec<u8>>>,
    folders: BTreeMap<HostPath, Vec<String>>,
}

impl Snapshot {
    /// Reads the main file and what it imports, and the files at `more` paths, which depend on it.
    ///
    /// # Errors
    /// As [`Effective::load`].
    pub fn take(
        files: &impl Files,
        main: &HostPath,
        version: ContainerdVersion,
        more: impl Fn(&Effective) -> Vec<HostPath>,
    ) -> Result<(Snapshot, Effective), ReadError> {
        let recorder = Recorder {
            files,
            seen: RefCell::default(),
        };
        let effective = Effective::load(&recorder, main, version)?;
        for path in more(&effective) {
            recorder.read(&path)?;
        }
        Ok((recorder.seen.into_inner(), effective))
    }
}

impl Files for Snapshot {
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error> {
        Ok(self.files.get(path).cloned().flatten())
    }

    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error> {
        Ok(self.folders.get(folder).cloned().unwrap_or_default())
    }
}

struct Recorder<'a, F> {
    files: &'a F,
    seen: RefCell<Snapshot>,
}

impl<F: Files> Files for Recorder<'_, F> {
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error> {
        let bytes = self.files.read(path)?;
        let mut seen = self.seen.borrow_mut();
        seen.files.insert(path.clone(), bytes.clone());
        Ok(bytes)
    }

    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error> {
        let names = self.files.names(folder)?;
        let mut seen = self.seen.borrow_mut();
        seen.folders.insert(folder.clone(), names.clone());
        Ok(names)
    }
}

/// Why the configuration in force cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file is no TOML, so that containerd does not start with it.
    #[error(
        "{path} is not valid TOML; containerd does not start with it. Correct it, then try again"
    )]
    Parse {
        /// The file.
        path: HostPath,
        /// Where and what.
        source: ParseError,
    },
    /// A file is no UTF-8 text.
    #[error("{path} is not UTF-8 text, which TOML is")]
    NotText {
        /// The file.
        path: HostPath,
    },
    /// An import is no path or no pattern.
    #[error(
        "{by} imports {import:?}, which cannot be read as a path or pattern: {reason}. Correct it, then try again"
    )]
    BadImport {
        /// The file that imports it.
        by: HostPath,
        /// As written.
        import: String,
        /// Why.
        reason: String,
    },
    /// More than anyone has.
    #[error("the imports of {main} lead to more than {what}: that is no configuration of a node")]
    TooMuch {
        /// The main file.
        main: HostPath,
        /// Which limit.
        what: String,
    },
    /// A file cannot be read.
    #[error("containerd's configuration cannot be read")]
    Host(#[from] km_host::Error),
}

/// A file that containerd reads.
#[derive(Debug, Clone)]
pub struct LoadedFile {
    /// Its path, as containerd names it.
    pub path: HostPath,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What it says.
    pub document: Document,
    /// The file that names it, by its place in [`Effective::files`]; `None` for the main one.
    pub imported_by: Option<usize>,
}

/// A file that is imported by name and not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingImport {
    /// The file.
    pub path: HostPath,
    /// The file that imports it.
    pub by: HostPath,
}

/// A handler that is in force.
#[derive(Debug, Clone, PartialEq)]
pub struct InForce {
    /// Its name.
    pub name: String,
    /// Its table after merging.
    pub settings: Settings,
    /// The files that its table comes from, the one that wins last.
    pub files: Vec<HostPath>,
    /// Whose its table is in the last of these files.
    pub owner: Owner,
    /// The line of its table in the last of these files.
    pub line: usize,
}

/// Everything that containerd reads, in the order in which it does.
#[derive(Debug, Clone)]
pub struct Effective {
    /// The files, the main one first; empty if there is none.
    pub files: Vec<LoadedFile>,
    /// What is imported by name and not there.
    pub missing: Vec<MissingImport>,
    /// The version whose rules hold.
    pub version: ContainerdVersion,
    main: HostPath,
}

impl Effective {
    /// Reads the main file and what it imports.
    ///
    /// # Errors
    /// [`ReadError`]. A file that is imported by name and absent is no error, but told in [`Effective::missing`].
    pub fn load(
        files: &impl Files,
        main: &HostPath,
        version: ContainerdVersion,
    ) -> Result<Effective, ReadError> {
        let mut found = Effective {
            files: Vec::new(),
            missing: Vec::new(),
            version,
            main: main.clone(),
        };
        let mut known = BTreeSet::new();
        let mut size = 0;
        let mut pending: VecDeque<(HostPath, Option<usize>)> =
            VecDeque::from([(main.clone(), None)]);
        while let Some((path, by)) = pending.pop_front() {
            if !known.insert(path.clone()) {
                continue;
            }
            let Some(bytes) = files.read(&path)? else {
                found.note_missing(path, by);
                continue;
            };
            size += bytes.len();
            found.within_limits(size)?;
            let document = parse(&path, &bytes)?;
            let index = found.files.len();
            for import in document.imports() {
                let paths = resolve(files, &path, &import, version)?;
                pending.extend(paths.into_iter().map(|path| (path, Some(index))));
            }
            found.files.push(LoadedFile {
                path,
                bytes,
                document,
                imported_by: by,
            });
        }
        Ok(found)
    }

    fn note_missing(&mut self, path: HostPath, by: Option<usize>) {
        if let Some(by) = by {
            let by = self.files[by].path.clone();
            self.missing.push(MissingImport { path, by });
        }
    }

    fn within_limits(&self, size: usize) -> Result<(), ReadError> {
        let too_much = |what: String| ReadError::TooMuch {
            main: self.main.clone(),
            what,
        };
        if self.files.len() >= MOST_FILES {
            return Err(too_much(format!("{MOST_FILES} files")));
        }
        if size > MOST_BYTES {
            return Err(too_much(format!("{} MiB", MOST_BYTES >> 20)));
        }
        Ok(())
    }

    /// The main file; `None` if there is none.
    pub fn main(&self) -> Option<&LoadedFile> {
        self.files.first().filter(|file| file.path == self.main)
    }

    /// A file by its path.
    pub fn file(&self, path: &HostPath) -> Option<&LoadedFile> {
        self.files.iter().find(|file| file.path == *path)
    }

    /// The settings in force, merged from all files; containerd's defaults are not among them.
    pub fn merged(&self) -> Settings {
        let mut merged = Settings::new();
        for file in &self.files {
            merge::merge(&mut merged, &file.document.tree, self.version);
        }
        merged
    }

    /// The plugin whose table has the runtimes in force.
    pub fn plugin(&self) -> &'static str {
        use crate::edit::{PLUGIN_V2, PLUGIN_V3};
        if self.version.major < 2 {
            return PLUGIN_V2;
        }
        let has = |plugin: &str| {
            self.files
                .iter()
                .any(|file| file.document.has_plugin(plugin))
        };
        let version = self
            .files
            .iter()
            .rev()
            .find_map(|file| file.document.version());
        match version {
            Some(0..=2) if !has(PLUGIN_V3) => PLUGIN_V2,
            _ => PLUGIN_V3,
        }
    }

    /// On 1.x, the imported file whose table of the CRI plugin takes the place of the main file's.
    pub fn replaces_main(&self) -> Option<&LoadedFile> {
        if self.version.major >= 2 {
            return None;
        }
        let plugin = self.plugin();
        let last = self
            .files
            .iter()
            .rev()
            .find(|file| file.document.has_plugin(plugin))?;
        (last.path != self.main).then_some(last)
    }

    /// The folder whose `bin` containerd puts before its PATH, if one is set.
    pub fn opt_path(&self) -> Option<&str> {
        let mut files = self.files.iter().rev();
        files.find_map(|file| file.document.opt_path())
    }

    /// The handlers in force, by name. containerd's own defaults are not among them.
    pub fn handlers(&self) -> Vec<InForce> {
        let plugin = self.plugin();
        let counts: Vec<&LoadedFile> = match self.replaces_main() {
            Some(winner) => vec![winner],
            None if self.version.major < 2 => self.main().into_iter().collect(),
            None => self.files.iter().collect(),
        };
        let mut found: BTreeMap<String, InForce> = BTreeMap::new();
        for file in counts {
            for handler in file.document.handlers_at(plugin) {
                if handler.owner == Owner::Adopted {
                    continue;
                }
                let entry = found
                    .entry(handler.name.clone())
                    .or_insert_with(|| InForce {
                        name: handler.name.clone(),
                        settings: Settings::new(),
                        files: Vec::new(),
                        owner: handler.owner,
                        line: handler.line,
                    });
                merge::deep(&mut entry.settings, &handler.settings);
                entry.files.push(file.path.clone());
                entry.owner = handler.owner;
                entry.line = handler.line;
            }
        }
        found.into_values().collect()
    }

    /// For each plugin with a table somewhere, the files that its table in force comes from.
    pub fn owners(&self) -> BTreeMap<String, Vec<HostPath>> {
        let mut owners: BTreeMap<String, Vec<HostPath>> = BTreeMap::new();
        for file in &self.files {
            for plugin in file.document.plugins() {
                let files = owners.entry(plugin.to_owned()).or_default();
                if self.version.major < 2 {
                    files.clear();
                }
                files.push(file.path.clone());
            }
        }
        owners
    }

    /// Files whose `version` is another than the main file's: containerd 2.0 and 2.1 silently drop the CRI tables of one of
    /// them, later ones refuse a higher one.
    pub fn other_versions(&self) -> Vec<&LoadedFile> {
        let main = self.main().and_then(|main| main.document.version());
        let differs = |file: &&LoadedFile| {
            let version = file.document.version();
            version.is_some() && main.is_some() && version != main
        };
        self.files.iter().filter(differs).collect()
    }

    /// A path in the same folder as a pattern of the main file's `imports` that would be read too, given a file name.
    pub fn imported_folder(&self, name: &str) -> Option<HostPath> {
        let main = self.main()?;
        main.document.imports().iter().find_map(|import| {
            let pattern = absolute(&main.path, import, self.version)?;
            let (folder, last) = pattern.rsplit_once('/')?;
            let folder = HostPath::new(folder).ok()?;
            let plain = !folder.as_str().contains(['*', '?', '[', '\\']);
            (plain && last.contains('*') && glob::matches(last, name).ok()?)
                .then(|| folder.join(name))
        })
    }
}

fn parse(path: &HostPath, bytes: &[u8]) -> Result<Document, ReadError> {
    let text = std::str::from_utf8(bytes).map_err(|_| ReadError::NotText { path: path.clone() })?;
    Document::parse(text).map_err(|source| ReadError::Parse {
        path: path.clone(),
        source,
    })
}

/// An import as a path or pattern from the root, before patterns are expanded.
fn absolute(by: &HostPath, import: &str, version: ContainerdVersion) -> Option<String> {
    let old = version < ContainerdVersion::new(1, 7, 0);
    let from = match by.parent() {
        Some(folder) if !(old && import.contains('*')) => folder.as_str().to_owned(),
        _ => "/".to_owned(),
    };
    let whole = if import.starts_with('/') {
        import.to_owned()
    } else {
        format!("{from}/{import}")
    };
    Some(HostPath::new(clean(&whole)).ok()?.as_str().to_owned())
}

/// A path from the root with `.` and `..` resolved by name alone, as Go's `filepath.Clean` does.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn resolve(
    files: &impl Files,
    by: &HostPath,
    import: &str,
    version: ContainerdVersion,
) -> Result<Vec<HostPath>, ReadError> {
    let bad = |reason: String| ReadError::BadImport {
        by: by.clone(),
        import: import.to_owned(),
        reason,
    };
    let path = absolute(by, import, version).ok_or_else(|| bad("it is no path".to_owned()))?;
    if path.contains('*') {
        return match glob::expand(files, &path)? {
            Ok(paths) => Ok(paths),
            Err(reason) => Err(bad(reason)),
        };
    }
    let path = HostPath::new(&path).map_err(|error| bad(error.to_string()))?;
    Ok(vec![path])
}
