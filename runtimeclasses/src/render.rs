//! A Kata configuration for an artifact that brings none. Settings are those of Kata's own GPU configurations
//! (`src/runtime/config/configuration-qemu-nvidia-gpu*.toml.in` and the defaults in `src/runtime/Makefile`, 4.1).

use toml_edit::{Array, DocumentMut, Item, Table, Value, value};

use crate::{ClassKind, ConfigError, GuestFile, Provider, Reference, Rendered, Runtime, Tee};

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
pub(crate) const POD_RESOURCES: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";

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
    document.decor_mut().set_prefix(header(kind));
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
    match provider.runtime {
        Runtime::Go => {
            kata.insert("dial_timeout", value(TIMEOUT_SECONDS));
        }
        Runtime::Rust => {
            kata.insert("dial_timeout_ms", value(1000));
            kata.insert("reconnect_timeout_ms", value(TIMEOUT_SECONDS * 1000));
            kata.insert("create_container_timeout", value(TIMEOUT_SECONDS));
        }
    }
    agent.insert("kata", Item::Table(kata));
    document.insert("agent", Item::Table(agent));
    document.insert("runtime", Item::Table(runtime(provider.runtime)));
    Ok(Rendered {
        text: document.to_string(),
        rerooted: Vec::new(),
        references,
    })
}

/// What a reader of the file must know: that it is derived, and where settings go instead.
fn header(kind: &ClassKind) -> String {
    format!(
        "# Derived by kata-manager for {}: the artifact brings no Kata configuration of its own.\n\
         # Do not edit: the next generation does not have your change. Settings go into a configuration.toml in the artifact.\n\n",
        kind.name
    )
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
    let shared = !confidential && provider.runtime == Runtime::Go;
    if shared {
        let daemon = provider.path("libexec/virtiofsd");
        table.insert("virtio_fs_daemon", value(daemon));
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
        value(if shared { "virtio-fs" } else { "none" }),
    );
    table.insert("cold_plug_vfio", value("root-port"));
    let spare = !confidential || provider.runtime == Runtime::Rust;
    table.insert("pcie_root_port", value(if spare { 8 } else { 0 }));
    if !confidential && provider.runtime == Runtime::Go {
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

fn runtime(runtime: Runtime) -> Table {
    let mut table = Table::new();
    if runtime == Runtime::Go {
        table.insert("create_container_timeout", value(TIMEOUT_SECONDS));
    }
    let entries: [(&str, Value); 4] = [
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

    /// A value of `[hypervisor.qemu]` as TOML, or nothing.
    fn setting(class: &str, key: &str) -> Option<String> {
        let text = rendered(class, &["vmlinuz", "kata.image"]).unwrap().text;
        let document: DocumentMut = text.parse().unwrap();
        let item = document["hypervisor"]["qemu"].get(key)?;
        Some(item.as_value()?.to_string().trim().to_owned())
    }

    #[test]
    fn the_classes_differ_where_kata_has_them_differ() {
        let params = "cgroup_no_v1=all pci=realloc pci=nocrs pci=assign-busses";
        let plain = format!("\"{params}\"");
        let cc = format!("\"{params} nvrc.smi.srs=1\"");
        let qemu = "\"/opt/kata/bin/qemu-system-x86_64";
        let snp = format!("{qemu}-snp-experimental\"");
        let tdx = format!("{qemu}-tdx-experimental\"");
        let qemu = format!("{qemu}\"");
        let rows: [(&str, [&str; 3]); 11] = [
            ("path", [&qemu, &snp, &tdx]),
            ("kernel_params", [&plain, &cc, &cc]),
            ("pcie_root_port", ["8", "0", "0"]),
            ("shared_fs", ["\"virtio-fs\"", "\"none\"", "\"none\""]),
            (
                "virtio_fs_daemon",
                ["\"/opt/kata/libexec/virtiofsd\"", "", ""],
            ),
            ("hot_plug_vfio", ["\"no-port\"", "", ""]),
            ("rootfs_type", ["\"erofs\""; 3]),
            ("confidential_guest", ["", "true", "true"]),
            ("sev_snp_guest", ["", "true", ""]),
            ("snp_guest_policy", ["", "196608", ""]),
            ("tdx_quote_generation_service_socket_port", ["", "", "0"]),
        ];
        for (key, expected) in rows {
            let found = ["", "-snp", "-tdx"]
                .map(|tee| setting(&format!("kata-qemu-nvidia-gpu{tee}"), key).unwrap_or_default());
            assert_eq!(found, expected, "{key}");
        }
    }

    #[test]
    fn the_header_says_that_it_is_derived_and_where_settings_go() {
        let text = rendered("kata-qemu-nvidia-gpu", &["vmlinuz", "initrd"])
            .unwrap()
            .text;
        let header: Vec<&str> = text
            .lines()
            .take_while(|line| line.starts_with('#'))
            .collect();
        assert_eq!(header.len(), 2, "{text}");
        assert!(
            header[0].contains("Derived by kata-manager for kata-qemu-nvidia-gpu"),
            "{text}"
        );
        assert!(
            header[1].contains("configuration.toml in the artifact"),
            "{text}"
        );
    }

    #[test]
    fn any_artifact_path_comes_out_as_toml() {
        let odd = "a \"b\\\n/vmlinuz'";
        let text = rendered("kata-qemu-nvidia-gpu", &[odd, "initrd"])
            .unwrap()
            .text;
        let document: DocumentMut = text.parse().unwrap();
        assert_eq!(
            document["hypervisor"]["qemu"]["kernel"].as_str(),
            Some(format!("/gen/1/{odd}").as_str())
        );
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
