//! Taking everything of ours out of a text: the inverse of `compose`.

use std::borrow::Cow;
use std::ops::Range;

use super::document::{Document, Section};
use super::error::EditError;
use super::lines::{Lines, bom};
use super::marks::{Block, KEPT};
use super::verify;

/// A text without anything of ours.
#[derive(Debug)]
pub(super) struct Stripped<'d> {
    pub(super) text: String,
    /// That text as read: the document from before if nothing was taken out.
    pub(super) document: Cow<'d, Document>,
    /// Where our block stood, in this text.
    pub(super) at: Option<usize>,
    /// The handlers of ours that were taken out.
    pub(super) removed: Vec<String>,
    /// Those of `removed` that are defaults of containerd, and are in force without being written.
    pub(super) restated: Vec<String>,
    /// The handlers whose adopted tables are back in this text.
    pub(super) given_back: Vec<String>,
    /// What was cut out of the text before.
    pub(super) cuts: Vec<Range<usize>>,
    /// Some of those taken out stood outside our block.
    pub(super) has_orphans: bool,
}

impl<'d> Stripped<'d> {
    /// A text that has nothing of ours.
    fn nothing(text: &str, document: &'d Document) -> Stripped<'d> {
        Stripped {
            text: text.to_owned(),
            document: Cow::Borrowed(document),
            at: None,
            removed: Vec::new(),
            restated: Vec::new(),
            given_back: Vec::new(),
            cuts: Vec::new(),
            has_orphans: false,
        }
    }

    /// The line that a line of this text has in the text before, for messages.
    pub(super) fn line_before(&self, before: &str, line: usize) -> usize {
        let mut offset = Lines::new(&self.text).start_of(line);
        for cut in &self.cuts {
            if cut.start <= offset {
                offset += cut.len();
            }
        }
        Lines::new(before).number(offset)
    }
}

/// Takes out our block, the version that we gave, the tables of `orphans`, and the marks before adopted lines.
pub(super) fn strip<'d>(
    text: &str,
    document: &'d Document,
    orphans: &[String],
) -> Result<Stripped<'d>, EditError> {
    if document.marks.is_empty() && orphans.is_empty() {
        return Ok(Stripped::nothing(text, document));
    }
    let mut removed = document.own_names();
    removed.extend(orphans.iter().cloned());
    let own = removed.iter();
    let restated = own
        .filter(|name| document.marks.restated(name))
        .cloned()
        .collect();
    let Taken { text, at, cuts } = take_out(text, document, orphans)?;
    let stripped = Document::parse(&text).map_err(|error| {
        if document.marks.kept.is_empty() {
            EditError::NotAsMeant {
                what: format!("without our lines it cannot be read: {error}"),
            }
        } else {
            EditError::GiveBack {
                line: error.line,
                message: error.message,
            }
        }
    })?;
    let given_back = given_back(document, &stripped);
    verify::stripped(document, &removed, &stripped, &given_back)?;
    Ok(Stripped {
        text,
        document: Cow::Owned(stripped),
        at,
        removed,
        restated,
        given_back,
        cuts,
        has_orphans: !orphans.is_empty(),
    })
}

/// Handlers that have sections now and had none in the text before, where they stood in comments.
fn given_back(before: &Document, after: &Document) -> Vec<String> {
    if before.marks.kept.is_empty() {
        return Vec::new();
    }
    let own: Vec<usize> = before.own_sections().map(|section| section.start).collect();
    let foreign: Vec<&str> = before
        .sections
        .iter()
        .filter(|section| !own.contains(&section.start))
        .filter_map(|section| section.handler())
        .collect();
    let mut names: Vec<String> = after
        .sections
        .iter()
        .filter_map(|section| section.handler())
        .filter(|name| !foreign.contains(name))
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    names
}

/// A text after cutting.
pub(super) struct Taken {
    pub(super) text: String,
    /// Where our block stood in it.
    at: Option<usize>,
    cuts: Vec<Range<usize>>,
}

