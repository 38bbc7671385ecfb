//! Drawings of the PCI tree, and the words that drawings and tables share. Data in, text out: nothing here reads or writes.

mod canvas;
pub(crate) mod planned;
mod svg;
mod text;

pub(crate) use svg::svg;
pub(crate) use text::text;

use km_vfio::{Function, Inventory, Link, Users};

/// How a function stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) mood: Mood,
    pub(crate) text: String,
}

/// What a state means to whoever wants to give the function to a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// It can be given away now.
    Ready,
    /// Something has it open.
    Used,
    /// It is not on VFIO.
    Idle,
    /// It cannot be given away, and binding it alone does not help.
    Broken,
}

/// How a function stands, in a few words.
pub(crate) fn state(inventory: &Inventory, users: &Users, function: &Function) -> State {
    let said = |mood, text: &str| State {
        mood,
        text: text.to_owned(),
    };
    let held: Vec<_> = users.of(function.address).collect();
    if function.dead {
        return said(Mood::Broken, "fallen off the bus");
    }
    if let Some(first) = held.first() {
        let more = match held.iter().filter(|other| other.pid != first.pid).count() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let name = shortened(&first.name, 16);
        return said(Mood::Used, &format!("used by {name}[{}]{more}", first.pid));
    }
    let Some(group) = function.iommu_group.and_then(|id| inventory.group(id)) else {
        return said(Mood::Broken, "no IOMMU group");
    };
    if !function.on_vfio() {
        let console = if function.boot_vga { "console" } else { "host" };
        return said(
            Mood::Idle,
            function.driver.as_ref().map_or("no driver", |_| console),
        );
    }
    if !group.viable {
        return said(Mood::Broken, "group is not all on VFIO");
    }
    said(Mood::Ready, "ready")
}

/// What a function is called: what it is and its model, without saying a word twice.
pub(crate) fn title(function: &Function) -> String {
    let (word, label) = (function.kind.word(), function.label());
    if label.contains(word) {
        label
    } else {
        format!("{word} {label}")
    }
}

/// A link in a few characters: `32.0 GT/s x16`, with what the function could do where that is more.
pub(crate) fn link(link: &Link) -> String {
    let one = |speed: &Option<String>, width: Option<u8>| match (speed, width) {
        (Some(speed), Some(width)) => {
            Some(format!("{} GT/s x{width}", speed.trim_end_matches(".0")))
        }
        (Some(speed), None) => Some(format!("{} GT/s", speed.trim_end_matches(".0"))),
        _ => None,
    };
    let now = one(&link.speed, link.width);
    let most = one(&link.max_speed, link.max_width);
    match (now, most) {
        (Some(now), Some(most)) if now != most => format!("{now} (of {most})"),
        (Some(now), _) => now,
        (None, _) => "down".to_owned(),
    }
}

/// A number with its noun.
fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// A text of at most so many characters, cut with an ellipsis.
pub(crate) fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(most.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

/// What a NUMA node's functions stand under.
pub(crate) fn domain(numa_node: Option<u16>) -> String {
    numa_node.map_or_else(
        || "NUMA node not told".to_owned(),
        |node| format!("NUMA node {node}"),
    )
}
