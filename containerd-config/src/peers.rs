//! Who else registers handlers in containerd: told by the marks that each leaves. Pure.

use std::fmt;

use crate::edit::Owner;
use crate::effective::InForce;

/// Who registered a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    /// We did.
    Ours,
    /// containerd's own default, or written out as such.
    Containerd,
    /// kata-deploy of the Kata Containers project.
    KataDeploy,
    /// NVIDIA's Kata Manager.
    NvidiaKataManager,
    /// The NVIDIA Container Toolkit.
    NvidiaContainerToolkit,
    /// Somebody by hand, or a tool that leaves no mark.
    Somebody,
}

impl Who {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Who::Ours => "kata-manager",
            Who::Containerd => "containerd's default",
            Who::KataDeploy => "kata-deploy",
            Who::NvidiaKataManager => "NVIDIA's Kata Manager",
            Who::NvidiaContainerToolkit => "the NVIDIA Container Toolkit",
            Who::Somebody => "somebody else",
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who registered a handler, by its files and settings.
///
/// kata-deploy writes `kata-deploy.toml` drop-ins and paths below `/opt/kata` (`tools/packaging/kata-deploy` in
/// kata-containers/kata-containers); NVIDIA's Kata Manager names configurations below its artifacts folder
/// (NVIDIA/k8s-kata-manager); the toolkit writes `99-nvidia.toml` and binaries named `nvidia-container-runtime`
/// (`nvidia-ctk runtime configure` in NVIDIA/nvidia-container-toolkit).
pub fn who(handler: &InForce) -> Who {
    match handler.owner {
        Owner::Ours | Owner::Adopted => return Who::Ours,
        Owner::Restated => return Who::Containerd,
        Owner::Foreign => {}
    }
    let text = |key: &str| handler.settings.get(key).and_then(|value| value.as_str());
    let option = |key: &str| handler.settings.get("options")?.get(key)?.as_str();
    let file = |part: &str| {
        handler
            .files
            .iter()
            .any(|path| path.as_str().contains(part))
    };
    let config = option("ConfigPath").unwrap_or_default();
    let path = text("runtime_path").unwrap_or_default();
    let binary = option("BinaryName").unwrap_or_default();
    if binary.contains("nvidia-container-runtime") || file("99-nvidia.toml") {
        return Who::NvidiaContainerToolkit;
    }
    if config.contains("/nvidia-gpu-operator/artifacts/") {
        return Who::NvidiaKataManager;
    }
    if file("kata-deploy") || path.starts_with("/opt/kata/") || config.starts_with("/opt/kata/") {
        return Who::KataDeploy;
    }
    let plain = text("runtime_type") == Some("io.containerd.runc.v2");
    if handler.name == "runc" && plain {
        return Who::Containerd;
    }
    Who::Somebody
}

#[cfg(test)]
mod tests {
    use super::*;
    use km_host::HostPath;
    use serde_json::json;

    #[test]
    fn each_leaves_its_mark() {
        let of = |owner, file: &str, settings: serde_json::Value| {
            who(&InForce {
                name: "x".into(),
                settings: settings.as_object().unwrap().clone(),
                files: vec![HostPath::new(file).unwrap()],
                owner,
                line: 1,
            })
        };
        let main = "/etc/containerd/config.toml";
        let foreign = Owner::Foreign;
        assert_eq!(of(Owner::Ours, main, json!({})), Who::Ours);
        assert_eq!(
            of(foreign, main, json!({ "runtime_type": "x.y.v1" })),
            Who::Somebody
        );
        assert_eq!(
            of(
                foreign,
                "/opt/kata/containerd/config.d/kata-deploy.toml",
                json!({})
            ),
            Who::KataDeploy
        );
        assert_eq!(
            of(
                foreign,
                main,
                json!({ "runtime_path": "/opt/kata/bin/containerd-shim-kata-v2" })
            ),
            Who::KataDeploy
        );
        let theirs = "/opt/nvidia-gpu-operator/artifacts/runtimeclasses/x/configuration-x.toml";
        assert_eq!(
            of(
                foreign,
                main,
                json!({ "options": { "ConfigPath": theirs } })
            ),
            Who::NvidiaKataManager
        );
        assert_eq!(
            of(foreign, "/etc/containerd/conf.d/99-nvidia.toml", json!({})),
            Who::NvidiaContainerToolkit
        );
    }
}
