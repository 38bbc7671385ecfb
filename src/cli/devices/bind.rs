//! `devices bind`.

use anyhow::{Context as _, Result};
use km_host::Root;
use km_vfio::plan::{self, Plan};
use km_vfio::{Inventory, apply, persist};

use super::Which;
use crate::cli::Global;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Take other vendors' functions of the same IOMMU groups from their drivers too.
    #[arg(long)]
    whole_group: bool,
    /// Take a GPU that shows the console too.
    #[arg(long)]
    console: bool,
    /// Bind them again after a reboot, by udev rules.
    #[arg(long)]
    persist: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let request = plan::Request {
        targets: arguments.which.targets(),
        whole_group: arguments.whole_group,
        console: arguments.console,
    };
    super::change(
        global,
        &arguments.which,
        "DevicesBound",
        |root, looked| {
            let choices = apply::choices(root, &looked.inventory);
            plan::bind(&looked.inventory, &looked.users, &choices, &request)
        },
        |root, plan| match arguments.persist {
            true => keep(root, plan),
            false => Ok(()),
        },
    )
}

/// Writes rules for the functions that a VFIO driver has now.
fn keep(root: &Root, plan: &Plan) -> Result<()> {
    let inventory = Inventory::observe(root)?;
    let choices = apply::choices(root, &inventory);
    let functions = inventory.functions.iter();
    let rules = functions
        .filter(|function| function.on_vfio() && plan.functions.contains(&function.address))
        .filter_map(|function| {
            let choice = choices.get(&function.address)?;
            Some((function.address, Some(persist::rule(function, choice))))
        })
        .collect();
    persist::update(root, &rules)
        .context("the devices are bound, and will not be after a reboot")?;
    Ok(())
}
