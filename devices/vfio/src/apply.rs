//! Carries a plan out, step by step, verifies each move, and puts everything back when one fails.
//!
//! The kernel's side (<https://docs.kernel.org/admin-guide/abi-testing-files.html>, sysfs-bus-pci): a driver's name in
//! `driver_override` keeps every other driver from the function, `unbind` takes it from its driver, `drivers_probe` offers it
//! to the rest, and an end of line in `driver_override` clears it.
//!
//! An unbind waits in the kernel, where nothing can interrupt it, until the last descriptor is closed. So users are looked for
//! again right before, and each write has a deadline and a process of its own; see [`Kernel`].

use std::time::Duration;

use km_host::Root;
use rustix::fs::OFlags;

use crate::inventory::is_vfio;
use crate::plan::{Choice, Plan, Step};
use crate::sysfs::Sysfs;
use crate::{Address, Inventory, Users, alias};

/// How long the kernel may take for one write. A GPU's driver takes seconds to let go of it.
const WRITE: Duration = Duration::from_secs(60);

/// How long modprobe may take.
const LOAD: Duration = Duration::from_secs(60);

/// What changes a node.
pub trait Kernel {
    /// Writes an attribute of sysfs, named by its path on the host.
    ///
    /// # Errors
    /// The kernel's answer, or that there was none in time.
    fn write(&self, path: &str, value: &str) -> Result<(), BoxError>;

    /// Loads a module with the host's modprobe.
    ///
    /// # Errors
    /// What modprobe said.
    fn load(&self, module: &str) -> Result<(), BoxError>;
}

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a plan was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A user came between the plan and its execution, or one that no process shows.
    #[error("{address} is in use by {by}: stop it first")]
    Held {
        /// The function.
        address: Address,
        /// By whom.
        by: String,
    },
    /// A write failed.
    #[error("cannot write {value:?} to {path}")]
    Write {
        /// The attribute.
        path: String,
        /// What was written.
        value: String,
        /// The kernel's answer.
        source: BoxError,
    },
    /// A module cannot be loaded.
    #[error(
        "cannot load module {module}: is it installed for this kernel, or blacklisted in /etc/modprobe.d?"
    )]
    Load {
        /// The module.
        module: String,
        /// What modprobe said.
        source: BoxError,
    },
    /// modprobe was content, and the driver is not there.
    #[error(
        "module {module} is loaded or blacklisted, and the PCI bus has no driver {driver}: look at /etc/modprobe.d"
    )]
    NoDriver {
        /// The module.
        module: String,
        /// The driver.
        driver: String,
    },
    /// The function went to no driver, or to another one.
    #[error(
        "{address} should have gone to {wanted} and is with {found}: the kernel's log (dmesg) says why"
    )]
    Elsewhere {
        /// The function.
        address: Address,
        /// Where it should have gone.
        wanted: String,
        /// Where it is.
        found: String,
    },
    /// It does not wake up.
    #[error("{address} stays in power state {state}: power-cycle the machine if it does so again")]
    Asleep {
        /// The function.
        address: Address,
        /// Its state.
        state: String,
    },
    /// A step failed, and everything is as it was.
    #[error("{step} failed; everything is as it was before")]
    Undone {
        /// The step.
        step: String,
        /// Why.
        source: Box<ApplyError>,
    },
    /// A step failed, and something could not be put back.
    #[error("{step} failed, and {left} could not be given back to its driver ({why})")]
    NotUndone {
        /// The step.
        step: String,
        /// Which function.
        left: Address,
        /// Why not.
        why: String,
        /// Why the step failed.
        source: Box<ApplyError>,
    },
    /// The processes cannot be looked through.
    #[error("cannot see who uses devices")]
    Users(#[source] km_host::Error),
}

impl ApplyError {
    /// Whether nothing was started because somebody uses a function.
    pub fn is_refusal(&self) -> bool {
        matches!(self, ApplyError::Held { .. })
    }
}

/// The node's own kernel.
#[derive(Debug)]
pub struct HostKernel<'a> {
    root: &'a Root,
}

impl<'a> HostKernel<'a> {
    /// The kernel of the host whose root this is.
    pub fn new(root: &'a Root) -> HostKernel<'a> {
        HostKernel { root }
    }
}

impl Kernel for HostKernel<'_> {
    fn write(&self, path: &str, value: &str) -> Result<(), BoxError> {
        let path = self.root.resolve(&km_host::HostPath::new(path)?)?;
        Ok(km_host::attribute::write(&path, value, WRITE)?)
    }

