//! How containerd merges one file into what it has read before. Pure.

use serde_json::Value;

use crate::handler::{ContainerdVersion, Settings};

/// Root tables whose entries later files replace whole, in every version.
const REPLACED: [&str; 3] = ["stream_processors", "proxy_plugins", "timeouts"];

/// Merges a later file into what was read before it.
pub(super) fn merge(into: &mut Settings, from: &Settings, version: ContainerdVersion) {
    for (key, value) in from {
        let replaces = REPLACED.contains(&key.as_str()) || (key == "plugins" && version.major < 2);
        match (into.get_mut(key), value) {
            (Some(Value::Object(old)), Value::Object(new)) if replaces => {
                old.extend(new.clone());
            }
            (Some(Value::Object(old)), Value::Object(new)) => deep(old, new),
            // Lists at the root (`disabled_plugins`, `imports`) are joined.
            (Some(Value::Array(old)), Value::Array(new)) => {
                for value in new {
                    if !old.contains(value) {
                        old.push(value.clone());
                    }
                }
            }
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Merges tables key by key; anything else is replaced.
pub(super) fn deep(into: &mut Settings, from: &Settings) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => deep(old, new),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}
