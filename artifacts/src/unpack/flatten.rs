//! A folder of a container image as one archive: its layers applied one upon the other, whiteouts honoured.
//!
//! The rules are those of the OCI image specification, layer.md, "Applying Changesets" and "Whiteouts". The layers are read
//! twice: [`flatten`] finds out what is left in the end, by names alone, so that its memory depends on the number of paths;
//! [`Flat::write`] then copies what is left, and nothing else, into a tar whose bytes depend on nothing but the layers and the
//! folder. That tar is judged by [`super::unpack`] like every other. What lies outside the folder is passed over, whatever it
//! is: an image may have devices in `/dev`.
//!
//! It must not know of the disk, the store or the registry.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use super::entries::{Entries, Stop};
use super::header::{Header, Kind};
use super::path::{NAME_MAX_BYTES, normalise, parents};
use super::stream::Leashed;
use super::{Format, Limits, Refusal, Refused};

/// What a whiteout's name begins with (layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";

/// Hides everything in its folder that is from the layers below (layer.md, "Opaque Whiteout").
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What else begins so is AUFS's own bookkeeping, and no content.
const BOOKKEEPING: &[u8] = b".wh..wh.";

/// The layers of an image, the lowest first. Each can be read from its beginning as often as need be.
pub trait Layers: Sync {
    /// How many there are.
    fn count(&self) -> usize;
    /// A layer's archive, as it is stored.
    ///
    /// # Errors
    /// When it cannot be read.
    fn open(&self, layer: usize) -> io::Result<(Box<dyn Read + Send + '_>, Format)>;
}

/// Why there is no such folder, or none that is taken. Layers are counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum FlattenError {
    /// An entry of a layer that no image should have, or in the folder one that no artifact should.
    #[error("layer {layer} of the image has an entry that is refused")]
    Refused {
        /// The layer.
        layer: usize,
        /// The entry and the reason.
        source: Refused,
    },
    /// A layer cannot be decoded, ends early, or changed while it was read.
    #[error("layer {layer} of the image is damaged near entry {entry:?}")]
    Damaged {
        /// The layer.
        layer: usize,
        /// The last entry whose name was read, or empty.
        entry: String,
        /// The decoder's answer.
        source: io::Error,
    },
    /// The image has no such folder, or nothing in it.
    #[error("the image has no file in the folder /{folder}{}", hint(blocked.as_deref()))]
    Nothing {
        /// The folder.
        folder: String,
        /// What is there in place of it, or of a folder above it.
        blocked: Option<String>,
    },
    /// The tar cannot be written.
    #[error("what is left of the image's layers cannot be written")]
    Write(#[source] io::Error),
}

fn hint(blocked: Option<&str>) -> String {
    match blocked {
        Some(path) => format!(": /{path} is no folder there"),
        None => String::new(),
    }
}

/// What is left of a folder when all layers are applied. Paths are relative to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Flat {
    /// Contents, by the layer and the number of the entry that has them.
    files: BTreeMap<(usize, usize), Content>,
    /// Symlinks, by path.
    links: BTreeMap<String, String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Content {
    size: u64,
    mode: u32,
    /// All names of it; more than one for hard links.
    paths: Vec<String>,
}

/// Finds out what is left of `folder`, which is normalised, and empty for the whole image.
///
/// # Errors
/// When a layer is damaged, passes a limit or holds what no image should; when nothing is left.
pub fn flatten(layers: &dyn Layers, folder: &str, limits: &Limits) -> Result<Flat, FlattenError> {
    let mut survey = Survey {
        folder,
        view: BTreeMap::new(),
        blocked: None,
        budget: limits.entries,
        limits,
    };
    for layer in 0..layers.count() {
        let mut entries = open(layers, layer, limits)?;
        let mut changes = BTreeMap::new();
        let read = survey.layer(layer, &mut entries, &mut changes);
        read.map_err(|stop| stopped(layer, stop))?;
        for (path, change) in changes {
            if let Change::Node(node) = change {
                survey.view.insert(path, node);
            }
        }
    }
    survey.finish()
}

fn open<'a>(
    layers: &'a dyn Layers,
    layer: usize,
    limits: &Limits,
) -> Result<Entries<Leashed<'a>>, FlattenError> {
    let unreadable = |source| FlattenError::Damaged {
        layer: layer + 1,
        entry: String::new(),
        source,
    };
    let (input, format) = layers.open(layer).map_err(unreadable)?;
    let leashed = Leashed::new(input, format, limits).map_err(unreadable)?;
    Ok(Entries::new(leashed))
}

