//! The shape of an artifact: which paths are folders, files and symlinks, and whether they fit together.
//!
//! One shape is checked twice: while a single archive is unpacked, and again over all layers of an artifact, because two
//! layers that are harmless alone may not be together (a symlink in one, a path through it in the other).
//! It must not know of contents or of the disk.

use std::collections::HashMap;

use super::path::{parents, walk_target};
use super::{Refusal, Refused};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Folder,
    File,
    Link(String),
}

/// Paths and what they are; every path is normalised.
#[derive(Debug)]
pub struct Shape {
    nodes: HashMap<String, Node>,
    limit: usize,
}

impl Shape {
    /// An empty shape that takes at most `limit` paths, implied folders included.
    pub fn new(limit: usize) -> Shape {
        Shape {
            nodes: HashMap::new(),
            limit,
        }
    }

    /// Adds a folder; one that is there already is fine.
    ///
    /// # Errors
    /// When the path, or one above it, is a file or a symlink, or there are too many.
    pub fn folder(&mut self, path: &str) -> Result<(), Refusal> {
        if path.is_empty() {
            return Ok(());
        }
        self.parents(path)?;
        self.folder_here(path)
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// When the path is there already, one above it is no folder, or there are too many.
    pub fn file(&mut self, path: &str) -> Result<(), Refusal> {
        self.leaf(path, Node::File)
    }

    /// Adds a symlink; where it leads is looked at by [`Shape::finish`].
    ///
    /// # Errors
    /// As [`Shape::file`], and when the target leaves the artifact.
    pub fn link(&mut self, path: &str, target: &str) -> Result<(), Refusal> {
        walk_target(path, target)?;
        self.leaf(path, Node::Link(target.to_owned()))
    }

    /// Whether the path is a regular file.
    pub fn is_file(&self, path: &str) -> bool {
        self.nodes.get(path) == Some(&Node::File)
    }

    /// Checks what can only be checked with all paths known: no symlink may lead through another, since `..` behind a
    /// symlink climbs from where that leads and not from where it lies.
    ///
    /// # Errors
    /// The first offending link in name order.
    pub fn finish(&self) -> Result<(), Refused> {
        let mut links: Vec<_> = self
            .nodes
            .iter()
            .filter_map(|(path, node)| match node {
                Node::Link(target) => Some((path, target)),
                _ => None,
            })
            .collect();
        links.sort();
        for (path, target) in links {
            self.check_link(path, target)
                .map_err(|reason| Refused::new(path, reason))?;
        }
        Ok(())
    }

    fn check_link(&self, path: &str, target: &str) -> Result<(), Refusal> {
        let visited = walk_target(path, target)?;
        let on_the_way = visited.len().saturating_sub(1);
        for step in &visited[..on_the_way] {
            if let Some(Node::Link(_)) = self.nodes.get(step) {
                return Err(Refusal::LinkThroughLink { via: step.clone() });
            }
        }
        Ok(())
    }

    fn leaf(&mut self, path: &str, node: Node) -> Result<(), Refusal> {
        if path.is_empty() {
            return Err(Refusal::EmptyName);
        }
        self.parents(path)?;
        if self.nodes.contains_key(path) {
            return Err(Refusal::Duplicate);
        }
        self.insert(path, node)
    }

    fn parents(&mut self, path: &str) -> Result<(), Refusal> {
        for parent in parents(path) {
            self.folder_here(parent).map_err(|reason| match reason {
                Refusal::Duplicate => Refusal::UnderNonFolder {
                    via: parent.to_owned(),
                },
                other => other,
            })?;
        }
        Ok(())
    }

    fn folder_here(&mut self, path: &str) -> Result<(), Refusal> {
        match self.nodes.get(path) {
            Some(Node::Folder) => Ok(()),
            Some(_) => Err(Refusal::Duplicate),
            None => self.insert(path, Node::Folder),
        }
    }

    fn insert(&mut self, path: &str, node: Node) -> Result<(), Refusal> {
        if self.nodes.len() >= self.limit {
            return Err(Refusal::TooManyEntries { limit: self.limit });
        }
        self.nodes.insert(path.to_owned(), node);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_must_not_meet() {
        let mut shape = Shape::new(100);
        shape.folder("a").unwrap();
        shape.folder("a").unwrap();
        shape.file("a/f").unwrap();
        assert_eq!(shape.file("a/f"), Err(Refusal::Duplicate));
        assert_eq!(shape.folder("a/f"), Err(Refusal::Duplicate));
        assert_eq!(shape.file("a"), Err(Refusal::Duplicate));
        shape.link("l", "a").unwrap();
        for path in ["l/x", "a/f/x"] {
            assert!(matches!(
                shape.file(path),
                Err(Refusal::UnderNonFolder { .. })
            ));
        }
        assert_eq!(shape.file(""), Err(Refusal::EmptyName));
        shape.finish().unwrap();
    }

    #[test]
    fn a_link_through_a_link_is_refused_in_whatever_order_they_come() {
        for order in [[0, 1], [1, 0]] {
            let mut shape = Shape::new(100);
            for step in order {
                match step {
                    0 => shape.link("a/b/up", "../..").unwrap(),
                    // Lexically `a`, really one above the top folder.
                    _ => shape.link("out", "a/b/up/../..").unwrap(),
                }
            }
            let refused = shape.finish().unwrap_err();
            assert_eq!(refused.entry, "out");
            assert!(matches!(refused.reason, Refusal::LinkThroughLink { .. }));
        }
    }

    #[test]
    fn a_link_to_a_link_is_fine() {
        let mut shape = Shape::new(100);
        shape.file("kata-1.image").unwrap();
        shape.link("kata.image", "kata-1.image").unwrap();
        shape.link("latest", "./kata.image").unwrap();
        shape.finish().unwrap();
    }

    #[test]
    fn implied_folders_count() {
        let mut shape = Shape::new(3);
        shape.file("a/b/c").unwrap();
        assert_eq!(shape.file("d"), Err(Refusal::TooManyEntries { limit: 3 }));
    }
}
