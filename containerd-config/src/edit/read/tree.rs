//! Tables by their paths, and the rules on what may be defined twice.
//!
//! All nodes are in one list and all names in one map, which is what makes reading quick: no table has a map of its own.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use serde_json::{Map, Value as Json};

use super::{Key, Refusal};

/// How a table came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Form {
    /// By its own header, which begins at this offset. The root has one too.
    Header(usize),
    /// By the header of a table below it.
    Implicit,
    /// By dotted keys.
    Dotted,
}

/// What stands at a key.
#[derive(Debug)]
pub(in super::super) enum What {
    /// A table.
    Table(Form),
    /// An array of tables with headers: its tables.
    Tables(Vec<usize>),
    /// Anything else, inline tables included, and where it stands.
    Value {
        /// What it says.
        json: Json,
        /// Its bytes.
        span: Range<usize>,
    },
}

/// A key and what stands at it.
#[derive(Debug)]
pub(in super::super) struct Node<'t> {
    /// The key.
    pub(in super::super) name: Cow<'t, str>,
    /// Where the key stands.
    pub(in super::super) key_at: usize,
    /// What stands there.
    pub(in super::super) what: What,
    /// The first and the last node below it.
    children: Option<(usize, usize)>,
    /// The next node below the same table.
    next: Option<usize>,
}

impl<'t> Node<'t> {
    fn new(name: Cow<'t, str>, key_at: usize, what: What) -> Node<'t> {
        Node {
            name,
            key_at,
            what,
            children: None,
            next: None,
        }
    }
}

/// The tables of a text. Nodes are named by their place in the list.
#[derive(Debug)]
pub(in super::super) struct Tree<'t> {
    nodes: Vec<Node<'t>>,
    names: HashMap<(usize, Cow<'t, str>), usize>,
    /// The path of the header before: tables, and what was found below each. Headers that follow each other share most of it.
    trail: Vec<(usize, usize)>,
}

impl<'t> Tree<'t> {
    /// The table above all.
    pub(in super::super) const ROOT: usize = 0;

    /// An empty document; it will have about this many keys.
    pub(super) fn new(keys: usize) -> Tree<'t> {
        let mut nodes = Vec::with_capacity(keys);
        nodes.push(Node::new("".into(), 0, What::Table(Form::Header(0))));
        Tree {
            nodes,
            names: HashMap::with_capacity(keys),
            trail: Vec::new(),
        }
    }

    /// What stands at a key of a table.
    pub(in super::super) fn get(&self, table: usize, name: &str) -> Option<usize> {
        self.names.get(&(table, Cow::Borrowed(name))).copied()
    }