fn stopped(layer: usize, stop: Stop) -> FlattenError {
    let layer = layer + 1;
    match stop {
        Stop::Refused(source) => FlattenError::Refused { layer, source },
        Stop::Damaged { entry, source } => FlattenError::Damaged {
            layer,
            entry,
            source,
        },
    }
}

/// What a path is.
#[derive(Clone, Debug)]
enum Node {
    File(Source),
    Link(String),
    /// In words.
    Other(&'static str, usize),
}

/// Where a content is.
#[derive(Clone, Copy, Debug)]
struct Source {
    layer: usize,
    entry: usize,
    size: u64,
    mode: u32,
}

/// What a layer makes of a path.
enum Change {
    Folder,
    Node(Node),
}

/// Where a name lies, seen from the folder.
enum Place {
    Outside,
    /// A folder above; or the folder itself.
    Above(String),
    Below(String),
}

/// What a name in a layer says.
enum Said {
    Entry(Place),
    /// Nothing of this is left from below.
    Without(Place),
    /// Nothing in this folder is left from below.
    Opaque(Place),
    Nothing,
}

struct Survey<'a> {
    folder: &'a str,
    /// What the layers so far leave, without the folders.
    view: BTreeMap<String, Node>,
    /// Something that is no folder where the folder, or one above it, should be.
    blocked: Option<String>,
    budget: usize,
    limits: &'a Limits,
}

type Changes = BTreeMap<String, Change>;

