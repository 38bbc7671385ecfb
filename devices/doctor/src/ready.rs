//! The files by which NVIDIA's GPU Operator is told that a node is ready for passthrough.
//!
//! Its Sandbox Validator writes them, and the device plugin's pod waits for them (NVIDIA/gpu-operator, cmd/nvidia-validator/main.go):
//! `workload-type` holds the node's workload and a newline; `vfio-pci-ready` is empty and there while every GPU is with VFIO;
//! `cc-manager-ready` is empty and there when the node needs no confidential-computing manager, or when that has said that it is
//! done by `.cc-manager-ctr-ready`.

use km_host::{Error, HostPath, Root, atomic};
use km_vfio::{Inventory, Kind};
use rustix::fs::OFlags;
use serde::Serialize;

use crate::fact::{Found, Reader};
use crate::software::Wants;

/// The folder.
pub const DIR: &str = "/run/nvidia/validations";

/// The workload of a node whose GPUs go into virtual machines (the label `nvidia.com/gpu.workload.config`).
pub const WORKLOAD: &str = "vm-passthrough\n";

const TYPE: &str = "workload-type";
const VFIO: &str = "vfio-pci-ready";
const CC: &str = "cc-manager-ready";

/// What the confidential-computing manager writes when it is done (NVIDIA/k8s-cc-manager, CC_READINESS_FILE).
const CC_DONE: &str = ".cc-manager-ctr-ready";

/// The modes that the validator gives.
const FOLDER_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;

/// A change of one of the files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "camelCase")]
pub enum Step {
    /// It is written.
    Write {
        /// Where.
        path: HostPath,
        /// What it will hold.
        content: &'static str,
    },
    /// It is removed: it is true no more.
    Remove {
        /// Where.
        path: HostPath,
        /// Why.
        reason: String,
    },
}

/// What a node is ready for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Why GPUs cannot be given away; `None`: they can.
    pub vfio: Option<String>,
    /// Why confidential computing is not ready; `None`: it is, or is not needed.
    pub cc: Option<String>,
}

/// Judges as the validator does: all GPUs count, whichever are wanted, and NVSwitches do not. A node without a GPU is not ready.
pub fn judge(root: &Root, inventory: &Inventory, wants: &Wants) -> Readiness {
    let gpus = inventory.primaries().filter(|f| f.kind == Kind::Gpu);
    let gpus: Vec<_> = gpus.collect();
    let other = gpus.iter().find(|gpu| !gpu.on_vfio() || gpu.dead);
    let vfio = match other {
        _ if gpus.is_empty() => Some("the node has no GPU".to_owned()),
        Some(gpu) if gpu.dead => Some(format!("{} has fallen off the bus", gpu.address)),
        Some(gpu) => {
            let driver = gpu.driver.as_deref().unwrap_or("no driver");
            Some(format!("{} is with {driver}", gpu.address))
        }
        None => None,
    };
    let done = root
        .open(format!("{DIR}/{CC_DONE}").as_ref(), OFlags::PATH)
        .is_ok();
    let cc = (wants.is_confidential() && !done)
        .then(|| "the confidential-computing manager has not said that it is done".to_owned());
    Readiness { vfio, cc }
}

/// What has to change.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn plan(root: &Root, readiness: &Readiness) -> Result<Vec<Step>, Error> {
    let reader = Reader::new(root);
    let files = [
        (TYPE, WORKLOAD, None),
        (VFIO, "", readiness.vfio.clone()),
        (CC, "", readiness.cc.clone()),
    ];
    let mut steps = Vec::new();
    for (name, content, not) in files {
        let file = format!("{DIR}/{name}");
        let path = HostPath::new(&file)
            .map_err(|error| Error::io("name", &file)(std::io::Error::other(error)))?;
        let there = match reader.bytes(&file, 4096).found {
            Found::Is(bytes) => Some(bytes),
            Found::Absent => None,
            Found::Unknown(reason) => {
                return Err(Error::io("read", &file)(std::io::Error::other(reason)));
            }
        };
        match not {
            Some(reason) if there.is_some() => steps.push(Step::Remove { path, reason }),
            Some(_) => {}
            None if there.as_deref() == Some(content.as_bytes()) => {}
            None => steps.push(Step::Write { path, content }),
        }
    }
    Ok(steps)
}

/// Carries steps out; makes the folder when something is written. Each file is all or nothing.
///
/// # Errors
/// When a step fails; those before it stay done, and the same plan can be made again.
pub fn apply(root: &Root, steps: &[Step]) -> Result<(), Error> {
    for step in steps {
        match step {
            Step::Write { path, content } => {
                let target = root.resolve(path)?;
                if let Some(folder) = target.parent() {
                    atomic::create_dir_all(folder, FOLDER_MODE)?;
                }
                atomic::write(&target, content.as_bytes(), FILE_MODE)?;
            }
            Step::Remove { path, .. } => {
                let target = root.resolve(path)?;
                atomic::remove_file(&target)?;
                atomic::remove_leftover(&target)?;
            }
        }
    }
    Ok(())
}
