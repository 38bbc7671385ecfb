//! The comment lines that say what is ours, and hold what removing needs to know.
//!
//! ```toml
//! # >>> kata-manager: runtime handlers, added by "kata-manager apply"; "kata-manager uninstall" removes them
//! # kata-manager state: {"handlers":{"kata":"4f6e..."}}
//! [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
//! runtime_type = "io.containerd.kata.v2"
//! # <<< kata-manager
//! ```
//!
//! A file that had nothing in it also gets its `version` between such lines, and a line that begins with [`KEPT`] is a line
//! of a table that was adopted.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::lines::Lines;

/// Every first line of something of ours begins so.
const BEGIN: &str = "# >>> kata-manager: ";
/// First line of the block with the handlers.
pub(crate) const BEGIN_HANDLERS: &str = "# >>> kata-manager: runtime handlers, added by \"kata-manager apply\"; \"kata-manager uninstall\" removes them";
/// First line of the block with the version.
pub(super) const BEGIN_VERSION: &str =
    "# >>> kata-manager: version, added because the file had no settings";
/// First line of the block with the import of our drop-in.
pub(super) const BEGIN_IMPORTS: &str = "# >>> kata-manager: imports, added by \"kata-manager apply\"; \"kata-manager uninstall\" removes them";
/// First line of the block with settings of the CRI plugin.
pub(super) const BEGIN_SETTINGS: &str = "# >>> kata-manager: settings of the CRI plugin that nobody set; \"kata-manager uninstall\" removes them";
/// What the second word of that block's first line is.
const SETTINGS_WORD: &str = "settings";
/// What the second word of the version block's first line is.
const VERSION_WORD: &str = "version";
/// What the second word of the import block's first line is.
const IMPORTS_WORD: &str = "imports";
/// The line with the [`State`].
pub(super) const STATE: &str = "# kata-manager state: ";
/// The last line of a block.
pub(super) const END: &str = "# <<< kata-manager";
/// What a line of an adopted table begins with.
pub(super) const KEPT: &str = "#kata-manager:kept# ";

/// What the inverse of an edit must know and cannot see in the text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// The handlers of the block, each with the short digest of its settings as they were written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) handlers: BTreeMap<String, String>,
    /// The text before the block had no line break at its end: the one that is there is ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) joined: bool,
    /// Those of `handlers` that are defaults of containerd, written out because it would drop them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) restated: Vec<String>,
    /// There was no file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) created: bool,
}

/// A block of handlers.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// The line that begins it.
    pub(super) begin: Range<usize>,
    /// The line with the state, if it is there.
    pub(super) state_line: Option<Range<usize>>,
    /// The state, if it is there and can be read.
    pub(super) state: Option<State>,
    /// The line that ends it; empty, at the end of the text or the next block, if someone removed the line.
    pub(super) end: Range<usize>,
}

impl Block {
    /// Whether a handler whose table stands in this block is ours. Other tools put tables of theirs before the last comment
    /// of a file, which is before our last line: the state tells them apart.
    pub(super) fn owns(&self, name: &str) -> bool {
        self.state
            .as_ref()
            .is_none_or(|state| state.handlers.contains_key(name))
    }
}

/// The lines around the version.
#[derive(Debug, Clone)]
pub(super) struct VersionBlock {
    pub(super) begin: Range<usize>,
    pub(super) end: Range<usize>,
}

/// Everything of ours in a text, except tables.
#[derive(Debug, Clone, Default)]
pub(super) struct Marks {
    pub(super) blocks: Vec<Block>,
    pub(super) version: Option<VersionBlock>,
    /// The block with the import of our drop-in; `super::imports` knows it, nothing else touches it.
    pub(super) imports: Option<Block>,
    /// The block with settings of the CRI plugin; `super::cri` knows it, nothing else touches it.
    pub(super) settings: Option<Block>,
    /// Where each line begins that starts with [`KEPT`].
    pub(super) kept: Vec<usize>,
    /// Last lines without a first one.
    pub(super) strays: Vec<Range<usize>>,
}

