//! `devices unbind`.

use anyhow::{Context as _, Result};
use km_vfio::{persist, plan};

use super::Which;
use crate::cli::Global;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    #[command(flatten)]
    which: Which,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let request = plan::Request {
        targets: arguments.which.targets(),
        whole_group: true,
        console: true,
    };
    super::change(
        global,
        &arguments.which,
        "DevicesUnbound",
        |_, looked| plan::unbind(&looked.inventory, &looked.users, &request),
        |root, plan| {
            let rules = plan.functions.iter().map(|address| (*address, None));
            persist::update(root, &rules.collect())
                .context("the devices are given back, and will be bound again after a reboot")?;
            Ok(())
        },
    )
}