    fn load(&self, module: &str) -> Result<(), BoxError> {
        let usual = "/sbin/modprobe";
        let program = match Sysfs::new(self.root).exists(usual) {
            true => usual,
            false => "modprobe",
        };
        // -b: a blacklist counts for the module's own name too.
        let output = km_host::command::run(self.root, &[program, "-b", module], LOAD)?;
        match output.status.success() {
            true => Ok(()),
            false => {
                Err(format!("{program} ended with {}: {}", output.status, output.tail(3)).into())
            }
        }
    }
}

/// The best VFIO driver for each function; see [`alias`].
pub fn choices(root: &Root, inventory: &Inventory) -> std::collections::BTreeMap<Address, Choice> {
    let sysfs = Sysfs::new(root);
    let release = sysfs.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let aliases = match alias::is_release(&release) {
        true => sysfs.bytes(
            format!("/lib/modules/{release}/modules.alias"),
            alias::LIMIT,
        ),
        false => None,
    }
    .unwrap_or_default();
    let choice = |modalias: &str| {
        let module = alias::best_module(&aliases, modalias);
        // The kernel lists a module's drivers, which need not have its name.
        let listed = sysfs.names(format!("/sys/module/{module}/drivers"));
        let listed = listed.iter().find_map(|name| name.strip_prefix("pci:"));
        let driver = match (listed, module.as_str()) {
            (Some(driver), _) if alias::is_module_name(driver) => driver.to_owned(),
            (_, alias::GENERIC) => "vfio-pci".to_owned(),
            _ => module.clone(),
        };
        Choice {
            registered: sysfs.exists(format!("/sys/bus/pci/drivers/{driver}")),
            module,
            driver,
        }
    };
    let functions = inventory.functions.iter();
    functions
        .map(|f| (f.address, choice(&f.modalias)))
        .collect()
}

/// Carries a plan out, and tells each step before it begins.
///
/// # Errors
/// [`ApplyError`]; unless it is [`ApplyError::NotUndone`], every function has the driver that it had.
pub fn apply(
    root: &Root,
    kernel: &dyn Kernel,
    plan: &Plan,
    tell: &mut dyn FnMut(&Step),
) -> Result<(), ApplyError> {
    let run = Run {
        sysfs: Sysfs::new(root),
        kernel,
    };
    run.check_free(plan)?;
    let mut begun: Vec<Begun> = Vec::new();
    for step in &plan.steps {
        tell(step);
        if let Err(error) = run.step(step, &mut begun) {
            return Err(run.undo(plan, step, error, begun));
        }
    }
    run.restore_power(plan)
}

/// A move that has begun: how it was before.
struct Begun {
    address: Address,
    driver: Option<String>,
    driver_override: Option<String>,
}

struct Run<'a> {
    sysfs: Sysfs<'a>,
    kernel: &'a dyn Kernel,
}

