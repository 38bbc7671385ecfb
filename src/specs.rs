//! CDI specs of the node's devices, as every command that changes devices keeps them: found, planned, written under the lock.

use std::time::Duration;

use anyhow::{Context as _, Result};
use km_cdi::devices::{self, Backend, Found, Naming};
use km_cdi::files::{self, Conflict, Step};
use km_host::lock::Lock;
use km_host::{HostPath, Root};
use km_vfio::Inventory;
use serde::Serialize;

use crate::config;
use crate::failure::{Failure, Kind};

/// One at a time changes devices. `/run` is emptied at boot, as devices are.
pub(crate) const LOCK: &str = "/run/kata-manager/devices.lock";

// How devices are named and which nodes are theirs, in place of what the configuration says. No documentation: it would stand in the
// place of the help of each command that has it.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "CDI specs")]
pub(crate) struct Options {
    /// The class of GPUs, as in nvidia.com/pgpu, in place of devices.gpuAlias; empty: each model is a class, such as
    /// GH100_H100_PCIE.
    #[arg(long, env = "P_GPU_ALIAS", value_name = "CLASS")]
    gpu_alias: Option<String>,
    /// The class of NVSwitches, in place of devices.nvswitchAlias; empty: each model is a class.
    #[arg(long, env = "NVSWITCH_ALIAS", value_name = "CLASS")]
    nvswitch_alias: Option<String>,
    /// The host's folder for the specs, in place of devices.cdiDir.
    #[arg(
        long = "cdi-dir",
        alias = "dir",
        env = "KATA_MANAGER_CDI_DIR",
        value_name = "DIR"
    )]
    dir: Option<HostPath>,
    /// Which nodes give a device to a virtual machine, in place of devices.backend.
    #[arg(long, env = "KATA_MANAGER_DEVICE_BACKEND", value_enum)]
    backend: Option<config::Backend>,
}

/// What counts, of options and configuration.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) naming: Naming,
    pub(crate) dir: HostPath,
    backend: config::Backend,
}

impl Settings {
    /// Options come before the configuration.
    pub(crate) fn new(options: &Options, configured: &config::Devices) -> Result<Settings> {
        let gpu = options.gpu_alias.as_ref();
        let nvswitch = options.nvswitch_alias.as_ref();
        let naming = Naming::new(
            gpu.unwrap_or(&configured.gpu_alias),
            nvswitch.unwrap_or(&configured.nvswitch_alias),
        )
        .map_err(|error| Failure::new(Kind::Configuration, error.to_string()))?;
        Ok(Settings {
            naming,
            dir: options.dir.as_ref().unwrap_or(&configured.cdi_dir).clone(),
            backend: options.backend.unwrap_or(configured.backend),
        })
    }

    /// Which nodes give a device to a virtual machine; `None` where that is the host's to say.
    pub(crate) fn backend(&self) -> Option<Backend> {
        match self.backend {
            config::Backend::Auto => None,
            config::Backend::Group => Some(Backend::Group),
            config::Backend::Iommufd => Some(Backend::IommufdOnly),
        }
    }

    /// The devices of a host that these settings and its nodes make.
    pub(crate) fn find(&self, root: &Root, inventory: &Inventory) -> Found {
        let backend = self.backend().unwrap_or_else(|| Backend::observe(root));
        devices::find(inventory, &self.naming, backend)
    }
}

/// What has to change.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Planned {
    pub(crate) dir: HostPath,
    pub(crate) steps: Vec<Step>,
    #[serde(flatten)]
    pub(crate) found: Found,
    /// Why nothing can change.
    #[serde(serialize_with = "texts")]
    pub(crate) conflicts: Vec<Conflict>,
}

fn texts<S: serde::Serializer>(conflicts: &[Conflict], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(conflicts.iter().map(ToString::to_string))
}

/// Looks at devices and specs; writes nothing.
pub(crate) fn plan(root: &Root, settings: &Settings) -> Result<Planned> {
    let inventory = Inventory::observe(root).context("cannot look at the PCI bus")?;
    let found = settings.find(root, &inventory);
    let there = files::observe(root, &settings.dir).context("cannot look at the CDI specs")?;
    let (steps, conflicts) = match files::plan(&settings.dir, &there, &found) {
        Ok(steps) => (steps, Vec::new()),
        Err(conflicts) => (Vec::new(), conflicts),
    };
    Ok(Planned {
        dir: settings.dir.clone(),
        steps,
        found,
        conflicts,
    })
}

/// Takes the lock of everything that changes devices.
pub(crate) fn lock(root: &Root, wait: Duration) -> Result<Lock> {
    let path = root.resolve(&HostPath::new(LOCK)?)?;
    if let Some(folder) = path.parent() {
        km_host::atomic::create_dir_all(folder, 0o755)?;
    }
    Ok(Lock::acquire(&path, wait)?)
}

/// Brings the specs up to date, under the lock where something changes. `held` says that the caller has it.
pub(crate) fn refresh(
    root: &Root,
    settings: &Settings,
    wait: Duration,
    held: bool,
) -> Result<Planned> {
    let mut planned = plan(root, settings)?;
    if planned.steps.is_empty() {
        return Ok(planned);
    }
    let _lock = match held {
        true => None,
        false => {
            let lock = lock(root, wait)?;
            planned = plan(root, settings)?;
            Some(lock)
        }
    };
    files::apply(root, &planned.steps).context("cannot bring the CDI specs up to date")?;
    Ok(planned)
}
