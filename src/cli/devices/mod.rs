//! `devices`: the NVIDIA functions of the node.

mod bind;
mod list;
mod unbind;

use std::time::Duration;

use anyhow::{Context as _, Result};
use km_host::lock::Lock;
use km_host::{HostPath, Root};
use km_vfio::apply::{self, HostKernel};
use km_vfio::plan::{Plan, Refusal, Targets};
use km_vfio::{Address, Function, Holder, Inventory, Users};
use serde::Serialize;
use serde_json::json;

use super::Global;
use crate::failure::{Failure, Kind};
use crate::output::{self, Format};

/// One at a time changes devices. `/run` is emptied at boot, as devices are.
pub(super) const LOCK: &str = "/run/kata-manager/devices.lock";

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List GPUs and NVSwitches with their drivers, IOMMU groups and users.
    List,
    /// Hand GPUs and NVSwitches to VFIO, with all that shares their slots and IOMMU groups.
    Bind(bind::Arguments),
    /// Give GPUs and NVSwitches back to the host's drivers.
    Unbind(unbind::Arguments),
}

/// Which devices, and whether only to look.
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
/// is to be done once the functions are where they should be, moved or not.
fn change(
    global: &Global,
    which: &Which,
    kind: &str,
    plan: impl Fn(&Root, &Looked) -> std::result::Result<Plan, Vec<Refusal>>,
    after: impl Fn(&Root, &Plan) -> Result<()>,
) -> Result<()> {
    let root = Root::new(&global.host_root)?;
    let make = || -> Result<Plan> { plan(&root, &Looked::at(&root)?).map_err(refused) };
    let mut planned = make()?;
    if which.dry_run {
        return tell(global, kind, &planned, false);
    }
    if planned.steps.is_empty() {
        after(&root, &planned)?;
        return tell(global, kind, &planned, true);
    }
    let path = root.resolve(&HostPath::new(LOCK)?)?;
    if let Some(folder) = path.parent() {
        km_host::atomic::create_dir_all(folder, 0o755)?;
    }
    let _lock = Lock::acquire(&path, Duration::from_secs(global.lock_timeout))?;
    planned = make()?;
    let mut say = |step: &km_vfio::plan::Step| {
        if global.output == Format::Text {
            output::to_stderr(&step.to_string());
        }
    };
    apply::apply(&root, &HostKernel::new(&root), &planned, &mut say)?;
    after(&root, &planned)?;
    tell(global, kind, &planned, true)
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

fn tell(global: &Global, kind: &str, plan: &Plan, done: bool) -> Result<()> {
    let body = json!({ "done": done, "steps": plan.steps, "functions": plan.functions });
    let moves = |step: &&km_vfio::plan::Step| matches!(step, km_vfio::plan::Step::Move { .. });
    let text = if plan.steps.is_empty() {
        format!("Nothing to do for {} functions.\n", plan.functions.len())
    } else if done {
        format!(
            "Done: {} functions moved.\n",
            plan.steps.iter().filter(moves).count()
        )
    } else {
        plan.steps.iter().map(|step| format!("{step}\n")).collect()
    };
    output::result(global.output, kind, body, &text)
}