impl Run<'_> {
    /// Looks again for users of what will be taken from its driver, all of it before the first step.
    fn check_free(&self, plan: &Plan) -> Result<(), ApplyError> {
        let root = self.sysfs.root();
        let leaving: Vec<Address> = plan
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Move {
                    address,
                    from: Some(_),
                    ..
                } => Some(*address),
                _ => None,
            })
            .collect();
        if leaving.is_empty() {
            return Ok(());
        }
        let inventory = Inventory::observe(root).map_err(ApplyError::Users)?;
        let users = Users::observe(root, &inventory).map_err(ApplyError::Users)?;
        for address in leaving {
            if let Some(holder) = users.of(address).next() {
                let by = holder.to_string();
                return Err(ApplyError::Held { address, by });
            }
            let function = inventory.function(address);
            if let Some(group) = function.filter(|f| f.on_vfio()).and_then(|f| f.iommu_group)
                && self.group_is_busy(group)
            {
                let by = unnamed(&users);
                return Err(ApplyError::Held { address, by });
            }
        }
        Ok(())
    }

    /// The kernel lets nobody open a group that is open, nor one whose device is (drivers/vfio/group.c, `EBUSY`).
    fn group_is_busy(&self, group: u32) -> bool {
        let path = format!("/dev/vfio/{group}");
        match self.sysfs.root().open(path.as_ref(), OFlags::RDWR) {
            Ok(_) => false,
            Err(error) => error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()),
        }
    }

    fn step(&self, step: &Step, begun: &mut Vec<Begun>) -> Result<(), ApplyError> {
        match step {
            Step::LoadModule { module, driver } => self.load(module, driver),
            Step::PowerOn { address, .. } => self.wake(*address),
            Step::Move { address, from, to } => {
                let driver_override = self
                    .sysfs
                    .text(device(*address, "driver_override"))
                    .filter(|text| !text.is_empty() && text != "(null)");
                begun.push(Begun {
                    address: *address,
                    driver: from.clone(),
                    driver_override,
                });
                self.shift(*address, from.as_deref(), to.as_deref())?;
                self.verify(*address, to.as_deref())?;
                self.set_override(*address, None)
            }
        }
    }

    fn load(&self, module: &str, driver: &str) -> Result<(), ApplyError> {
        self.kernel
            .load(module)
            .map_err(|source| ApplyError::Load {
                module: module.to_owned(),
                source,
            })?;
        if self.sysfs.exists(format!("/sys/bus/pci/drivers/{driver}")) {
            return Ok(());
        }
        Err(ApplyError::NoDriver {
            module: module.to_owned(),
            driver: driver.to_owned(),
        })
    }

    /// `on` forbids runtime suspend and resumes before the write returns (Documentation/power/runtime_pm.rst).
    fn wake(&self, address: Address) -> Result<(), ApplyError> {
        self.write(device(address, "power/control"), "on")?;
        let state = self
            .sysfs
            .text(device(address, "power_state"))
            .unwrap_or_default();
        match state.starts_with("D3") {
            true => Err(ApplyError::Asleep { address, state }),
            false => Ok(()),
        }
    }

    fn restore_power(&self, plan: &Plan) -> Result<(), ApplyError> {
        for step in &plan.steps {
            if let Step::PowerOn { address, control } = step {
                self.write(device(*address, "power/control"), control)?;
            }
        }
        Ok(())
    }

    /// Takes a function from the driver that has it now, and has it probed.
    fn shift(
        &self,
        address: Address,
        from: Option<&str>,
        to: Option<&str>,
    ) -> Result<(), ApplyError> {
        self.set_override(address, to)?;
        if let Some(from) = from
            && self.driver(address).as_deref() == Some(from)
        {
            let unbind = format!("/sys/bus/pci/drivers/{from}/unbind");
            self.write(unbind, &address.to_string())?;
        }
        self.write(
            "/sys/bus/pci/drivers_probe".to_owned(),
            &address.to_string(),
        )
    }

    fn verify(&self, address: Address, to: Option<&str>) -> Result<(), ApplyError> {
        let found = self.driver(address);
        let right = match to {
            Some(to) => found.as_deref() == Some(to),
            None => !found.as_deref().is_some_and(is_vfio),
        };
        if right {
            return Ok(());
        }
        Err(ApplyError::Elsewhere {
            address,
            wanted: to.unwrap_or("a driver of the host").to_owned(),
            found: found.unwrap_or_else(|| "no driver".to_owned()),
        })
    }

    fn driver(&self, address: Address) -> Option<String> {
        self.sysfs.link_name(device(address, "driver"))
    }

    fn set_override(&self, address: Address, driver: Option<&str>) -> Result<(), ApplyError> {
        let value = driver.map_or("\n".to_owned(), str::to_owned);
        self.write(device(address, "driver_override"), &value)
    }

    fn write(&self, path: String, value: &str) -> Result<(), ApplyError> {
        self.kernel
            .write(&path, value)
            .map_err(|source| ApplyError::Write {
                path,
                value: value.to_owned(),
                source,
            })
    }

    /// Gives everything that has begun to move back, last first.
    fn undo(&self, plan: &Plan, step: &Step, error: ApplyError, begun: Vec<Begun>) -> ApplyError {
        let (step, source) = (step.to_string(), Box::new(error));
        let mut left = None;
        for before in begun.into_iter().rev() {
            if let Err(error) = self.give_back(&before) {
                left.get_or_insert((before.address, error));
            }
        }
        for power in plan.steps.iter().rev() {
            if let Step::PowerOn { address, control } = power
                && let Err(error) = self.write(device(*address, "power/control"), control)
            {
                left.get_or_insert((*address, error));
            }
        }
        match left {
            None => ApplyError::Undone { step, source },
            Some((left, error)) => ApplyError::NotUndone {
                step,
                left,
                why: chain(&error),
                source,
            },
        }
    }

    fn give_back(&self, before: &Begun) -> Result<(), ApplyError> {
        let address = before.address;
        let now = self.driver(address);
        if now != before.driver {
            match &before.driver {
                Some(driver) => {
                    self.shift(address, now.as_deref(), Some(driver))?;
                    self.verify(address, Some(driver))?;
                }
                None => {
                    let now = now.unwrap_or_default();
                    self.write(
                        format!("/sys/bus/pci/drivers/{now}/unbind"),
                        &address.to_string(),
                    )?;
                }
            }
        }
        self.set_override(address, before.driver_override.as_deref())
    }
}

/// Who may hold a function whose group is busy.
fn unnamed(users: &Users) -> String {
    let all: Vec<String> = users.unplaced().map(ToString::to_string).collect();
    match all.as_slice() {
        [] => "a process that cannot be seen from here".to_owned(),
        [one] => one.clone(),
        many => format!("one of {}", many.join(", ")),
    }
}

fn device(address: Address, attribute: &str) -> String {
    format!("/sys/bus/pci/devices/{address}/{attribute}")
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}
