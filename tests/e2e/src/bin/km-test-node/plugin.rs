//! The device plugin on a real kernel, with real events, towards the kubelet's stand-in in the node. What the kubelet is told is
//! asked again and again, from a change on: it has to be true within two seconds of the node's own clock.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::kubelet::{Allocated, Resource};
use km_tests_e2e::node_in_a_box::{Holder, Node};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::wait;
use serde_json::{Value, json};

use crate::shown::Listed;
use crate::{devices, hardware};

/// A boot of their own, of two shapes.
pub(crate) const TESTS: &[Test] = &[
    ("alone", |sandbox| on_a_shape(sandbox, "one-gpu", false)),
    ("behind-switches", |sandbox| {
        on_a_shape(sandbox, "eight-gpus", true)
    }),
];

fn on_a_shape(sandbox: &Sandbox, shape: &str, switched: bool) -> Result<()> {
    let (mut node, names) = hardware::boot(sandbox, shape)?;
    node.step("bind all", devices::bind_all)?;
    node.step("the device plugin", |node| works(node, &names[0], switched))
}

/// The emulated GPUs as a resource.
const GPUS: &str = "nvidia.com/pgpu";

/// How soon the kubelet must know, in milliseconds.
const IN_TIME: u64 = 2000;

/// Where the plugin's words go.
const LOG: &str = "/run/device-plugin.log";

/// The stand-in reads from a pipe that is kept open, and answers into a file.
pub(crate) const STAND_IN: &str = "test -p /run/kubelet.in || mkfifo /run/kubelet.in; exec 3<>/run/kubelet.in; touch $READY; \
    exec kubelet-stand-in /var/lib/kubelet <&3 >/run/kubelet.out";

/// Gives a command to the stand-in and prints its answer: the line after those that are there.
const ASK: &str = r#"ask() {
    local before=$(wc -l </run/kubelet.out)
    printf '%s\n' "$1" >/run/kubelet.in
    for _ in $(seq 2000); do
        if [ "$(wc -l </run/kubelet.out)" -gt "$before" ]; then tail -n 1 /run/kubelet.out; return; fi
        sleep 0.01
    done
    echo "no answer to $1" >&2; return 1
}
"#;

/// All of it, for a node whose GPUs are on VFIO. `first` is the name of one of them; with `switched` the GPUs are behind switches that
/// keep four of them together.
fn works(node: &mut Node, first: &str, switched: bool) -> Result<()> {
    let address = node.address(first)?;
    let kubelet = node.hold(&["/usr/bin/bash", "-c", STAND_IN])?;
    ask(node, &json!({ "start": {} }))?;
    // Probes that come too late: whatever is told in time, an event has told.
    let plugin = start(node, &["--probe-interval", "3600000"])?;
    let listed = until(node, "the first list", Resource::connected_and_healthy)?;
    is_the_node(node, &listed)?;
    preferred(node, &listed, switched)?;
    given_out(node, &address)?;
    unplugged_and_back(node, &address)?;
    restarted(node)?;
    node.release(plugin)?;
    node.shell("test ! -e /var/lib/kubelet/device-plugins/km-pgpu.sock")?;
    // No event tells of this: the probes have to.
    let plugin = start(node, &[])?;
    until(
        node,
        "the list of the second plugin",
        Resource::connected_and_healthy,
    )?;
    let config = format!("/sys/bus/pci/devices/{address}/config");
    node.emulator().kill(first)?;
    let dead = told(node, "true", &address, false);
    node.emulator().revive(first)?;
    dead.context("dead")?;
    node.shell(&format!("od -An -tx4 -N4 {config}"))?;
    told(node, "true", &address, true).context("alive again")?;
    node.release(plugin)?;
    node.release(kubelet)
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
    let found = wait::until(what, Duration::from_secs(30), || {
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

/// Makes a change in the node, and waits there until the kubelet knows; all within one script, so that the way to the node counts for
/// nothing.
fn told(node: &mut Node, change: &str, address: &str, healthy: bool) -> Result<()> {
    let wanted = format!("\"id\":\"{address}\",\"healthy\":{healthy}");
    let script = format!(
        r#"{ASK}{change}
began=$(date +%s%3N)
while ! ask '{{"show":{{}}}}' | grep -q '{wanted}'; do
    if [ $(($(date +%s%3N) - began)) -gt 20000 ]; then ask '{{"show":{{}}}}'; tail -n 20 {LOG}; exit 1; fi
done
echo took $(($(date +%s%3N) - began))"#
    );
    let said = node.shell(&script)?;
    let took = said
        .trim()
        .rsplit(' ')
        .next()
        .and_then(|took| took.parse::<u64>().ok());
    let took = took.with_context(|| format!("no time in {said:?}"))?;
    ensure!(
        took <= IN_TIME,
        "{change}: the kubelet knew after {took} ms"
    );
    Ok(())
}

/// The list is what `devices list` says, and so are the CDI specs.
fn is_the_node(node: &mut Node, listed: &Resource) -> Result<()> {
    let devices = Listed::of(node)?;
    for gpu in &listed.devices {
        ensure!(devices.at(&gpu.id)?.driver.is_some(), "{gpu:?}");
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
fn preferred(node: &mut Node, listed: &Resource, switched: bool) -> Result<()> {
    if !switched {
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
    let group = Listed::of(node)?
        .at(address)?
        .iommu_group
        .context("a group")?;
    ensure!(
        given
            .nodes
            .iter()
            .any(|one| one.host == format!("/dev/vfio/{group}")),
        "{given:?}"
    );
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
    told(node, &format!("echo 1 >{device}/remove"), address, false).context("unplugged")?;
    node.shell(&format!("! grep -q {address} {spec}"))?;
    node.shell("echo 1 >/sys/bus/pci/rescan")?;
    let bind = format!("kata-manager devices bind {address} >/dev/null");
    told(node, &bind, address, true).context("plugged and bound")?;
    node.shell(&format!("grep -q {address} {spec}"))?;
    let unbind = format!("kata-manager devices unbind {address} >/dev/null");
    told(node, &unbind, address, false).context("unbound")?;
    told(node, &bind, address, true).context("bound again")
}

/// A kubelet that starts again gets the list again.
fn restarted(node: &mut Node) -> Result<()> {
    let command = json!({ "restarts": { "resources": [GPUS], "times": 3 } });
    let seconds = ask(node, &command)?.as_f64().context("seconds")?;
    ensure!(seconds < 6.0, "three restarts took {seconds} s");
    let listed = resource(node)?;
    ensure!(listed.connected_and_healthy(), "{listed:?}");
    Ok(())
}