/// The text without anything of ours.
pub(super) fn take_out(
    text: &str,
    document: &Document,
    orphans: &[String],
) -> Result<Taken, EditError> {
    let lines = Lines::new(text);
    let marks = &document.marks;
    let mut cuts: Vec<Range<usize>> = marks.strays.clone();
    cuts.extend(marks.kept.iter().map(|start| *start..start + KEPT.len()));
    for name in orphans {
        cuts.extend(
            document
                .sections_of(name)
                .map(|section| section.start..section.end),
        );
    }
    for section in document.own_sections() {
        if let Some(block) = marks.block_at(section.start) {
            cuts.push(own_lines(&lines, text, section, block)?);
        }
    }
    cut_version(document, &lines, text, orphans, &mut cuts);
    for block in &marks.blocks {
        cuts.push(separator(&lines, text, block)..block.begin.end);
        cuts.extend(block.state_line.clone());
        cuts.push(block.end.clone());
    }
    cuts = merged(cuts);
    for block in &marks.blocks {
        let start = separator(&lines, text, block);
        let joined = block.state.as_ref().is_some_and(|state| state.joined);
        if joined
            && cuts
                .iter()
                .any(|cut| cut.start <= start && cut.end == text.len())
        {
            cuts.push(line_break_before(text, start)..start);
        }
    }
    cuts = merged(cuts);
    let at = marks.blocks.first().map(|block| {
        let before = cuts.iter().filter(|cut| cut.start < block.begin.start);
        let gone: usize = before
            .map(|cut| cut.end.min(block.begin.start) - cut.start)
            .sum();
        block.begin.start - gone
    });
    Ok(Taken {
        text: without(text, &cuts),
        at,
        cuts,
    })
}

/// The lines of a section of ours, with the blank lines that follow it in the block.
fn own_lines(
    lines: &Lines<'_>,
    text: &str,
    section: &Section,
    block: &Block,
) -> Result<Range<usize>, EditError> {
    if section.end > block.end.start {
        return Err(EditError::LooseKeys {
            line: lines.number(block.end.end),
        });
    }
    let mut end = section.end;
    while end < block.end.start {
        let next = lines.end(end);
        if next <= end || !text[end..next].trim().is_empty() {
            break;
        }
        end = next;
    }
    Ok(section.start..end)
}

/// Where the blank line before a block begins, which is ours too; where the block begins if there is none.
pub(super) fn separator(lines: &Lines<'_>, text: &str, block: &Block) -> usize {
    let begin = block.begin.start;
    if begin <= bom(text) {
        return begin;
    }
    let start = lines.start(begin - 1);
    let line = &text[start..begin];
    if line == "\n" || line == "\r\n" {
        start
    } else {
        begin
    }
}

/// The version that we gave goes, unless somebody put settings into the file since: they need it, and keep it.
fn cut_version(
    document: &Document,
    lines: &Lines<'_>,
    text: &str,
    orphans: &[String],
    cuts: &mut Vec<Range<usize>>,
) {
    let Some(block) = &document.marks.version else {
        return;
    };
    let mut ours: Vec<usize> = document.own_sections().map(|s| s.start).collect();
    for name in orphans {
        ours.extend(document.sections_of(name).map(|section| section.start));
    }
    let sections = document.sections.iter().skip(1);
    let in_use = sections.clone().any(|s| !ours.contains(&s.start))
        || !document.marks.kept.is_empty()
        || document
            .tree
            .keys()
            .any(|key| key != "version" && key != "plugins")
        || (document.tree.contains_key("plugins") && ours.is_empty());
    cuts.push(block.begin.clone());
    cuts.push(block.end.clone());
    if in_use {
        return;
    }
    let inside = if block.end.is_empty() {
        block.begin.end..lines.end(block.begin.end.min(text.len()))
    } else {
        block.begin.end..block.end.start
    };
    let is_version = text[inside.clone()].trim_start().starts_with("version");
    if is_version {
        cuts.push(inside);
    }
}

/// Where the line break that ends right at `at` begins.
pub(super) fn line_break_before(text: &str, at: usize) -> usize {
    let before = &text[..at];
    let without = before
        .strip_suffix("\r\n")
        .or_else(|| before.strip_suffix('\n'));
    without.unwrap_or(before).len()
}

/// Sorts ranges and joins those that touch or overlap; drops empty ones.
pub(super) fn merged(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

pub(super) fn without(text: &str, cuts: &[Range<usize>]) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut at = 0;
    for cut in cuts {
        kept.push_str(&text[at..cut.start]);
        at = cut.end;
    }
    kept.push_str(&text[at..]);
    kept
}
