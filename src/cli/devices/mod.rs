//! `devices`: the NVIDIA functions of the node.

mod bind;
mod list;
mod unbind;

use std::time::Duration;

use anyhow::{Context as _, Result};
use km_host::Root;
use km_vfio::apply::{self, HostKernel};
use km_vfio::plan::{Plan, Refusal, Targets};
use km_vfio::{Address, Function, Holder, Inventory, Users};
use serde::Serialize;
use serde_json::json;

use super::Global;
use crate::failure::{Failure, Kind};
use crate::output::{self, Format};
use crate::specs::{self, Options, Planned, Settings};

#[derive(Debug, clap::Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// List GPUs and NVSwitches with their drivers, IOMMU groups and users.
    List,
    /// Hand GPUs and NVSwitches to VFIO, with all that shares their slots and IOMMU groups.
    Bind(bind::Arguments),
    /// Give GPUs and NVSwitches back to the host's drivers.
    Unbind(unbind::Arguments),
}

// Which devices, and whether only to look. No documentation: it would stand in the place of the help of each command that has it.
#[derive(Debug, clap::Args)]
struct Which {
    /// PCI addresses, such as 0000:41:00.0 or 41:00.0.
    #[arg(
        required_unless_present = "all",
        conflicts_with = "all",
        value_name = "ADDRESS"
    )]
    addresses: Vec<Address>,
    /// Every GPU and NVSwitch of the node.
    #[arg(long)]
    all: bool,
    /// Print the steps, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Leave the CDI specs as they are; "cdi generate" brings them up to date.
    #[arg(long)]
    no_cdi: bool,
    #[command(flatten)]
    specs: Options,
}

impl Which {
    fn targets(&self) -> Targets {
        match self.all {
            true => Targets::All,
            false => Targets::Addresses(self.addresses.clone()),
        }
    }
}

pub(super) fn run(global: &Global, command: &Command) -> Result<()> {
    match command {
        Command::List => list::run(global),
        Command::Bind(arguments) => bind::run(global, arguments),
        Command::Unbind(arguments) => unbind::run(global, arguments),
    }
}

/// What is on the bus, and who uses it.
pub(super) struct Looked {
    pub(super) inventory: Inventory,
    pub(super) users: Users,
}

/// A function with its users, as JSON has it.
#[derive(Debug, Serialize)]
pub(super) struct Shown<'a> {
    #[serde(flatten)]
    function: &'a Function,
    holders: Vec<&'a Holder>,
}

impl Looked {
    pub(super) fn at(root: &Root) -> Result<Looked> {
        let inventory = Inventory::observe(root).context("cannot look at the PCI bus")?;
        let users = Users::observe(root, &inventory).context("cannot see who uses devices")?;
        Ok(Looked { inventory, users })
    }

    pub(super) fn shown(&self) -> Vec<Shown<'_>> {
        let shown = |function| Shown {
            function,
            holders: self.users.of(function.address).collect(),
        };
        self.inventory.functions.iter().map(shown).collect()
    }
}

/// Plans, and tells the plan or carries it out under the lock; `plan` is asked again when the lock is held. `after` is for what
/// is to be done once the functions are where they should be, moved or not; then the CDI specs follow.
fn change(
    global: &Global,
    which: &Which,
    kind: &str,
    plan: impl Fn(&Root, &Looked) -> std::result::Result<Plan, Vec<Refusal>>,
    after: impl Fn(&Root, &Plan) -> Result<()>,
) -> Result<()> {
    let settings = Settings::new(&which.specs, &global.devices()?)?;
    let root = Root::new(&global.host_root)?;
    let wait = Duration::from_secs(global.lock_timeout);
    let make = || -> Result<Plan> { plan(&root, &Looked::at(&root)?).map_err(refused) };
    let mut planned = make()?;
    if which.dry_run {
        return tell(global, kind, &planned, None);
    }
    let lock = match planned.steps.is_empty() {
        true => None,
        false => Some(specs::lock(&root, wait)?),
    };
    if lock.is_some() {
        planned = make()?;
        let mut say = |step: &km_vfio::plan::Step| {
            if global.output == Format::Text {
                output::to_stderr(&step.to_string());
            }
        };
        apply::apply(&root, &HostKernel::new(&root), &planned, &mut say)?;
    }
    after(&root, &planned)?;
    let specs = match which.no_cdi {
        true => None,
        false => Some(
            specs::refresh(&root, &settings, wait, lock.is_some())
                .context("the devices are where they should be, and their CDI specs are not")?,
        ),
    };
    tell(global, kind, &planned, Some(specs))
}

/// All reasons at once. A device that is not there or does not answer is the device's failure; the others are refusals.
fn refused(refusals: Vec<Refusal>) -> anyhow::Error {
    let device = |refusal: &Refusal| matches!(refusal, Refusal::NotFound(_) | Refusal::Dead(_));
    let kind = match refusals.iter().all(device) {
        true => Kind::Device,
        false => Kind::Refused,
    };
    let all: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    Failure::new(kind, all.join("\n       ")).into()
}

/// Tells what was done, with the specs unless they were left alone; `done` is `None` where nothing was to be done.
fn tell(global: &Global, kind: &str, plan: &Plan, done: Option<Option<Planned>>) -> Result<()> {
    let specs = done.as_ref().and_then(Option::as_ref);
    let body = json!({
        "done": done.is_some(),
        "steps": plan.steps,
        "functions": plan.functions,
        "specs": specs,
    });
    let moves = |step: &&km_vfio::plan::Step| matches!(step, km_vfio::plan::Step::Move { .. });
    let mut text = if plan.steps.is_empty() {
        format!("Nothing to do for {} functions.\n", plan.functions.len())
    } else if done.is_some() {
        format!(
            "Done: {} functions moved.\n",
            plan.steps.iter().filter(moves).count()
        )
    } else {
        plan.steps.iter().map(|step| format!("{step}\n")).collect()
    };
    if let Some(specs) = specs {
        text.extend(specs.steps.iter().map(super::cdi::step));
        for conflict in &specs.conflicts {
            output::to_stderr(&format!("warning: CDI specs are left alone: {conflict}"));
        }
    }
    output::result(global.output, kind, body, &text)
}
