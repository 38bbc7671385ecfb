//! `topology --plan`: from names of devices to a plan, printed. The plan is [`km_topology`]'s.

use std::str::FromStr;

use anyhow::{Context as _, Result};
use km_host::claims::{Claims, Found};
use km_topology::{Class, Device, Flavor, Guest, Kata, Layout, Request, Version, Writer};
use km_vfio::{Address, Function, Inventory};
use serde_json::json;

use super::Arguments;
use crate::cli::Global;
use crate::cli::devices::Looked;
use crate::config::Config;
use crate::draw::planned as draw;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::{additions, kata, output, wanted};

/// The class that is planned for unless told otherwise.
const CLASS: &str = "kata-qemu-nvidia-gpu";

/// What is planned for.
#[derive(Clone, Debug)]
pub(super) enum What {
    All,
    Devices(Vec<Address>),
    Pod { namespace: String, name: String },
}

impl FromStr for What {
    type Err = String;

    fn from_str(text: &str) -> Result<What, String> {
        if text == "all" {
            return Ok(What::All);
        }
        if let Some((namespace, name)) = text.split_once('/') {
            return Ok(What::Pod {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            });
        }
        let addresses: Result<Vec<Address>, _> =
            text.split(',').map(|one| one.trim().parse()).collect();
        addresses
            .map(What::Devices)
            .map_err(|error| format!("{error}; `all` and pods, NAMESPACE/NAME, can be named too"))
    }
}

// The guest that is planned for. No documentation: it would stand in the place of the help of the command that has it.
#[derive(Debug, clap::Args)]
pub(super) struct GuestArguments {
    /// The runtime class of the guest.
    #[arg(long, value_name = "CLASS", requires = "plan")]
    class: Option<String>,
    /// Plan for this version of Kata in place of the one on the node.
    #[arg(long, value_name = "VERSION", requires = "plan")]
    kata_version: Option<Version>,
    /// Plan for this runtime of Kata in place of the configured one.
    #[arg(long, value_enum, value_name = "RUNTIME", requires = "plan")]
    kata_runtime: Option<Runtime>,
    /// The guest's memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 8192, requires = "plan")]
    memory: u64,
    /// The guest's processors.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "plan")]
    vcpus: u32,
    /// The host's NUMA node behind each of the guest's, with commas between.
    #[arg(long, value_name = "NODES", value_delimiter = ',', requires = "plan")]
    numa: Vec<u16>,
    /// How devices hang; what fits when left out.
    #[arg(long, value_enum, requires = "plan")]
    layout: Option<Shape>,
    /// Print the plan as arguments of QEMU, one option a line.
    #[arg(long, requires = "plan")]
    arguments: bool,
}

/// One of Kata's runtimes.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Runtime {
    /// The one in Go.
    Go,
    /// runtime-rs.
    Rust,
}

/// How devices hang.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Shape {
    /// Each behind a root port.
    RootPort,
    /// Each behind a port of one switch.
    SwitchPort,
    /// Behind an expander for each NUMA node.
    Numa,
}

pub(super) async fn run(
    global: &Global,
    arguments: &Arguments,
    what: &What,
    looked: &Looked,
) -> Result<()> {
    let node = global.node_if_configured()?;
    let guest = &arguments.guest;
    let inventory = &looked.inventory;
    let named = named(&node, inventory, what).await?;
    let class = guest.class.clone().or(named.class);
    let class = class.as_deref().unwrap_or(CLASS);
    let found = kata::find(&node.root, &node.config.provider)?;
    let kata = Kata {
        flavor: match guest.kata_runtime {
            None => found.kata.flavor,
            Some(Runtime::Go) => Flavor::Go,
            Some(Runtime::Rust) => Flavor::Rust,
        },
        version: guest.kata_version.unwrap_or(found.kata.version),
    };
    let request = Request {
        devices: named.functions.iter().map(|one| device(one)).collect(),
        class: Class {
            confidential: confidential(&node.config, class)?,
        },
        kata,
        guest: Guest {
            memory_mib: guest.memory,
            vcpus: guest.vcpus,
            numa: guest.numa.clone(),
        },
        layout: guest.layout.map(|shape| match shape {
            Shape::RootPort => Layout::RootPort,
            Shape::SwitchPort => Layout::SwitchPort,
            Shape::Numa => Layout::Numa,
        }),
        writer: Writer::Kata { pool: 0 },
    };
    let mut plan = km_topology::plan(&request)
        .map_err(|refusal| Failure::new(Kind::Refused, refusal.to_string()))?;
    if guest.kata_version.is_none() {
        plan.notes.extend(found.warning(&node.config.provider));
    }
    if plan.layout != Layout::Numa && kata.emits_numa() && has_numa(&node, class)? {
        plan.notes.push(format!(
            "Kata's configuration of {class} has enable_numa = true, and this guest is planned without expanders: name the host's NUMA nodes with --numa, \
             a single one with --layout numa as well"
        ));
    }
    let idle: Vec<String> = named
        .functions
        .iter()
        .filter(|function| !function.on_vfio())
        .map(|function| function.address.short())
        .collect();
    if !idle.is_empty() {
        plan.notes.push(format!(
            "not on VFIO yet: {}; `kata-manager devices bind` gives them",
            idle.join(", ")
        ));
    }
    let names = named
        .functions
        .iter()
        .map(|function| (function.address.to_string(), crate::draw::title(function)))
        .collect();
    if let Some(file) = &arguments.svg
        && super::drawn(global, file, &draw::svg(&plan, &names))?
    {
        return Ok(());
    }
    let qemu = plan.arguments();
    let text = match guest.arguments {
        true => lines(&qemu),
        false => draw::text(&plan, &names),
    };
    let body = json!({ "class": class, "plan": plan, "arguments": qemu });
    output::result(global.output, "TopologyPlan", body, &text)
}

