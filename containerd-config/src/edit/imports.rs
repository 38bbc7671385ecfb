//! The one entry that has containerd read our drop-in: put into `imports` of the main file, and taken out again.
//!
//! Where the file has an `imports` array, of whatever layout, the entry becomes its first element and brings a comma with it
//! if others follow. Where it has none, the key comes in a block of comment lines of ours at the top of the file, with a
//! `version` when the file has no settings at all.

use std::ops::Range;

use super::compose::line_break;
use super::document::Document;
use super::error::EditError;
use super::lines::{Lines, bom};
use super::marks::{BEGIN_IMPORTS, END, STATE, State};
use super::verify;

/// A text after an import was put in or taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EditedImport {
    /// The text; the same as before when there was nothing to do.
    pub text: String,
    /// We created the file and nothing is left in it: it is to be removed.
    pub remove_file: bool,
}

/// Has a main configuration import `entry`. `version` is for a file without any settings; `absent` says that there is none.
///
/// # Errors
/// [`EditError`] says what stands in the way, and where.
pub fn add_import(
    text: &str,
    entry: &str,
    version: u32,
    absent: bool,
) -> Result<EditedImport, EditError> {
    let document = Document::parse(text)?;
    if document.imports().iter().any(|import| import == entry) {
        return Ok(EditedImport {
            text: text.to_owned(),
            remove_file: false,
        });
    }
    let result = match &document.imports {
        Some(value) => {
            let Some(span) = &value.span else {
                return Err(EditError::BadImports {
                    line: document.root_line("imports"),
                });
            };
            let comma = if value.elements.is_empty() { "" } else { "," };
            let at = span.start + 1;
            format!("{}{entry:?}{comma}{}", &text[..at], &text[at..])
        }
        None => {
            let eol = line_break(text);
            let at = bom(text);
            let state = State {
                created: absent,
                ..State::default()
            };
            let state = serde_json::to_string(&state).unwrap_or_default();
            let given = if document.is_empty() {
                format!("version = {version}{eol}")
            } else {
                String::new()
            };
            format!(
                "{}{BEGIN_IMPORTS}{eol}{STATE}{state}{eol}{given}imports = [{entry:?}]{eol}{END}{eol}{}",
                &text[..at],
                &text[at..]
            )
        }
    };
    check_added(&document, &result, entry, text)?;
    Ok(EditedImport {
        text: result,
        remove_file: false,
    })
}

/// The entry is there, nothing else differs, and taking it out again gives back the bytes.
fn check_added(before: &Document, result: &str, entry: &str, text: &str) -> Result<(), EditError> {
    let after = reparsed(result)?;
    let mut wanted = vec![entry.to_owned()];
    wanted.extend(before.imports());
    let mut keys = vec!["imports"];
    if before.version().is_none() && before.is_empty() {
        keys.push("version");
    }
    verify::same_but_for(&before.tree, &after.tree, &keys, "after adding the import")?;
    if after.imports() != wanted || take_out(result, &after, entry) != text {
        return Err(EditError::NotAsMeant {
            what: "the import cannot be added so that removing it gives back the same bytes"
                .to_owned(),
        });
    }
    Ok(())
}

/// Takes an import of ours out again: the inverse of [`add_import`]. Other imports stay, whoever added them and when.
///
/// # Errors
/// [`EditError`] says what stands in the way, and where.
pub fn remove_import(text: &str, entry: &str) -> Result<EditedImport, EditError> {
    let document = Document::parse(text)?;
    let created = document
        .marks
        .imports
        .as_ref()
        .and_then(|block| block.state.as_ref())
        .is_some_and(|state| state.created);
    let result = take_out(text, &document, entry);
    let after = reparsed(&result)?;
    let left: Vec<String> = document
        .imports()
        .into_iter()
        .filter(|import| import != entry)
        .collect();
    let mut keys = vec!["imports"];
    if after.version().is_none() && after.is_empty() {
        keys.push("version");
    }
    verify::same_but_for(
        &document.tree,
        &after.tree,
        &keys,
        "after removing the import",
    )?;
    if after.imports() != left {
        return Err(EditError::NotAsMeant {
            what: "removing the import would change other imports".to_owned(),
        });
    }
    let blank = result.trim_start_matches('\u{feff}').trim().is_empty();
    Ok(EditedImport {
        text: result,
        remove_file: created && blank,
    })
}

