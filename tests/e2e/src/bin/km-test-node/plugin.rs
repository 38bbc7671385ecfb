//! The device plugin on a real kernel, with real events, towards the kubelet's stand-in in the node. What the kubelet is told has to be
//! true within two seconds of a change, by the node's own clock.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::kubelet::{Allocated, Resource};
use km_tests_e2e::node_in_a_box::{Holder, Node};
use km_tests_e2e::wait;
use serde_json::{Value, json};

use crate::shown::Listed;

/// The emulated GPUs as a resource.
const GPUS: &str = "nvidia.com/pgpu";

/// How soon the kubelet must know.
const IN_TIME: Duration = Duration::from_secs(2);

/// Where the plugin's words go.
const LOG: &str = "/run/device-plugin.log";

/// The longest that anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(60);

/// The stand-in reads from a pipe that is kept open, and answers into a file.
pub(crate) const STAND_IN: &str = "test -p /run/kubelet.in || mkfifo /run/kubelet.in; exec 3<>/run/kubelet.in; : >/run/kubelet.out; touch $READY; \
    exec kubelet-stand-in /var/lib/kubelet <&3 >/run/kubelet.out";

/// Gives a command to the stand-in and prints its answer: the line after those that are there.
const ASK: &str = r#"ask() {
    local before=$(wc -l </run/kubelet.out)
    printf '%s\n' "$1" >/run/kubelet.in
    for _ in $(seq 6000); do
        if [ "$(wc -l </run/kubelet.out)" -gt "$before" ]; then tail -n 1 /run/kubelet.out; return; fi
        sleep 0.01
    done
    echo "no answer to $1" >&2; return 1
}
"#;

/// All of it, for a node whose GPUs are on VFIO. `first` is the name of one of them.
pub(crate) fn works(node: &mut Node, first: &str) -> Result<()> {
    let address = node.address(first)?;
    let kubelet = start_kubelet(node)?;
    // Probes that come too late: whatever is told in time, an event has told.
    let plugin = start(node, &["--probe-interval", "3600000"])?;
    let listed = until(node, "the first list", Resource::connected_and_healthy)?;
    is_the_node(node, &listed)?;
    preferred(node, &listed)?;
    given_out(node, &address)?;
    unplugged_and_back(node, &address)?;
    restarted(node)?;
    node.release(plugin)?;
    node.shell("test ! -e /var/lib/kubelet/device-plugins/km-pgpu.sock")?;
    models_apart(node)?;
    // No event tells of this: the probes have to.
    let plugin = start(node, &[])?;
    until(
        node,
        "the list of the next plugin",
        Resource::connected_and_healthy,
    )?;
    dead_and_back(node, first, &address)?;
    node.release(plugin)?;
    node.release(kubelet)
}

/// Where VFIO can give nothing away the plugin runs, offers nothing, and says why.
pub(crate) fn has_nothing(node: &mut Node) -> Result<()> {
    let kubelet = start_kubelet(node)?;
    let plugin = start(node, &[])?;
    let why = wait::until("the reason in the log", PATIENCE, || {
        let said = node.shell(&format!("cat {LOG}"))?;
        ensure!(said.contains("is not offered"), "it said {said:?}");
        Ok(said)
    })?;
    for device in &Listed::of(node)?.devices {
        let reason = format!("{} ", device.address);
        ensure!(
            why.contains(&reason) && why.contains("switch the IOMMU on"),
            "{why}"
        );
    }
    let all = ask(node, &json!({ "show": {} }))?;
    ensure!(all == json!({}), "the kubelet has {all}");
    node.shell("test ! -e /var/run/cdi/nvidia.com-pgpu.yaml")?;
    node.release(plugin)?;
    node.release(kubelet)
}

fn start_kubelet(node: &mut Node) -> Result<Holder> {
    let kubelet = node.hold(&["/usr/bin/bash", "-c", STAND_IN])?;
    ask(node, &json!({ "start": {} }))?;
    Ok(kubelet)
}

/// Starts the plugin.
fn start(node: &mut Node, words: &[&str]) -> Result<Holder> {
    let script = format!(
        "touch $READY; exec kata-manager device-plugin {} 2>{LOG}",
        words.join(" ")
    );
    node.hold(&["/usr/bin/bash", "-c", &script])
}

trait Whole {
    fn connected_and_healthy(&self) -> bool;
}

impl Whole for Resource {
    fn connected_and_healthy(&self) -> bool {
        self.connected && !self.devices.is_empty() && self.healthy().len() == self.devices.len()
    }
}

