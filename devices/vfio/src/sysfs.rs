//! Small reads below the host's root: attributes, links and folders of `/sys` and `/proc`.
//!
//! Devices come and go while they are read, and a prepared root may hold anything. So each read is bounded, never waits (a
//! pipe in the place of an attribute), never leaves the root, and gives `None` for what is not there or cannot be read.
//! What must be there is asked for with [`Sysfs::require_folder`].

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use km_host::Root;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// The longest attribute that is read, in bytes. The kernel gives at most one page.
pub(crate) const ATTRIBUTE: usize = 4096;

/// The most entries of one folder that are looked at. A machine with every bus of four domains full has fewer functions.
pub(crate) const ENTRIES: usize = 1 << 16;

/// The readable files below a root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sysfs<'a> {
    root: &'a Root,
}

impl<'a> Sysfs<'a> {
    pub(crate) fn new(root: &'a Root) -> Sysfs<'a> {
        Sysfs { root }
    }

    pub(crate) fn root(&self) -> &'a Root {
        self.root
    }

    /// A file's first bytes, at most `limit`.
    pub(crate) fn bytes(&self, path: impl AsRef<Path>, limit: usize) -> Option<Vec<u8>> {
        let fd = self.root.open(path.as_ref(), OFlags::RDONLY).ok()?;
        read(fd, limit)
    }

    /// An attribute's text without the white space around it. Bytes that are not UTF-8 and control characters become U+FFFD.
    pub(crate) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        Some(text(&self.bytes(path, ATTRIBUTE)?))
    }

    /// Opens a folder, of which several things are read.
    pub(crate) fn folder(&self, path: impl AsRef<Path>) -> Option<Folder> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        self.root.open(path.as_ref(), flags).ok().map(Folder)
    }

    /// An attribute's text as it stands, for what has several lines and is parsed.
    pub(crate) fn lines(&self, path: impl AsRef<Path>) -> String {
        let bytes = self.bytes(path, ATTRIBUTE).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// An attribute that is a decimal number.
    pub(crate) fn number<T: std::str::FromStr>(&self, path: impl AsRef<Path>) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// The last part of a link's target, such as a driver's name.
    pub(crate) fn link_name(&self, path: impl AsRef<Path>) -> Option<String> {
        last_part(&self.link(path)?)
    }

    /// A link's target as it stands.
    pub(crate) fn link(&self, path: impl AsRef<Path>) -> Option<OsString> {
        let fd = self
            .root
            .open(path.as_ref(), OFlags::PATH | OFlags::NOFOLLOW)
            .ok()?;
        // An empty path reads the link that the descriptor is of (readlink(2)).
        let target = rustix::fs::readlinkat(&fd, "", Vec::new()).ok()?;
        Some(OsString::from_vec(target.into_bytes()))
    }

    /// Whether something is there.
    pub(crate) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.root.open(path.as_ref(), OFlags::PATH).is_ok()
    }

    /// The names in a folder that are UTF-8, sorted; none when it is not there.
    pub(crate) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        self.require_folder(path).unwrap_or_default()
    }

    /// The names of the real folders in a folder; links to folders are none.
    pub(crate) fn folders(&self, path: &str) -> Vec<String> {
        let Ok(fd) = self
            .root
            .open(Path::new(path), OFlags::RDONLY | OFlags::DIRECTORY)
        else {
            return Vec::new();
        };
        let Ok(dir) = rustix::fs::Dir::new(fd) else {
            return Vec::new();
        };
        dir.take(ENTRIES)
            .map_while(Result::ok)
            .filter(|entry| entry.file_type() == rustix::fs::FileType::Directory)
            .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned))
            .filter(|name| name != "." && name != "..")
            .collect()
    }

    /// The names in a folder that are UTF-8, sorted.
    pub(crate) fn require_folder(
        &self,
        path: impl AsRef<Path>,
    ) -> Result<Vec<String>, km_host::Error> {
        let path = path.as_ref();
        let names = || -> std::io::Result<Vec<String>> {
            let fd = self.root.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            Ok(self::names(fd)?)
        };
        names().map_err(km_host::Error::io("list", path))
    }
}

/// A folder that is open. What is read of it is in it by that name: no link is followed.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl Folder {
    fn open(&self, name: &str, flags: OFlags) -> Option<OwnedFd> {
        let flags = flags
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC
            // Nothing is waited for, and no terminal becomes ours.
            | OFlags::NONBLOCK
            | OFlags::NOCTTY;
        rustix::fs::openat(&self.0, name, flags, Mode::empty()).ok()
    }

    /// As [`Sysfs::bytes`].
    pub(crate) fn bytes(&self, name: &str, limit: usize) -> Option<Vec<u8>> {
        read(self.open(name, OFlags::RDONLY)?, limit)
    }

    /// As [`Sysfs::text`].
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        Some(text(&self.bytes(name, ATTRIBUTE)?))
    }

    /// As [`Sysfs::link_name`].
    pub(crate) fn link_name(&self, name: &str) -> Option<String> {
        let target = rustix::fs::readlinkat(&self.0, name, Vec::new()).ok()?;
        last_part(OsStr::from_bytes(target.as_bytes()))
    }
}

fn read(fd: OwnedFd, limit: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = File::from(fd).take(limit as u64);
    file.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn text(bytes: &[u8]) -> String {
    printable(String::from_utf8_lossy(bytes).trim())
}

fn last_part(target: &OsStr) -> Option<String> {
    let name = Path::new(target).file_name()?.to_str()?;
    name.chars()
        .all(|char| !char.is_control())
        .then(|| name.to_owned())
}

fn names(fd: OwnedFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(fd)?.take(ENTRIES) {
        // An entry that cannot be read ends the listing; what came before it counts.
        let Ok(entry) = entry else { break };
        if let Ok(name) = entry.file_name().to_str()
            && name != "."
            && name != ".."
        {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A text without control characters, so that it can be printed on a terminal.
pub fn printable(text: &str) -> String {
    let plain = |char: char| {
        // Besides control characters, those that turn the direction of writing or cannot be seen.
        !char.is_control()
            && !matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    text.chars()
        .map(|char| {
            if plain(char) {
                char
            } else {
                char::REPLACEMENT_CHARACTER
            }
        })
        .collect()
}
