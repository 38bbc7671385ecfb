//! A Kata configuration for an artifact that brings none. Settings are those of Kata's own GPU configurations
//! (`src/runtime/config/configuration-qemu-nvidia-gpu*.toml.in` and the defaults in `src/runtime/Makefile`, 4.1).

use toml_edit::{Array, DocumentMut, Item, Table, Value, value};

use crate::{ClassKind, ConfigError, GuestFile, Provider, Reference, Rendered, Tee};

/// Kernel parameters of the guest: a unified cgroup tree, and PCI windows sized by the guest for large BARs.
const KERNEL_PARAMS: &str = "cgroup_no_v1=all pci=realloc pci=nocrs pci=assign-busses";

/// What a confidential guest gets besides: its GPUs are set ready once they are attested.
const CONFIDENTIAL_KERNEL_PARAMS: &str = " nvrc.smi.srs=1";

/// The guest's memory in MiB.
const MEMORY_MIB: i64 = 8192;

/// Seconds until the agent must answer and a container must exist: a guest with many GPUs takes minutes to start.
const TIMEOUT_SECONDS: i64 = 1200;

/// QEMU's default SNP guest policy: 0x30000.
const SNP_POLICY: i64 = 196_608;

/// Where kubelet answers which devices a pod was given.
const POD_RESOURCES: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";

