//! A configuration read for editing: which tables stand where, and what they say.
//!
//! The text is parsed to read and to find spans, never to be written back: that would not give the bytes that were read.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::Value as Json;
use toml_edit::TomlError;

use super::error::ParseError;
use super::lines::{Lines, bom};
use super::marks::{self, Marks};
use super::read::{self, Form, Header, Node, Read, Refusal, Tree, What};
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
    /// What it is to us.
    pub(super) of: Of,
    /// Where the header's line begins.
    pub(super) start: usize,
    /// The number of that line, from 1.
    pub(super) line: usize,
    /// Where the line of the last value (or of the header, if there is none) ends, its line break included.
    pub(super) end: usize,
}

/// What a section is, by the keys of its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Of {
    /// The table of a CRI plugin.
    Plugin(&'static str),
    /// A handler's table, or one below it.
    Handler {
        /// The CRI plugin, by either name.
        plugin: &'static str,
        /// The handler.
        name: String,
    },
    /// Nothing that we change.
    Other,
}

impl Of {
    fn read(path: &[Cow<'_, str>]) -> Of {
        let known = |name: &str| PLUGINS.into_iter().find(|plugin| *plugin == name);
        match path {
            [plugins, plugin, below @ ..] if plugins == "plugins" => match (known(plugin), below) {
                (Some(plugin), []) => Of::Plugin(plugin),
                (Some(plugin), [containerd, runtimes, name, ..])
                    if containerd == "containerd" && runtimes == "runtimes" =>
                {
                    Of::Handler {
                        plugin,
                        name: name.to_string(),
                    }
                }
                _ => Of::Other,
            },
            _ => Of::Other,
        }
    }
}

impl Section {
    /// The handler that it belongs to, for either plugin name.
    pub(super) fn handler(&self) -> Option<&str> {
        match &self.of {
            Of::Handler { name, .. } => Some(name),
            Of::Plugin(_) | Of::Other => None,
        }
    }

