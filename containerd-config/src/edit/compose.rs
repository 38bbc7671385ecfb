//! Putting our handlers into a text that has nothing of ours.

use super::document::{PLUGIN_V2, PLUGIN_V3};
use super::error::EditError;
use super::lines::{Lines, bom};
use super::marks::{BEGIN_HANDLERS, BEGIN_VERSION, END, KEPT, STATE, State};
use super::settings_digest;
use super::strip::Stripped;
use serde_json::Value;

use crate::handler::{Handler, Settings};

/// The comment in the table of a restated default.
const RESTATED: &str = "# containerd's own default, written out: containerd 1.x drops it once a file names any handler";

/// A table of ours.
pub(super) struct OurTable {
    /// The handler.
    pub(super) name: String,
    /// What it says.
    pub(super) settings: Settings,
    /// The short digest of what we last wrote, which is not what it says where somebody's edit stays.
    pub(super) digest: String,
}

impl OurTable {
    /// The table that stands for a handler.
    pub(super) fn new(handler: &Handler) -> OurTable {
        let settings = handler.settings();
        OurTable {
            name: handler.name.clone(),
            digest: settings_digest(&settings),
            settings,
        }
    }
}

/// What is to be put in.
pub(super) struct Plan<'a> {
    pub(super) wanted: &'a [OurTable],
    /// Defaults of containerd to write out beside them.
    pub(super) restated: &'a [OurTable],
    /// The configuration's version, the file's own or the one that it gets.
    pub(super) version: u32,
    /// Foreign handlers whose tables become comments.
    pub(super) displaced: &'a [String],
    /// There was no file at first.
    pub(super) created: bool,
}

impl Plan<'_> {
    /// Every table to write.
    pub(super) fn handlers(&self) -> impl Iterator<Item = &OurTable> {
        self.wanted.iter().chain(self.restated)
    }
}

/// Refuses handlers that have no place in a configuration.
pub(super) fn check_wanted(wanted: &[Handler]) -> Result<(), EditError> {
    for (index, handler) in wanted.iter().enumerate() {
        let bad = |reason: &str| EditError::BadHandler {
            name: handler.name.clone(),
            reason: reason.to_owned(),
        };
        if handler.name.is_empty() {
            return Err(bad("it has no name"));
        }
        if handler.runtime_type.is_empty() {
            return Err(bad("it has no runtime_type"));
        }
        if wanted[..index]
            .iter()
            .any(|other| other.name == handler.name)
        {
            return Err(bad("it is wanted twice"));
        }
        let texts = [Some(&handler.name), Some(&handler.runtime_type)]
            .into_iter()
            .chain(
                [
                    &handler.runtime_path,
                    &handler.config_path,
                    &handler.snapshotter,
                ]
                .map(Option::as_ref),
            )
            .flatten()
            .chain(&handler.pod_annotations)
            .chain(&handler.container_annotations);
        for text in texts {
            if text.chars().any(char::is_control) {
                return Err(bad(&format!("{text:?} has a control character")));
            }
        }
    }
    Ok(())
}

/// The header that handler tables can be added below.
pub(super) fn runtimes_header(version: u32) -> String {
    format!("plugins.{:?}.containerd.runtimes", plugin(version))
}

pub(super) fn plugin(version: u32) -> &'static str {
    if version <= 2 { PLUGIN_V2 } else { PLUGIN_V3 }
}

/// The text with our handlers in it.
pub(super) fn compose(base: &Stripped<'_>, plan: &Plan<'_>) -> String {
    let text = base.text.as_str();
    let eol = line_break(text);
    let mut inserts: Vec<(usize, String)> = Vec::new();
    let start = bom(text);
    if base.document.version().is_none() {
        let version = plan.version;
        let lines = format!("{BEGIN_VERSION}{eol}version = {version}{eol}{END}{eol}");
        inserts.push((start, lines));
    }
    let lines = Lines::new(text);
    for name in plan.displaced {
        for section in base.document.sections_of(name) {
            let mut at = section.start;
            while at < section.end {
                inserts.push((at, KEPT.to_owned()));
                at = lines.end(at);
            }
        }
    }
    let at = place(base);
    let before = &text[start..at];
    let joined = !before.is_empty() && !before.ends_with('\n');
    let mut block = String::new();
    if joined {
        block.push_str(eol);
    }
    if !before.is_empty() || !inserts.is_empty() {
        block.push_str(eol);
    }
    let state = State {
        handlers: plan
            .handlers()
            .map(|table| (table.name.clone(), table.digest.clone()))
            .collect(),
        joined,
        restated: plan.restated.iter().map(|h| h.name.clone()).collect(),
        created: plan.created,
    };
    render_block(&mut block, plan, &state, eol);
    inserts.push((at, block));
    inserts.sort_by_key(|(at, _)| *at);
    spliced(text, &inserts)
}

