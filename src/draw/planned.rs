//! Drawings of a planned guest: its root buses, ports and devices, as text and as SVG. Data in, text out.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use km_topology::{Placed, Plan, Port};

use super::canvas::{BOX, CARD, CARD_WIDTH, COLUMN, Canvas, FOOTER, HEADER, MARGIN, ROW, middle};
use super::{plural, shortened};

/// What devices are called, by address.
pub(crate) type Names = BTreeMap<String, String>;

/// A bus or a port, and what is behind it.
struct Part<'a> {
    /// `root bus`, `root port`, `switch`.
    what: &'static str,
    name: &'a str,
    /// The number of the bus behind it.
    bus: u8,
    port: Option<&'a Port>,
    /// The NUMA nodes of guest and host that a root bus belongs to.
    nodes: Option<(u16, u16)>,
    children: Vec<Part<'a>>,
    device: Option<&'a Placed>,
}

/// The root buses of the guest that have ports.
fn roots(plan: &Plan) -> Vec<Part<'_>> {
    let root = |name, bus, nodes| Part {
        what: "root bus",
        name,
        bus,
        port: None,
        nodes,
        children: below(plan, name),
        device: None,
    };
    let main = root("pcie.0", 0, None);
    let others = plan.expanders.iter().map(|expander| {
        let nodes = Some((expander.guest_node, expander.host_node));
        root(&expander.id, expander.bus, nodes)
    });
    std::iter::once(main)
        .chain(others)
        .filter(|root| !root.children.is_empty() || root.nodes.is_some())
        .collect()
}

fn below<'a>(plan: &'a Plan, parent: &str) -> Vec<Part<'a>> {
    let ports = plan.ports.iter().filter(|port| port.parent == parent);
    ports
        .map(|port| Part {
            what: if port.parent.starts_with("sw") {
                "port"
            } else {
                "root port"
            },
            name: &port.id,
            bus: port.bus,
            port: Some(port),
            nodes: None,
            children: switches(plan, &port.id),
            device: plan.behind(&port.id),
        })
        .collect()
}

fn switches<'a>(plan: &'a Plan, port: &str) -> Vec<Part<'a>> {
    let switches = plan.switches.iter().filter(|switch| switch.port == port);
    switches
        .map(|switch| Part {
            what: "switch",
            name: &switch.id,
            bus: switch.bus,
            port: None,
            nodes: None,
            children: below(plan, &switch.id),
            device: None,
        })
        .collect()
}

/// What the plan is, in a line.
fn title(plan: &Plan) -> String {
    let confidential = if plan.class.confidential {
        "confidential guest · "
    } else {
        ""
    };
    format!(
        "{confidential}{} · {} · {}",
        plural(plan.devices.len(), "device", "devices"),
        plural(plan.ports.len(), "port", "ports"),
        plan.kata
    )
}

/// The settings that Kata must have, as its configuration has them.
pub(crate) fn told(plan: &Plan) -> Vec<(&'static str, String)> {
    let told = &plan.told;
    let mut all = vec![
        ("cold_plug_vfio", format!("{:?}", told.cold_plug_vfio)),
        ("pcie_root_port", told.pcie_root_port.to_string()),
    ];
    all.extend(
        told.pcie_switch_port
            .map(|n| ("pcie_switch_port", n.to_string())),
    );
    all.extend(told.enable_numa.map(|on| ("enable_numa", on.to_string())));
    all.push(("create_container_timeout", told.timeout_seconds.to_string()));
    all
}

fn numa(nodes: (u16, u16)) -> String {
    format!(
        "NUMA node {} of the guest, {} of the host",
        nodes.0, nodes.1
    )
}

fn way(device: &Placed) -> String {
    match &device.iommufd {
        Some(object) => format!("iommufd {object}"),
        None => "legacy group".to_owned(),
    }
}

