//! Reads a TOML text into tables, values and the places where both stand, in one pass.
//!
//! `toml_parser` reads the grammar and decodes keys and scalars; here its events become tables, by the rules of TOML 1.1 on
//! what may be defined twice. It is what `toml_edit` does too, but without what writing needs: a MiB takes half the time, and
//! an edit reads its text twice. A property test holds both against each other.
//!
//! It knows TOML, and nothing of containerd.

mod tree;
mod value;

use std::borrow::Cow;
use std::ops::Range;

use toml_parser::Source;
use toml_parser::parser::{Event, EventKind, RecursionGuard, ValidateWhitespace, parse_document};

pub(super) use tree::{Form, Node, Tree, What};

/// The deepest nesting of values, and the most keys of one path: as `toml_edit` has it.
const DEPTH: u32 = 80;

/// A table with a header of its own.
#[derive(Debug)]
pub(super) struct Header<'t> {
    /// Its keys.
    pub(super) path: Vec<Cow<'t, str>>,
    /// Where the brackets stand, both included.
    pub(super) span: Range<usize>,
    /// The end of the last value below it, or of the header if there is none.
    pub(super) end: usize,
}

/// A text that was read.
#[derive(Debug)]
pub(super) struct Read<'t> {
    /// Tables and values.
    pub(super) tree: Tree<'t>,
    /// The headers, in the order of the text.
    pub(super) headers: Vec<Header<'t>>,
    /// The end of the last value above the first header.
    pub(super) root_end: Option<usize>,
    /// Values that go over several lines.
    pub(super) multiline: Vec<Range<usize>>,
    /// The strings (`None` for anything else) of the arrays at the root, by the array's start.
    pub(super) root_arrays: Vec<(Range<usize>, Vec<Element>)>,
}

/// An element of an array: what it says if it is a string, and where it stands.
pub(super) type Element = (Option<String>, Range<usize>);

/// Why a text is no TOML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The offset in the text, in bytes.
    pub(super) at: usize,
    /// What is wrong there.
    pub(super) message: String,
}

impl Refusal {
    fn new(at: usize, message: impl Into<String>) -> Refusal {
        Refusal {
            at,
            message: message.into(),
        }
    }
}

/// Reads a text.
///
/// # Errors
/// [`Refusal`] when it is no TOML, at the first place that is wrong.
pub(super) fn read(text: &str) -> Result<Read<'_>, Refusal> {
    let source = Source::new(text);
    let events = events(text, source)?;
    let mut reader = Reader {
        source,
        text,
        events: &events,
        at: 0,
        table: Tree::ROOT,
        keys: [const { ("", Cow::Borrowed("")) }; 64],
        out: Read {
            tree: Tree::new(events.len() / 8),
            headers: Vec::new(),
            root_end: None,
            multiline: Vec::new(),
            root_arrays: Vec::new(),
        },
    };
    while let Some(event) = reader.next() {
        match event.kind() {
            EventKind::StdTableOpen | EventKind::ArrayTableOpen => reader.header(&event)?,
            EventKind::SimpleKey => reader.key_value(&event)?,
            _ => return Err(unexpected(&event)),
        }
    }
    Ok(reader.out)
}

/// The events of a text that is right by the grammar, white space and comments left out.
fn events(text: &str, source: Source<'_>) -> Result<Vec<Event>, Refusal> {
    // A token has five bytes or more in most texts; too few are no harm.
    let mut tokens = Vec::with_capacity(text.len() / 5);
    tokens.extend(source.lex());
    let mut events = Vec::with_capacity(tokens.len());
    let mut keep = |event: Event| {
        let blank = matches!(
            event.kind(),
            EventKind::Whitespace | EventKind::Comment | EventKind::Newline
        );
        if !blank {
            events.push(event);
        }
    };
    let mut error = None;
    let mut checked = ValidateWhitespace::new(&mut keep, source);
    let mut bounded = RecursionGuard::new(&mut checked, DEPTH);
    parse_document(&tokens, &mut bounded, &mut error);
    match error {
        None => Ok(events),
        Some(error) => Err(refused(&error, text.len())),
    }
}

fn refused(error: &toml_parser::ParseError, end: usize) -> Refusal {
    let at = error.unexpected().map_or(end, |span| span.start());
    Refusal::new(at, error.description())
}