/// The import that our block in the text has, for a caller that does not remember which.
pub(crate) fn own_import(document: &Document) -> Option<String> {
    let block = document.marks.imports.as_ref()?;
    let value = document.imports.as_ref()?;
    let inside = block.begin.end..block.end.start;
    let mut elements = value.elements.iter();
    let (text, _) = elements.find(|(_, span)| inside.contains(&span.start))?;
    text.clone()
}

fn reparsed(text: &str) -> Result<Document, EditError> {
    Document::parse(text).map_err(|error| EditError::NotAsMeant {
        what: format!("the result cannot be read: {error}"),
    })
}

fn take_out(text: &str, document: &Document, entry: &str) -> String {
    let mut cuts: Vec<Range<usize>> = Vec::new();
    if let Some(value) = &document.imports {
        let is_entry = |(text, _): &&(Option<String>, Range<usize>)| text.as_deref() == Some(entry);
        let whole = value.elements.iter().all(|element| is_entry(&element));
        let mut previous: Option<usize> = None;
        let mut alone = whole && !value.elements.is_empty();
        if let (Some(block), Some(array)) = (&document.marks.imports, &value.span) {
            let inside = block.begin.end <= array.start && array.end <= block.end.start;
            if alone && inside {
                let lines = Lines::new(text);
                cuts.push(lines.start(array.start)..lines.end(array.end));
            } else {
                alone = false;
            }
        } else {
            alone = false;
        }
        if !alone {
            for element in &value.elements {
                if is_entry(&element) {
                    cuts.extend(element_cuts(text, previous, &element.1));
                } else {
                    previous = Some(element.1.end);
                }
            }
        }
    }
    if let Some(block) = &document.marks.imports {
        cuts.push(block.begin.clone());
        cuts.extend(block.state_line.clone());
        cuts.push(block.end.clone());
        cuts.extend(given_version(
            text,
            document,
            block.begin.end..block.end.start,
        ));
    }
    super::strip::without(text, &super::strip::merged(cuts))
}

/// An element and its comma: the one after it, else the one before it.
fn element_cuts(text: &str, previous: Option<usize>, span: &Range<usize>) -> [Range<usize>; 2] {
    let none = span.end..span.end;
    if let Some(comma) = comma_after(text, span.end) {
        return [span.clone(), comma..comma + 1];
    }
    match previous.and_then(|end| comma_after(text, end)) {
        Some(comma) if text[comma + 1..span.start].trim().is_empty() => [comma..span.end, none],
        Some(comma) => [comma..comma + 1, span.clone()],
        None => [span.clone(), none],
    }
}

/// The comma after an element, comments skipped.
fn comma_after(text: &str, from: usize) -> Option<usize> {
    let mut comment = false;
    for (at, byte) in text.bytes().enumerate().skip(from) {
        match byte {
            b'\n' => comment = false,
            _ if comment => {}
            b'#' => comment = true,
            b',' => return Some(at),
            byte if byte.is_ascii_whitespace() => {}
            _ => return None,
        }
    }
    None
}

/// The line of the version that we gave, unless somebody put settings into the file since: they need it.
fn given_version(text: &str, document: &Document, inside: Range<usize>) -> Option<Range<usize>> {
    let mut keys = document.tree.keys();
    let used = document.sections.len() > 1 || keys.any(|key| key != "version" && key != "imports");
    let line = text[inside.clone()].find("version")? + inside.start;
    let lines = Lines::new(text);
    let others = document.imports().len() > 1;
    let ours = lines.start(line) == line && line < inside.end;
    (ours && !used && !others).then(|| line..lines.end(line))
}

/// The text with exactly these imports, in place of those that it has. For a dry run: it is not to be undone.
pub(crate) fn with_imports(text: &str, imports: &[&str]) -> Result<String, EditError> {
    let document = Document::parse(text)?;
    let list: Vec<String> = imports.iter().map(|import| format!("{import:?}")).collect();
    let list = format!("[{}]", list.join(", "));
    let result = match document
        .imports
        .as_ref()
        .and_then(|value| value.span.clone())
    {
        Some(span) => format!("{}{list}{}", &text[..span.start], &text[span.end..]),
        None if imports.is_empty() => text.to_owned(),
        None => {
            let (at, eol) = (bom(text), line_break(text));
            format!("{}imports = {list}{eol}{}", &text[..at], &text[at..])
        }
    };
    let after = reparsed(&result)?;
    verify::same_but_for(&document.tree, &after.tree, &["imports"], "in the dry run")?;
    Ok(result)
}
