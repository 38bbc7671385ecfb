//! Small reads below the host's root. Each is bounded, never waits, never leaves the root, and keeps its source, so that a finding
//! can say what it was told and by which file. Must not judge anything.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};

use km_host::Root;
use rustix::fs::{FileType, OFlags};

/// The longest attribute that is read, in bytes. The kernel gives at most one page.
const ATTRIBUTE: usize = 4096;

/// The most entries of one folder that are looked at.
const ENTRIES: usize = 1 << 16;

/// Something that was looked at, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact<T> {
    /// The file or folder, as the host sees it.
    pub source: String,
    /// What was found there.
    pub found: Found<T>,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// This.
    Is(T),
    /// Nothing: it is not there.
    Absent,
    /// It could not be looked at, or what is in it means nothing; the reason, such as the system's answer.
    Unknown(String),
}

impl<T> Found<T> {
    /// What was found, if that is known.
    pub fn get(&self) -> Option<&T> {
        match self {
            Found::Is(value) => Some(value),
            Found::Absent | Found::Unknown(_) => None,
        }
    }

    /// Why it is not known, if it is not.
    pub fn unknown(&self) -> Option<&str> {
        match self {
            Found::Unknown(reason) => Some(reason),
            Found::Is(_) | Found::Absent => None,
        }
    }

    /// Reads more out of it; `None` means that it says nothing that can be understood.
    pub fn and_read<U>(self, read: impl FnOnce(T) -> Option<U>) -> Found<U> {
        match self {
            Found::Is(value) => match read(value) {
                Some(read) => Found::Is(read),
                None => Found::Unknown("what it says could not be understood".to_owned()),
            },
            Found::Absent => Found::Absent,
            Found::Unknown(reason) => Found::Unknown(reason),
        }
    }
}

impl<T> Fact<T> {
    /// A fact.
    pub fn new(source: impl Into<String>, found: Found<T>) -> Fact<T> {
        Fact {
            source: source.into(),
            found,
        }
    }

    /// What was found, if that is known.
    pub fn get(&self) -> Option<&T> {
        self.found.get()
    }

    /// Why it is not known, with its source, if it is not.
    pub fn unknown(&self) -> Option<String> {
        let reason = self.found.unknown()?;
        Some(format!("{}: {reason}", self.source))
    }

    /// Reads more out of it.
    pub fn and_read<U>(self, read: impl FnOnce(T) -> Option<U>) -> Fact<U> {
        Fact {
            source: self.source,
            found: self.found.and_read(read),
        }
    }
}

/// What a name in `/dev` or of a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A character device.
    Device,
    /// A socket.
    Socket,
    /// Something else.
    Other,
}

/// A file's first bytes as text, at most `limit` of them, without the white space around it.
pub fn text(root: &Root, path: &str, limit: usize) -> Fact<String> {
    Reader::new(root)
        .text(path, limit)
        .and_read(|text| Some(text.trim().to_owned()))
}

/// The readable files below a root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    root: &'a Root,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(root: &'a Root) -> Reader<'a> {
        Reader { root }
    }

    /// A file's first bytes, at most `limit`.
    pub(crate) fn bytes(&self, path: &str, limit: usize) -> Fact<Vec<u8>> {
        let read = || -> io::Result<Vec<u8>> {
            let fd = self.root.open(path.as_ref(), OFlags::RDONLY)?;
            let mut bytes = Vec::new();
            File::from(fd).take(limit as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        Fact::new(path, found(read()))
    }

    /// A file's first bytes as text. What is not UTF-8 becomes U+FFFD.
    pub(crate) fn text(&self, path: &str, limit: usize) -> Fact<String> {
        self.bytes(path, limit)
            .and_read(|bytes| Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// An attribute's text without the white space around it.
    pub(crate) fn attribute(&self, path: &str) -> Fact<String> {
        self.text(path, ATTRIBUTE)
            .and_read(|text| Some(text.trim().to_owned()))
    }

    /// What a name is.
    pub(crate) fn node(&self, path: &str) -> Fact<Node> {
        let look = || -> io::Result<Node> {
            let fd = self.root.open(path.as_ref(), OFlags::PATH)?;
            let mode = rustix::fs::fstat(&fd)?.st_mode;
            Ok(match FileType::from_raw_mode(mode) {
                FileType::CharacterDevice => Node::Device,
                FileType::Socket => Node::Socket,
                _ => Node::Other,
            })
        };
        let mut found = found(look());
        // A container without the host's /dev shows none of it.
        if found == Found::Absent && path.starts_with("/dev/") {
            found = match self.names("/dev").found {
                Found::Is(_) => Found::Absent,
                Found::Absent => Found::Unknown("the host's /dev is not there".to_owned()),
                Found::Unknown(reason) => Found::Unknown(format!("/dev: {reason}")),
            };
        }
        Fact::new(path, found)
    }

    /// The names in a folder that are UTF-8, sorted.
    pub(crate) fn names(&self, path: &str) -> Fact<BTreeSet<String>> {
        let list = || -> io::Result<BTreeSet<String>> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let fd = self.root.open(path.as_ref(), flags)?;
            let mut names = BTreeSet::new();
            for entry in rustix::fs::Dir::new(fd)?.take(ENTRIES) {
                if let Ok(name) = entry?.file_name().to_str()
                    && !name.starts_with('.')
                {
                    names.insert(name.to_owned());
                }
            }
            Ok(names)
        };
        Fact::new(path, found(list()))
    }

    /// The processes whose command has this short name (proc_pid_comm(5): 15 bytes at most), by number.
    pub(crate) fn processes(&self, fits: impl Fn(&str) -> bool) -> Fact<Vec<u32>> {
        let names = self.names("/proc");
        let found = match names.found {
            Found::Is(names) => {
                let numbers = names.iter().filter_map(|name| name.parse().ok());
                let mut numbers: Vec<u32> = numbers.collect();
                numbers.sort_unstable();
                // /proc of a running system has at least its first process.
                match numbers.is_empty() {
                    true => Found::Unknown("no process is there: is it the host's?".to_owned()),
                    false => {
                        numbers.retain(|number| {
                            let comm = self.attribute(&format!("/proc/{number}/comm"));
                            comm.get().is_some_and(|name| fits(name))
                        });
                        Found::Is(numbers)
                    }
                }
            }
            Found::Absent => Found::Absent,
            Found::Unknown(reason) => Found::Unknown(reason),
        };
        Fact::new(names.source, found)
    }
}

fn found<T>(result: io::Result<T>) -> Found<T> {
    match result {
        Ok(value) => Found::Is(value),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Found::Absent
        }
        Err(error) => Found::Unknown(error.to_string()),
    }
}