impl Survey<'_> {
    fn layer(
        &mut self,
        layer: usize,
        entries: &mut Entries<Leashed<'_>>,
        changes: &mut Changes,
    ) -> Result<(), Stop> {
        let mut number = 0;
        while let Some(header) = entries.next()? {
            let applied = self.apply(layer, number, &header, changes);
            applied.map_err(|reason| entries.refused(reason))?;
            number += 1;
        }
        entries.rest()
    }

    fn apply(
        &mut self,
        layer: usize,
        entry: usize,
        header: &Header,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        let folder = header.kind == Kind::Folder;
        match self.said(&header.name)? {
            Said::Nothing | Said::Entry(Place::Outside) => Ok(()),
            Said::Without(Place::Outside) | Said::Opaque(Place::Outside) => Ok(()),
            Said::Without(Place::Above(path)) => {
                self.view.clear();
                self.blocked
                    .take_if(|blocked| *blocked == path || lies_in(blocked, &path));
                Ok(())
            }
            Said::Opaque(Place::Above(path)) => {
                self.view.clear();
                self.blocked.take_if(|blocked| lies_in(blocked, &path));
                Ok(())
            }
            Said::Without(Place::Below(path)) => {
                self.count()?;
                self.hide(&path);
                Ok(())
            }
            Said::Opaque(Place::Below(path)) => {
                self.count()?;
                self.hide_below(&path);
                Ok(())
            }
            Said::Entry(Place::Above(path)) if folder => {
                self.blocked.take_if(|blocked| *blocked == path);
                Ok(())
            }
            Said::Entry(Place::Above(path)) => {
                if !changes.is_empty() {
                    return Err(Refusal::Duplicate);
                }
                self.view.clear();
                self.blocked = Some(path);
                Ok(())
            }
            Said::Entry(Place::Below(path)) => {
                self.count()?;
                if let Some(via) = &self.blocked {
                    return Err(Refusal::UnderNonFolder { via: via.clone() });
                }
                let change = self.change(layer, entry, header, changes)?;
                self.add(path, change, changes)
            }
        }
    }

    fn change(
        &self,
        layer: usize,
        entry: usize,
        header: &Header,
        changes: &Changes,
    ) -> Result<Change, Refusal> {
        Ok(Change::Node(match header.kind {
            Kind::Folder => return Ok(Change::Folder),
            // What makes images writes none; a folder of an image is made into a plain tar.
            Kind::File if header.sparse.is_some() => {
                return Err(Refusal::Kind {
                    what: "a sparse file in a container image",
                });
            }
            Kind::File => Node::File(Source {
                layer,
                entry,
                size: header.size,
                mode: header.mode,
            }),
            Kind::Symlink => {
                let target = std::str::from_utf8(&header.target);
                let target = target.map_err(|_| Refusal::NotUtf8)?;
                if target.is_empty() || target.len() > NAME_MAX_BYTES {
                    return Err(Refusal::BadTarget);
                }
                if target.chars().any(char::is_control) {
                    return Err(Refusal::ControlCharacter);
                }
                Node::Link(target.to_owned())
            }
            Kind::HardLink => Node::File(self.linked(&header.target, changes)?),
            Kind::Other(what) => Node::Other(what, layer),
        }))
    }

    /// The content that a hard link names: of this layer, or of those below.
    fn linked(&self, target: &[u8], changes: &Changes) -> Result<Source, Refusal> {
        let wrong = || Refusal::HardLinkTarget {
            target: String::from_utf8_lossy(target).into_owned(),
        };
        let Ok(Place::Below(path)) = self.place(target) else {
            return Err(wrong());
        };
        let node = match changes.get(&path) {
            Some(Change::Node(node)) => Some(node),
            Some(Change::Folder) => None,
            None => self.view.get(&path),
        };
        match node {
            Some(Node::File(source)) => Ok(*source),
            _ => Err(wrong()),
        }
    }

    fn add(&mut self, path: String, change: Change, changes: &mut Changes) -> Result<(), Refusal> {
        match (changes.get(&path), &change) {
            (Some(Change::Folder), Change::Folder) => return Ok(()),
            (Some(_), _) => return Err(Refusal::Duplicate),
            // A folder stays where there is one, and takes the place of anything else.
            (None, Change::Folder) => drop(self.view.remove(&path)),
            (None, Change::Node(_)) => self.hide(&path),
        }
        changes.insert(path, change);
        Ok(())
    }

    fn hide(&mut self, path: &str) {
        self.view.remove(path);
        self.hide_below(path);
    }

    fn hide_below(&mut self, path: &str) {
        // '0' follows '/' in ASCII.
        let below = format!("{path}/")..format!("{path}0");
        let hidden: Vec<_> = self
            .view
            .range(below)
            .map(|(path, _)| path.clone())
            .collect();
        for path in hidden {
            self.view.remove(&path);
        }
    }

    fn count(&mut self) -> Result<(), Refusal> {
        self.budget = self.budget.checked_sub(1).ok_or(Refusal::TooManyEntries {
            limit: self.limits.entries,
        })?;
        Ok(())
    }

    /// What a name says. Names of an image begin at its root, with a slash or without.
    fn said(&self, name: &[u8]) -> Result<Said, Refusal> {
        let parts: Vec<&[u8]> = parts(name).collect();
        let Some((last, above)) = parts.split_last() else {
            return self.place(name).map(Said::Entry);
        };
        let bookkeeping = last.starts_with(BOOKKEEPING) && *last != OPAQUE;
        if bookkeeping || above.iter().any(|part| part.starts_with(BOOKKEEPING)) {
            return Ok(Said::Nothing);
        }
        if above.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(Refusal::Whiteout);
        }
        if *last == OPAQUE {
            return self.place(&above.join(&b'/')).map(Said::Opaque);
        }
        let Some(hidden) = last.strip_prefix(WHITEOUT) else {
            return self.place(name).map(Said::Entry);
        };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Refusal::Whiteout);
        }
        let hidden = [above, &[hidden]].concat().join(&b'/');
        self.place(&hidden).map(Said::Without)
    }

    fn place(&self, name: &[u8]) -> Result<Place, Refusal> {
        if parts(name).any(|part| part == b"..") {
            return Err(Refusal::Climbs);
        }
        let mut parts = parts(name);
        let mut above = String::new();
        for wanted in self.folder.split('/').filter(|part| !part.is_empty()) {
            match parts.next() {
                None => return Ok(Place::Above(above)),
                Some(part) if part == wanted.as_bytes() => {
                    if !above.is_empty() {
                        above.push('/');
                    }
                    above.push_str(wanted);
                }
                Some(_) => return Ok(Place::Outside),
            }
        }
        let below: Vec<&[u8]> = parts.collect();
        if below.is_empty() {
            return Ok(Place::Above(above));
        }
        normalise(&below.join(&b'/')).map(Place::Below)
    }

    fn finish(self) -> Result<Flat, FlattenError> {
        if self.view.is_empty() {
            return Err(FlattenError::Nothing {
                folder: self.folder.to_owned(),
                blocked: self.blocked,
            });
        }
        let refused = |layer: usize, path: &str, reason| FlattenError::Refused {
            layer: layer + 1,
            source: Refused::new(path, reason),
        };
        let mut files: BTreeMap<_, Content> = BTreeMap::new();
        let mut links = BTreeMap::new();
        for (path, node) in &self.view {
            for parent in parents(path) {
                if self.view.contains_key(parent) {
                    let via = parent.to_owned();
                    let layer = match node {
                        Node::File(source) => source.layer,
                        _ => 0,
                    };
                    return Err(refused(layer, path, Refusal::UnderNonFolder { via }));
                }
            }
            match node {
                Node::Other(what, layer) => {
                    return Err(refused(*layer, path, Refusal::Kind { what }));
                }
                Node::Link(target) => drop(links.insert(path.clone(), target.clone())),
                Node::File(source) => {
                    let content = files.entry((source.layer, source.entry));
                    let content = content.or_insert_with(|| Content {
                        size: source.size,
                        mode: source.mode,
                        paths: Vec::new(),
                    });
                    content.paths.push(path.clone());
                }
            }
        }
        Ok(Flat { files, links })
    }
}

