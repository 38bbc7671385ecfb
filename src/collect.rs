//! Which generations stay and why, and the removal of the others with what only they needed.
//!
//! A class keeps its live generation, the one below it to roll back to, the one above it where a rollback left one, what
//! `rollback` holds, what a sandbox claims, and whatever a process has open.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use km_host::claims::{Claims, Found};
use km_host::process;
use serde::Serialize;

use crate::journal::Record;
use crate::node::Node;
use crate::output;

/// What was, or would be, removed, and what stays.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Collection {
    /// Generations that go.
    pub(crate) removed: Vec<Generation>,
    /// Generations that stay.
    pub(crate) kept: Vec<Generation>,
    /// Names of blobs, contents and records that go.
    pub(crate) files: usize,
    /// Bytes that the disk gets back.
    pub(crate) bytes: u64,
}

/// A generation of a class.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Generation {
    pub(crate) class: String,
    pub(crate) generation: u64,
    /// Why it stays; empty for one that goes.
    pub(crate) because: Vec<String>,
}

/// Finds what can go. Reads only.
pub(crate) fn find(node: &Node, record: &Record) -> Result<Collection> {
    let claimed = claimed(node)?;
    let mut found = Collection::default();
    let mut gone = BTreeSet::new();
    for class in node.store.classes()? {
        let live = node.store.live_number(&class)?;
        let numbers: Vec<u64> = node
            .store
            .generations(&class)?
            .iter()
            .map(km_artifacts::Generation::number)
            .collect();
        let because = reasons(&numbers, live, record.held.get(&class).copied());
        for number in numbers {
            let mut because = because.get(&number).cloned().unwrap_or_default();
            if let Some(sandboxes) = claimed.get(&(class.clone(), number)) {
                because.extend(sandboxes.iter().map(|id| format!("sandbox {id} uses it")));
            }
            if because.is_empty() {
                let dir = node.store.generation_dir(&class, number);
                let holders = process::holders(&node.root, &dir)?;
                because.extend(holders.iter().map(|(holder, _)| {
                    format!("process {} ({}) has it open", holder.pid, holder.name)
                }));
            }
            let goes = because.is_empty();
            let generation = Generation {
                class: class.clone(),
                generation: number,
                because,
            };
            if goes {
                gone.insert((class.clone(), number));
                found.removed.push(generation);
            } else {
                found.kept.push(generation);
            }
        }
    }
    let unreferenced = node.store.unreferenced_without(&gone)?;
    found.files = unreferenced.paths.len();
    found.bytes = unreferenced.bytes;
    Ok(found)
}

/// Removes what [`find`] found. The lock is held.
pub(crate) fn remove(node: &Node, found: &Collection) -> Result<()> {
    for generation in &found.removed {
        node.store
            .remove_generation(&generation.class, generation.generation)?;
    }
    if found.files > 0 || !found.removed.is_empty() {
        node.store.remove_unreferenced()?;
    }
    Ok(())
}

/// Why generations stay, by what is known of the class alone.
fn reasons(numbers: &[u64], live: Option<u64>, held: Option<u64>) -> BTreeMap<u64, Vec<String>> {
    let mut reasons: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut keep = |number: Option<u64>, why: &str| {
        if let Some(number) = number {
            reasons.entry(number).or_default().push(why.to_owned());
        }
    };
    keep(live, "live");
    keep(held, "held by rollback");
    let below = |number: &&u64| live.is_none_or(|live| **number < live);
    keep(numbers.iter().rfind(below).copied(), "previous");
    let above = |number: &&u64| live.is_some_and(|live| **number > live);
    keep(numbers.iter().rfind(above).copied(), "newest");
    reasons
}

/// The sandboxes that claim a generation, as far as they live.
fn claimed(node: &Node) -> Result<BTreeMap<(String, u64), Vec<String>>> {
    let claims = Claims::open(&node.root)?;
    let mut claimed: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for found in claims.list()? {
        match found {
            Found::Claim(claim) if claims.is_alive(&claim) => claimed
                .entry((claim.class, claim.generation))
                .or_default()
                .push(claim.sandbox),
            Found::Claim(_) => {}
            // What it claims is not known, and open files keep what is in use all the same.
            Found::Unreadable { path, problem } => output::to_stderr(&format!(
                "warning: {} is no claim of a sandbox that can be read: {problem}",
                path.display()
            )),
        }
    }
    Ok(claimed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(numbers: &[u64], live: Option<u64>, held: Option<u64>) -> Vec<u64> {
        reasons(numbers, live, held).into_keys().collect()
    }

    #[test]
    fn the_neighbours_of_the_live_generation_stay() {
        assert_eq!(kept(&[1, 2, 3, 4], Some(4), None), [3, 4]);
        assert_eq!(kept(&[1, 2, 3, 4, 5], Some(3), Some(3)), [2, 3, 5]);
        assert_eq!(kept(&[1, 2, 3, 4], Some(4), Some(1)), [1, 3, 4]);
        assert_eq!(kept(&[7], Some(7), None), [7]);
        assert_eq!(kept(&[], None, None), [0; 0]);
    }

    #[test]
    fn without_a_live_one_the_newest_stays() {
        assert_eq!(kept(&[1, 2, 3], None, None), [3]);
    }
}
