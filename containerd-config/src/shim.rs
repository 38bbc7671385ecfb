//! Which binary containerd would run for a handler, found the way containerd does.
//!
//! `resolveRuntimePath` in containerd's `core/runtime/v2/shim_manager.go` (1.x: `runtime/v2/manager.go`): an absolute
//! `runtime_path` or `runtime_type` is taken as it is; else the last two parts of the type make the name
//! `containerd-shim-<a>-<b>`, which is looked for on containerd's PATH and then beside containerd's own binary. The CRI
//! `Status` does not check any of this: a missing binary shows only when the first pod fails.

use std::os::unix::fs::PermissionsExt;

use km_host::{HostPath, Root};

use crate::handler::{ContainerdVersion, Handler};

/// Where a containerd looks for shims.
#[derive(Debug, Clone, Default)]
pub struct ShimSearch {
    /// PATH of containerd's process. containerd puts `<opt>/bin` before it when it starts, and its environment in /proc does
    /// not show that: the caller prepends it ([`crate::edit::Document::opt_path`], default `/opt/containerd`).
    pub path: String,
    /// The folder of containerd's own binary.
    pub containerd_dir: Option<HostPath>,
}

/// Why a handler's shim cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The type is no path and has no two parts to make a name from.
    #[error(
        "the handler {handler:?} has runtime_type {runtime_type:?}, which is neither an absolute path nor a name such as io.containerd.kata.v2"
    )]
    BadType {
        /// The handler.
        handler: String,
        /// Its type.
        runtime_type: String,
    },
    /// The path that the handler names is not there.
    #[error(
        "the shim {path} of the handler {handler:?} does not exist: install it, or name another one"
    )]
    Absent {
        /// The handler.
        handler: String,
        /// The path.
        path: String,
    },
    /// The path that the handler names is no program.
    #[error("the shim {path} of the handler {handler:?} is {what}: containerd cannot run it")]
    NotExecutable {
        /// The handler.
        handler: String,
        /// The path.
        path: String,
        /// What it is instead.
        what: &'static str,
    },
    /// No folder that containerd searches has the binary.
    #[error(
        "the shim {binary:?} of the handler {handler:?} is in none of the folders that containerd searches ({searched}): \
         install it there, or set runtime_path"
    )]
    NotFound {
        /// The handler.
        handler: String,
        /// The name that is looked for.
        binary: String,
        /// The folders, separated by colons.
        searched: String,
    },
    /// The host's file system refused to say.
    #[error("cannot look for the shim of the handler {handler:?}")]
    Host {
        /// The handler.
        handler: String,
        /// Why.
        source: km_host::Error,
    },
}

/// The name of the binary for a `runtime_type`: `io.containerd.kata.v2` is `containerd-shim-kata-v2`.
pub fn binary_name(runtime_type: &str) -> Option<String> {
    let mut parts = runtime_type.rsplitn(3, '.');
    let (version, name) = (parts.next()?, parts.next()?);
    (!runtime_type.starts_with('.') && !runtime_type.contains('/'))
        .then(|| format!("containerd-shim-{name}-{version}"))
}

/// Finds the binary that this containerd would run for a handler, as the host sees it.
///
/// # Errors
/// [`ShimError`] when there is none or it cannot be executed.
pub fn resolve(
    root: &Root,
    handler: &Handler,
    search: &ShimSearch,
    version: ContainerdVersion,
) -> Result<HostPath, ShimError> {
    let handler = handler.for_version(version);
    let named = handler
        .runtime_path
        .as_ref()
        .unwrap_or(&handler.runtime_type);
    if let Ok(path) = HostPath::new(named) {
        return match look(root, &handler, &path)? {
            Look::Program => Ok(path),
            Look::Absent => Err(ShimError::Absent {
                handler: handler.name,
                path: named.clone(),
            }),
            Look::Other(what) => Err(ShimError::NotExecutable {
                handler: handler.name,
                path: named.clone(),
                what,
            }),
        };
    }
    let Some(binary) = binary_name(named) else {
        return Err(ShimError::BadType {
            handler: handler.name,
            runtime_type: named.clone(),
        });
    };
    // Go's LookPath does not run what it finds by a relative folder.
    let folders = search
        .path
        .split(':')
        .filter_map(|folder| HostPath::new(folder).ok());
    let folders: Vec<HostPath> = folders.chain(search.containerd_dir.clone()).collect();
    for folder in &folders {
        let path = folder.join(&binary);
        if matches!(look(root, &handler, &path)?, Look::Program) {
            return Ok(path);
        }
    }
    let searched: Vec<&str> = folders.iter().map(HostPath::as_str).collect();
    Err(ShimError::NotFound {
        handler: handler.name,
        binary,
        searched: searched.join(":"),
    })
}

