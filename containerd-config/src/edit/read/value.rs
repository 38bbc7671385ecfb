//! Values as JSON.
//!
//! What JSON does not have (dates, infinities) becomes an object that no table is mistaken for.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use serde_json::{Map, Value as Json, json};
use toml_parser::decoder::ScalarKind;
use toml_parser::parser::{Event, EventKind};

use super::{Element, Key, Reader, Refusal, refused, unexpected};

impl<'t> Reader<'t, '_> {
    /// The value that comes next, and where it stands. Its depth is bounded by the guard that the events went through.
    pub(super) fn value(&mut self) -> Result<(Json, Range<usize>), Refusal> {
        let Some(event) = self.next() else {
            return Err(Refusal::new(self.text.len(), "the text ends too early"));
        };
        let span = event.span();
        match event.kind() {
            EventKind::Scalar => Ok((self.scalar(&event)?, span.start()..span.end())),
            EventKind::ArrayOpen => {
                let (list, end) = self.array()?;
                Ok((Json::Array(list), span.start()..end))
            }
            EventKind::InlineTableOpen => {
                let (table, end) = self.inline_table()?;
                Ok((Json::Object(table), span.start()..end))
            }
            _ => Err(unexpected(&event)),
        }
    }

    fn array(&mut self) -> Result<(Vec<Json>, usize), Refusal> {
        let mut list = Vec::new();
        loop {
            match self.events.get(self.at) {
                Some(event) if event.kind() == EventKind::ValueSep => self.at += 1,
                Some(event) if event.kind() == EventKind::ArrayClose => {
                    self.at += 1;
                    return Ok((list, event.span().end()));
                }
                _ => list.push(self.value()?.0),
            }
        }
    }

    fn inline_table(&mut self) -> Result<(Map<String, Json>, usize), Refusal> {
        let mut table = Map::new();
        // Paths of the tables that dotted keys made here: those alone may be extended by dotted keys.
        let mut dotted = HashSet::new();
        loop {
            let Some(event) = self.next() else {
                return Err(Refusal::new(self.text.len(), "the text ends too early"));
            };
            match event.kind() {
                EventKind::ValueSep => {}
                EventKind::InlineTableClose => return Ok((table, event.span().end())),
                EventKind::SimpleKey => {
                    let (path, key) = self.path(&event)?;
                    self.expect(EventKind::KeyValSep)?;
                    let value = self.value()?.0;
                    put(&mut table, &mut dotted, &path, &key, value)?;
                }
                _ => return Err(unexpected(&event)),
            }
        }
    }

    fn scalar(&self, event: &Event) -> Result<Json, Refusal> {
        let at = event.span().start();
        let raw = self.source.get(event).ok_or_else(|| unexpected(event))?;
        let mut text = Cow::Borrowed("");
        let mut error = None;
        let kind = raw.decode_scalar(&mut text, &mut error);
        if let Some(error) = error {
            return Err(refused(&error, at));
        }
        match kind {
            ScalarKind::String => Ok(Json::String(text.into_owned())),
            ScalarKind::Boolean(flag) => Ok(Json::Bool(flag)),
            ScalarKind::Integer(radix) => i64::from_str_radix(&text, radix.value())
                .map(Json::from)
                .map_err(|_| Refusal::new(at, "integer number overflowed")),
            ScalarKind::Float => float(&text, at),
            ScalarKind::DateTime => match text.parse::<toml_edit::Datetime>() {
                Ok(date) => Ok(json!({ "$date": date.to_string() })),
                Err(error) => Err(Refusal::new(at, error.to_string())),
            },
        }
    }

    /// The elements of the array whose first event is at `from`, and that was read already.
    pub(super) fn elements(&self, from: usize) -> Vec<Element> {
        let mut elements: Vec<Element> = Vec::new();
        let mut depth = 0;
        let mut start = 0;
        for event in &self.events[from..self.at] {
            let span = event.span();
            match event.kind() {
                EventKind::ArrayOpen | EventKind::InlineTableOpen => {
                    depth += 1;
                    if depth == 2 {
                        start = span.start();
                    }
                }
                EventKind::ArrayClose | EventKind::InlineTableClose => {
                    if depth == 2 {
                        elements.push((None, start..span.end()));
                    }
                    depth -= 1;
                }
                EventKind::Scalar if depth == 1 => {
                    let text = match self.scalar(event) {
                        Ok(Json::String(text)) => Some(text),
                        _ => None,
                    };
                    elements.push((text, span.start()..span.end()));
                }
                _ => {}
            }
        }
        elements
    }
}

/// Puts a value below a path of dotted keys of an inline table.
fn put(
    mut table: &mut Map<String, Json>,
    dotted: &mut HashSet<Vec<String>>,
    path: &[Key<'_>],
    key: &Key<'_>,
    value: Json,
) -> Result<(), Refusal> {
    let mut names: Vec<String> = Vec::new();
    for part in path {
        names.push(part.name.to_string());
        if !table.contains_key(part.name.as_ref()) {
            dotted.insert(names.clone());
        } else if !dotted.contains(&names) {
            return Err(Refusal::new(part.at, "duplicate key"));
        }
        let inner = table
            .entry(part.name.as_ref())
            .or_insert_with(|| Json::Object(Map::new()));
        table = match inner {
            Json::Object(inner) => inner,
            _ => return Err(Refusal::new(part.at, "duplicate key")),
        };
    }
    if table.contains_key(key.name.as_ref()) {
        return Err(Refusal::new(key.at, "duplicate key"));
    }
    table.insert(key.name.to_string(), value);
    Ok(())
}

fn float(text: &str, at: usize) -> Result<Json, Refusal> {
    let number: f64 = text
        .parse()
        .map_err(|_| Refusal::new(at, "invalid floating-point number"))?;
    if number.is_finite() {
        return Ok(Json::from(number));
    }
    // `inf` and `nan` are numbers; digits that are too many are not.
    let written = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !written.chars().all(|c| c.is_ascii_alphabetic()) {
        return Err(Refusal::new(at, "floating-point number overflowed"));
    }
    Ok(json!({ "$float": number.to_string() }))
}
