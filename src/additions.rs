//! What goes into a class's generation beside Kata's configuration: what the node adds, and what the user does in
//! `/etc/kata-manager/<class>.d/*.toml`. Files are read here, and judged by `km_runtimeclasses`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Result;
use km_host::HostPath;
use km_runtimeclasses::{DROP_IN, OWN_PREFIX, check_own};

use crate::config::RuntimeClass;
use crate::execute::CONFIGURATION_LIMIT;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::programs;
use crate::wanted::CONFIGURATION;

/// The folder beside whose files each class has its own.
const DIR: &str = "/etc/kata-manager";

/// The largest file that is taken, in bytes. Kata's whole configuration has some 40 kB, most of it comments.
const LIMIT: u64 = 256 << 10;

/// The most files of a class.
const FILES: usize = 32;

/// A file of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Addition {
    /// Relative to the generation.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// All additions of a class: the node's drop-in, then the user's files in the order in which Kata will read them. `launched` tells
/// whether its QEMU is started by the launcher, whose path no user's file may change.
///
/// # Errors
/// When a user's file cannot be read, or Kata could not take it. Each names the file.
pub(crate) fn observe(
    node: &Node,
    class: &RuntimeClass,
    drop_in: Option<String>,
    launched: bool,
) -> Result<Vec<Addition>> {
    let Some(drop_in) = drop_in else {
        return Ok(Vec::new());
    };
    let folder = HostPath::new(DIR)?.join(format!("{}.d", class.name));
    let mut additions = vec![Addition {
        path: DROP_IN.to_owned(),
        text: drop_in,
    }];
    for name in files(node, &folder)? {
        let path = folder.join(&name);
        let text = read(node, &path)?;
        check_own(&text, &additions[0].text, launched).map_err(|error| {
            let message = format!("{path}, your own settings of {},", class.name);
            Failure::because(Kind::Configuration, message, error)
        })?;
        additions.push(Addition {
            path: format!("{OWN_PREFIX}{name}"),
            text,
        });
    }
    Ok(additions)
}

/// The names of a class's files, in order.
fn files(node: &Node, folder: &HostPath) -> Result<Vec<String>> {
    let bad = |problem: String| Failure::new(Kind::Configuration, format!("{folder} {problem}"));
    let mut names = programs::names(node, folder)?;
    names.retain(|name| name.ends_with(".toml") && !name.starts_with('.'));
    if names.len() > FILES {
        return Err(bad(format!(
            "has {} files, and {FILES} at most are taken",
            names.len()
        ))
        .into());
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    match names.iter().find(|name| !name.bytes().all(plain)) {
        Some(odd) => Err(bad(format!(
            "has {odd:?}: name it with letters, digits, \"-\", \"_\" and \".\" alone"
        ))
        .into()),
        None => Ok(names),
    }
}

fn read(node: &Node, path: &HostPath) -> Result<String> {
    let bad = |problem: &str| Failure::new(Kind::Configuration, format!("{path} {problem}"));
    let bytes = node.root.read(path.as_path(), LIMIT).map_err(|error| {
        let operation = format!("cannot read {path}");
        match error.kind() {
            ErrorKind::InvalidInput | ErrorKind::FileTooLarge => {
                Failure::because(Kind::Configuration, operation, error).into()
            }
            _ => anyhow::Error::new(error).context(operation),
        }
    })?;
    String::from_utf8(bytes).map_err(|_| bad("is not UTF-8 text").into())
}

/// What Kata reads of a class's live generation, in order: its configuration, and all of `config.d` beside that. What is no file, too large
/// or no text says nothing: it is among the generation's damages, or the artifact's own doing.
///
/// # Errors
/// When the class's name is unusable or the disk fails.
pub(crate) fn configuration(node: &Node, class: &str) -> Result<Vec<String>> {
    let Some(number) = node.store.live_number(class)? else {
        return Ok(Vec::new());
    };
    let dir = node.store.generation_dir(class, number);
    let all = std::iter::once(dir.join(CONFIGURATION)).chain(added(&dir)?);
    Ok(all.filter_map(|path| text_of(&path)).collect())
}

/// What is in a generation's `config.d`, in the order in which Kata reads it.
fn added(dir: &Path) -> Result<Vec<PathBuf>, km_host::Error> {
    let folder = dir.join("config.d");
    let failed = |error| km_host::Error::io("list", &folder)(error);
    let mut added = match std::fs::read_dir(&folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry.map_err(failed)?.path()))
            .collect::<Result<Vec<PathBuf>, km_host::Error>>()?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(error)),
    };
    added.sort();
    Ok(added)
}

/// A file's text.
fn text_of(path: &Path) -> Option<String> {
    let meta = path.symlink_metadata().ok()?;
    let usual = meta.is_file() && meta.len() <= CONFIGURATION_LIMIT;
    usual.then(|| std::fs::read_to_string(path).ok()).flatten()
}

/// The text of the additions of a generation that is there, for show. What is wrong with them is among its damages.
pub(crate) fn live(node: &Node, class: &str, number: u64) -> String {
    let dir = node.store.generation_dir(class, number);
    let added = added(&dir).unwrap_or_default();
    let ours = added.iter().filter(|path| {
        let name = path.strip_prefix(&dir).ok().and_then(Path::to_str);
        name.is_some_and(|name| name == DROP_IN || name.starts_with(OWN_PREFIX))
    });
    let texts = ours.filter_map(|path| text_of(path));
    texts.flat_map(|text| [text, "\n".to_owned()]).collect()
}
