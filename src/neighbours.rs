//! What `doctor` is told of the software around it: containerd, Kata, handlers and CDI specs of others. Reads only, and judges
//! nothing; what cannot be asked is said.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use km_cdi::devices::Found as Devices;
use km_containerd_config::ContainerdVersion;
use km_containerd_config::peers::{self, Who};
use km_doctor::fact::{self, Fact, Found};
use km_doctor::software::{Containerd, Handler, Kata, Software, Spec, Wants};
use km_host::HostPath;
use km_runtimeclasses::Tee;
use km_vfio::Address;

use crate::config::Config;
use crate::node::Node;
use crate::specs::Settings;
use crate::{observe, wanted};

/// How long Kata's shim may take to tell its version.
const VERSION: Duration = Duration::from_secs(5);

/// Kata's shims below its prefix: in Go, and in Rust (kata-deploy, `tools/packaging/kata-deploy`).
const SHIMS: [&str; 2] = [
    "bin/containerd-shim-kata-v2",
    "runtime-rs/bin/containerd-shim-kata-v2",
];

/// The rules by which containerd's files are read where it does not answer.
const ASSUMED: ContainerdVersion = ContainerdVersion::new(2, 0, 0);

/// What the configuration and the command line want.
pub(crate) fn wants(config: &Config, devices: &[Address]) -> Wants {
    let of = |tee: Tee| {
        let classes = config.runtime_classes.iter();
        classes
            .filter(|class| wanted::class_kind(class).is_some_and(|kind| kind.tee == tee))
            .map(|class| class.name.clone())
            .collect()
    };
    Wants {
        devices: devices.to_vec(),
        snp: of(Tee::Snp),
        tdx: of(Tee::Tdx),
    }
}

/// Asks everybody.
pub(crate) async fn look(node: &Node, settings: &Settings, devices: &Devices) -> Software {
    let containerd = containerd(node, settings).await;
    let version = containerd.as_ref().ok();
    let version = version.and_then(|containerd| containerd.version.parse().ok());
    Software {
        handlers: handlers(node, version.unwrap_or(ASSUMED)).map_err(told),
        specs: specs(node, settings, devices).map_err(told),
        kata: kata(node),
        containerd: containerd.map_err(told),
    }
}

fn told(error: anyhow::Error) -> String {
    format!("{error:#}")
}

async fn containerd(node: &Node, settings: &Settings) -> Result<Containerd> {
    let cri = node.daemon()?.cri().await?;
    let version = cri.version().await?.runtime_version;
    let status = cri.status().await?;
    let ours = settings.dir.as_path();
    Ok(Containerd {
        version,
        enable_cdi: status.enable_cdi,
        reads_ours: status.cdi_spec_dirs.iter().any(|dir| same(dir, ours)),
        spec_dirs: status
            .cdi_spec_dirs
            .iter()
            .map(|dir| dir.display().to_string())
            .collect(),
    })
}

/// `/var/run` is `/run` on every host that systemd has started (file-hierarchy(7)).
fn same(a: &Path, b: &Path) -> bool {
    let plain = |path: &Path| match path.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest),
        Err(_) => path.components().collect(),
    };
    plain(a) == plain(b)
}

fn kata(node: &Node) -> Kata {
    let prefix = &node.config.provider.prefix;
    let there = |path: &HostPath| matches!(observe::lacks(node, path, true), Ok(None));
    let shims: Vec<HostPath> = SHIMS.map(|shim| prefix.join(shim)).into_iter().collect();
    let shims: Vec<&HostPath> = shims.iter().filter(|shim| there(shim)).collect();
    Kata {
        prefix: prefix.to_string(),
        version: kata_version(node, prefix, shims.first().copied()),
        shims: shims.iter().map(ToString::to_string).collect(),
        missing: observe::missing_provider_files(node).map_err(told),
    }
}

/// The file `VERSION` of Kata's archives, or else what its shim says.
fn kata_version(node: &Node, prefix: &HostPath, shim: Option<&HostPath>) -> Fact<String> {
    let file = prefix.join("VERSION");
    let fact = fact::text(&node.root, file.as_str(), 200);
    match (&fact.found, shim) {
        (Found::Absent, Some(shim)) => shim_version(node, shim),
        _ => fact,
    }
}

fn shim_version(node: &Node, shim: &HostPath) -> Fact<String> {
    let source = format!("{shim} --version");
    let found = match km_host::command::run(&node.root, &[shim.as_str(), "--version"], VERSION) {
        Ok(output) => match version_in(&String::from_utf8_lossy(&output.stdout)) {
            Some(version) => Found::Is(version),
            None => Found::Unknown("it tells no version".to_owned()),
        },
        Err(error) => Found::Unknown(error.to_string()),
    };
    Fact::new(source, found)
}

/// Kata's shims in Go and in Rust both say `..., version: 4.1.0, commit: ...`.
fn version_in(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("version: ")?;
    let version = rest.split([',', ' ', '\n']).next()?;
    let plain = |char: char| char.is_ascii_alphanumeric() || ".-+~".contains(char);
    (!version.is_empty() && version.chars().all(plain)).then(|| version.to_owned())
}

fn handlers(node: &Node, version: ContainerdVersion) -> Result<Vec<Handler>> {
    let (_, effective) = observe::files(node, version)?;
    let ours: BTreeSet<&str> = node
        .config
        .runtime_classes
        .iter()
        .map(|class| class.handler())
        .collect();
    let found = effective.handlers();
    let foreign = found.iter().filter_map(|handler| {
        let who = peers::who(handler);
        let other = who != Who::Ours && ours.contains(handler.name.as_str());
        other.then(|| Handler {
            name: handler.name.clone(),
            who: who.to_string(),
            file: handler
                .files
                .last()
                .map(ToString::to_string)
                .unwrap_or_default(),
        })
    });
    Ok(foreign.collect())
}

/// The specs of others under the classes of our devices.
fn specs(node: &Node, settings: &Settings, devices: &Devices) -> Result<Vec<Spec>> {
    let mut kinds: BTreeSet<String> = settings.naming.kinds().into_iter().collect();
    kinds.extend(devices.devices.iter().map(|device| device.class.kind()));
    let mut found = Vec::new();
    for dir in [km_cdi::STATIC_DIR, km_cdi::DIR] {
        for file in km_cdi::files::observe(&node.root, &HostPath::new(dir)?)? {
            if let Ok(spec) = &file.spec
                && !file.ours
                && kinds.contains(&spec.kind)
            {
                found.push(Spec {
                    file: file.path.to_string(),
                    kind: spec.kind.clone(),
                });
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_shims_say() {
        let go = "Kata Containers containerd shim (Golang): id: \"io.containerd.kata.v2\", version: 3.24.0-rc1, commit: abc-dirty\n";
        assert_eq!(version_in(go).as_deref(), Some("3.24.0-rc1"));
        let rust = "Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: 4.1.0, commit: x";
        assert_eq!(version_in(rust).as_deref(), Some("4.1.0"));
        assert_eq!(version_in("version: \u{1b}[2J,"), None);
        assert_eq!(version_in("usage"), None);
    }

    #[test]
    fn run_is_var_run() {
        assert!(same(Path::new("/run/cdi/"), Path::new("/var/run/cdi")));
        assert!(!same(Path::new("/etc/cdi"), Path::new("/var/run/cdi")));
    }
}