pub(crate) fn ask(node: &mut Node, command: &Value) -> Result<Value> {
    let answer = node.shell(&format!("{ASK}ask '{command}'"))?;
    let mut answer: Value = serde_json::from_str(answer.trim()).with_context(|| answer.clone())?;
    let ok = answer.get_mut("ok").map(Value::take);
    ok.with_context(|| format!("{command}: {answer}"))
}

fn resource(node: &mut Node) -> Result<Resource> {
    let mut all = ask(node, &json!({ "show": {} }))?;
    let one = all.get_mut(GPUS).map(Value::take).unwrap_or_default();
    serde_json::from_value(one).with_context(|| format!("{all}"))
}

/// Waits for as long as it takes.
fn until(node: &mut Node, what: &str, is: fn(&Resource) -> bool) -> Result<Resource> {
    let found = wait::until(what, PATIENCE, || {
        let resource = resource(node)?;
        ensure!(is(&resource), "it is {resource:?}");
        Ok(resource)
    });
    match found {
        Ok(found) => Ok(found),
        Err(error) => {
            let said = node.shell(&format!("tail -n 20 {LOG}"))?;
            Err(error).with_context(|| format!("the plugin said:\n{said}"))
        }
    }
}

/// What must be in time; says how long it took.
#[expect(clippy::print_stdout, reason = "a measurement is to be seen")]
fn in_time(
    node: &mut Node,
    what: &str,
    mut once: impl FnMut(&mut Node) -> Result<Duration>,
) -> Result<()> {
    wait::in_time(what, IN_TIME, || {
        let took = once(node)?;
        println!("{what}: told after {} ms", took.as_millis());
        Ok(took)
    })
}

/// Makes a change in the node, and waits there until the kubelet knows: how long after the change it was told, by the node's own clock.
/// Neither the way to the node nor that of our questions counts.
fn told(node: &mut Node, change: &str, address: &str, healthy: bool) -> Result<Duration> {
    let wanted = format!("\"id\":\"{address}\",\"healthy\":{healthy}");
    let script = format!(
        r#"{ASK}{change}
began=$(date +%s%3N)
while said=$(ask '{{"show":{{}}}}'); ! grep -q '{wanted}' <<<"$said"; do
    if [ $(($(date +%s%3N) - began)) -gt 60000 ]; then echo "$said"; tail -n 20 {LOG}; exit 1; fi
done
echo $began; echo "$said""#
    );
    let said = node.shell(&script).context(change.to_owned())?;
    let (began, shown) = said.trim().split_once('\n').with_context(|| said.clone())?;
    let shown: Value = serde_json::from_str(shown).with_context(|| said.clone())?;
    let one: Resource = serde_json::from_value(shown["ok"][GPUS].clone())?;
    let took = one.listed_at.saturating_sub(began.parse()?);
    Ok(Duration::from_millis(took))
}

/// The list is what `devices list` says: a device for each IOMMU group with a GPU, whatever its model, and one server for all. So are
/// the CDI specs.
fn is_the_node(node: &mut Node, listed: &Resource) -> Result<()> {
    let devices = Listed::of(node)?;
    let gpus = devices
        .devices
        .iter()
        .filter(|one| one.class() == "pgpu" && one.is_primary());
    let ids: Vec<&str> = gpus.map(|gpu| gpu.address.as_str()).collect();
    ensure!(listed.healthy() == ids, "{ids:?} are there; {listed:?}");
    ensure!(
        listed.endpoint == "km-pgpu.sock" && listed.registrations == 1,
        "{listed:?}"
    );
    for gpu in &listed.devices {
        let numa: Vec<i64> = devices
            .at(&gpu.id)?
            .numa_node
            .map(i64::from)
            .into_iter()
            .collect();
        ensure!(gpu.numa == numa, "NUMA node {numa:?}; {gpu:?}");
    }
    node.kata_manager(&["cdi", "validate"], 0)?;
    let specs = node.kata_manager(&["cdi", "list"], 0)?.stdout;
    for gpu in &listed.devices {
        ensure!(
            specs.contains(&format!("{GPUS}={}", gpu.id)),
            "{} is not in\n{specs}",
            gpu.id
        );
    }
    ensure!(!specs.contains("does not have"), "{specs}");
    Ok(())
}

/// Two and four of eight on one NUMA node, behind one switch.
fn preferred(node: &mut Node, listed: &Resource) -> Result<()> {
    if node.shape().name != "eight-gpus" {
        return Ok(());
    }
    ensure!(listed.devices.len() == 8, "{listed:?}");
    for size in [2, 4] {
        let ids = ask(
            node,
            &json!({ "prefer": { "resource": GPUS, "size": size } }),
        )?;
        let ids: Vec<String> = serde_json::from_value(ids)?;
        let devices = Listed::of(node)?;
        let mut places = Vec::new();
        for id in &ids {
            let device = devices.at(id)?;
            places.push((device.numa_node, device.path.get(1).cloned()));
        }
        places.dedup();
        ensure!(
            ids.len() == size && places.len() == 1,
            "{ids:?} are at {places:?}"
        );
        ensure!(places[0].0.is_some() && places[0].1.is_some(), "{places:?}");
    }
    let said = node.shell(&format!("grep preferred {LOG}"))?;
    ensure!(said.contains("preferred 4 of 8 free"), "{said}");
    Ok(())
}