/// Whether a path is below a folder; the top folder is empty.
fn lies_in(path: &str, folder: &str) -> bool {
    let below = path.strip_prefix(folder);
    below.is_some_and(|below| folder.is_empty() || below.starts_with('/'))
}

/// The parts of a name, without those that say nothing.
fn parts(name: &[u8]) -> impl Iterator<Item = &[u8]> {
    let parts = name.split(|byte| *byte == b'/');
    parts.filter(|part| !part.is_empty() && *part != b".")
}

impl Flat {
    /// Bytes of all contents, each once.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|content| content.size).sum()
    }

    /// Writes what is left as a tar: files in the order of the layers, further names as hard links, then symlinks by name.
    ///
    /// # Errors
    /// When a layer is not what it was before, or nothing can be written.
    pub fn write(
        &self,
        layers: &dyn Layers,
        limits: &Limits,
        to: impl Write,
    ) -> Result<(), FlattenError> {
        let mut to = tar::Builder::new(to);
        for layer in 0..layers.count() {
            let wanted = self.files.range((layer, 0)..(layer + 1, 0));
            if wanted.clone().next().is_none() {
                continue;
            }
            let mut entries = open(layers, layer, limits)?;
            let mut next = 0;
            for ((_, number), content) in wanted {
                let header = loop {
                    let header = entries.next().map_err(|stop| stopped(layer, stop))?;
                    next += 1;
                    if header.is_none() || next > *number {
                        break header;
                    }
                };
                if header.is_none_or(|header| header.size != content.size) {
                    let changed = io::Error::other("it changed while it was read");
                    return Err(stopped(layer, entries.damaged(changed)));
                }
                content.write(&mut entries, &mut to, layer)?;
            }
        }
        for (path, target) in &self.links {
            let mut header = plain(tar::EntryType::Symlink, 0o777);
            to.append_link(&mut header, path, target)
                .map_err(FlattenError::Write)?;
        }
        let mut to = to.into_inner().map_err(FlattenError::Write)?;
        to.flush().map_err(FlattenError::Write)
    }
}

impl Content {
    fn write(
        &self,
        entries: &mut Entries<Leashed<'_>>,
        to: &mut tar::Builder<impl Write>,
        layer: usize,
    ) -> Result<(), FlattenError> {
        let Some((first, others)) = self.paths.split_first() else {
            return Ok(());
        };
        let mut header = plain(tar::EntryType::Regular, self.mode);
        header.set_size(self.size);
        let mut input = Noted {
            inner: entries,
            failed: None,
        };
        let appended = to.append_data(&mut header, first, &mut input);
        if let Some(error) = input.failed {
            return Err(stopped(layer, entries.damaged(error)));
        }
        appended.map_err(FlattenError::Write)?;
        for path in others {
            let mut header = plain(tar::EntryType::Link, self.mode);
            to.append_link(&mut header, path, first)
                .map_err(FlattenError::Write)?;
        }
        Ok(())
    }
}

/// A header that tells nothing of time or machine.
fn plain(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// Tells a failure to read from one to write.
struct Noted<'a, R> {
    inner: &'a mut R,
    failed: Option<io::Error>,
}

impl<R: Read> Read for Noted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            let kind = error.kind();
            self.failed = Some(error);
            kind.into()
        })
    }
}

#[cfg(test)]
mod tests;