/// Whether Kata gives NUMA nodes to new guests of a class.
fn has_numa(node: &Node, class: &str) -> Result<bool> {
    let files = additions::configuration(node, class)?;
    Ok(km_runtimeclasses::has_numa(
        files.iter().map(String::as_str),
    ))
}

/// Options and their values, one pair a line, so that they can be pasted into a shell.
fn lines(arguments: &[String]) -> String {
    let mut out = String::new();
    for pair in arguments.chunks(2) {
        out.push_str(&pair.join(" "));
        out.push('\n');
    }
    out
}

struct Named<'a> {
    functions: Vec<&'a Function>,
    /// The class of the pod's sandbox.
    class: Option<String>,
}

/// The functions that are meant, with those that only go together with them.
async fn named<'a>(node: &Node, inventory: &'a Inventory, what: &What) -> Result<Named<'a>> {
    let (addresses, class) = match what {
        What::All => (inventory.primaries().map(|f| f.address).collect(), None),
        What::Devices(addresses) => (addresses.clone(), None),
        What::Pod { namespace, name } => {
            let (addresses, class) = of_pod(node, namespace, name).await?;
            (addresses, Some(class))
        }
    };
    let mut functions: Vec<&Function> = Vec::new();
    for address in addresses {
        if inventory.function(address).is_none() {
            return Err(Failure::new(
                Kind::Device,
                format!("{address} is no NVIDIA function of this node: `kata-manager devices list` lists them"),
            )
            .into());
        }
        functions.extend(inventory.unit(address));
    }
    functions.sort_by_key(|function| function.address);
    functions.dedup_by_key(|function| function.address);
    Ok(Named { functions, class })
}

/// What the sandbox of a pod claimed.
async fn of_pod(node: &Node, namespace: &str, name: &str) -> Result<(Vec<Address>, String)> {
    let cri = node.daemon()?.cri().await?;
    let sandboxes = cri.sandboxes().await?;
    let ids: Vec<&str> = sandboxes
        .iter()
        .filter(|sandbox| sandbox.namespace == namespace && sandbox.name == name)
        .map(|sandbox| sandbox.id.as_str())
        .collect();
    if ids.is_empty() {
        let message = format!("containerd has no sandbox of pod {namespace}/{name} on this node");
        return Err(Failure::refused(message).into());
    }
    let claims = Claims::open(&node.root)?;
    for found in claims.list()? {
        let Found::Claim(claim) = found else { continue };
        let its = ids.contains(&claim.sandbox.as_str()) && claims.is_alive(&claim);
        if its && !claim.devices.is_empty() {
            let addresses: Result<Vec<Address>, _> = claim
                .devices
                .iter()
                .map(|one| one.address.parse())
                .collect();
            let addresses = addresses
                .with_context(|| format!("read the claim of sandbox {}", claim.sandbox))?;
            return Ok((addresses, claim.class));
        }
    }
    Err(Failure::refused(format!(
        "the sandbox of pod {namespace}/{name} has claimed no devices: name their addresses instead"
    ))
    .into())
}

/// A function, as the planner wants it.
pub(crate) fn device(function: &Function) -> Device {
    Device {
        address: function.address.to_string(),
        class: function.class,
        numa_node: function.numa_node,
        iommu_group: function.iommu_group,
        cdev: function.cdev,
    }
}

/// Whether guests of a class have encrypted memory.
fn confidential(config: &Config, class: &str) -> Result<bool> {
    let configured = config.runtime_classes.iter().find(|one| one.name == class);
    let kind = match configured {
        Some(one) => wanted::class_kind(one),
        None => km_runtimeclasses::find(class),
    };
    let kind = kind.ok_or_else(|| {
        let message = format!(
            "{class} is neither a configured class that runs Kata nor one of the catalogue"
        );
        Failure::new(Kind::Configuration, message)
    })?;
    Ok(kind.tee != km_runtimeclasses::Tee::None)
}