/// Where the guest's root file system comes from.
enum RootFs<'a> {
    Image(&'a str),
    Initrd(&'a str),
}

pub(crate) fn render(
    kind: &ClassKind,
    provider: &Provider,
    dir: &str,
    files: &[GuestFile],
) -> Result<Rendered, ConfigError> {
    let kernel = kernel(files)?;
    let rootfs = rootfs(files)?;
    let mut references = Vec::new();
    let mut document = DocumentMut::new();
    document.decor_mut().set_prefix(
        "# Derived by kata-manager from the artifact and the runtime class, and never edited: the generation is immutable.\n",
    );
    let mut hypervisor = Table::new();
    hypervisor.set_implicit(true);
    hypervisor.insert(
        "qemu",
        Item::Table(qemu(kind, provider, dir, kernel, &rootfs, &mut references)),
    );
    document.insert("hypervisor", Item::Table(hypervisor));
    let mut agent = Table::new();
    agent.set_implicit(true);
    let mut kata = Table::new();
    kata.insert("dial_timeout", value(TIMEOUT_SECONDS));
    agent.insert("kata", Item::Table(kata));
    document.insert("agent", Item::Table(agent));
    document.insert("runtime", Item::Table(runtime()));
    Ok(Rendered {
        text: document.to_string(),
        rerooted: Vec::new(),
        references,
    })
}

fn qemu(
    kind: &ClassKind,
    provider: &Provider,
    dir: &str,
    kernel: &str,
    rootfs: &RootFs<'_>,
    references: &mut Vec<Reference>,
) -> Table {
    let confidential = kind.tee != Tee::None;
    let mut table = Table::new();
    let mut path = |table: &mut Table, key: &str, path: String, executable: bool| {
        table.insert(key, value(path.clone()));
        references.push(Reference {
            key: format!("hypervisor.qemu.{key}"),
            path,
            executable,
        });
    };
    path(&mut table, "path", provider.path(kind.qemu), true);
    path(&mut table, "kernel", format!("{dir}/{kernel}"), false);
    match rootfs {
        RootFs::Image(file) => path(&mut table, "image", format!("{dir}/{file}"), false),
        RootFs::Initrd(file) => path(&mut table, "initrd", format!("{dir}/{file}"), false),
    }
    path(&mut table, "firmware", provider.path(kind.firmware), false);
    if !confidential {
        path(
            &mut table,
            "virtio_fs_daemon",
            provider.path("libexec/virtiofsd"),
            true,
        );
        // Only pods with shared volumes need it; Kata says so itself when it is missing.
        references.retain(|reference| reference.key != "hypervisor.qemu.virtio_fs_daemon");
    }
    if matches!(rootfs, RootFs::Image(_)) {
        table.insert("rootfs_type", value("erofs"));
    }
    table.insert("machine_type", value("q35"));
    let more = if confidential {
        CONFIDENTIAL_KERNEL_PARAMS
    } else {
        ""
    };
    table.insert("kernel_params", value(format!("{KERNEL_PARAMS}{more}")));
    table.insert("default_vcpus", value(1));
    table.insert("default_memory", value(MEMORY_MIB));
    table.insert("disable_image_nvdimm", value(true));
    table.insert(
        "shared_fs",
        value(if confidential { "none" } else { "virtio-fs" }),
    );
    table.insert("cold_plug_vfio", value("root-port"));
    table.insert("pcie_root_port", value(if confidential { 0 } else { 8 }));
    if !confidential {
        table.insert("hot_plug_vfio", value("no-port"));
    }
    table.insert("enable_annotations", value(annotations(confidential)));
    table.insert(
        "valid_hypervisor_paths",
        value(Array::from_iter([provider.path(kind.qemu)])),
    );
    tee(kind.tee, &mut table);
    table
}

fn tee(tee: Tee, table: &mut Table) {
    if tee != Tee::None {
        table.insert("confidential_guest", value(true));
    }
    if tee == Tee::Snp {
        table.insert("sev_snp_guest", value(true));
        table.insert("snp_id_block", value(""));
        table.insert("snp_id_auth", value(""));
        table.insert("snp_guest_policy", value(SNP_POLICY));
    }
    if tee == Tee::Tdx {
        table.insert("tdx_quote_generation_service_socket_port", value(0));
    }
}

fn annotations(confidential: bool) -> Array {
    let plain = ["enable_iommu", "kernel_params", "kernel_verity_params"];
    let more: &[&str] = if confidential {
        &["default_vcpus", "default_memory", "cc_init_data"]
    } else {
        &[]
    };
    plain.iter().chain(more).copied().collect()
}

fn runtime() -> Table {
    let mut table = Table::new();
    let entries: [(&str, Value); 5] = [
        ("create_container_timeout", TIMEOUT_SECONDS.into()),
        ("sandbox_cgroup_only", true.into()),
        ("static_sandbox_resource_mgmt", true.into()),
        ("vfio_mode", "guest-kernel".into()),
        ("pod_resource_api_sock", POD_RESOURCES.into()),
    ];
    for (key, entry) in entries {
        table.insert(key, value(entry));
    }
    table
}

fn kernel(files: &[GuestFile]) -> Result<&str, ConfigError> {
    let is_kernel = |name: &str| {
        ["vmlinuz", "vmlinux", "bzImage"]
            .iter()
            .any(|start| name.starts_with(start))
    };
    one(
        files,
        "kernel",
        "a file whose name begins with vmlinuz, vmlinux or bzImage",
        is_kernel,
    )
}

fn rootfs(files: &[GuestFile]) -> Result<RootFs<'_>, ConfigError> {
    let is_initrd =
        |name: &str| name.contains("initrd") || name.ends_with(".cpio") || name.contains(".cpio.");
    let is_image = |name: &str| {
        !is_initrd(name)
            && (name.ends_with(".img") || name.ends_with(".image") || name.starts_with("rootfs"))
    };
    let hint = "a *.img or *.image, or a file with initrd in its name";
    let found = one(files, "guest image or initrd", hint, |name| {
        is_initrd(name) || is_image(name)
    })?;
    Ok(if is_initrd(base(found)) {
        RootFs::Initrd(found)
    } else {
        RootFs::Image(found)
    })
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn one<'a>(
    files: &'a [GuestFile],
    what: &'static str,
    hint: &str,
    matches: impl Fn(&str) -> bool,
) -> Result<&'a str, ConfigError> {
    let found: Vec<&str> = files
        .iter()
        .map(|file| file.path.as_str())
        .filter(|path| matches(base(path)))
        .collect();
    match found.as_slice() {
        [one] => Ok(one),
        [] => Err(ConfigError::Missing {
            what,
            hint: format!("{hint} is expected"),
            files: files.iter().map(|file| file.path.clone()).collect(),
        }),
        several => Err(ConfigError::Ambiguous {
            what,
            candidates: several.iter().map(ToString::to_string).collect(),
            hint: "put a configuration.toml into the artifact that names the right one".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(class: &str, paths: &[&str]) -> Result<Rendered, ConfigError> {
        let files: Vec<_> = paths
            .iter()
            .map(|path| GuestFile {
                path: (*path).to_owned(),
            })
            .collect();
        let kind = crate::find(class).expect("a class of the catalogue");
        render(kind, &Provider::default(), "/gen/1", &files)
    }

    #[test]
    fn each_class_has_its_settings() {
        for kind in crate::catalogue() {
            let rendered = rendered(kind.name, &["vmlinuz-6", "kata.initrd"]).unwrap();
            let document: DocumentMut = rendered.text.parse().unwrap();
            let qemu = &document["hypervisor"]["qemu"];
            assert_eq!(qemu["kernel"].as_str(), Some("/gen/1/vmlinuz-6"));
            assert_eq!(qemu["initrd"].as_str(), Some("/gen/1/kata.initrd"));
            assert_eq!(
                qemu["firmware"].as_str(),
                Some(format!("/opt/kata/{}", kind.firmware).as_str())
            );
            assert_eq!(qemu["cold_plug_vfio"].as_str(), Some("root-port"));
            assert!(qemu.get("rootfs_type").is_none());
            assert_eq!(
                qemu.get("confidential_guest").is_some(),
                kind.tee != Tee::None
            );
            assert_eq!(qemu.get("sev_snp_guest").is_some(), kind.tee == Tee::Snp);
            assert_eq!(
                document["runtime"]["create_container_timeout"].as_integer(),
                Some(1200)
            );
            assert_eq!(
                document["agent"]["kata"]["dial_timeout"].as_integer(),
                Some(1200)
            );
            assert_eq!(rendered.references.len(), 4);
        }
    }

    #[test]
    fn an_image_is_told_from_an_initrd() {
        let text = rendered("kata-qemu-nvidia-gpu", &["bzImage", "kata-containers.img"])
            .unwrap()
            .text;
        assert!(
            text.contains("image = \"/gen/1/kata-containers.img\"") && text.contains("erofs"),
            "{text}"
        );
        let text = rendered("kata-qemu-nvidia-gpu", &["bzImage", "initrd.img"])
            .unwrap()
            .text;
        assert!(text.contains("initrd = \"/gen/1/initrd.img\""), "{text}");
    }

    #[test]
    fn missing_and_doubled_files_are_named() {
        let error = rendered("kata-qemu-nvidia-gpu", &["initrd"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no kernel") && error.contains("it has initrd"),
            "{error}"
        );
        let error = rendered("kata-qemu-nvidia-gpu", &["vmlinuz", "a.img", "initrd"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("a.img, initrd"), "{error}");
    }
}
