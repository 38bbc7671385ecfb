//! A configuration read for editing: which tables stand where, and what they say.
//!
//! The TOML parser is used to read and to find spans, never to write: written back, it would not give the bytes it read.

use std::ops::Range;

use serde_json::{Map, Value as Json};
use toml_edit::{InlineTable, Item, Key, Table, TomlError, Value};

use super::error::ParseError;
use super::lines::{Lines, bom};
use super::marks::{self, Marks};
use super::{FoundHandler, Owner, settings_digest};
use crate::handler::Settings;

/// The CRI plugin's name in configuration version 2 (containerd 1.x, and accepted by 2.x).
pub(crate) const PLUGIN_V2: &str = "io.containerd.grpc.v1.cri";
/// The plugin with the runtimes in configuration version 3 and later (containerd 2.x).
pub(crate) const PLUGIN_V3: &str = "io.containerd.cri.v1.runtime";
/// Both names.
pub(super) const PLUGINS: [&str; 2] = [PLUGIN_V2, PLUGIN_V3];

/// A containerd configuration that was read.
#[derive(Debug, Clone)]
pub struct Document {
    /// The whole document as JSON.
    pub(crate) tree: Settings,
    /// Every table that has a header, the root first, in the order of the text.
    pub(super) sections: Vec<Section>,
    /// Handlers at the plugin name that counts for this version.
    pub(super) tables: Vec<HandlerTable>,
    /// What keeps a table header from adding a handler, if anything does.
    pub(super) obstacle: Option<Obstacle>,
    /// What kata-manager left in the text.
    pub(super) marks: Marks,
    /// Handlers of others that were adopted: their tables stand in comments.
    adopted: Vec<HandlerTable>,
    /// Where `imports` stands in the text and what is in it, if it is there.
    pub(super) imports: Option<ImportsValue>,
    /// Line of each root key.
    root_lines: Vec<(String, usize)>,
    version: Option<Result<u32, String>>,
}

/// A table with a header of its own, and the keys below it.
#[derive(Debug, Clone)]
pub(super) struct Section {
    /// The header's keys; empty for the root.
    pub(super) path: Vec<String>,
    /// Where the header's line begins.
    pub(super) start: usize,
    /// The number of that line, from 1.
    pub(super) line: usize,
    /// Where the line of the last value (or of the header, if there is none) ends, its line break included.
    pub(super) end: usize,
}

/// A table `runtimes.<name>`, however it is written.
#[derive(Debug, Clone)]
pub(super) struct HandlerTable {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) settings: Settings,
    /// Written as tables with headers only, so that its lines can be told from others.
    pub(super) has_own_lines: bool,
}

/// A parent of the handler tables that a header cannot extend.
#[derive(Debug, Clone)]
pub(super) struct Obstacle {
    pub(super) line: usize,
    pub(super) key: String,
    pub(super) what: &'static str,
}

/// The value of `imports`.
#[derive(Debug, Clone)]
pub(super) struct ImportsValue {
    /// Where the array stands, its brackets included; `None` if it is no array.
    pub(super) span: Option<Range<usize>>,
    /// Its elements: what each says (`None` if it is no string) and where it stands.
    pub(super) elements: Vec<(Option<String>, Range<usize>)>,
}

