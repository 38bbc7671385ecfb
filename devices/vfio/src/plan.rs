//! What binding or unbinding does, as an ordered list of steps that print, or why it is refused. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::inventory::is_vfio;
use crate::{Address, Function, Holder, Inventory, Kind, Users};

/// Which functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every GPU and NVSwitch.
    All,
    /// Those at these addresses.
    Addresses(Vec<Address>),
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which functions; the rest of their slots and IOMMU groups goes with them.
    pub targets: Targets,
    /// Whether another vendor's functions of these groups are taken from their drivers too.
    pub whole_group: bool,
    /// Whether a GPU that has the console is taken from its driver.
    pub console: bool,
}

/// The driver that a function is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The module that brings it.
    pub module: String,
    /// Its name on the PCI bus.
    pub driver: String,
    /// Whether the bus has it already.
    pub registered: bool,
}

/// A step. In the order of a plan, each leaves the node in a state that the next run can go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(
    tag = "step",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum Step {
    /// The host's modprobe loads a module.
    LoadModule {
        /// The module.
        module: String,
        /// The driver that the bus has then.
        driver: String,
    },
    /// The function is kept from runtime suspend, and woken.
    PowerOn {
        /// The function.
        address: Address,
        /// What `power/control` says again when the function has been moved.
        control: String,
    },
    /// A function goes from its driver to another.
    Move {
        /// The function.
        address: Address,
        /// The driver that has it.
        from: Option<String>,
        /// The driver that shall have it; `None` lets the kernel choose.
        to: Option<String>,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |driver: &Option<String>| driver.clone().unwrap_or("no driver".to_owned());
        match self {
            Step::LoadModule { module, driver } => {
                write!(f, "load module {module}, for driver {driver}")
            }
            Step::PowerOn { address, .. } => write!(f, "{address}: wake up"),
            Step::Move {
                address,
                from,
                to: Some(to),
            } => write!(f, "{address}: {} -> {to}", or_none(from)),
            Step::Move {
                address,
                from,
                to: None,
            } => {
                write!(f, "{address}: {} -> the kernel's choice", or_none(from))
            }
        }
    }
}

/// Steps; none when everything is as it is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// The functions that the request is about, moved or not.
    pub functions: Vec<Address>,
}

/// Why a request is refused. Nothing has been changed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing of ours is there.
    #[error("{0} is no NVIDIA function of this node: \"devices list\" shows those that are")]
    NotFound(Address),
    /// It is in use.
    #[error("{address} is in use by {}: stop it first", holders(.by))]
    Held {
        /// The function.
        address: Address,
        /// By whom.
        by: Vec<Holder>,
    },
    /// The kernel has no IOMMU group for it.
    #[error(
        "{0} has no IOMMU group: switch the IOMMU on, in the firmware (VT-d, AMD-Vi) and on the kernel's command line \
         (intel_iommu=on or amd_iommu=on)"
    )]
    NoIommu(Address),
    /// It does not answer.
    #[error(
        "{0} has fallen off the bus, its registers answer all ones: reset or power-cycle the machine"
    )]
    Dead(Address),
    /// Another vendor's function with a driver shares the group.
    #[error(
        "{address} shares IOMMU group {group} with {member}, which driver {driver} has: the group can only be given away \
         whole, so move the card to another slot, or take that function from the host too with --whole-group"
    )]
    Foreign {
        /// The function.
        address: Address,
        /// The group.
        group: u32,
        /// The other function.
        member: Address,
        /// Its driver.
        driver: String,
    },
    /// A claim cannot be read.
    #[error(
        "cannot tell which devices a sandbox claims in {0}: remove the file if its sandbox is gone"
    )]
    Claim(String),
    /// The console is on it.
    #[error(
        "{0} shows the console, which goes dark when its driver lets go: say --console if that is fine"
    )]
    Console(Address),
}

fn holders(by: &[Holder]) -> String {
    let all: Vec<String> = by.iter().map(ToString::to_string).collect();
    all.join(", ")
}

/// Plans binding to VFIO. `choices` has the driver for each function of the inventory.
///
/// # Errors
/// Every reason why it is refused.
pub fn bind(
    inventory: &Inventory,
    users: &Users,
    choices: &BTreeMap<Address, Choice>,
    request: &Request,
) -> Result<Plan, Vec<Refusal>> {
    let functions = targets(inventory, request)?;
    let mut refusals = Vec::new();
    let mut plan = Plan::default();
    for function in functions {
        plan.functions.push(function.address);
        let free = function
            .driver
            .as_deref()
            .is_none_or(|name| name == "pci-stub");
        if function.on_vfio() || (function.kind == Kind::Foreign && (free || !request.whole_group))
        {
            refusals.extend(foreign(inventory, function));
            continue;
        }
        let refused = refusals.len();
        refusals.extend(unfit(users, function, request));
        let Some(choice) = choices.get(&function.address) else {
            continue;
        };
        if refusals.len() == refused {
            move_to(&mut plan, function, choice);
        }
    }
    done(plan, refusals, users)
}