    /// A node.
    pub(in super::super) fn node(&self, index: usize) -> &Node<'t> {
        &self.nodes[index]
    }

    /// What stands below a table.
    pub(in super::super) fn children(&self, table: usize) -> impl Iterator<Item = usize> {
        let first = self.nodes[table].children.map(|(first, _)| first);
        std::iter::successors(first, |child| self.nodes[*child].next)
    }

    /// Everything below a node, as JSON.
    pub(in super::super) fn json(&self, index: usize) -> Json {
        let node = &self.nodes[index];
        match &node.what {
            What::Table(_) => Json::Object(self.table_json(index)),
            What::Tables(tables) => tables
                .iter()
                .map(|table| Json::Object(self.table_json(*table)))
                .collect(),
            What::Value { json, .. } => json.clone(),
        }
    }

    fn table_json(&self, table: usize) -> Map<String, Json> {
        self.children(table)
            .map(|child| (self.nodes[child].name.to_string(), self.json(child)))
            .collect()
    }

    /// The whole document as JSON; the values are moved.
    pub(in super::super) fn into_json(mut self) -> Map<String, Json> {
        self.take_table(Tree::ROOT)
    }

    /// As deep as the longest paths of keys, which are bounded.
    fn take_table(&mut self, table: usize) -> Map<String, Json> {
        let mut map = Map::new();
        let mut next = self.nodes[table].children.map(|(first, _)| first);
        while let Some(child) = next {
            let node = &mut self.nodes[child];
            next = node.next;
            let name = std::mem::take(&mut node.name).into_owned();
            let what = std::mem::replace(&mut node.what, What::Tables(Vec::new()));
            let json = match what {
                What::Value { json, .. } => json,
                What::Table(_) => Json::Object(self.take_table(child)),
                What::Tables(tables) => tables
                    .into_iter()
                    .map(|table| Json::Object(self.take_table(table)))
                    .collect(),
            };
            map.insert(name, json);
        }
        map
    }

    /// The table at a path below another. What is missing is made: by a header ([`Form::Implicit`]) or by dotted keys.
    pub(super) fn descend(
        &mut self,
        mut table: usize,
        path: &[Key<'t>],
        form: Form,
    ) -> Result<usize, Refusal> {
        for (depth, key) in path.iter().enumerate() {
            let Some(found) = self.find(table, key, depth) else {
                table = self.add(table, key.clone(), What::Table(form));
                continue;
            };
            let node = &mut self.nodes[found];
            table = match (&mut node.what, form) {
                (What::Table(Form::Header(_)), Form::Dotted) => return Err(twice(key)),
                (What::Table(own), Form::Dotted) => {
                    *own = Form::Dotted;
                    found
                }
                (What::Table(_), _) => found,
                (What::Tables(_), Form::Dotted) => return Err(twice(key)),
                (What::Tables(tables), _) => tables.last().copied().ok_or_else(|| twice(key))?,
                (What::Value { .. }, _) => {
                    let message = format!("{:?} is no table that can be extended", key.name);
                    return Err(Refusal::new(key.at, message));
                }
            };
        }
        Ok(table)
    }

    /// What stands at the key of this depth of a path, and remembers it.
    fn find(&mut self, table: usize, key: &Key<'t>, depth: usize) -> Option<usize> {
        if let Some((parent, found)) = self.trail.get(depth)
            && *parent == table
            && self.nodes[*found].name == key.name
        {
            return Some(*found);
        }
        let found = self.get(table, &key.name)?;
        self.trail.truncate(depth);
        if self.trail.len() == depth {
            self.trail.push((table, found));
        }
        Some(found)
    }

    /// Opens the table of a header that begins at `start`.
    pub(super) fn open_table(
        &mut self,
        parent: usize,
        key: Key<'t>,
        start: usize,
    ) -> Result<usize, Refusal> {
        let place = (parent, key.name.clone());
        let found = match self.names.entry(place) {
            Entry::Occupied(found) => *found.get(),
            Entry::Vacant(free) => {
                free.insert(self.nodes.len());
                return Ok(self.link(parent, key, What::Table(Form::Header(start))));
            }
        };
        let node = &mut self.nodes[found];
        match &mut node.what {
            What::Table(form @ Form::Implicit) => {
                *form = Form::Header(start);
                node.key_at = key.at;
                Ok(found)
            }
            _ => Err(twice(&key)),
        }
    }

    /// Opens the next table of an array of tables, by a header that begins at `start`.
    pub(super) fn open_element(
        &mut self,
        parent: usize,
        key: Key<'t>,
        start: usize,
    ) -> Result<usize, Refusal> {
        let element = Node::new("".into(), key.at, What::Table(Form::Header(start)));
        let array = match self.get(parent, &key.name) {
            Some(found) => found,
            None => self.add(parent, key.clone(), What::Tables(Vec::new())),
        };
        let index = self.nodes.len();
        match &mut self.nodes[array].what {
            What::Tables(tables) => tables.push(index),
            _ => return Err(twice(&key)),
        }
        self.nodes.push(element);
        Ok(index)
    }

    /// Puts a value into a table.
    pub(super) fn insert(&mut self, table: usize, key: Key<'t>, what: What) -> Result<(), Refusal> {
        match self.names.entry((table, key.name.clone())) {
            Entry::Occupied(_) => return Err(twice(&key)),
            Entry::Vacant(free) => free.insert(self.nodes.len()),
        };
        self.link(table, key, what);
        Ok(())
    }

    fn add(&mut self, table: usize, key: Key<'t>, what: What) -> usize {
        self.names
            .insert((table, key.name.clone()), self.nodes.len());
        self.link(table, key, what)
    }

    /// The next node, as the last one below a table.
    fn link(&mut self, table: usize, key: Key<'t>, what: What) -> usize {
        let index = self.nodes.len();
        let last = match &mut self.nodes[table].children {
            Some((_, last)) => Some(std::mem::replace(last, index)),
            none => {
                *none = Some((index, index));
                None
            }
        };
        if let Some(last) = last {
            self.nodes[last].next = Some(index);
        }
        self.nodes.push(Node::new(key.name, key.at, what));
        index
    }
}

fn twice(key: &Key<'_>) -> Refusal {
    Refusal::new(key.at, "duplicate key")
}