/// Draws the plan with box characters.
pub(crate) fn text(plan: &Plan, names: &Names) -> String {
    let mut out = format!("Guest: {}\n", title(plan));
    for root in roots(plan) {
        let nodes = root
            .nodes
            .map_or_else(String::new, |n| format!(" · {}", numa(n)));
        // Writing into a String does not fail.
        let _ = writeln!(
            out,
            "bus {:02x} {} {}{nodes}",
            root.bus, root.what, root.name
        );
        lines(&root.children, "", names, &mut out);
    }
    for skipped in &plan.skipped {
        let _ = writeln!(out, "not given: {}: {}", skipped.address, skipped.reason);
    }
    out.push_str("Kata is told:\n");
    for (key, value) in told(plan) {
        let _ = writeln!(out, "  {key} = {value}");
    }
    for note in &plan.notes {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

/// A plan is at most four levels deep, so this may call itself.
fn lines(parts: &[Part<'_>], stem: &str, names: &Names, out: &mut String) {
    for (at, part) in parts.iter().enumerate() {
        let last = at + 1 == parts.len();
        let (branch, below) = if last {
            ("└─ ", "   ")
        } else {
            ("├─ ", "│  ")
        };
        let place = part.port.map_or_else(String::new, |port| {
            let addr = port
                .addr
                .map_or_else(String::new, |addr| format!("slot {addr:02x}, "));
            format!(" ({addr}chassis {} slot {})", port.chassis, port.slot)
        });
        let _ = writeln!(
            out,
            "{stem}{branch}bus {:02x} {} {}{place}",
            part.bus, part.what, part.name
        );
        let stem = format!("{stem}{below}");
        if let Some(device) = part.device {
            let name = names.get(&device.address).map_or("", String::as_str);
            let path = device
                .guest_path
                .as_ref()
                .map_or_else(String::new, |path| format!(" · guest path {path}"));
            let node = device.host_node.map_or_else(String::new, |node| {
                format!(" · NUMA node {node} of the host")
            });
            let _ = writeln!(
                out,
                "{stem}└─ {} {name} · {}{node}{path}",
                device.address,
                way(device)
            );
        }
        lines(&part.children, &stem, names, out);
    }
}

/// Draws the plan as SVG.
pub(crate) fn svg(plan: &Plan, names: &Names) -> String {
    let roots = roots(plan);
    let depth = roots.iter().map(depth).max().unwrap_or(1);
    let mut picture = Picture {
        names,
        cards_at: 2 * MARGIN + depth * COLUMN,
        canvas: Canvas::default(),
    };
    let width = picture.cards_at + CARD_WIDTH + 2 * MARGIN;
    let mut y = HEADER + 8;
    for root in &roots {
        let rows = leaves(root);
        let height = 36 + rows * ROW + 8;
        let panel = root
            .nodes
            .map_or_else(|| "The guest's root complex".to_owned(), numa);
        picture.canvas.panel(y, width, height, &panel);
        let mut top = y + 36;
        picture.part(root, 0, &mut top);
        y += height + 16;
    }
    let told: Vec<String> = told(plan)
        .into_iter()
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    picture
        .canvas
        .text(MARGIN, y + 10, "small", &told.join(" · "));
    let height = y + FOOTER - 8;
    picture
        .canvas
        .finish(width, height, "Planned guest", &title(plan))
}

/// How many columns of boxes a part needs.
fn depth(part: &Part<'_>) -> usize {
    1 + part.children.iter().map(depth).max().unwrap_or(0)
}

/// How many rows a part needs.
fn leaves(part: &Part<'_>) -> usize {
    part.children.iter().map(leaves).sum::<usize>().max(1)
}

struct Picture<'a> {
    names: &'a Names,
    cards_at: usize,
    canvas: Canvas,
}

impl Picture<'_> {
    /// Draws a part and what is behind it. Returns where a wire meets it.
    fn part(&mut self, part: &Part<'_>, column: usize, top: &mut usize) -> (usize, usize) {
        let x = 2 * MARGIN + column * COLUMN;
        let mut ends: Vec<_> = part
            .children
            .iter()
            .map(|child| self.part(child, column + 1, top))
            .collect();
        let mut y = middle(&ends);
        if ends.is_empty() {
            y = *top + CARD / 2;
            match part.device {
                Some(device) => {
                    ends.push((self.cards_at, y));
                    self.card(device, *top);
                }
                None => self
                    .canvas
                    .text(x + BOX + 12, y + 4, "small", "nothing behind it"),
            }
            *top += ROW;
        }
        self.canvas.wires(x, y, &ends);
        self.canvas.frame(x, y);
        self.canvas.text(x + 8, y - 3, "small", part.what);
        self.canvas.add(format_args!(
            "<text class=\"small\" x=\"{}\" y=\"{}\" text-anchor=\"end\">bus {:02x}</text>",
            x + BOX - 8,
            y + 12,
            part.bus
        ));
        self.canvas
            .text(x + 8, y + 12, "mono", &shortened(part.name, 10));
        (x, y)
    }

    fn card(&mut self, device: &Placed, y: usize) {
        let x = self.cards_at;
        self.canvas.card(x, y, "used");
        let name = self
            .names
            .get(&device.address)
            .map_or("device", String::as_str);
        self.canvas
            .text(x + 16, y + 20, "name", &shortened(name, 32));
        self.canvas
            .text(x + 16, y + 38, "mono quiet", &device.address);
        self.canvas
            .text(x + 262, y + 20, "quiet", &shortened(&way(device), 38));
        let node = match (device.host_node, &device.guest_path) {
            (Some(node), None) => format!("NUMA node {node} of the host"),
            (None, Some(path)) => format!("in the guest at {path}"),
            (Some(node), Some(path)) => {
                format!("NUMA node {node} of the host, in the guest at {path}")
            }
            (None, None) => "NUMA node not told".to_owned(),
        };
        self.canvas.text(x + 262, y + 38, "quiet", &node);
    }
}
