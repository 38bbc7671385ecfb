//! `topology`: the PCI tree of the node's NVIDIA functions, drawn.

use std::path::PathBuf;

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
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let looked = Looked::at(&Root::new(&global.host_root)?)?;
    let (inventory, users) = (&looked.inventory, &looked.users);
    if let Some(file) = &arguments.svg {
        let picture = draw::svg(inventory, users);
        if file.as_os_str() == "-" {
            return output::to_stdout(&picture);
        }
        km_host::atomic::write(file, picture.as_bytes(), 0o644)
            .with_context(|| format!("cannot write the drawing into {}", file.display()))?;
        if global.output == Format::Text {
            return output::to_stdout(&format!("Drawn into {}\n", file.display()));
        }
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
