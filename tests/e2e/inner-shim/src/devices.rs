//! A bundle's config.json: whose container it is, and which functions its VFIO nodes give.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Where containerd says which sandbox a container is of.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
const TYPE: &str = "io.kubernetes.cri.container-type";

fn spec(bundle: &Path) -> Result<Value> {
    let path = bundle.join("config.json");
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))
}

/// The sandbox that a container is of; `None` for a sandbox itself.
pub(crate) fn sandbox_of(bundle: &Path) -> Result<Option<String>> {
    let spec = spec(bundle)?;
    let said = |key: &str| spec["annotations"][key].as_str();
    Ok(match said(TYPE) {
        Some("container") => said(SANDBOX).map(str::to_owned),
        _ => None,
    })
}

/// A function to be given away.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Function {
    /// Its address.
    pub(crate) address: String,
    /// Whether it was given by a node of its own, `/dev/vfio/devices/vfioN`, which QEMU takes through iommufd.
    pub(crate) iommufd: bool,
}

/// The functions that the bundle's VFIO nodes give, by address: one by its own node, or all of a group but its bridges (Kata,
/// src/runtime/pkg/device/drivers/utils.go, leaves out the classes 0600 and 0604).
pub(crate) fn functions(bundle: &Path) -> Result<Vec<Function>> {
    let spec = spec(bundle)?;
    let nodes = spec["linux"]["devices"].as_array();
    let mut found = Vec::new();
    for node in nodes.into_iter().flatten() {
        let path = node["path"].as_str().unwrap_or_default();
        let Some(name) = path.strip_prefix("/dev/vfio/") else {
            continue;
        };
        if let Some(name) = name.strip_prefix("devices/") {
            let link = format!("/sys/class/vfio-dev/{name}/device");
            let function = fs::canonicalize(&link).with_context(|| format!("find {link}"))?;
            let address = function.file_name().context("a function")?;
            found.push(Function {
                address: address.to_string_lossy().into_owned(),
                iommufd: true,
            });
        } else if name != "vfio" {
            found.extend(members(name)?);
        }
    }
    // Kata takes them in the order in which it was given them; the plan's is by address.
    found.sort();
    Ok(found)
}

fn members(group: &str) -> Result<Vec<Function>> {
    let folder = format!("/sys/kernel/iommu_groups/{group}/devices");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {folder}"))? {
        let address = entry?.file_name().to_string_lossy().into_owned();
        let class = format!("/sys/bus/pci/devices/{address}/class");
        let class = fs::read_to_string(&class).with_context(|| format!("read {class}"))?;
        if !class.starts_with("0x0600") && !class.starts_with("0x0604") {
            found.push(Function {
                address,
                iommufd: false,
            });
        }
    }
    Ok(found)
}
