//! `topology`: the PCI tree of the node's NVIDIA functions, drawn; or with `--plan` the one that a guest will have.

mod planned;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use km_host::Root;
use serde_json::json;

use super::Global;
use super::devices::Looked;
use crate::draw;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Write the drawing as SVG into this file; - is standard output.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Plan the topology of a guest with these devices: addresses with commas between, `all`, or a pod that runs (NAMESPACE/NAME).
    #[arg(long, value_name = "DEVICES|POD")]
    plan: Option<planned::What>,
    #[command(flatten)]
    guest: planned::GuestArguments,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let looked = Looked::at(&Root::new(&global.host_root)?)?;
    if let Some(what) = &arguments.plan {
        return planned::run(global, arguments, what, &looked).await;
    }
    let (inventory, users) = (&looked.inventory, &looked.users);
    if let Some(file) = &arguments.svg
        && drawn(global, file, &draw::svg(inventory, users))?
    {
        return Ok(());
    }
    let body = json!({
        "domains": inventory.topology(),
        "devices": looked.shown(),
        "bridges": inventory.bridges,
        "groups": inventory.groups,
    });
    let text = draw::text(inventory, users);
    output::result(global.output, "Topology", body, &text)
}

/// Writes a picture where it was asked for. Returns whether nothing else is to be said.
fn drawn(global: &Global, file: &Path, picture: &str) -> Result<bool> {
    if file.as_os_str() == "-" {
        output::to_stdout(picture)?;
        return Ok(true);
    }
    km_host::atomic::write(file, picture.as_bytes(), 0o644)
        .with_context(|| format!("cannot write the drawing into {}", file.display()))?;
    if global.output == Format::Text {
        output::to_stdout(&format!("Drawn into {}\n", file.display()))?;
        return Ok(true);
    }
    Ok(false)
}