/// Where our block goes: where it was, or at the end; never between a header and its keys.
fn place(base: &Stripped<'_>) -> usize {
    let Some(at) = base.at else {
        return base.text.len();
    };
    let mut sections = base.document.sections.iter();
    let split = sections.find(|section| section.start < at && at < section.end);
    split.map_or(at, |section| section.end)
}

fn render_block(out: &mut String, plan: &Plan<'_>, state: &State, eol: &str) {
    let tables = plan.handlers().map(|ours| {
        let comment = state.restated.contains(&ours.name).then_some(RESTATED);
        (ours, comment)
    });
    render(out, tables, plugin(plan.version), state, eol);
}

/// Our block with these tables, in a configuration of this version.
pub(super) fn render_tables(
    out: &mut String,
    tables: &[OurTable],
    version: u32,
    state: &State,
    eol: &str,
) {
    let tables = tables.iter().map(|ours| (ours, None));
    render(out, tables, plugin(version), state, eol);
}

fn render<'t>(
    out: &mut String,
    tables: impl Iterator<Item = (&'t OurTable, Option<&'t str>)>,
    plugin: &str,
    state: &State,
    eol: &str,
) {
    let mut line = |text: &str| {
        out.push_str(text);
        out.push_str(eol);
    };
    line(BEGIN_HANDLERS);
    // Names and digests always have a JSON form.
    let state = serde_json::to_string(state).unwrap_or_default();
    line(&format!("{STATE}{state}"));
    for (index, (ours, comment)) in tables.enumerate() {
        if index > 0 {
            line("");
        }
        let mut lines = table(ours, plugin);
        if let Some(comment) = comment {
            lines.insert(1, comment.to_owned());
        }
        for text in lines {
            line(&text);
        }
    }
    line(END);
}

/// The lines of one handler's table.
fn table(ours: &OurTable, plugin: &str) -> Vec<String> {
    let header = format!(
        "plugins.{}.containerd.runtimes.{}",
        quoted(plugin),
        key(&ours.name)
    );
    let mut lines = vec![format!("[{header}]")];
    let mut below = Vec::new();
    for (name, setting) in &ours.settings {
        match setting {
            Value::Object(table) if name == "options" => {
                below.push(format!("[{header}.options]"));
                below.extend(
                    table
                        .iter()
                        .map(|(name, setting)| assignment(name, setting)),
                );
            }
            setting => lines.push(assignment(name, setting)),
        }
    }
    lines.extend(below);
    lines
}

pub(super) fn assignment(name: &str, setting: &Value) -> String {
    format!("{} = {}", key(name), value(setting))
}

/// A value in TOML's form. What TOML does not have (null) is written as an empty table, which is then seen to differ.
fn value(setting: &Value) -> String {
    match setting {
        Value::String(text) => quoted(text),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(value).collect();
            format!("[{}]", list.join(", "))
        }
        Value::Object(table) if table.is_empty() => "{}".to_owned(),
        Value::Object(table) => {
            let table: Vec<String> = table.iter().map(|(k, v)| assignment(k, v)).collect();
            format!("{{ {} }}", table.join(", "))
        }
        Value::Null => "{}".to_owned(),
        Value::Bool(_) | Value::Number(_) => setting.to_string(),
    }
}

/// A key, bare where TOML allows it (letters, digits, `_` and `-` of ASCII).
fn key(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(bare) {
        name.to_owned()
    } else {
        quoted(name)
    }
}

/// A basic string.
pub(super) fn quoted(text: &str) -> String {
    use std::fmt::Write as _;
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        if c.is_control() {
            // Writing to a String cannot fail.
            let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            continue;
        }
        if c == '"' || c == '\\' {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

/// The line break that the text uses, by its first one.
pub(super) fn line_break(text: &str) -> &'static str {
    match text.find('\n') {
        Some(at) if text[..at].ends_with('\r') => "\r\n",
        _ => "\n",
    }
}

fn spliced(text: &str, inserts: &[(usize, String)]) -> String {
    let added: usize = inserts.iter().map(|(_, insert)| insert.len()).sum();
    let mut out = String::with_capacity(text.len() + added);
    let mut last = 0;
    for (at, insert) in inserts {
        out.push_str(&text[last..*at]);
        out.push_str(insert);
        last = *at;
    }
    out.push_str(&text[last..]);
    out
}
