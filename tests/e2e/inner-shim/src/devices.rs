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

/// The functions that the bundle's VFIO nodes give, by address: all of a group but its bridges (Kata,
/// src/runtime/pkg/device/drivers/utils.go, leaves out the classes 0600 and 0604).
pub(crate) fn functions(bundle: &Path) -> Result<Vec<String>> {
    let spec = spec(bundle)?;
    let nodes = spec["linux"]["devices"].as_array();
    let mut found = Vec::new();
    for node in nodes.into_iter().flatten() {
        let path = node["path"].as_str().unwrap_or_default();
        let Some(group) = path.strip_prefix("/dev/vfio/") else {
            continue;
        };
        if group == "vfio" {
            continue;
        }
        let folder = format!("/sys/kernel/iommu_groups/{group}/devices");
        let mut members: Vec<String> = fs::read_dir(&folder)
            .with_context(|| format!("list {folder}, for {path}"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        members.sort();
        for member in members {
            let class = format!("/sys/bus/pci/devices/{member}/class");
            let class = fs::read_to_string(&class).with_context(|| format!("read {class}"))?;
            if !class.starts_with("0x0600") && !class.starts_with("0x0604") {
                found.push(member);
            }
        }
    }
    // Kata takes them in the order in which it was given them; the plan's is by address.
    found.sort();
    Ok(found)
}