enum Look {
    Program,
    Absent,
    Other(&'static str),
}

fn look(root: &Root, handler: &Handler, path: &HostPath) -> Result<Look, ShimError> {
    let host = |source| ShimError::Host {
        handler: handler.name.clone(),
        source,
    };
    let ours = root.resolve(path).map_err(host)?;
    match ours.metadata() {
        Ok(meta) if meta.is_dir() => Ok(Look::Other("a folder")),
        Ok(meta) if meta.permissions().mode() & 0o111 == 0 => Ok(Look::Other("not executable")),
        Ok(_) => Ok(Look::Program),
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(Look::Absent)
        }
        Err(error) => Err(host(km_host::Error::io("look at", &ours)(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    const V16: ContainerdVersion = ContainerdVersion::new(1, 6, 20);
    const V17: ContainerdVersion = ContainerdVersion::new(1, 7, 24);

    fn program(root: &Path, path: &str, mode: u32) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn handler(runtime_type: &str, runtime_path: Option<&str>) -> Handler {
        Handler {
            name: "kata".into(),
            runtime_type: runtime_type.into(),
            runtime_path: runtime_path.map(str::to_owned),
            ..Handler::default()
        }
    }

    fn search() -> ShimSearch {
        ShimSearch {
            path: "/opt/containerd/bin:relative:/usr/local/bin:/usr/bin".into(),
            containerd_dir: Some(HostPath::new("/usr/sbin").unwrap()),
        }
    }

    #[test]
    fn names_are_made_like_containerd_makes_them() {
        for (runtime_type, name) in [
            ("io.containerd.runc.v2", Some("containerd-shim-runc-v2")),
            (
                "io.containerd.kata-qemu-nvidia-gpu.v2",
                Some("containerd-shim-kata-qemu-nvidia-gpu-v2"),
            ),
            ("a.b", Some("containerd-shim-a-b")),
            ("kata", None),
            (".v2", None),
            ("./x.v2", None),
            ("", None),
        ] {
            assert_eq!(binary_name(runtime_type).as_deref(), name, "{runtime_type}");
        }
    }

    #[test]
    fn the_path_is_searched_in_order_and_then_containerds_own_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        let kata = handler("io.containerd.kata.v2", None);
        let error = resolve(&root, &kata, &search(), V17).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/opt/containerd/bin:/usr/local/bin:/usr/bin:/usr/sbin"),
            "{error}"
        );

        program(dir.path(), "usr/sbin/containerd-shim-kata-v2", 0o755);
        program(
            dir.path(),
            "opt/containerd/bin/containerd-shim-kata-v2",
            0o644,
        );
        let found = |root: &Root| resolve(root, &kata, &search(), V17).unwrap().to_string();
        assert_eq!(found(&root), "/usr/sbin/containerd-shim-kata-v2");
        program(dir.path(), "usr/bin/containerd-shim-kata-v2", 0o755);
        assert_eq!(found(&root), "/usr/bin/containerd-shim-kata-v2");
    }

    #[test]
    fn an_absolute_path_is_taken_as_it_is_and_follows_links_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        program(dir.path(), "opt/kata/shim-1.2", 0o755);
        std::os::unix::fs::symlink("/opt/kata/shim-1.2", dir.path().join("opt/kata/shim")).unwrap();
        let by_path = handler("io.containerd.kata.v2", Some("/opt/kata/shim"));
        for version in [V16, V17] {
            let found = resolve(&root, &by_path, &search(), version).unwrap();
            assert_eq!(found.as_str(), "/opt/kata/shim");
        }
        let by_type = handler("/opt/kata/shim", None);
        assert!(resolve(&root, &by_type, &search(), V16).is_ok());

        for (path, wanted) in [
            ("/opt/kata/none", "does not exist"),
            ("/opt/kata", "is a folder"),
        ] {
            let error = resolve(&root, &handler("a.b", Some(path)), &search(), V17).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
        program(dir.path(), "opt/kata/plain", 0o644);
        assert!(matches!(
            resolve(&root, &handler("/opt/kata/plain", None), &search(), V17),
            Err(ShimError::NotExecutable { .. })
        ));
        assert!(matches!(
            resolve(&root, &handler("kata", None), &search(), V17),
            Err(ShimError::BadType { .. })
        ));
    }
}
