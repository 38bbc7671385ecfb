//! `cdi generate`.

use std::time::Duration;

use anyhow::Result;
use km_cdi::files::Step;
use km_host::Root;
use serde_json::json;

use super::Global;
use crate::failure::Failure;
use crate::output;
use crate::specs::{self, Options, Planned, Settings};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Print what would be written, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    options: Options,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let settings = Settings::new(&arguments.options, &global.devices()?)?;
    let root = Root::new(&global.host_root)?;
    let wait = Duration::from_secs(global.lock_timeout);
    let planned = match arguments.dry_run {
        true => specs::plan(&root, &settings)?,
        false => specs::refresh(&root, &settings, wait, false)?,
    };
    if !planned.conflicts.is_empty() {
        let all: Vec<String> = planned.conflicts.iter().map(ToString::to_string).collect();
        return Err(Failure::refused(all.join("\n       ")).into());
    }
    let body = json!({
        "done": !arguments.dry_run,
        "dir": planned.dir,
        "steps": planned.steps,
        "devices": planned.found.devices,
        "leftOut": planned.found.left_out,
    });
    let text = text(&planned, arguments.dry_run);
    output::result(global.output, "CdiGenerated", body, &text)
}

fn text(planned: &Planned, dry_run: bool) -> String {
    let (found, steps) = (&planned.found, &planned.steps);
    let mut out = String::new();
    for step in steps {
        out.push_str(&super::step(step));
        if let (Step::Write { text, .. }, true) = (step, dry_run) {
            out.extend(text.lines().map(|line| format!("    {line}\n")));
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
