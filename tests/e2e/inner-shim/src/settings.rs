//! What Kata has in its configuration.toml, as far as it is needed here: one file of JSON.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// The file.
const FILE: &str = "/etc/km-inner-shim.json";

/// The settings.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// `[hypervisor.qemu] path`.
    pub(crate) qemu: String,
    /// The guest's kernel.
    pub(crate) kernel: String,
    /// The guest's initrd.
    pub(crate) initrd: String,
    /// The kernel's parameters.
    pub(crate) append: String,
    /// The guest's memory, as QEMU's `-m` takes it.
    pub(crate) memory: String,
    /// More properties of each device of the host, with a comma in front; empty for none.
    pub(crate) properties: String,
}

impl Settings {
    pub(crate) fn load() -> Result<Self> {
        let text = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("read {FILE}"))?;
        let text = |key: &str| -> Result<String> {
            let found = value.get(key).and_then(Value::as_str);
            Ok(found
                .with_context(|| format!("{FILE} has no {key}"))?
                .to_owned())
        };
        Ok(Self {
            qemu: text("qemu")?,
            kernel: text("kernel")?,
            initrd: text("initrd")?,
            append: text("append")?,
            memory: text("memory")?,
            properties: text("properties")?,
        })
    }
}
