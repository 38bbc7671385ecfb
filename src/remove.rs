//! Uninstall: the inverse edit of containerd's configuration, then our programs and everything of ours in the artifacts folder.

use anyhow::Result;
use km_containerd_config::ContainerdVersion;
use km_containerd_config::edit::{Document, Owner};
use km_containerd_config::place::{self, Request};
use km_containerd_config::transaction;
use km_host::{HostPath, atomic};
use serde::Serialize;

use crate::execute;
use crate::failure::Failure;
use crate::journal::Journal;
use crate::node::Node;
use crate::observe::{self, SeenContainerd};
use crate::plan;

/// Which files there are hardly depends on the version: patterns of 1.6 alone may differ, and are none of ours.
const ANY_VERSION: ContainerdVersion = ContainerdVersion::new(2, 0, 0);

/// What uninstalling did.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Removed {
    /// Handlers that are gone.
    pub(crate) handlers: Vec<String>,
    /// Handlers of others that are back.
    pub(crate) given_back: Vec<String>,
    /// Classes that are gone.
    pub(crate) classes: Vec<String>,
    /// Folders of others that are back under a class's name.
    pub(crate) folders_back: Vec<String>,
    /// CDI specs that are gone.
    pub(crate) cdi_specs: Vec<String>,
    /// Files with rules of `devices bind --persist` that are gone.
    pub(crate) udev_rules: Vec<String>,
    /// Readiness files that `doctor --write-ready` wrote and that are gone.
    pub(crate) readiness_files: Vec<String>,
    /// Programs of ours, with their links and settings, that are gone.
    pub(crate) programs: Vec<String>,
    /// What stays, and what still needs it.
    pub(crate) held: Vec<String>,
}

/// Whether there is anything of ours on the node.
pub(crate) fn anything(node: &Node) -> Result<bool> {
    if node.store.store_dir().exists() {
        return Ok(true);
    }
    // A file that cannot be read is the next step's to refuse, if anything of ours may be in it.
    let Ok((_, effective)) = observe::files(node, ANY_VERSION) else {
        return Ok(true);
    };
    let ours = |document: &Document| {
        let handlers = document.handlers();
        handlers.iter().any(|handler| handler.owner == Owner::Ours)
    };
    Ok(effective.files.iter().any(|file| ours(&file.document)))
}

/// Takes the handlers out of containerd, refusing while sandboxes use them unless forced.
pub(crate) async fn handlers(
    node: &Node,
    journal: &mut Journal,
    seen: &SeenContainerd,
    force: bool,
    removed: &mut Removed,
) -> Result<()> {
    let request = Request {
        recorded: &seen.recorded,
        rendered: seen.flavor.is_rendered(),
        ..Request::default()
    };
    let main = &node.config.containerd.config;
    let placed = place::plan(&seen.files, &seen.effective, main, &request)?;
    let edited = &placed.edited;
    let gone = edited.gone();
    let touched: Vec<String> = gone.iter().chain(&edited.given_back).cloned().collect();
    let users = plan::users(seen, &touched);
    if !users.is_empty() && !force {
        return Err(Failure::refused(format!(
            "handlers are in use; delete these pods first, or give --force and they cannot be restarted or (containerd 2.x) exec'd into:\n{}",
            users.join("\n")
        ))
        .into());
    }
    let change = execute::change(node, seen, &placed, journal)?;
    transaction::run(&change, &node.daemon()?, journal, &mut execute::report).await?;
    removed.handlers = gone;
    removed.given_back.clone_from(&edited.given_back);
    journal.update(|record| record.handlers.clear())
}

/// Removes the CDI specs of ours from the folders that CDI looks into by default, and from the one that is configured.
pub(crate) fn cdi_specs(node: &Node, removed: &mut Removed) -> Result<()> {
    let usual = [
        HostPath::new(km_cdi::STATIC_DIR)?,
        HostPath::new(km_cdi::DIR)?,
    ];
    let own = node.config.devices.cdi_dir.clone();
    let own = Some(own).filter(|dir| !usual.contains(dir));
    for dir in usual.iter().chain(&own) {
        let gone = km_cdi::files::remove_ours(&node.root, dir)?;
        removed
            .cdi_specs
            .extend(gone.iter().map(ToString::to_string));
    }
    Ok(())
}

/// Removes the rules of `devices bind --persist`: after the next reboot no device goes to VFIO by itself. Those that are there now
/// stay, for pods may use them.
pub(crate) fn udev_rules(node: &Node, removed: &mut Removed) -> Result<()> {
    if km_vfio::persist::remove(&node.root)? {
        removed.udev_rules.push(km_vfio::persist::RULES.to_owned());
    }
    Ok(())
}

/// Removes what `doctor --write-ready` has told the GPU Operator: nobody keeps it true any more. The validator's own files stay.
pub(crate) fn readiness_files(node: &Node, removed: &mut Removed) -> Result<()> {
    let gone = km_doctor::ready::remove_ours(&node.root)?;
    removed
        .readiness_files
        .extend(gone.iter().map(ToString::to_string));
    Ok(())
}

/// Removes the shim, its links and its settings, unless a sandbox still needs them.
pub(crate) fn programs(node: &Node, removed: &mut Removed) -> Result<()> {
    let (gone, held) = crate::programs::remove(node)?;
    removed.programs.extend(gone);
    removed.held.extend(held);
    Ok(())
}

/// Removes everything of ours in the artifacts folder; the journal goes last.
pub(crate) fn artifacts(node: &Node, journal: &Journal, removed: &mut Removed) -> Result<()> {
    let folders = journal.record().store_folders.clone();
    for class in node.store.classes()? {
        if node.store.displaced(&class)?.is_some() {
            removed.folders_back.push(class.clone());
        }
        node.store.remove_class(&class)?;
        removed.classes.push(class);
    }
    node.store.remove_all()?;
    node.store.remove_state()?;
    for folder in folders.iter().rev() {
        if !folder.starts_with(node.store.store_dir()) && !atomic::remove_dir_if_empty(folder)? {
            break;
        }
    }
    Ok(())
}
