//! The files by which NVIDIA's GPU Operator is told that a node is ready for passthrough.
//!
//! Its Sandbox Validator writes them, and the device plugin's pod waits for them (NVIDIA/gpu-operator, cmd/nvidia-validator/main.go):
//! `workload-type` holds the node's workload and a newline; `vfio-pci-ready` is empty and there while every GPU is with VFIO;
//! `cc-manager-ready` is empty and there when the node needs no confidential-computing manager, or when that has said that it is
//! done by `.cc-manager-ctr-ready`.
//!
//! The validator writes the same bytes. So that an uninstall takes ours and leaves its own, which file is ours is written down.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

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

/// Which of the files are ours: a line for each, with its name and its inode number, which is another one when somebody has made the
/// file anew. It goes at boot, as the files do.
const RECORD: &str = "/run/kata-manager/validations";

/// What each file holds.
const FILES: [(&str, &str); 3] = [(TYPE, WORKLOAD), (VFIO, ""), (CC, "")];

/// The most of a file that is read. Ours have a few bytes.
const LONGEST: usize = 4096;

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
    let mut steps = Vec::new();
    for (name, content) in FILES {
        let path = path(&format!("{DIR}/{name}"))?;
        let not = match name {
            VFIO => readiness.vfio.clone(),
            CC => readiness.cc.clone(),
            _ => None,
        };
        let there = read(root, path.as_str())?;
        match not {
            Some(reason) if there.is_some() => steps.push(Step::Remove { path, reason }),
            Some(_) => {}
            None if there.as_deref() == Some(content.as_bytes()) => {}
            None => steps.push(Step::Write { path, content }),
        }
    }
    Ok(steps)
}

/// Carries steps out; makes the folder when something is written. Each file is all or nothing, and is written down as ours at once:
/// whoever is killed between the two leaves a file that is taken for the validator's.
///
/// # Errors
/// When a step fails; those before it stay done, and the same plan can be made again.
pub fn apply(root: &Root, steps: &[Step]) -> Result<(), Error> {
    let mut ours = Record::read(root)?;
    for step in steps {
        match step {
            Step::Write { path, content } => {
                let target = root.resolve(path)?;
                create_parent(&target)?;
                atomic::write(&target, content.as_bytes(), FILE_MODE)?;
                ours.0.insert(name_of(path).to_owned(), inode(&target)?);
            }
            Step::Remove { path, .. } => {
                let target = root.resolve(path)?;
                atomic::remove_file(&target)?;
                atomic::remove_leftover(&target)?;
                ours.0.remove(name_of(path));
            }
        }
        ours.write(root)?;
    }
    Ok(())
}

/// Removes those of the files that are ours and as we wrote them, and gives them. The folder stays: the GPU Operator's pods mount it.
///
/// # Errors
/// When one cannot be read or removed.
pub fn remove_ours(root: &Root) -> Result<Vec<HostPath>, Error> {
    let ours = Record::read(root)?;
    let mut removed = Vec::new();
    for (name, content) in FILES {
        let path = path(&format!("{DIR}/{name}"))?;
        let (Some(number), Some(bytes)) = (ours.0.get(name), read(root, path.as_str())?) else {
            continue;
        };
        let target = root.resolve(&path)?;
        if bytes == content.as_bytes() && inode(&target)? == *number {
            atomic::remove_file(&target)?;
            removed.push(path);
        }
    }
    atomic::remove_file(&root.resolve(&path(RECORD)?)?)?;
    Ok(removed)
}

/// The files that are ours, with their inode numbers.
#[derive(Debug)]
struct Record(BTreeMap<String, u64>);

impl Record {
    /// Reads it. A line that is none of ours counts for nothing: it names no file that is removed.
    fn read(root: &Root) -> Result<Record, Error> {
        let bytes = read(root, RECORD)?.unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().filter_map(|line| {
            let (name, number) = line.split_once(' ')?;
            Some((name.to_owned(), number.parse().ok()?))
        });
        Ok(Record(lines.collect()))
    }

    fn write(&self, root: &Root) -> Result<(), Error> {
        let lines = self
            .0
            .iter()
            .map(|(name, number)| format!("{name} {number}\n"));
        let text: String = lines.collect();
        let target = root.resolve(&path(RECORD)?)?;
        create_parent(&target)?;
        atomic::write(&target, text.as_bytes(), FILE_MODE)
    }
}

fn path(path: &str) -> Result<HostPath, Error> {
    HostPath::new(path).map_err(|error| Error::io("name", path)(std::io::Error::other(error)))
}

fn name_of(path: &HostPath) -> &str {
    let name = path.as_str().rsplit('/').next();
    name.unwrap_or_default()
}

/// A file's first bytes; nothing where it is not.
fn read(root: &Root, file: &str) -> Result<Option<Vec<u8>>, Error> {
    match Reader::new(root).bytes(file, LONGEST).found {
        Found::Is(bytes) => Ok(Some(bytes)),
        Found::Absent => Ok(None),
        Found::Unknown(reason) => Err(Error::io("read", file)(std::io::Error::other(reason))),
    }
}

fn inode(target: &Path) -> Result<u64, Error> {
    let metadata = std::fs::metadata(target).map_err(Error::io("look at", target))?;
    Ok(metadata.ino())
}

fn create_parent(target: &Path) -> Result<(), Error> {
    match target.parent() {
        Some(folder) => atomic::create_dir_all(folder, FOLDER_MODE).map(drop),
        None => Ok(()),
    }
}
