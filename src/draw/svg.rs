//! The PCI tree as SVG: from the root bus on the left to a card for each function on the right.

use std::fmt::Write as _;

use km_vfio::topology::Node;
use km_vfio::{Address, BridgeKind, Function, Inventory, Users};

use super::canvas::{
    CARD, CARD_WIDTH, COLUMN, Canvas, FOOTER, HEADER, MARGIN, ROW, escaped, middle,
};
use super::{Mood, domain, link, plural, shortened, state};

/// A panel's title.
const TITLE: usize = 36;
/// The most columns of bridges that are drawn. Real machines have five at most.
const COLUMNS: usize = 12;

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
        canvas: Canvas::default(),
        rows: Vec::new(),
    };
    let width = picture.cards_at + CARD_WIDTH + 2 * MARGIN + 16;
    let mut y = HEADER + 8;
    for part in &domains {
        let leaves: usize = part.roots.iter().map(|root| leaves(&root.children)).sum();
        let height = TITLE + leaves * ROW + 8;
        picture
            .canvas
            .panel(y, width, height, &domain(part.numa_node));
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
    picture
        .canvas
        .finish(width, height, "PCIe topology", &title)
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
    canvas: Canvas,
    /// The tops of the cards drawn so far.
    rows: Vec<(Address, usize)>,
}

impl Picture<'_> {
    fn root(&mut self, name: &str, children: &[Node], top: &mut usize) {
        let x = 2 * MARGIN;
        let middles = self.nodes(children, 1, top);
        let y = middle(&middles);
        self.canvas.wires(x, y, &middles);
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
            self.canvas.wires(x, y, &middles);
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

    fn bridge(&mut self, x: usize, y: usize, part: &str, name: &str) {
        self.canvas.frame(x, y);
        self.canvas.text(x + 10, y - 3, "small", part);
        self.canvas
            .text(x + 10, y + 12, "mono", &shortened(name, 12));
    }

    fn card(&mut self, address: Address, y: usize) {
        let x = self.cards_at;
        let Some(function) = self.inventory.function(address) else {
            return;
        };
        self.rows.push((address, y));
        let state = state(self.inventory, self.users, function);
        let class = class(state.mood);
        self.canvas.card(x, y, class);
        let label = shortened(&super::title(function), 32);
        self.canvas.text(x + 16, y + 20, "name", &label);
        self.canvas
            .text(x + 16, y + 38, "mono quiet", &details(function));
        let driver = function.driver.as_deref().unwrap_or("no driver");
        self.pill(x + 268, y + 7, 126, &shortened(driver, 17));
        let group = function
            .iommu_group
            .map_or("no group".to_owned(), |id| format!("group {id}"));
        self.pill(x + 402, y + 7, 84, &group);
        self.canvas.add(format_args!(
            "<circle class=\"{class}\" cx=\"{}\" cy=\"{}\" r=\"4\"/>",
            x + 274,
            y + 34
        ));
        self.canvas
            .text(x + 285, y + 38, "quiet", &shortened(&state.text, 38));
    }

    fn pill(&mut self, x: usize, y: usize, width: usize, text: &str) {
        let (middle, text) = (x + width / 2, escaped(text));
        self.canvas.add(format_args!(
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
            self.canvas.add(format_args!(
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
            self.canvas.add(format_args!(
                "<circle class=\"{class}\" cx=\"{x}\" cy=\"{}\" r=\"4\"/>",
                y - 4
            ));
            self.canvas.text(x + 10, y, "small", words);
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

fn details(function: &Function) -> String {
    let mut text = function.address.to_string();
    if let Some(about) = &function.link {
        let _ = write!(text, " · {}", shortened(&link(about), 22));
    }
    text
}

fn class(mood: Mood) -> &'static str {
    match mood {
        Mood::Ready => "ready",
        Mood::Used => "used",
        Mood::Idle => "idle",
        Mood::Broken => "broken",
    }
}