impl Marks {
    /// Whether there is nothing of ours.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
            && self.version.is_none()
            && self.kept.is_empty()
            && self.strays.is_empty()
    }

    /// The block that an offset is in.
    pub(super) fn block_at(&self, offset: usize) -> Option<&Block> {
        self.blocks
            .iter()
            .find(|block| (block.begin.end..block.end.start.max(block.begin.end)).contains(&offset))
    }

    /// The digest of a handler's settings as they were written.
    pub(super) fn written_digest(&self, name: &str) -> Option<&str> {
        self.blocks
            .iter()
            .filter_map(|block| block.state.as_ref()?.handlers.get(name))
            .map(String::as_str)
            .next()
    }

    /// Whether a handler was written out because containerd would drop it.
    pub(super) fn restated(&self, name: &str) -> bool {
        let mut states = self.blocks.iter().filter_map(|block| block.state.as_ref());
        states.any(|state| state.restated.iter().any(|restated| restated == name))
    }

    /// Whether the file was made by us.
    pub(super) fn created(&self) -> bool {
        let mut states = self.blocks.iter().filter_map(|block| block.state.as_ref());
        states.any(|state| state.created)
    }
}

enum Open {
    Nothing,
    Handlers,
    Version,
    Imports,
    Settings,
}

/// Finds our lines. Lines inside `multiline` values are text of somebody's value, whatever they look like.
pub(super) fn find(text: &str, lines: &Lines<'_>, multiline: &[Range<usize>]) -> Marks {
    let mut marks = Marks::default();
    let mut open = Open::Nothing;
    let looks_ours = |line: &str| line.starts_with("# ") || line.starts_with(KEPT);
    for (start, line) in lines.iter().filter(|(_, line)| looks_ours(line)) {
        if inside(multiline, start) {
            continue;
        }
        let range = start..start + line.len();
        let words = line.trim_end();
        if line.starts_with(KEPT) {
            marks.kept.push(start);
        } else if let Some(kind) = words.strip_prefix(BEGIN) {
            marks.close(&open, start..start);
            open = marks.open(kind, range, text.len());
        } else if words == END {
            if matches!(open, Open::Nothing) {
                marks.strays.push(range);
            } else {
                marks.close(&open, range);
                open = Open::Nothing;
            }
        } else if let Some(state) = words.strip_prefix(STATE)
            && let Some(block) = marks.open_block(&open)
        {
            block.state = serde_json::from_str(state).ok();
            block.state_line = Some(range);
        }
    }
    marks
}

impl Marks {
    fn open_block(&mut self, open: &Open) -> Option<&mut Block> {
        match open {
            Open::Handlers => self.blocks.last_mut(),
            Open::Imports => self.imports.as_mut(),
            Open::Settings => self.settings.as_mut(),
            Open::Nothing | Open::Version => None,
        }
    }

    fn open(&mut self, kind: &str, begin: Range<usize>, length: usize) -> Open {
        if kind.starts_with(SETTINGS_WORD) {
            let first = self.settings.is_none();
            if first {
                self.settings = Some(Block {
                    begin,
                    state_line: None,
                    state: None,
                    end: length..length,
                });
            }
            return if first { Open::Settings } else { Open::Nothing };
        }
        if kind.starts_with(IMPORTS_WORD) {
            // A second one is a copy that somebody made: its lines are comments and settings of theirs.
            if self.imports.is_none() {
                self.imports = Some(Block {
                    begin,
                    state_line: None,
                    state: None,
                    end: length..length,
                });
                return Open::Imports;
            }
            return Open::Nothing;
        }
        if kind.starts_with(VERSION_WORD) {
            if let Some(other) = self.version.take() {
                self.strays.extend([other.begin, other.end]);
            }
            self.version = Some(VersionBlock {
                begin,
                end: length..length,
            });
            Open::Version
        } else {
            self.blocks.push(Block {
                begin,
                state_line: None,
                state: None,
                end: length..length,
            });
            Open::Handlers
        }
    }

    fn close(&mut self, open: &Open, end: Range<usize>) {
        match (open, self.blocks.last_mut(), &mut self.version) {
            (Open::Handlers, Some(block), _) => block.end = end,
            (Open::Version, _, Some(version)) => version.end = end,
            (Open::Imports | Open::Settings, ..) => {
                if let Some(block) = self.open_block(open) {
                    block.end = end;
                }
            }
            _ => {}
        }
    }
}

fn inside(ranges: &[Range<usize>], offset: usize) -> bool {
    let next = ranges.partition_point(|range| range.start < offset);
    next > 0 && ranges[next - 1].contains(&offset)
}
