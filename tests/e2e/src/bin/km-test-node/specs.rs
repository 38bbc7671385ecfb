//! The CDI specs that follow the devices of a shape: one device a group, under the names that the shape makes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::node_in_a_box::Node;
use serde::Deserialize;

use crate::shown::Listed;

#[derive(Debug, Deserialize)]
struct List {
    specs: Vec<Spec>,
}

#[derive(Debug, Deserialize)]
struct Spec {
    ours: bool,
    kind: Option<String>,
    devices: Vec<Device>,
}

#[derive(Debug, Deserialize)]
struct Device {
    name: String,
    nodes: Vec<String>,
    missing: Vec<String>,
}

fn list(node: &mut Node) -> Result<Vec<Spec>> {
    let said = node.kata_manager(&["cdi", "list", "--output", "json"], 0)?;
    let list: List =
        serde_json::from_str(&said.stdout).with_context(|| format!("read {}", said.stdout))?;
    Ok(list.specs)
}

/// Everything is bound: each group is one device, named by its first function's address and by an index, with nodes that are there.
pub(crate) fn follow(node: &mut Node) -> Result<()> {
    let listed = Listed::of(node)?;
    let mut groups: BTreeMap<(String, u32), Vec<&str>> = BTreeMap::new();
    for device in listed.devices.iter().filter(|device| device.is_primary()) {
        let group = device.iommu_group.context("a bound function has a group")?;
        let kind = format!("nvidia.com/{}", device.class());
        groups
            .entry((kind, group))
            .or_default()
            .push(&device.address);
    }
    let specs = list(node)?;
    ensure!(specs.iter().all(|spec| spec.ours), "{specs:?}");
    let kinds: BTreeSet<&String> = groups.keys().map(|(kind, _)| kind).collect();
    let said: BTreeSet<&String> = specs.iter().filter_map(|spec| spec.kind.as_ref()).collect();
    ensure!(kinds == said, "{kinds:?} are wanted, there are {said:?}");
    for spec in &specs {
        let mine = groups
            .iter()
            .filter(|((kind, _), _)| Some(kind) == spec.kind.as_ref());
        let mut wanted = BTreeSet::new();
        let mut index = 0;
        for (_, addresses) in mine {
            wanted.insert((*addresses.first().context("a group has a device")?).to_owned());
            for _ in addresses {
                wanted.insert(index.to_string());
                index += 1;
            }
        }
        let names: BTreeSet<String> = spec
            .devices
            .iter()
            .map(|device| device.name.clone())
            .collect();
        ensure!(
            names == wanted,
            "{wanted:?} are wanted, there are {names:?}"
        );
        for device in &spec.devices {
            ensure!(
                !device.nodes.is_empty() && device.missing.is_empty(),
                "{device:?}"
            );
        }
    }
    node.kata_manager(&["cdi", "validate"], 0)?;
    let again = node.kata_manager(&["cdi", "generate"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "it {again}");
    Ok(())
}

/// Nothing is bound: no spec of ours is left.
pub(crate) fn are_gone(node: &mut Node) -> Result<()> {
    let specs = list(node)?;
    ensure!(specs.is_empty(), "{specs:?}");
    Ok(())
}
