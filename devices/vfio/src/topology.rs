//! The tree that an [`Inventory`]'s functions hang in: NUMA node, root bus, bridges, functions. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{Address, Inventory};

/// The functions of one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Domain {
    /// The node's number; `None` where the firmware tells none.
    pub numa_node: Option<u16>,
    /// Its root buses that have such functions.
    pub roots: Vec<RootBus>,
}

/// A root bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RootBus {
    /// Its name in sysfs, `pci0000:40`; `pci` where sysfs told none.
    pub name: String,
    /// What hangs from it.
    pub children: Vec<Node>,
}

/// A bridge with what is below it, or a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Where it is, to be looked up in the inventory.
    pub address: Address,
    /// What is below it; nothing for a function.
    pub children: Vec<Node>,
}

impl Inventory {
    /// The tree of this inventory.
    pub fn topology(&self) -> Vec<Domain> {
        type Roots<'a> = BTreeMap<&'a str, Vec<Node>>;
        let mut domains: BTreeMap<(bool, Option<u16>), Roots<'_>> = BTreeMap::new();
        for function in &self.functions {
            // Nodes that are told come first.
            let domain = (function.numa_node.is_none(), function.numa_node);
            let root = function.root_complex.as_deref().unwrap_or("pci");
            let children = domains.entry(domain).or_default().entry(root).or_default();
            insert(children, &function.path, function.address);
        }
        let root = |(name, children): (&str, Vec<Node>)| RootBus {
            name: name.to_owned(),
            children,
        };
        domains
            .into_iter()
            .map(|((_, numa_node), roots)| Domain {
                numa_node,
                roots: roots.into_iter().map(root).collect(),
            })
            .collect()
    }
}

/// Functions come in order of their addresses, so what is added last stands last.
fn insert(mut children: &mut Vec<Node>, path: &[Address], function: Address) {
    for address in path {
        let at = match children.iter().position(|node| node.address == *address) {
            Some(at) => at,
            None => {
                children.push(leaf(*address));
                children.len() - 1
            }
        };
        children = &mut children[at].children;
    }
    children.push(leaf(function));
}

fn leaf(address: Address) -> Node {
    Node {
        address,
        children: Vec::new(),
    }
}
