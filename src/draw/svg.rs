//! The PCI tree as SVG: from the root bus on the left to a card for each function on the right.
//!
//! The picture brings its own background, so it reads on any page, and its own dark colours for viewers that ask for them.
//! Sizes are in pixels.

use std::fmt::Write as _;

use km_vfio::topology::Node;
use km_vfio::{Address, BridgeKind, Function, Inventory, Users};

use super::{Mood, domain, link, shortened, state};

pub(super) const MARGIN: usize = 24;
pub(super) const HEADER: usize = 64;
pub(super) const FOOTER: usize = 40;
/// From one card to the next.
pub(super) const ROW: usize = 58;
pub(super) const CARD: usize = 48;
pub(super) const CARD_WIDTH: usize = 560;
/// From one column of boxes to the next.
pub(super) const COLUMN: usize = 132;
pub(super) const BOX: usize = 104;
/// A panel's title.
const TITLE: usize = 36;
/// The most columns of bridges that are drawn. Real machines have five at most.
const COLUMNS: usize = 12;

pub(super) const STYLE: &str = "\
:root{color-scheme:light dark}\
text{font:13px ui-sans-serif,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328}\
.bg{fill:#fff;stroke:#d0d7de}.panel{fill:#f6f8fa;stroke:#d0d7de}.box{fill:#fff;stroke:#afb8c1}\
.wire{fill:none;stroke:#8c959f;stroke-width:1.5}.title{font-size:18px;font-weight:600}\
.name{font-weight:600}.quiet,.small{fill:#59636e}.small{font-size:11px}\
.mono{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:12px}\
.pill{fill:#eaeef2;stroke:none}\
.ready{fill:#1a7f37}.used{fill:#0969da}.idle{fill:#9a6700}.broken{fill:#cf222e}\
.group{fill:none;stroke:#8250df;stroke-width:1.5;stroke-dasharray:5 4}.grouptext{fill:#8250df;font-size:11px}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.bg{fill:#0d1117;stroke:#3d444d}.panel{fill:#151b23;stroke:#3d444d}\
.box{fill:#212830;stroke:#656c76}.wire{stroke:#656c76}.quiet,.small{fill:#9198a1}.pill{fill:#2f3742}\
.ready{fill:#3fb950}.used{fill:#4493f8}.idle{fill:#d29922}.broken{fill:#f85149}\
.group{stroke:#ab7df8}.grouptext{fill:#ab7df8}}";

/// Draws the tree.
pub(crate) fn svg(inventory: &Inventory, users: &Users) -> String {
    let domains = inventory.topology();
    let depth = domains
        .iter()
        .flat_map(|domain| &domain.roots)
        .flat_map(|root| &root.children)
        .map(depth)
        .max()
        .unwrap_or(0)
        .min(COLUMNS);
    let mut picture = Picture {
        inventory,
        users,
        cards_at: 2 * MARGIN + (depth + 1) * COLUMN,
        shapes: String::new(),
        rows: Vec::new(),
    };
    let width = picture.cards_at + CARD_WIDTH + 2 * MARGIN + 16;
    let mut y = HEADER + 8;
    for part in &domains {
        let leaves: usize = part.roots.iter().map(|root| leaves(&root.children)).sum();
        let height = TITLE + leaves * ROW + 8;
        let inner = width - 2 * MARGIN;
        picture.add(format_args!(
            "<rect class=\"panel\" x=\"{MARGIN}\" y=\"{y}\" width=\"{inner}\" height=\"{height}\" rx=\"10\"/>"
        ));
        picture.text(MARGIN + 16, y + 24, "name", &domain(part.numa_node));
        let mut top = y + TITLE;
        for root in &part.roots {
            picture.root(&root.name, &root.children, &mut top);
        }
        y += height + 16;
    }
    picture.shared_groups();
    picture.legend(y + 14);
    let height = y + FOOTER;
    let title = picture.title();
    let shapes = picture.shapes;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"img\">\n<title>PCIe topology: {title}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"bg\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"12\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"32\">PCIe topology</text>\n\
         <text class=\"quiet\" x=\"{MARGIN}\" y=\"54\">{title}</text>\n{shapes}</svg>\n",
        width - 1,
        height - 1
    )
}