    fn is_of(&self, handler: &str, in_plugin: &str) -> bool {
        matches!(&self.of, Of::Handler { plugin, name } if *plugin == in_plugin && name == handler)
    }
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
        let Read {
            tree,
            headers,
            root_end,
            mut multiline,
            root_arrays,
        } = read::read(text).map_err(|refusal| parse_error(text, refusal))?;
        let lines = Lines::new(text);
        multiline.sort_by_key(|range| range.start);
        let version = tree
            .get(Tree::ROOT, "version")
            .map(|found| read_version(text, tree.node(found)));
        let plugin = plugin_of(version.as_ref().and_then(|v| v.as_ref().ok().copied()));
        let marks = marks::find(text, &lines, &multiline);
        let (tables, obstacle) = read_handlers(&lines, &tree, plugin);
        Ok(Document {
            sections: sections(text, &lines, headers, root_end),
            tables,
            obstacle,
            adopted: read_adopted(text, &lines, &marks, plugin),
            marks,
            imports: read_imports(&tree, root_arrays),
            root_lines: root_lines(&lines, &tree),
            version,
            tree: tree.into_json(),
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
            .filter_map(|section| section.handler().map(str::to_owned))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// The sections in a block of ours that belong to a handler of ours.
    pub(super) fn own_sections(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter().filter(|section| {
            section.handler().is_some_and(|name| {
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
        self.sections
            .iter()
            .filter(move |section| section.is_of(name, plugin))
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
                        .find(|section| section.is_of(name, plugin))
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

fn plugin_of(version: Option<u32>) -> &'static str {
    match version {
        Some(0..=2) => PLUGIN_V2,
        // A file without a version is version 1, which has no handlers that we read; drop-ins without one are version 3.
        _ => PLUGIN_V3,
    }
}

/// What is wrong with a text, in the words of `toml_edit`, which are the better ones; it refuses what we refuse.
fn parse_error(text: &str, refusal: Refusal) -> ParseError {
    let (offset, message) = match toml_edit::Document::parse(text).err() {
        Some(error) => (offset_of(text, &error), error.message().to_owned()),
        None => (refusal.at, refusal.message),
    };
    let lines = Lines::new(text);
    let start = lines.start(offset.min(text.len()));
    let before = text.get(start..offset).unwrap_or_default();
    ParseError {
        line: lines.number(offset),
        column: before.chars().count() + 1,
        message: message.trim().replace('\n', ", "),
    }
}

fn offset_of(text: &str, error: &TomlError) -> usize {
    error.span().map_or(text.len(), |span| span.start)
}

fn read_version(text: &str, node: &Node<'_>) -> Result<u32, String> {
    let What::Value { json, span } = &node.what else {
        return Err("a table".to_owned());
    };
    let number = json.as_u64().and_then(|number| u32::try_from(number).ok());
    number.ok_or_else(|| text[span.clone()].to_owned())
}

fn read_imports(
    tree: &Tree<'_>,
    root_arrays: Vec<(Range<usize>, Vec<read::Element>)>,
) -> Option<ImportsValue> {
    let node = tree.node(tree.get(Tree::ROOT, "imports")?);
    let found = match &node.what {
        What::Value { span, .. } => root_arrays.into_iter().find(|(array, _)| array == span),
        _ => None,
    };
    let (span, elements) = found.unzip();
    Some(ImportsValue {
        span,
        elements: elements.unwrap_or_default(),
    })
}

fn root_lines(lines: &Lines<'_>, tree: &Tree<'_>) -> Vec<(String, usize)> {
    let keys = tree.children(Tree::ROOT).map(|child| tree.node(child));
    keys.map(|node| (node.name.to_string(), lines.number(node.key_at)))
        .collect()
}

/// The root and every table with a header, by whole lines.
fn sections(
    text: &str,
    lines: &Lines<'_>,
    headers: Vec<Header<'_>>,
    root_end: Option<usize>,
) -> Vec<Section> {
    let start = bom(text);
    let root = Section {
        of: Of::Other,
        start,
        line: 1,
        end: root_end.map_or(start, |end| lines.end(end)),
    };
    let headers = headers.iter().map(|header| {
        let line = lines.number(header.span.start);
        Section {
            of: Of::read(&header.path),
            start: lines.start_of(line),
            line,
            end: lines.end(header.end),
        }
    });
    std::iter::once(root).chain(headers).collect()
}

/// Reads the handler tables below `plugins.<plugin>.containerd.runtimes`, and what stands in the way of adding one.
fn read_handlers(
    lines: &Lines<'_>,
    tree: &Tree<'_>,
    plugin: &str,
) -> (Vec<HandlerTable>, Option<Obstacle>) {
    let path = ["plugins", plugin, "containerd", "runtimes"];
    let mut at = Tree::ROOT;
    let mut obstacle = None;
    for (depth, key) in path.iter().enumerate() {
        let Some(found) = tree.get(at, key) else {
            return (Vec::new(), obstacle);
        };
        let node = tree.node(found);
        if obstacle.is_none() {
            obstacle = obstacle_of(lines, node);
        }
        match &node.what {
            What::Table(_) => at = found,
            What::Value { json, .. } => {
                let line = lines.number(node.key_at);
                return (read_inline(json, &path[depth + 1..], line), obstacle);
            }
            What::Tables(_) => return (Vec::new(), obstacle),
        }
    }
    let tables = tree
        .children(at)
        .filter_map(|child| {
            let node = tree.node(child);
            let settings = match tree.json(child) {
                Json::Object(settings) => settings,
                _ => return None,
            };
            let (at, has_own_lines) = match node.what {
                What::Table(Form::Header(start)) => (start, true),
                What::Table(form) => (node.key_at, form != Form::Dotted),
                _ => (node.key_at, false),
            };
            Some(HandlerTable {
                name: node.name.to_string(),
                line: lines.number(at),
                settings,
                has_own_lines,
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
    let Ok(read) = read::read(&kept_text) else {
        return Vec::new();
    };
    let (mut tables, _) = read_handlers(&Lines::new(&kept_text), &read.tree, plugin);
    for table in &mut tables {
        let start = marks.kept.get(table.line - 1).copied().unwrap_or(0);
        table.line = lines.number(start);
    }
    tables
}

fn obstacle_of(lines: &Lines<'_>, node: &Node<'_>) -> Option<Obstacle> {
    let what = match &node.what {
        What::Table(Form::Dotted) => "is written with dotted keys",
        What::Table(_) => return None,
        What::Value { json, .. } if json.is_object() => "is an inline table",
        What::Value { .. } => "is no table",
        What::Tables(_) => "is an array of tables",
    };
    Some(Obstacle {
        line: lines.number(node.key_at),
        key: node.name.to_string(),
        what,
    })
}

/// Handlers inside an inline table on this line, below the keys of `path`.
fn read_inline(json: &Json, path: &[&str], line: usize) -> Vec<HandlerTable> {
    let runtimes = path.iter().try_fold(json, |at, key| at.get(key));
    let tables = runtimes.and_then(Json::as_object).into_iter().flatten();
    tables
        .filter_map(|(name, table)| {
            Some(HandlerTable {
                name: name.clone(),
                line,
                settings: table.as_object()?.clone(),
                has_own_lines: false,
            })
        })
        .collect()
}
