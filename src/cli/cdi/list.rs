//! `cdi list`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use km_cdi::files::{self, Doubled, File};
use km_host::Root;
use serde::Serialize;
use serde_json::{Value, json};

use super::Global;
use crate::draw;
use crate::node::Node;
use crate::output;

/// The longest text of a stranger's that is shown in a column, in characters.
const WIDTH: usize = 60;

/// Whether containerd gives CDI devices to containers.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Injection {
    /// containerd's version; `None` when it does not answer.
    version: Option<String>,
    /// `None` when that is not known.
    injects: Option<bool>,
    /// The folders that it reads specs from.
    spec_dirs: Vec<String>,
    /// The above for people, and what to do.
    message: String,
}

pub(super) async fn run(global: &Global) -> Result<()> {
    let node = global.node_if_configured()?;
    let folders = super::folders(&node.root)?;
    let doubled: Vec<Doubled> = folders
        .iter()
        .flat_map(|files| files::doubled(files))
        .collect();
    let files: Vec<&File> = folders.iter().flatten().collect();
    let injection = injection(&node).await;
    let body = json!({
        "specs": files.iter().map(|file| to_json(&node.root, file)).collect::<Vec<_>>(),
        "listedTwice": doubled,
        "containerd": injection,
    });
    let mut text = to_text(&node.root, &files);
    for twice in &doubled {
        let paths: Vec<&str> = twice.files.iter().map(|path| path.as_str()).collect();
        text.push_str(&format!(
            "{} is listed by {}, so CDI gives it to nobody: remove it from all but one.\n",
            twice.device,
            paths.join(" and ")
        ));
    }
    text.push_str(&format!("{}\n", injection.message));
    output::result(global.output, "CdiDevices", body, &text)
}

async fn injection(node: &Node) -> Injection {
    let ask = async {
        let cri = node.daemon()?.cri().await?;
        let version = cri.version().await?.runtime_version;
        anyhow::Ok((version, cri.status().await?))
    };
    match ask.await {
        Ok((version, status)) => {
            let dirs = status.cdi_spec_dirs.iter();
            let dirs = dirs.map(|dir| dir.display().to_string()).collect();
            judge(version, status.enable_cdi, dirs)
        }
        Err(error) => Injection {
            version: None,
            injects: None,
            spec_dirs: Vec::new(),
            message: format!(
                "Whether containerd injects CDI devices could not be asked: {error:#}"
            ),
        },
    }
}

/// What containerd's version and its configuration in force say. 1.6 has no such setting and ignores CDI without a word.
fn judge(version: String, enabled: Option<bool>, spec_dirs: Vec<String>) -> Injection {
    let message = match enabled {
        None => format!(
            "containerd {version} cannot inject CDI devices, and ignores them without an error: that needs containerd 1.7 or later. Kata that asks the kubelet for a pod's devices reads the specs itself."
        ),
        Some(false) => format!(
            "containerd {version} does not inject CDI devices, and ignores them without an error: enable_cdi is false. Set containerd.enableCdi and run \"kata-manager apply\"."
        ),
        Some(true) if spec_dirs.iter().any(|dir| is_default(dir)) => {
            format!("containerd {version} injects CDI devices.")
        }
        Some(true) => format!(
            "containerd {version} injects CDI devices, but reads specs from {} only, not from {}: set containerd.cdiSpecDirs, or give that folder to \"cdi generate --dir\".",
            spec_dirs.join(", "),
            km_cdi::DIR
        ),
    };
    Injection {
        version: Some(version),
        injects: Some(enabled == Some(true)),
        spec_dirs,
        message,
    }
}

/// `/var/run` is `/run` on every host that systemd has started (hier, file-hierarchy(7)).
fn is_default(dir: &str) -> bool {
    let dir = Path::new(dir);
    dir == Path::new(km_cdi::DIR) || dir == Path::new("/run/cdi")
}

fn to_json(root: &Root, file: &File) -> Value {
    let (kind, devices, problem) = match &file.spec {
        Ok(spec) => {
            let devices = spec.devices.iter().map(|device| {
                json!({
                    "name": device.name,
                    "nodes": device.nodes().collect::<Vec<_>>(),
                    "missing": files::missing(root, device),
                })
            });
            (Some(&spec.kind), devices.collect(), None)
        }
        Err(error) => (None, Vec::new(), Some(error.to_string())),
    };
    json!({ "file": file.path, "ours": file.ours, "kind": kind, "devices": devices, "problem": problem })
}

fn to_text(root: &Root, files: &[&File]) -> String {
    if files.is_empty() {
        return format!(
            "No CDI specs in {} and {}: \"kata-manager cdi generate\" writes them.\n",
            km_cdi::STATIC_DIR,
            km_cdi::DIR
        );
    }
    let mut rows = vec![["DEVICE", "NODES", "FILE"].map(str::to_owned)];
    let mut notes = String::new();
    let mut absent = BTreeSet::new();
    for file in files {
        let by = if file.ours { "" } else { " (not ours)" };
        let spec = match &file.spec {
            Ok(spec) => spec,
            Err(error) => {
                let reason = draw::shortened(&error.to_string(), 4 * WIDTH);
                notes.push_str(&format!("{}{by}: {reason}\n", file.path));
                continue;
            }
        };
        for (device, name) in spec.devices.iter().zip(spec.qualified()) {
            let nodes: Vec<&str> = device.nodes().collect();
            let nodes = nodes.join(" ").escape_debug().to_string();
            rows.push([
                name.clone(),
                draw::shortened(&nodes, WIDTH),
                format!("{}{by}", file.path),
            ]);
            for node in files::missing(root, device) {
                absent.insert(draw::shortened(&node.escape_debug().to_string(), WIDTH));
            }
        }
    }
    if !absent.is_empty() {
        let all: Vec<String> = absent.into_iter().collect();
        notes.push_str(&format!("The host does not have: {}\n", all.join(", ")));
    }
    format!("{}{notes}", output::table(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_containerd_is_told_apart() {
        let dirs = |dirs: &[&str]| dirs.iter().map(|&dir| dir.to_owned()).collect();
        let old = judge("1.6.20".to_owned(), None, Vec::new());
        assert!(old.injects == Some(false) && old.message.contains("cannot"));
        let off = judge("1.7.24".to_owned(), Some(false), dirs(&["/etc/cdi"]));
        assert!(off.injects == Some(false) && off.message.contains("enable_cdi"));
        let on = judge(
            "2.1.4".to_owned(),
            Some(true),
            dirs(&["/etc/cdi", "/run/cdi/"]),
        );
        assert!(on.injects == Some(true) && on.message.ends_with("injects CDI devices."));
        let other = judge("2.1.4".to_owned(), Some(true), dirs(&["/etc/cdi"]));
        assert!(other.injects == Some(true) && other.message.contains("not from /var/run/cdi"));
    }
}