impl Document {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ParseError`] when the text is no TOML.
    pub fn parse(text: &str) -> Result<Document, ParseError> {
        let parsed = toml_edit::Document::parse(text).map_err(|e| parse_error(text, &e))?;
        let root = parsed.as_table();
        let lines = Lines::new(text);
        let mut sections = Sections {
            text,
            lines: &lines,
            found: Vec::new(),
            multiline: Vec::new(),
        };
        sections.root(root);
        let Sections {
            mut found,
            mut multiline,
            ..
        } = sections;
        found.sort_by_key(|section| section.start);
        multiline.sort_by_key(|range| range.start);
        let version = root.get("version").map(read_version);
        let plugin = plugin_of(version.as_ref().and_then(|v| v.as_ref().ok().copied()));
        let marks = marks::find(text, &lines, &multiline);
        let (tables, obstacle) = read_handlers(&lines, root, plugin);
        Ok(Document {
            tree: table_json(root),
            sections: found,
            tables,
            obstacle,
            adopted: read_adopted(text, &lines, &marks, plugin),
            marks,
            imports: root.get("imports").map(read_imports),
            root_lines: root_lines(&lines, root),
            version,
        })
    }

    /// The configuration's `version`; `None` when there is none (containerd then reads version 1) or it is no number.
    pub fn version(&self) -> Option<u32> {
        self.version.as_ref().and_then(|v| v.as_ref().ok().copied())
    }

    /// The `version` as written, if it is no number that containerd knows.
    pub(super) fn odd_version(&self) -> Option<&str> {
        self.version.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// The runtime handlers that containerd reads from this text, and those that [`super::set_handlers`] set aside, in the
    /// order of the text.
    pub fn handlers(&self) -> Vec<FoundHandler> {
        let ours = self.own_names();
        let owner = |name: &String| {
            if ours.contains(name) && self.marks.restated(name) {
                Owner::Restated
            } else if ours.contains(name) {
                Owner::Ours
            } else {
                Owner::Foreign
            }
        };
        let tables = self.tables.iter().map(|t| (t, owner(&t.name)));
        let adopted = self.adopted.iter().map(|t| (t, Owner::Adopted));
        let mut found: Vec<FoundHandler> = tables
            .chain(adopted)
            .map(|(table, owner)| FoundHandler {
                name: table.name.clone(),
                owner,
                settings: table.settings.clone(),
                line: table.line,
            })
            .collect();
        found.sort_by_key(|handler| handler.line);
        found
    }

    /// Names of the handlers whose tables stand in a block of ours, those that are only restated among them.
    pub(super) fn own_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .own_sections()
            .filter_map(|section| handler_of(&section.path).map(str::to_owned))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// The sections in a block of ours that belong to a handler of ours.
    pub(super) fn own_sections(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter().filter(|section| {
            handler_of(&section.path).is_some_and(|name| {
                let block = self.marks.block_at(section.start);
                block.is_some_and(|block| block.owns(name)) && !self.is_taken_over(name)
            })
        })
    }

    /// Whether somebody edited a default of containerd's that we wrote out: it is theirs then, and stays.
    fn is_taken_over(&self, name: &str) -> bool {
        self.marks.restated(name)
            && self.settings(name).map(settings_digest).as_deref()
                != self.marks.written_digest(name)
    }

    /// The sections of one handler, wherever they stand.
    pub(super) fn sections_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Section> {
        let plugin = self.plugin();
        self.sections.iter().filter(move |section| {
            handler_of(&section.path) == Some(name) && section.path[1] == plugin
        })
    }

    /// The runtime handlers below the name of one plugin, whatever the file's version is.
    pub(crate) fn handlers_at(&self, plugin: &str) -> Vec<FoundHandler> {
        if plugin == self.plugin() {
            return self.handlers();
        }
        let runtimes = self
            .tree
            .get("plugins")
            .and_then(|plugins| plugins.get(plugin)?.get("containerd")?.get("runtimes"))
            .and_then(Json::as_object);
        let own = self.own_names();
        let tables = runtimes.into_iter().flatten();
        tables
            .filter_map(|(name, table)| {
                let path = |section: &&Section| {
                    handler_of(&section.path) == Some(name) && section.path[1] == plugin
                };
                Some(FoundHandler {
                    name: name.clone(),
                    owner: if own.contains(name) {
                        Owner::Ours
                    } else {
                        Owner::Foreign
                    },
                    settings: table.as_object()?.clone(),
                    line: self
                        .sections
                        .iter()
                        .find(path)
                        .map_or(1, |section| section.line),
                })
            })
            .collect()
    }

    /// Whether there is a table of this plugin.
    pub(crate) fn has_plugin(&self, plugin: &str) -> bool {
        self.plugins().any(|name| name == plugin)
    }

    /// Whether a plugin's table has a setting, ours apart.
    pub(crate) fn sets(&self, plugin: &str, key: &str) -> bool {
        let table = self
            .tree
            .get("plugins")
            .and_then(|plugins| plugins.get(plugin));
        self.marks.settings.is_none() && table.is_some_and(|table| table.get(key).is_some())
    }

    /// The plugins that have a table.
    pub(crate) fn plugins(&self) -> impl Iterator<Item = &str> {
        let plugins = self.tree.get("plugins").and_then(Json::as_object);
        plugins.into_iter().flatten().map(|(name, _)| name.as_str())
    }

    /// Files that this one imports, as written: globs and relative paths are not resolved.
    pub fn imports(&self) -> Vec<String> {
        self.strings("imports")
    }

    /// Plugins that this file switches off, as written.
    pub fn disabled_plugins(&self) -> Vec<String> {
        self.strings("disabled_plugins")
    }

    /// The handler of pods that name none (`default_runtime_name`).
    pub fn default_runtime(&self) -> Option<&str> {
        self.containerd_table()?
            .get("default_runtime_name")?
            .as_str()
    }

    /// The folder whose `bin` containerd puts before its PATH (plugin `io.containerd.internal.v1.opt`), if one is set;
    /// containerd's own default is `/opt/containerd`.
    pub fn opt_path(&self) -> Option<&str> {
        self.tree
            .get("plugins")?
            .get("io.containerd.internal.v1.opt")?
            .get("path")?
            .as_str()
    }

    /// The table that runtime handlers stand in, as it is written in this version: for messages.
    pub fn runtimes_key(&self) -> String {
        format!("plugins.{:?}.containerd.runtimes", self.plugin())
    }

    /// Whether the text sets nothing at all: white space and comments only.
    pub(super) fn is_empty(&self) -> bool {
        self.tree.is_empty() && self.sections.len() <= 1
    }

    /// The name of the plugin that has the handlers in this version.
    pub(super) fn plugin(&self) -> &'static str {
        plugin_of(self.version())
    }

    /// The line of a root key.
    pub(super) fn root_line(&self, key: &str) -> usize {
        let found = self.root_lines.iter().find(|(name, _)| name == key);
        found.map_or(1, |(_, line)| *line)
    }

    /// The settings of one handler.
    pub(crate) fn settings(&self, name: &str) -> Option<&Settings> {
        let found = self.tables.iter().find(|table| table.name == name);
        found.map(|table| &table.settings)
    }

    fn containerd_table(&self) -> Option<&Json> {
        self.tree
            .get("plugins")?
            .get(self.plugin())?
            .get("containerd")
    }

    fn strings(&self, key: &str) -> Vec<String> {
        let list = self.tree.get(key).and_then(Json::as_array);
        list.into_iter()
            .flatten()
            .filter_map(Json::as_str)
            .map(str::to_owned)
            .collect()
    }
}

/// The name of the handler that a header path belongs to, for either plugin name.
pub(super) fn handler_of(path: &[String]) -> Option<&str> {
    match path {
        [plugins, plugin, containerd, runtimes, name, ..]
            if plugins == "plugins"
                && PLUGINS.contains(&plugin.as_str())
                && containerd == "containerd"
                && runtimes == "runtimes" =>
        {
            Some(name)
        }
        _ => None,
    }
}

fn plugin_of(version: Option<u32>) -> &'static str {
    match version {
        Some(0..=2) => PLUGIN_V2,
        // A file without a version is version 1, which has no handlers that we read; drop-ins without one are version 3.
        _ => PLUGIN_V3,
    }
}

fn parse_error(text: &str, error: &TomlError) -> ParseError {
    let lines = Lines::new(text);
    let offset = error.span().map_or(text.len(), |span| span.start);
    let start = lines.start(offset.min(text.len()));
    let before = text.get(start..offset).unwrap_or_default();
    ParseError {
        line: lines.number(offset),
        column: before.chars().count() + 1,
        message: error.message().trim().replace('\n', ", "),
    }
}

fn read_version(item: &Item) -> Result<u32, String> {
    item.as_integer()
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| item.to_string().trim().to_owned())
}

fn read_imports(item: &Item) -> ImportsValue {
    let array = item.as_array();
    let elements = array.into_iter().flatten();
    ImportsValue {
        span: array.and_then(toml_edit::Array::span),
        elements: elements
            .map(|value| {
                (
                    value.as_str().map(str::to_owned),
                    value.span().unwrap_or_default(),
                )
            })
            .collect(),
    }
}

fn root_lines(lines: &Lines<'_>, root: &Table) -> Vec<(String, usize)> {
    root.iter()
        .filter_map(|(name, _)| {
            let span = root.key(name)?.span()?;
            Some((name.to_owned(), lines.number(span.start)))
        })
        .collect()
}

/// Collects the sections, and the values that go over several lines.
struct Sections<'a> {
    text: &'a str,
    lines: &'a Lines<'a>,
    found: Vec<Section>,
    multiline: Vec<Range<usize>>,
}

impl Sections<'_> {
    fn root(&mut self, root: &Table) {
        let start = bom(self.text);
        self.found.push(Section {
            path: Vec::new(),
            start,
            line: 1,
            end: start,
        });
        self.keys(root, &mut Vec::new(), 0);
    }

    fn header(&mut self, table: &Table, path: &mut Vec<String>) {
        let span = table.span().unwrap_or_default();
        let index = self.found.len();
        self.found.push(Section {
            path: path.clone(),
            start: self.lines.start(span.start),
            line: self.lines.number(span.start),
            end: self.lines.end(span.end),
        });
        self.keys(table, path, index);
    }

    /// Walks the keys of a table. Values and dotted tables belong to the section at `index`.
    fn keys(&mut self, table: &Table, path: &mut Vec<String>, index: usize) {
        for (name, item) in table.iter() {
            path.push(name.to_owned());
            match item {
                Item::None => {}
                Item::Value(value) => self.value(value, index),
                Item::Table(inner) if inner.is_implicit() => self.keys(inner, path, index),
                Item::Table(inner) => self.header(inner, path),
                Item::ArrayOfTables(tables) => {
                    for inner in tables {
                        self.header(inner, path);
                    }
                }
            }
            path.pop();
        }
    }

    fn value(&mut self, value: &Value, index: usize) {
        let Some(span) = value.span() else { return };
        if self.text[span.clone()].contains('\n') {
            self.multiline.push(span.clone());
        }
        let end = self.lines.end(span.end);
        let section = &mut self.found[index];
        section.end = section.end.max(end);
    }
}

/// Reads the handler tables below `plugins.<plugin>.containerd.runtimes`, and what stands in the way of adding one.
fn read_handlers(
    lines: &Lines<'_>,
    root: &Table,
    plugin: &str,
) -> (Vec<HandlerTable>, Option<Obstacle>) {
    let mut at = root;
    let mut obstacle = None;
    for key in ["plugins", plugin, "containerd", "runtimes"] {
        let Some((written, item)) = at.get_key_value(key) else {
            return (Vec::new(), obstacle);
        };
        if obstacle.is_none() {
            obstacle = obstacle_of(lines, written, item);
        }
        match item {
            Item::Table(table) => at = table,
            Item::Value(Value::InlineTable(inline)) => {
                return (read_inline(lines, inline, key, plugin), obstacle);
            }
            _ => return (Vec::new(), obstacle),
        }
    }
    let tables = at
        .iter()
        .filter_map(|(name, item)| {
            let settings = match item_json(item) {
                Json::Object(settings) => settings,
                _ => return None,
            };
            let key = at.key(name)?;
            Some(HandlerTable {
                name: name.to_owned(),
                line: header_line(lines, item, key),
                settings,
                has_own_lines: item.as_table().is_some_and(|table| !table.is_dotted()),
            })
        })
        .collect();
    (tables, obstacle)
}

/// Reads the tables that stand in our comments.
fn read_adopted(text: &str, lines: &Lines<'_>, marks: &Marks, plugin: &str) -> Vec<HandlerTable> {
    let kept = marks.kept.iter().map(|start| {
        let line = &text[*start..lines.end(*start)];
        line.strip_prefix(marks::KEPT).unwrap_or(line)
    });
    let kept_text: String = kept.collect();
    // What cannot be read is not reported here; giving it back says what is wrong with it.
    let Ok(parsed) = toml_edit::Document::parse(kept_text.as_str()) else {
        return Vec::new();
    };
    let (mut tables, _) = read_handlers(&Lines::new(&kept_text), parsed.as_table(), plugin);
    for table in &mut tables {
        let start = marks.kept.get(table.line - 1).copied().unwrap_or(0);
        table.line = lines.number(start);
    }
    tables
}

fn obstacle_of(lines: &Lines<'_>, key: &Key, item: &Item) -> Option<Obstacle> {
    let what = match item {
        Item::Table(table) if table.is_dotted() => "is written with dotted keys",
        Item::Value(Value::InlineTable(_)) => "is an inline table",
        Item::Value(_) => "is no table",
        Item::ArrayOfTables(_) => "is an array of tables",
        _ => return None,
    };
    Some(Obstacle {
        line: lines.number(key.span().unwrap_or_default().start),
        key: key.get().to_owned(),
        what,
    })
}

/// Handlers inside an inline table that stands at `key` of the path to the runtimes.
fn read_inline(
    lines: &Lines<'_>,
    inline: &InlineTable,
    key: &str,
    plugin: &str,
) -> Vec<HandlerTable> {
    let path = ["plugins", plugin, "containerd", "runtimes"];
    let below = path.iter().skip_while(|part| **part != key).skip(1);
    let mut at = inline;
    for part in below {
        match at.get(part).and_then(Value::as_inline_table) {
            Some(inner) => at = inner,
            None => return Vec::new(),
        }
    }
    let line = lines.number(at.span().unwrap_or_default().start);
    at.iter()
        .filter_map(|(name, value)| match value_json(value) {
            Json::Object(settings) => Some(HandlerTable {
                name: name.to_owned(),
                line,
                settings,
                has_own_lines: false,
            }),
            _ => None,
        })
        .collect()
}

fn header_line(lines: &Lines<'_>, item: &Item, key: &Key) -> usize {
    let header = item
        .as_table()
        .filter(|table| !table.is_implicit())
        .and_then(Table::span);
    let span = header.or_else(|| key.span()).unwrap_or_default();
    lines.number(span.start)
}

fn table_json(table: &Table) -> Map<String, Json> {
    table
        .iter()
        .filter(|(_, item)| !item.is_none())
        .map(|(name, item)| (name.to_owned(), item_json(item)))
        .collect()
}

fn item_json(item: &Item) -> Json {
    match item {
        Item::None => Json::Null,
        Item::Value(value) => value_json(value),
        Item::Table(table) => Json::Object(table_json(table)),
        Item::ArrayOfTables(tables) => {
            Json::Array(tables.iter().map(|t| Json::Object(table_json(t))).collect())
        }
    }
}

/// A TOML value as JSON. What JSON does not have (dates, infinities) becomes an object that no table is mistaken for.
fn value_json(value: &Value) -> Json {
    match value {
        Value::String(text) => Json::String(text.value().clone()),
        Value::Integer(number) => Json::from(*number.value()),
        Value::Float(number) if number.value().is_finite() => Json::from(*number.value()),
        Value::Float(number) => serde_json::json!({ "$float": number.value().to_string() }),
        Value::Boolean(flag) => Json::Bool(*flag.value()),
        Value::Datetime(date) => serde_json::json!({ "$date": date.value().to_string() }),
        Value::Array(list) => Json::Array(list.iter().map(value_json).collect()),
        Value::InlineTable(table) => Json::Object(
            table
                .iter()
                .map(|(name, value)| (name.to_owned(), value_json(value)))
                .collect(),
        ),
    }
}
