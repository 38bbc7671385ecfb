//! Which distribution's containerd a node runs: where its files are, how it is restarted, and whether its main file is rendered.
//!
//! k3s and RKE2 bring a containerd of their own and write its `config.toml` anew at each start, from a template beside it
//! (`pkg/agent/containerd` in k3s-io/k3s). k0s, MicroK8s and CRI-O are known by their folders and sockets, and refused.

use km_host::{HostPath, Root};
use serde::{Deserialize, Serialize};

use crate::config::{Containerd, Flavor};
use crate::failure::Failure;

/// The socket of the containerd that k3s and RKE2 bring.
const RANCHER_SOCKET: &str = "/run/k3s/containerd/containerd.sock";

/// Where systemd units are installed, the first that counts first (systemd.unit(5)).
const UNIT_FOLDERS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// A distribution that renders its main file.
struct Rancher {
    kind: Kind,
    folder: &'static str,
    units: [&'static str; 2],
}

const RANCHERS: [Rancher; 2] = [
    Rancher {
        kind: Kind::K3s,
        folder: "/var/lib/rancher/k3s/agent/etc/containerd",
        units: ["k3s.service", "k3s-agent.service"],
    },
    Rancher {
        kind: Kind::Rke2,
        folder: "/var/lib/rancher/rke2/agent/etc/containerd",
        units: ["rke2-server.service", "rke2-agent.service"],
    },
];

/// What is known and not supported: its name, and paths that tell it.
const UNSUPPORTED: [(&str, &[&str]); 3] = [
    (
        "k0s",
        &["/run/k0s/containerd.sock", "/etc/k0s", "/var/lib/k0s"],
    ),
    ("MicroK8s", &["/var/snap/microk8s"]),
    ("CRI-O", &["/run/crio/crio.sock", "/var/run/crio/crio.sock"]),
];

/// What a node's containerd is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Kind {
    /// containerd as a package or archive installs it.
    Stock,
    /// The one that k3s brings.
    K3s,
    /// The one that RKE2 brings.
    Rke2,
}

impl Kind {
    /// Whether the main file is rendered from a template at each start.
    pub(crate) fn is_rendered(self) -> bool {
        self != Kind::Stock
    }

    /// Its name for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Stock => "stock",
            Kind::K3s => "k3s",
            Kind::Rke2 => "RKE2",
        }
    }
}

/// Finds out, and fills in what the configuration leaves at its default. A distribution that is not supported is an error.
pub(crate) fn settle(root: &Root, settings: &mut Containerd) -> Result<Kind, Failure> {
    let kind = match settings.flavor {
        Flavor::Stock => {
            refuse_rendered(root, settings)?;
            Kind::Stock
        }
        Flavor::K3s => Kind::K3s,
        Flavor::Rke2 => Kind::Rke2,
        Flavor::Auto => detect(root, settings)?,
    };
    let Some(rancher) = RANCHERS.iter().find(|rancher| rancher.kind == kind) else {
        return Ok(kind);
    };
    let defaults = Containerd::default();
    let fixed =
        |path: String| HostPath::new(path).map_err(|error| Failure::refused(error.to_string()));
    if settings.config == defaults.config {
        settings.config = fixed(format!("{}/config.toml", rancher.folder))?;
    }
    if settings.socket == defaults.socket {
        settings.socket = fixed(RANCHER_SOCKET.to_owned())?;
    }
    if settings.restart.unit == defaults.restart.unit {
        let unit = rancher.units.iter().find(|unit| has_unit(root, unit));
        settings.restart.unit = (*unit.unwrap_or(&rancher.units[0])).to_owned();
    }
    Ok(kind)
}

fn has_unit(root: &Root, unit: &str) -> bool {
    UNIT_FOLDERS
        .iter()
        .any(|folder| exists(root, &format!("{folder}/{unit}")))
}

fn exists(root: &Root, path: &str) -> bool {
    let resolved = HostPath::new(path)
        .ok()
        .and_then(|path| root.resolve(&path).ok());
    resolved.is_some_and(|path| path.exists())
}

fn detect(root: &Root, settings: &Containerd) -> Result<Kind, Failure> {
    let defaults = Containerd::default();
    if let Some(kind) = renderer(root, settings) {
        return Ok(kind);
    }
    let named = [&settings.config, &settings.socket];
    for (name, paths) in UNSUPPORTED {
        let below = |path: &&&HostPath| paths.iter().any(|known| path.as_path().starts_with(known));
        if let Some(path) = named.iter().find(below) {
            return Err(unsupported(name, path.as_str()));
        }
    }
    if settings.config != defaults.config || settings.socket != defaults.socket {
        return Ok(Kind::Stock);
    }
    let stock = exists(root, defaults.socket.as_str());
    let there: Vec<&Rancher> = RANCHERS
        .iter()
        .filter(|rancher| exists(root, rancher.folder) && (!stock || exists(root, RANCHER_SOCKET)))
        .collect();
    match there.as_slice() {
        [] if stock || exists(root, defaults.config.as_str()) => Ok(Kind::Stock),
        [] => {
            for (name, paths) in UNSUPPORTED {
                if let Some(path) = paths.iter().find(|path| exists(root, path)) {
                    return Err(unsupported(name, path));
                }
            }
            Ok(Kind::Stock)
        }
        [one] if !stock => Ok(one.kind),
        several => {
            let mut names: Vec<&str> = several.iter().map(|rancher| rancher.kind.name()).collect();
            if stock {
                names.push("a containerd of its own");
            }
            Err(Failure::refused(format!(
                "this node has {}: name the one that runs its pods in containerd.flavor (stock, k3s or rke2), or with --flavor",
                names.join(" and ")
            )))
        }
    }
}

