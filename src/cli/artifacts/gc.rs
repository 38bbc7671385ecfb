//! `artifacts gc`: removes generations that nothing needs, and what only they needed.

use anyhow::Result;

use super::Global;
use crate::collect::{self, Collection};
use crate::journal::Journal;
use crate::node::Node;
use crate::output;

/// Remove generations that nothing needs, and blobs and files that no generation has.
///
/// What stays: the live generation, the one before it, what rollback holds, what a sandbox claims, and whatever any process
/// has open.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Tell what would go, and remove nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(global: &Global, node: &Node, arguments: &Arguments) -> Result<()> {
    let found = if arguments.dry_run || !node.store.store_dir().exists() {
        collect::find(
            node,
            Journal::open(&node.root, &node.store.state_dir())?.record(),
        )?
    } else {
        let (_lock, journal) = node.lock()?;
        let found = collect::find(node, journal.record())?;
        collect::remove(node, &found)?;
        node.store.end_session()?;
        found
    };
    output::result(
        global.output,
        "Collected",
        &found,
        &text(&found, arguments.dry_run),
    )
}

fn text(found: &Collection, dry_run: bool) -> String {
    let mut out = String::new();
    for kept in &found.kept {
        out.push_str(&format!(
            "keep    {} {}: {}\n",
            kept.class,
            kept.generation,
            kept.because.join(", ")
        ));
    }
    for removed in &found.removed {
        out.push_str(&format!(
            "remove  {} {}\n",
            removed.class, removed.generation
        ));
    }
    let verb = if dry_run { "Would remove" } else { "Removed" };
    out.push_str(&format!(
        "{verb} {} generations and {} files of the store: {}.\n",
        found.removed.len(),
        found.files,
        output::bytes(found.bytes)
    ));
    out
}
