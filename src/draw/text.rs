//! The PCI tree as text, with box characters.

use km_vfio::topology::Node;
use km_vfio::{Address, BridgeKind, Inventory, Users};

use super::{domain, link, shortened, state, title};

/// Draws the tree. Lines are not cut: a terminal's width is not known here.
pub(crate) fn text(inventory: &Inventory, users: &Users) -> String {
    if inventory.functions.is_empty() {
        return format!(
            "No NVIDIA GPU or NVSwitch among {} PCI functions.\n",
            inventory.scanned
        );
    }
    let mut lines = Vec::new();
    for part in inventory.topology() {
        lines.push(domain(part.numa_node));
        let last = part.roots.len();
        for (at, root) in part.roots.into_iter().enumerate() {
            let (branch, stem) = branches(at + 1 == last);
            lines.push(format!("{branch}{} root bus", root.name));
            nodes(inventory, users, &root.children, stem, &mut lines);
        }
    }
    let shared = inventory.groups.iter().filter(|group| {
        let endpoints = group.members.iter().filter(|member| member.kind.is_some());
        endpoints.count() > 1
    });
    for group in shared {
        let members: Vec<_> = group.members.iter().map(|m| m.address.short()).collect();
        lines.push(format!(
            "group {} can only be given away whole: {}",
            group.id,
            members.join(", ")
        ));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// What stands before an entry, and before what is below it.
fn branches(last: bool) -> (&'static str, &'static str) {
    if last {
        ("└─ ", "   ")
    } else {
        ("├─ ", "│  ")
    }
}

/// The tree is at most as deep as buses have numbers, so this may call itself.
fn nodes(
    inventory: &Inventory,
    users: &Users,
    children: &[Node],
    stem: &str,
    lines: &mut Vec<String>,
) {
    for (at, node) in children.iter().enumerate() {
        let (branch, below) = branches(at + 1 == children.len());
        let label = label(inventory, users, node.address);
        lines.push(format!("{stem}{branch}{} {label}", node.address.short()));
        let below = format!("{stem}{below}");
        nodes(inventory, users, &node.children, &below, lines);
    }
}

fn label(inventory: &Inventory, users: &Users, address: Address) -> String {
    if let Some(bridge) = inventory.bridge(address) {
        let part = match bridge.kind {
            BridgeKind::RootPort => "root port",
            BridgeKind::UpstreamPort => "switch",
            BridgeKind::DownstreamPort => "port",
        };
        return match (&bridge.name, bridge.kind) {
            (Some(name), BridgeKind::UpstreamPort) => format!("{part}, {}", shortened(name, 40)),
            _ => part.to_owned(),
        };
    }
    let Some(function) = inventory.function(address) else {
        return String::new();
    };
    let mut parts = vec![shortened(&title(function), 44)];
    parts.push(
        function
            .driver
            .clone()
            .unwrap_or_else(|| "no driver".to_owned()),
    );
    parts.extend(function.iommu_group.map(|id| format!("group {id}")));
    parts.extend(function.link.as_ref().map(link));
    let state = state(inventory, users, function).text;
    if !parts.contains(&state) {
        parts.push(state);
    }
    parts.join(" · ")
}