/// The distribution that renders the configured main file, by its path or its first line.
fn renderer(root: &Root, settings: &Containerd) -> Option<Kind> {
    let by_path = RANCHERS
        .iter()
        .find(|rancher| settings.config.as_path().starts_with(rancher.folder));
    if let Some(rancher) = by_path {
        return Some(rancher.kind);
    }
    let path = root.resolve(&settings.config).ok()?;
    let bytes = std::fs::read(path).ok()?;
    let first = bytes.split(|byte| *byte == b'\n').next()?;
    let first = String::from_utf8_lossy(first).to_ascii_lowercase();
    let made_by = |name: &str| first.contains(&format!("generated by {name}. do not edit"));
    match () {
        () if made_by("k3s") => Some(Kind::K3s),
        () if made_by("rke2") => Some(Kind::Rke2),
        () => None,
    }
}

fn refuse_rendered(root: &Root, settings: &Containerd) -> Result<(), Failure> {
    match renderer(root, settings) {
        None => Ok(()),
        Some(kind) => Err(Failure::refused(format!(
            "{} writes {} anew from a template at each start, so that an edit of it would be lost: leave containerd.flavor at `auto`, and \
             the template is extended",
            kind.name(),
            settings.config
        ))),
    }
}

fn unsupported(name: &str, path: &str) -> Failure {
    Failure::refused(format!(
        "this node runs {name} ({path} is its), which kata-manager does not support yet: containerd itself, k3s and RKE2 are. If it \
         has a containerd beside it, name that one's containerd.config and containerd.socket, and containerd.flavor `stock`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(paths: &[&str]) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        for path in paths {
            std::fs::create_dir_all(dir.path().join(path.trim_start_matches('/'))).unwrap();
        }
        let root = Root::new(dir.path()).unwrap();
        (dir, root)
    }

    fn found(paths: &[&str], settings: &mut Containerd) -> Result<Kind, String> {
        let (_dir, root) = node(paths);
        settle(&root, settings).map_err(|failure| failure.to_string())
    }

    const K3S: &str = "/var/lib/rancher/k3s/agent/etc/containerd";
    const RKE2: &str = "/var/lib/rancher/rke2/agent/etc/containerd";

    #[test]
    fn each_distribution_is_told_by_its_paths() {
        let mut settings = Containerd::default();
        assert_eq!(found(&[], &mut settings), Ok(Kind::Stock));
        assert_eq!(settings.config, Containerd::default().config);
        let stock = ["/run/containerd/containerd.sock"];
        assert_eq!(found(&stock, &mut Containerd::default()), Ok(Kind::Stock));

        let unit = "/etc/systemd/system/k3s-agent.service";
        assert_eq!(found(&[K3S, unit], &mut settings), Ok(Kind::K3s));
        assert_eq!(settings.config.as_str(), format!("{K3S}/config.toml"));
        assert_eq!(settings.socket.as_str(), RANCHER_SOCKET);
        assert_eq!(settings.restart.unit, "k3s-agent.service");

        let mut settings = Containerd::default();
        assert_eq!(found(&[RKE2], &mut settings), Ok(Kind::Rke2));
        assert_eq!(settings.restart.unit, "rke2-server.service");

        for (path, name) in [
            ("/etc/k0s", "k0s"),
            ("/var/snap/microk8s/current", "MicroK8s"),
            ("/run/crio/crio.sock", "CRI-O"),
        ] {
            let refused = found(&[path], &mut Containerd::default()).unwrap_err();
            assert!(
                refused.contains(name) && refused.contains("not support"),
                "{refused}"
            );
            let both = [path, stock[0]];
            assert_eq!(found(&both, &mut Containerd::default()), Ok(Kind::Stock));
        }
    }

    #[test]
    fn what_is_not_clear_is_asked_and_what_is_forced_is_taken() {
        let both = [K3S, RANCHER_SOCKET, "/run/containerd/containerd.sock"];
        let refused = found(&both, &mut Containerd::default()).unwrap_err();
        assert!(refused.contains("containerd.flavor"), "{refused}");
        let mut forced = Containerd {
            flavor: Flavor::K3s,
            ..Containerd::default()
        };
        assert_eq!(found(&both, &mut forced), Ok(Kind::K3s));
        let mut forced = Containerd {
            flavor: Flavor::Stock,
            ..Containerd::default()
        };
        assert_eq!(found(&both, &mut forced), Ok(Kind::Stock));
        forced.config = HostPath::new(format!("{K3S}/config.toml")).unwrap();
        let refused = found(&both, &mut forced).unwrap_err();
        assert!(refused.contains("anew from a template"), "{refused}");
    }

    #[test]
    fn a_rendered_file_elsewhere_is_told_by_its_first_line() {
        let (dir, root) = node(&["/data/etc"]);
        let text = b"# File generated by rke2. DO NOT EDIT. Use config.toml.tmpl instead.\n";
        km_host::atomic::write(&dir.path().join("data/etc/config.toml"), text, 0o644).unwrap();
        let mut settings = Containerd {
            config: HostPath::new("/data/etc/config.toml").unwrap(),
            ..Containerd::default()
        };
        assert_eq!(settle(&root, &mut settings).unwrap(), Kind::Rke2);
        assert_eq!(settings.config.as_str(), "/data/etc/config.toml");
    }
}