/// Plans giving functions back to the host.
///
/// # Errors
/// Every reason why it is refused.
pub fn unbind(
    inventory: &Inventory,
    users: &Users,
    request: &Request,
) -> Result<Plan, Vec<Refusal>> {
    let mut refusals = Vec::new();
    let mut plan = Plan::default();
    for function in targets(inventory, request)? {
        plan.functions.push(function.address);
        if !function.on_vfio() {
            continue;
        }
        refusals.extend(held(users, function));
        plan.steps.push(Step::Move {
            address: function.address,
            from: function.driver.clone(),
            to: None,
        });
    }
    done(plan, refusals, users)
}

fn done(plan: Plan, mut refusals: Vec<Refusal>, users: &Users) -> Result<Plan, Vec<Refusal>> {
    if !plan.steps.is_empty() {
        refusals.extend(users.unreadable.iter().cloned().map(Refusal::Claim));
    }
    if refusals.is_empty() {
        Ok(plan)
    } else {
        Err(refusals)
    }
}

/// The functions asked for and all that go with them, by address.
fn targets<'a>(
    inventory: &'a Inventory,
    request: &Request,
) -> Result<Vec<&'a Function>, Vec<Refusal>> {
    let asked: Vec<Address> = match &request.targets {
        Targets::All => inventory.primaries().map(|f| f.address).collect(),
        Targets::Addresses(addresses) => addresses.clone(),
    };
    let ours = |address: &Address| {
        inventory
            .function(*address)
            .is_some_and(|function| function.kind != Kind::Foreign)
    };
    let missing: Vec<Refusal> = asked
        .iter()
        .filter(|address| !ours(address))
        .map(|address| Refusal::NotFound(*address))
        .collect();
    if !missing.is_empty() {
        return Err(missing);
    }
    let wanted: BTreeSet<Address> = asked
        .iter()
        .flat_map(|address| inventory.unit(*address))
        .map(|function| function.address)
        .collect();
    let all = inventory.functions.iter();
    Ok(all.filter(|f| wanted.contains(&f.address)).collect())
}

/// A foreign member that stays with its driver makes the group useless.
fn foreign(inventory: &Inventory, function: &Function) -> Option<Refusal> {
    let group = function.iommu_group?;
    let driver = function.driver.clone()?;
    if function.kind != Kind::Foreign || is_vfio(&driver) || driver == "pci-stub" {
        return None;
    }
    let ours = inventory
        .functions
        .iter()
        .find(|other| other.iommu_group == Some(group) && other.kind != Kind::Foreign)?;
    Some(Refusal::Foreign {
        address: ours.address,
        group,
        member: function.address,
        driver,
    })
}

fn unfit(users: &Users, function: &Function, request: &Request) -> Vec<Refusal> {
    let mut found = Vec::new();
    let address = function.address;
    if function.iommu_group.is_none() {
        found.push(Refusal::NoIommu(address));
    }
    if function.dead {
        found.push(Refusal::Dead(address));
    }
    if function.boot_vga && function.driver.is_some() && !request.console {
        found.push(Refusal::Console(address));
    }
    found.extend(held(users, function));
    found
}

fn held(users: &Users, function: &Function) -> Option<Refusal> {
    let by: Vec<Holder> = users.of(function.address).cloned().collect();
    (!by.is_empty()).then_some(Refusal::Held {
        address: function.address,
        by,
    })
}

fn move_to(plan: &mut Plan, function: &Function, choice: &Choice) {
    let load = Step::LoadModule {
        module: choice.module.clone(),
        driver: choice.driver.clone(),
    };
    if !choice.registered && !plan.steps.contains(&load) {
        // Before anything moves: a module that cannot be loaded then costs nothing.
        plan.steps.insert(0, load);
    }
    if asleep(function) {
        plan.steps.push(Step::PowerOn {
            address: function.address,
            control: function
                .power
                .control
                .clone()
                .filter(|control| control == "on" || control == "auto")
                .unwrap_or_else(|| "auto".to_owned()),
        });
    }
    plan.steps.push(Step::Move {
        address: function.address,
        from: function.driver.clone(),
        to: Some(choice.driver.clone()),
    });
}

fn asleep(function: &Function) -> bool {
    let power = &function.power;
    power.runtime_status.as_deref() == Some("suspended")
        || power
            .state
            .as_deref()
            .is_some_and(|state| state.starts_with("D3"))
}
