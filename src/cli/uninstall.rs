//! `uninstall`: take everything off the node again.

use anyhow::Result;

use super::Global;
use crate::execute;
use crate::observe;
use crate::output;
use crate::remove::{self, Removed};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Go on although pods use the handlers.
    #[arg(long)]
    force: bool,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let node = global.node()?;
    let mut removed = Removed::default();
    if !remove::anything(&node)? {
        // These need neither containerd nor the store.
        remove::cdi_specs(&node, &mut removed)?;
        remove::udev_rules(&node, &mut removed)?;
        remove::readiness_files(&node, &mut removed)?;
        remove::programs(&node, &mut removed)?;
        let text = match removed == Removed::default() {
            true => "Nothing to do: nothing of kata-manager is on this node.\n".to_owned(),
            false => text(&removed),
        };
        return output::result(global.output, "Uninstalled", &removed, &text);
    }
    let (_lock, mut journal) = node.lock()?;
    execute::settle(&node, &mut journal).await?;
    let seen = observe::containerd(&node, &journal).await?;
    remove::handlers(&node, &mut journal, &seen, arguments.force, &mut removed).await?;
    remove::cdi_specs(&node, &mut removed)?;
    remove::udev_rules(&node, &mut removed)?;
    remove::readiness_files(&node, &mut removed)?;
    remove::programs(&node, &mut removed)?;
    remove::artifacts(&node, &journal, &mut removed)?;
    output::result(global.output, "Uninstalled", &removed, &text(&removed))
}

fn text(removed: &Removed) -> String {
    let mut out = String::new();
    let mut say = |what: &str, names: &[String]| {
        if !names.is_empty() {
            out.push_str(&format!("{what}: {}\n", names.join(", ")));
        }
    };
    say("Handlers removed from containerd", &removed.handlers);
    say("Handlers given back to their owners", &removed.given_back);
    say("Classes removed", &removed.classes);
    say(
        "Folders that were in a class's place are back",
        &removed.folders_back,
    );
    say("CDI specs removed", &removed.cdi_specs);
    say("udev rules removed", &removed.udev_rules);
    say("Readiness files removed", &removed.readiness_files);
    say("Programs removed", &removed.programs);
    if removed.held.is_empty() {
        out.push_str(
            "Done: nothing of kata-manager is left on this node but its configuration file.\n",
        );
        return out;
    }
    for held in &removed.held {
        out.push_str(&format!("Stays: {held}\n"));
    }
    out.push_str(
        "Done, but for what stays: containerd gives a sandbox up whose shim is gone. Uninstall again when it has ended.\n",
    );
    out
}
