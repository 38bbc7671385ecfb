//! A guest with NUMA nodes, as Kata in Go makes it with `enable_numa` (kata-containers 4.1, src/runtime/virtcontainers/qemu.go): one for
//! each of the host's, with a root bus of its own.

use std::fs;

use anyhow::{Context as _, Result};

use crate::devices::Function;

/// The host's nodes.
const NODES: &str = "/sys/devices/system/node";

/// Bus numbers between two root buses, and the chassis of the ports on the first (same file).
const BUSES: usize = 0x20;
const CHASSIS: usize = 10;

/// The guest's nodes.
pub(crate) struct Nodes {
    /// What makes them, their root buses, and a port for each function.
    pub(crate) arguments: Vec<String>,
    /// The port of each function.
    pub(crate) buses: Vec<String>,
}

/// Makes the nodes of a guest with that many MiB: equal shares, and the first has what is left. It has one processor, which is the first node's.
pub(crate) fn nodes(memory: i64, functions: &[Function]) -> Result<Nodes> {
    let hosts = online()?;
    let count = i64::try_from(hosts.len())?;
    let (share, left) = (memory / count, memory % count);
    let mut arguments = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    for (node, host) in hosts.iter().enumerate() {
        let share = if node == 0 { share + left } else { share };
        let memory = format!(
            "memory-backend-ram,id=numa-mem{node},size={share}M,host-nodes={host},policy=bind"
        );
        add("-object", memory);
        let processors = if node == 0 { ",cpus=0" } else { "" };
        add(
            "-numa",
            format!("node,nodeid={node},memdev=numa-mem{node}{processors}"),
        );
    }
    for node in 0..hosts.len() {
        let number = BUSES * (node + 1);
        add(
            "-device",
            format!("pxb-pcie,id=pxb-numa{node},bus=pcie.0,bus_nr={number},numa_node={node}"),
        );
    }
    let mut buses = Vec::new();
    let mut ports = vec![0; hosts.len()];
    for function in functions {
        let path = format!("/sys/bus/pci/devices/{}/numa_node", function.address);
        let host = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let node = hosts.iter().position(|one| one.to_string() == host.trim());
        let node = node.with_context(|| format!("{} is on node {host}", function.address))?;
        let (slot, chassis) = (ports[node], CHASSIS + node);
        ports[node] += 1;
        let bus = format!("rp-numa{node}-{slot}");
        add(
            "-device",
            format!(
                "pcie-root-port,id={bus},bus=pxb-numa{node},chassis={chassis},slot={slot},multifunction=off"
            ),
        );
        buses.push(bus);
    }
    Ok(Nodes { arguments, buses })
}

fn online() -> Result<Vec<u16>> {
    let entries = fs::read_dir(NODES).with_context(|| format!("list {NODES}"))?;
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node"));
        found.extend(number.and_then(|number| number.parse::<u16>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}
