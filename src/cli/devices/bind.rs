//! `devices bind`.

use anyhow::Result;
use km_vfio::{apply, plan};

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
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let request = plan::Request {
        targets: arguments.which.targets(),
        whole_group: arguments.whole_group,
        console: arguments.console,
    };
    super::change(global, &arguments.which, "DevicesBound", |root, looked| {
        let choices = apply::choices(root, &looked.inventory);
        plan::bind(&looked.inventory, &looked.users, &choices, &request)
    })
}