/// A pod gets a device: its nodes are there, and can be opened.
fn given_out(node: &mut Node, address: &str) -> Result<()> {
    let given = ask(
        node,
        &json!({ "allocate": { "resource": GPUS, "ids": [address], "namespace": "default", "pod": "p", "container": "c" } }),
    )?;
    let given: Allocated = serde_json::from_value(given)?;
    ensure!(given.cdi == [format!("{GPUS}={address}")], "{given:?}");
    let wanted = Listed::of(node)?.at(address)?.node().context("a node")?;
    let nodes = &given.nodes;
    ensure!(nodes.iter().any(|one| one.host == wanted), "{given:?}");
    for one in &given.nodes {
        node.shell(&format!("test -c {0} && exec 3<>{0}", one.host))?;
    }
    ask(
        node,
        &json!({ "release": { "namespace": "default", "pod": "p" } }),
    )?;
    Ok(())
}

/// sysfs takes the device away and brings it back; another driver than VFIO's, and VFIO's again.
fn unplugged_and_back(node: &mut Node, address: &str) -> Result<()> {
    let device = format!("/sys/bus/pci/devices/{address}");
    let spec = "/var/run/cdi/nvidia.com-pgpu.yaml";
    let remove = format!("echo 1 >{device}/remove");
    let bind = format!("kata-manager devices bind {address} >/dev/null");
    let unbind = format!("kata-manager devices unbind {address} >/dev/null");
    in_time(node, "unplugging and plugging", |node| {
        let gone = told(node, &remove, address, false)?;
        node.shell(&format!(
            "if [ -e {spec} ]; then ! grep -q {address} {spec}; fi"
        ))?;
        node.shell("echo 1 >/sys/bus/pci/rescan")?;
        let there = told(node, &bind, address, true)?;
        node.shell(&format!("grep -q {address} {spec}"))?;
        Ok(gone.max(there))
    })?;
    in_time(node, "unbinding and binding", |node| {
        let gone = told(node, &unbind, address, false)?;
        Ok(told(node, &bind, address, true)?.max(gone))
    })
}

/// It falls off the bus, and answers again.
fn dead_and_back(node: &mut Node, name: &str, address: &str) -> Result<()> {
    in_time(node, "death and return", |node| {
        node.emulator().kill(name)?;
        let gone = told(node, "true", address, false);
        node.emulator().revive(name)?;
        Ok(told(node, "true", address, true)?.max(gone?))
    })
}

/// A kubelet that starts again gets the list again.
fn restarted(node: &mut Node) -> Result<()> {
    let command = json!({ "restarts": { "resources": [GPUS], "times": 1 } });
    in_time(node, "the list after a restart", |node| {
        let seconds = ask(node, &command)?.as_f64().context("seconds")?;
        Ok(Duration::try_from_secs_f64(seconds)?)
    })?;
    until(node, "all devices", Resource::connected_and_healthy).map(drop)
}

/// Without an alias each model is a resource of its own, with its own devices.
fn models_apart(node: &mut Node) -> Result<()> {
    let mut wanted: BTreeMap<Option<String>, Vec<String>> = BTreeMap::new();
    for device in Listed::of(node)?.devices {
        if device.class() == "pgpu" && device.is_primary() {
            wanted.entry(device.name).or_default().push(device.address);
        }
    }
    if wanted.len() < 2 {
        return Ok(());
    }
    ask(node, &json!({ "start": {} }))?;
    let plugin = start(node, &["--gpu-alias", "''"])?;
    let mut wanted: Vec<Vec<String>> = wanted.into_values().collect();
    wanted.sort();
    wait::until("a resource for each model", PATIENCE, || {
        let all = ask(node, &json!({ "show": {} }))?;
        let all: BTreeMap<String, Resource> = serde_json::from_value(all)?;
        let listed = all
            .values()
            .map(|one| one.healthy().iter().map(ToString::to_string).collect());
        let mut listed: Vec<Vec<String>> = listed.collect();
        listed.sort();
        ensure!(listed == wanted, "{wanted:?} are wanted; {all:?}");
        Ok(())
    })?;
    node.release(plugin)?;
    // The next one is asked by a kubelet that knows of no other.
    ask(node, &json!({ "start": {} })).map(drop)
}
