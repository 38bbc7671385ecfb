//! `cdi generate`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use km_cdi::devices::{self, Backend, Found, Naming};
use km_cdi::files::{self, Step};
use km_host::lock::Lock;
use km_host::{HostPath, Root};
use km_vfio::Inventory;
use serde_json::json;

use super::Global;
use crate::cli::devices::LOCK;
use crate::failure::{Failure, Kind};
use crate::output;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// The host's folder for the specs.
    #[arg(long, env = "KATA_MANAGER_CDI_DIR", value_name = "DIR", default_value = km_cdi::DIR)]
    dir: HostPath,
    /// The class of GPUs, as in nvidia.com/pgpu; empty: each model is a class, such as GH100_H100_PCIE.
    #[arg(
        long,
        env = "P_GPU_ALIAS",
        value_name = "CLASS",
        default_value = "pgpu"
    )]
    gpu_alias: String,
    /// The class of NVSwitches; empty: each model is a class.
    #[arg(
        long,
        env = "NVSWITCH_ALIAS",
        value_name = "CLASS",
        default_value = "nvswitch"
    )]
    nvswitch_alias: String,
    /// Print what would be written, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let naming = Naming::new(&arguments.gpu_alias, &arguments.nvswitch_alias)
        .map_err(|error| Failure::new(Kind::Configuration, error.to_string()))?;
    let root = Root::new(&global.host_root)?;
    let mut planned = plan(&root, &arguments.dir, &naming)?;
    if !arguments.dry_run && !planned.1.is_empty() {
        let path = root.resolve(&HostPath::new(LOCK)?)?;
        if let Some(folder) = path.parent() {
            km_host::atomic::create_dir_all(folder, 0o755)?;
        }
        let _lock = Lock::acquire(&path, Duration::from_secs(global.lock_timeout))?;
        planned = plan(&root, &arguments.dir, &naming)?;
        files::apply(&root, &planned.1).context("cannot bring the CDI specs up to date")?;
    }
    let (found, steps) = planned;
    let body = json!({
        "done": !arguments.dry_run,
        "dir": arguments.dir,
        "steps": steps,
        "devices": found.devices,
        "leftOut": found.left_out,
    });
    let text = text(&found, &steps, arguments.dry_run);
    output::result(global.output, "CdiGenerated", body, &text)
}

fn plan(root: &Root, dir: &HostPath, naming: &Naming) -> Result<(Found, Vec<Step>)> {
    let inventory = Inventory::observe(root).context("cannot look at the PCI bus")?;
    let found = devices::find(&inventory, naming, Backend::observe(root));
    let there = files::observe(root, dir).context("cannot look at the CDI specs")?;
    let steps = files::plan(dir, &there, &found).map_err(|conflicts| {
        let all: Vec<String> = conflicts.iter().map(ToString::to_string).collect();
        Failure::refused(all.join("\n       "))
    })?;
    Ok((found, steps))
}

fn text(found: &Found, steps: &[Step], dry_run: bool) -> String {
    let mut out = String::new();
    for step in steps {
        match step {
            Step::Write {
                path,
                new,
                devices,
                text,
            } => {
                let how = if *new { "new" } else { "changed" };
                out.push_str(&format!("write {path} ({how}, devices: {devices})\n"));
                if dry_run {
                    out.extend(text.lines().map(|line| format!("    {line}\n")));
                }
            }
            Step::Remove { path } => out.push_str(&format!("remove {path}\n")),
        }
    }
    if steps.is_empty() {
        let count = found.devices.len();
        out.push_str(&format!("Nothing to do for {count} devices.\n"));
    }
    for function in &found.left_out {
        out.push_str(&format!(
            "left out: {} {}: {}\n",
            function.address, function.model, function.reason
        ));
    }
    out
}
