//! What a pod's guest sees of the host's devices, and what was planned for it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::cri::{Cri, Pod};
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::wait;
use serde_json::Value;

use crate::pods::NAMESPACE;
use crate::shown::{Device, Listed};

/// The guest says nothing, or no more. As in [`crate::nested`], such a one, and no other, is tried once more, and the output says so.
#[derive(Debug)]
pub(crate) struct Hung;

impl std::fmt::Display for Hung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the pod's guest does not answer")
    }
}

/// A function in a guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Function {
    /// Its device id.
    id: String,
    /// The bus that its port is on, and its NUMA node: -1 where the guest has none.
    above: (u64, i64),
}

/// The guest's functions behind ports, by the bus that each is on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen(BTreeMap<u64, Function>);

/// Asks the guest.
pub(crate) fn functions(cri: &Cri, pod: &Pod, patience: Duration) -> Result<Seen> {
    let command = &["/bin/functions"];
    let said = wait::until("the guest's agent", patience, || {
        let said = cri.exec_within(&pod.container, command, patience.as_secs().cast_signed())?;
        ensure!(said.code == 0, "{said:?}");
        Ok(said.stdout)
    })
    .context(Hung)?;
    ensure!(said.contains("these are all"), "it said {said}");
    let mut seen = BTreeMap::new();
    for line in said.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let ["function", path, "0x10de", device, node] = words[..] else {
            continue;
        };
        // /sys/devices/pci0000:00/0000:00:03.0/0000:02:00.0
        let steps: Vec<&str> = path
            .trim_start_matches("/sys/devices/")
            .split('/')
            .collect();
        let [_, port, function] = steps[..] else {
            anyhow::bail!("{path} is not behind one port")
        };
        ensure!(function.ends_with(":00.0"), "{path} is not at 00.0");
        let there = Function {
            id: device.trim_start_matches("0x").to_owned(),
            above: (bus(port)?, node.parse()?),
        };
        let other = seen.insert(bus(function)?, there);
        ensure!(other.is_none(), "two functions share a bus: {said}");
    }
    ensure!(!seen.is_empty(), "the guest has no GPU: {said}");
    Ok(Seen(seen))
}

/// The bus in an address with a domain.
fn bus(address: &str) -> Result<u64> {
    let bus = address.split(':').nth(1).context("a bus number")?;
    Ok(u64::from_str_radix(bus, 16)?)
}

fn id(device: &Device) -> String {
    let id = device.id();
    id.split(' ').nth(1).unwrap_or_default().to_owned()
}

/// The bus of each device of the host, by address, in the arguments of a pod's QEMU.
fn attached(node: &mut Node, pod: &Pod) -> Result<BTreeMap<String, String>> {
    let line = format!("pgrep -f 'name sandbox-{}' | head -n 1", pod.sandbox);
    let process = node.shell(&line)?;
    let words = node.get(&format!("/proc/{}/cmdline", process.trim()))?;
    let words = String::from_utf8(words)?;
    let value = |word: &str, key: &str| {
        let value = word.split(',').find_map(|part| part.strip_prefix(key));
        value.map(str::to_owned)
    };
    let devices = words
        .split('\0')
        .filter(|word| word.starts_with("vfio-pci,"));
    Ok(devices
        .filter_map(|word| Some((value(word, "host=")?, value(word, "bus=")?)))
        .collect())
}

impl Seen {
    /// What is drawn for the pod is what its QEMU was told of each device, by address, and what its guest has. `more` says what guest is meant.
    pub(crate) fn is_planned(
        &self,
        node: &mut Node,
        pod: &Pod,
        name: &str,
        more: &[&str],
    ) -> Result<()> {
        let (listed, attached) = (Listed::of(node)?, attached(node, pod)?);
        let name = format!("{NAMESPACE}/{name}");
        let words = [&["topology", "--plan", &name, "--output", "json"], more].concat();
        let said = node.kata_manager(&words, 0)?.stdout;
        let plan: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let list = |key: &str| plan["plan"][key].as_array().cloned().unwrap_or_default();
        let (ports, expanders) = (list("ports"), list("expanders"));
        let named = |all: &[Value], id: &Value| all.iter().find(|one| one["id"] == *id).cloned();
        let mut planned = BTreeMap::new();
        for device in list("devices") {
            let port = named(&ports, &device["port"]).context("its port")?;
            let above = match named(&expanders, &port["parent"]) {
                Some(expander) => (
                    expander["bus"].as_u64().context("a bus")?,
                    expander["guestNode"].as_i64().context("a node")?,
                ),
                None => (0, -1),
            };
            let address = device["address"].as_str().unwrap_or_default();
            ensure!(
                attached.get(address).map(String::as_str) == device["port"].as_str(),
                "{device} is drawn, and QEMU was told {attached:?}"
            );
            let id = id(listed.at(address)?);
            let bus = port["bus"].as_u64().context("a port has a bus")?;
            planned.insert(bus, Function { id, above });
        }
        ensure!(
            planned == self.0,
            "planned is {planned:?}, the guest has {:?}",
            self.0
        );
        Ok(())
    }

    /// All devices of the node are there, and nothing else.
    pub(crate) fn has_all(&self, listed: &Listed) -> Result<()> {
        let mut here: Vec<&str> = self.0.values().map(|one| one.id.as_str()).collect();
        let mut there: Vec<String> = listed.devices.iter().map(id).collect();
        here.sort_unstable();
        there.sort_unstable();
        ensure!(here == there, "the guest has {here:?}, the node {there:?}");
        Ok(())
    }
}
