//! What of a node goes into Kata's configuration: how many functions it can give away, and how long a guest with all of them may take.

use anyhow::{Context as _, Result};
use km_host::{HostPath, memory};
use km_runtimeclasses::{DropIn, Facts, Sizing, Tee};
use km_topology::{GO_PORTS, Kata, Version, timeouts};
use km_vfio::{Inventory, Kind};

use crate::config::RuntimeClass;
use crate::node::Node;
use crate::{kata, wanted};

/// What a node has, looked at once.
#[derive(Clone, Debug)]
pub(crate) struct Sized {
    functions: u32,
    gpus: usize,
    /// Rounded up, so that what a kernel keeps for itself makes no other configuration.
    memory_mib: u64,
    kata: kata::Found,
}

/// Looks at the node.
pub(crate) fn observe(node: &Node) -> Result<Sized> {
    let inventory = Inventory::observe(&node.root).context("cannot look at the PCI bus")?;
    let kata = kata::find(&node.root, &node.config.provider)?;
    let given = inventory.functions.iter();
    let given = given.filter(|one| kata.kata.skips(one.class).is_none());
    let memory = memory::total_mib(&node.root)?.unwrap_or_default();
    Ok(Sized {
        functions: u32::try_from(given.count()).unwrap_or(u32::MAX),
        gpus: inventory
            .functions
            .iter()
            .filter(|one| one.kind == Kind::Gpu)
            .count(),
        memory_mib: memory.checked_next_power_of_two().unwrap_or(memory),
        kata,
    })
}

impl Sized {
    /// What the node adds to the configuration of a class; `None` for one that runs no Kata of the catalogue.
    pub(crate) fn drop_in(
        &self,
        node: &Node,
        class: &RuntimeClass,
        launcher: Option<&HostPath>,
    ) -> Option<DropIn> {
        let kind = wanted::class_kind(class)?;
        let confidential = kind.tee != Tee::None;
        let provider = wanted::provider(&node.config);
        let kata = self.kata.kata;
        let pair = |version: Version| (version.major, version.minor);
        let mut made = km_runtimeclasses::drop_in(
            kind,
            &Facts {
                provider: &provider,
                kata: km_runtimeclasses::Kata {
                    version: pair(kata.version),
                    asks_kubelet_since: pair(Kata::first_with_cold_plug(kata.flavor)),
                    knows_numa: kata.emits_numa(),
                    ports_max: u32::try_from(GO_PORTS).unwrap_or(u32::MAX),
                },
                sizing: Sizing {
                    functions: self.functions,
                    timeout_seconds: timeouts::seconds(
                        confidential,
                        self.gpus,
                        self.memory_mib,
                        self.gpus,
                    ),
                },
                kubelet_socket: node.config.shim.kubelet_socket.as_str(),
                launcher: launcher.map(HostPath::as_str),
            },
        );
        // Without GPUs the version makes no difference to anything that a pod could notice.
        if self.gpus == 0 {
            made.warnings.clear();
        } else {
            made.warnings
                .extend(self.kata.warning(&node.config.provider));
        }
        Some(made)
    }
}