fn unexpected(event: &Event) -> Refusal {
    Refusal::new(
        event.span().start(),
        format!("unexpected {:?}", event.kind()),
    )
}

/// A key, and where it stands.
#[derive(Debug, Clone)]
struct Key<'t> {
    name: Cow<'t, str>,
    at: usize,
}

struct Reader<'t, 'e> {
    source: Source<'t>,
    text: &'t str,
    events: &'e [Event],
    at: usize,
    /// The table that keys go to.
    table: usize,
    /// Keys that were read, as written and as decoded, each at the place of its length: the same few come again and again.
    keys: [(&'t str, Cow<'t, str>); 64],
    out: Read<'t>,
}

impl<'t> Reader<'t, '_> {
    fn next(&mut self) -> Option<Event> {
        let event = self.events.get(self.at).copied();
        self.at += 1;
        event
    }

    fn expect(&mut self, kind: EventKind) -> Result<Event, Refusal> {
        match self.next() {
            Some(event) if event.kind() == kind => Ok(event),
            Some(event) => Err(unexpected(&event)),
            None => Err(Refusal::new(self.text.len(), "the text ends too early")),
        }
    }

    /// The keys of a path whose first one is `first`; what follows it is not taken.
    fn path(&mut self, first: &Event) -> Result<(Vec<Key<'t>>, Key<'t>), Refusal> {
        let mut path = Vec::new();
        let mut key = self.key(first)?;
        while self.events.get(self.at).map(Event::kind) == Some(EventKind::KeySep) {
            self.at += 1;
            let event = self.expect(EventKind::SimpleKey)?;
            let next = self.key(&event)?;
            path.push(std::mem::replace(&mut key, next));
        }
        if path.len() >= DEPTH as usize {
            return Err(Refusal::new(first.span().start(), "recursion limit"));
        }
        Ok((path, key))
    }

    fn key(&mut self, event: &Event) -> Result<Key<'t>, Refusal> {
        let at = event.span().start();
        let raw = self.source.get(event).ok_or_else(|| unexpected(event))?;
        let place = raw.len() % self.keys.len();
        let (written, name) = &self.keys[place];
        if !written.is_empty() && *written == raw.as_str() {
            let name = name.clone();
            return Ok(Key { name, at });
        }
        let mut name = Cow::Borrowed("");
        let mut error = None;
        raw.decode_key(&mut name, &mut error);
        if let Some(error) = error {
            return Err(refused(&error, at));
        }
        self.keys[place] = (raw.as_str(), name.clone());
        Ok(Key { name, at })
    }

    fn header(&mut self, open: &Event) -> Result<(), Refusal> {
        let first = self.expect(EventKind::SimpleKey)?;
        let (path, key) = self.path(&first)?;
        let is_array = open.kind() == EventKind::ArrayTableOpen;
        let close = self.expect(if is_array {
            EventKind::ArrayTableClose
        } else {
            EventKind::StdTableClose
        })?;
        let start = open.span().start();
        let tree = &mut self.out.tree;
        let parent = tree.descend(Tree::ROOT, &path, Form::Implicit)?;
        let mut names: Vec<_> = path.into_iter().map(|key| key.name).collect();
        names.push(key.name.clone());
        self.table = if is_array {
            tree.open_element(parent, key, start)?
        } else {
            tree.open_table(parent, key, start)?
        };
        self.out.headers.push(Header {
            path: names,
            span: start..close.span().end(),
            end: close.span().end(),
        });
        Ok(())
    }

    fn key_value(&mut self, first: &Event) -> Result<(), Refusal> {
        let (path, key) = self.path(first)?;
        self.expect(EventKind::KeyValSep)?;
        let from = self.at;
        let (json, span) = self.value()?;
        if self.table == Tree::ROOT && path.is_empty() && json.is_array() {
            let elements = self.elements(from);
            self.out.root_arrays.push((span.clone(), elements));
        }
        if self.text[span.clone()].contains('\n') {
            self.out.multiline.push(span.clone());
        }
        let end = match self.out.headers.last_mut() {
            Some(header) => &mut header.end,
            None => self.out.root_end.get_or_insert(span.end),
        };
        *end = span.end.max(*end);
        let tree = &mut self.out.tree;
        let table = tree.descend(self.table, &path, Form::Dotted)?;
        tree.insert(table, key, What::Value { json, span })
    }
}

#[cfg(test)]
mod tests;
