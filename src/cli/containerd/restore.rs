//! `containerd restore`: take our handlers out of containerd, and nothing else.

use anyhow::Result;

use crate::cli::Global;
use crate::remove::{self, Removed};
use crate::{execute, observe, output};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Go on although pods use the handlers.
    #[arg(long)]
    force: bool,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let node = global.node()?;
    let mut removed = Removed::default();
    if !remove::anything(&node)? {
        return output::result(
            global.output,
            "ContainerdRestored",
            &removed,
            "Nothing to do: nothing of kata-manager is in containerd's configuration.\n",
        );
    }
    let (_lock, mut journal) = node.lock()?;
    execute::settle(&node, &mut journal).await?;
    let seen = observe::containerd(&node, &journal).await?;
    remove::handlers(&node, &mut journal, &seen, arguments.force, &mut removed).await?;
    output::result(
        global.output,
        "ContainerdRestored",
        &removed,
        &text(&removed),
    )
}

fn text(removed: &Removed) -> String {
    let mut out = String::new();
    for (what, names) in [
        ("Handlers removed from containerd", &removed.handlers),
        ("Handlers given back to their owners", &removed.given_back),
    ] {
        if !names.is_empty() {
            out.push_str(&format!("{what}: {}\n", names.join(", ")));
        }
    }
    out.push_str("Done: containerd's configuration has nothing of kata-manager. \"kata-manager apply\" puts the handlers back.\n");
    out
}
