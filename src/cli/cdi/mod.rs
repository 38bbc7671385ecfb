//! `cdi`: specs of the Container Device Interface, by which containerd and Kata find a device by its name.

mod generate;
mod list;
mod validate;

use anyhow::Result;
use km_cdi::files::{File, Step};
use km_host::{HostPath, Root};

use super::Global;

#[derive(Debug, clap::Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Write the specs of the GPUs and NVSwitches that VFIO has, and remove those of ours that list nothing any more.
    Generate(generate::Arguments),
    /// List the devices of all specs on the node, and whether containerd injects them.
    List,
    /// Check specs as CDI's own library does: those named, or all on the node.
    Validate(validate::Arguments),
}

pub(super) async fn run(global: &Global, command: &Command) -> Result<()> {
    match command {
        Command::Generate(arguments) => generate::run(global, arguments),
        Command::List => list::run(global).await,
        Command::Validate(arguments) => validate::run(global, arguments),
    }
}

/// The specs in each of the folders that CDI looks into by default; what is in a later one comes before what is in an earlier one.
fn folders(root: &Root) -> Result<Vec<Vec<File>>> {
    let mut folders = Vec::new();
    for dir in [km_cdi::STATIC_DIR, km_cdi::DIR] {
        folders.push(km_cdi::files::observe(root, &HostPath::new(dir)?)?);
    }
    Ok(folders)
}

/// A change of a spec, as a line.
pub(super) fn step(step: &Step) -> String {
    match step {
        Step::Write {
            path, new, devices, ..
        } => {
            let how = if *new { "new" } else { "changed" };
            format!("write {path} ({how}, devices: {devices})\n")
        }
        Step::Remove { path } => format!("remove {path}\n"),
    }
}