/// How many columns of bridges a node needs.
fn depth(node: &Node) -> usize {
    let below = node.children.iter().map(depth).max();
    below.map_or(0, |below| below + 1)
}

fn leaves(nodes: &[Node]) -> usize {
    nodes
        .iter()
        .map(|node| match node.children.is_empty() {
            true => 1,
            false => leaves(&node.children),
        })
        .sum()
}

struct Picture<'a> {
    inventory: &'a Inventory,
    users: &'a Users,
    cards_at: usize,
    shapes: String,
    /// The tops of the cards drawn so far.
    rows: Vec<(Address, usize)>,
}

impl Picture<'_> {
    fn add(&mut self, shape: std::fmt::Arguments<'_>) {
        // Writing into a String does not fail.
        let _ = writeln!(self.shapes, "{shape}");
    }

    fn text(&mut self, x: usize, y: usize, class: &str, text: &str) {
        let text = escaped(text);
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{text}</text>"
        ));
    }

    fn root(&mut self, name: &str, children: &[Node], top: &mut usize) {
        let x = 2 * MARGIN;
        let middles = self.nodes(children, 1, top);
        let y = middle(&middles);
        self.wires(x + BOX, y, &middles);
        self.bridge(x, y, "root bus", name.trim_start_matches("pci"));
    }

    /// Draws nodes and what is below them. Returns where a wire meets each: its left edge and its middle.
    fn nodes(&mut self, nodes: &[Node], column: usize, top: &mut usize) -> Vec<(usize, usize)> {
        let mut ends = Vec::new();
        for node in nodes {
            if node.children.is_empty() {
                ends.push((self.cards_at, *top + CARD / 2));
                self.card(node.address, *top);
                *top += ROW;
                continue;
            }
            let middles = self.nodes(&node.children, column + 1, top);
            if column > COLUMNS {
                ends.extend(middles);
                continue;
            }
            let (x, y) = (2 * MARGIN + column * COLUMN, middle(&middles));
            self.wires(x + BOX, y, &middles);
            let part = match self
                .inventory
                .bridge(node.address)
                .map(|bridge| bridge.kind)
            {
                Some(BridgeKind::UpstreamPort) => "switch",
                Some(BridgeKind::DownstreamPort) => "port",
                _ => "root port",
            };
            self.bridge(x, y, part, &node.address.short());
            ends.push((x, y));
        }
        ends
    }

    /// Wires with right angles, from a box to each end.
    fn wires(&mut self, x: usize, y: usize, ends: &[(usize, usize)]) {
        let bend = x + (COLUMN - BOX) / 2;
        for (to_x, to_y) in ends {
            self.add(format_args!(
                "<path class=\"wire\" d=\"M{x} {y}H{bend}V{to_y}H{to_x}\"/>"
            ));
        }
    }

    fn bridge(&mut self, x: usize, y: usize, part: &str, name: &str) {
        let top = y - 18;
        self.add(format_args!(
            "<rect class=\"box\" x=\"{x}\" y=\"{top}\" width=\"{BOX}\" height=\"36\" rx=\"6\"/>"
        ));
        self.text(x + 10, y - 3, "small", part);
        self.text(x + 10, y + 12, "mono", &shortened(name, 12));
    }

    fn card(&mut self, address: Address, y: usize) {
        let x = self.cards_at;
        let Some(function) = self.inventory.function(address) else {
            return;
        };
        self.rows.push((address, y));
        let state = state(self.inventory, self.users, function);
        let class = class(state.mood);
        self.add(format_args!(
            "<rect class=\"box\" x=\"{x}\" y=\"{y}\" width=\"{CARD_WIDTH}\" height=\"{CARD}\" rx=\"8\"/>\
             <rect class=\"{class}\" x=\"{x}\" y=\"{}\" width=\"4\" height=\"{}\" rx=\"2\"/>",
            y + 8,
            CARD - 16
        ));
        let label = shortened(&super::title(function), 32);
        self.text(x + 16, y + 20, "name", &label);
        self.text(x + 16, y + 38, "mono quiet", &details(function));
        let driver = function.driver.as_deref().unwrap_or("no driver");
        self.pill(x + 268, y + 7, 126, &shortened(driver, 17));
        let group = function
            .iommu_group
            .map_or("no group".to_owned(), |id| format!("group {id}"));
        self.pill(x + 402, y + 7, 84, &group);
        self.add(format_args!(
            "<circle class=\"{class}\" cx=\"{}\" cy=\"{}\" r=\"4\"/>",
            x + 274,
            y + 34
        ));
        self.text(x + 285, y + 38, "quiet", &shortened(&state.text, 38));
    }

    fn pill(&mut self, x: usize, y: usize, width: usize, text: &str) {
        let (middle, text) = (x + width / 2, escaped(text));
        self.add(format_args!(
            "<rect class=\"pill\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"18\" rx=\"9\"/>\
             <text class=\"small\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{text}</text>",
            y + 13
        ));
    }

    /// A bracket beside the cards of each group that has more than one.
    fn shared_groups(&mut self) {
        let x = self.cards_at + CARD_WIDTH + 4;
        for group in &self.inventory.groups {
            let member = |address: &Address| group.members.iter().any(|m| m.address == *address);
            let tops: Vec<usize> = self
                .rows
                .iter()
                .filter(|(address, _)| member(address))
                .map(|(_, top)| *top)
                .collect();
            let (Some(first), Some(last), true) = (tops.first(), tops.last(), tops.len() > 1)
            else {
                continue;
            };
            let (first, last) = (first + 6, last + CARD - 6);
            let (middle, right) = ((first + last) / 2, x + 22);
            let id = group.id;
            self.add(format_args!(
                "<path class=\"group\" d=\"M{x} {first}h8V{last}h-8\"/>\
                 <text class=\"grouptext\" x=\"{right}\" y=\"{middle}\" text-anchor=\"middle\" \
                 transform=\"rotate(-90 {right} {middle})\">one IOMMU group: {id}</text>"
            ));
        }
    }

    fn legend(&mut self, y: usize) {
        const WORDS: [(Mood, &str, usize); 4] = [
            (Mood::Ready, "ready for a virtual machine", 200),
            (Mood::Used, "in use", 70),
            (Mood::Idle, "not on VFIO", 104),
            (Mood::Broken, "cannot be given away", 160),
        ];
        let mut x = MARGIN + 6;
        for (mood, words, width) in WORDS {
            let class = class(mood);
            self.add(format_args!(
                "<circle class=\"{class}\" cx=\"{x}\" cy=\"{}\" r=\"4\"/>",
                y - 4
            ));
            self.text(x + 10, y, "small", words);
            x += width;
        }
    }

    fn title(&self) -> String {
        let count = |kind| {
            self.inventory
                .functions
                .iter()
                .filter(|f| f.kind == kind)
                .count()
        };
        let gpus = count(km_vfio::Kind::Gpu);
        let switches = count(km_vfio::Kind::NvSwitch);
        let mut parts = vec![plural(gpus, "GPU", "GPUs")];
        if switches > 0 {
            parts.push(plural(switches, "NVSwitch", "NVSwitches"));
        }
        parts.push(plural(
            self.inventory.groups.len(),
            "IOMMU group",
            "IOMMU groups",
        ));
        parts.join(" · ")
    }
}

pub(super) fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn details(function: &Function) -> String {
    let mut text = function.address.to_string();
    if let Some(about) = &function.link {
        let _ = write!(text, " · {}", shortened(&link(about), 22));
    }
    text
}

pub(super) fn middle(ends: &[(usize, usize)]) -> usize {
    let first = ends.first().map_or(0, |end| end.1);
    let last = ends.last().map_or(0, |end| end.1);
    (first + last) / 2
}

fn class(mood: Mood) -> &'static str {
    match mood {
        Mood::Ready => "ready",
        Mood::Used => "used",
        Mood::Idle => "idle",
        Mood::Broken => "broken",
    }
}

/// Text for XML. Control characters, which XML cannot carry, are left out.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            char if char.is_control() || matches!(char, '\u{fffe}' | '\u{ffff}') => {}
            char => safe.push(char),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(
            escaped("</text><script>'\"&\u{1b}\u{0}x"),
            "&lt;/text&gt;&lt;script&gt;&#39;&quot;&amp;x"
        );
    }
}
