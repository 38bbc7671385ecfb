//! A host on which GPUs can be passed through, as a prepared root. Each test takes something away from it.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use km_doctor::fact::{Fact, Found, Node};
use km_doctor::software::{Containerd, Kata};
use km_doctor::{Case, Check, Finding, Host, Software, Wants, examine};
use km_host::Root;
use km_tests_sysfs::{Device, Machine, device, shapes};
use rustix::fs::{CWD, FileType, Mode};

/// The GPU.
pub(crate) const GPU: &str = "0000:01:00.0";
/// The root port above it.
pub(crate) const PORT: &str = "0000:00:10.0";
/// The kernel's release.
pub(crate) const RELEASE: &str = "6.12.48-amd64";
/// The nodes in `/dev` that a good host has.
const NODES: [&str; 4] = [
    "/dev/kvm",
    "/dev/vhost-vsock",
    "/dev/vhost-net",
    "/dev/iommu",
];
/// The socket of PodResources.
pub(crate) const SOCKET: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";

const CPUINFO: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu vme svm sse\n";
const DEP: &str = "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/drivers/vfio/vfio.ko.zst\n\
    kernel/drivers/vfio/vfio_iommu_type1.ko.zst:\nkernel/drivers/vhost/vhost_net.ko.zst:\n\
    kernel/drivers/vhost/vhost_vsock.ko.zst:\nkernel/drivers/iommu/iommufd/iommufd.ko.zst:\n";
const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
    Max locked memory         unlimited            unlimited            bytes     \n";

/// A host.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    pub(crate) software: Software,
    pub(crate) wants: Wants,
}

/// Configuration space of a port with Access Control Services on, off or not there.
pub(crate) fn port_space(acs: Option<bool>) -> Vec<u8> {
    let mut space = vec![0_u8; 4096];
    if let Some(on) = acs {
        space[0x100..0x104].copy_from_slice(&0x0001_000d_u32.to_le_bytes());
        space[0x104] = 0x1f;
        space[0x106] = if on { 0x1d } else { 0 };
    }
    space
}

pub(crate) fn gpu() -> Device {
    device(GPU, shapes::H100, shapes::GPU)
        .under("pci0000:00", &[PORT])
        .group(12)
        .numa(0)
}

pub(crate) fn port() -> Device {
    device(PORT, (0x1022, 0x1483), shapes::BRIDGE)
        .driver("pcieport")
        .group(3)
}

impl Place {
    /// A good host with these functions.
    pub(crate) fn with(devices: Vec<Device>) -> Place {
        let place = Place::bare();
        Machine::new(devices)
            .file(
                "/proc/cmdline",
                "BOOT_IMAGE=/vmlinuz root=/dev/sda1 quiet\n",
            )
            .file("/proc/cpuinfo", CPUINFO)
            .file("/proc/sys/kernel/osrelease", &format!("{RELEASE}\n"))
            .file(&format!("/lib/modules/{RELEASE}/modules.dep"), DEP)
            .file(
                &format!("/lib/modules/{RELEASE}/modules.builtin"),
                "kernel/fs/ext4/ext4.ko\n",
            )
            .file("/sys/module/vfio_pci/refcnt", "1\n")
            .file("/sys/module/vfio_iommu_type1/refcnt", "1\n")
            .file("/sys/module/kvm_amd/parameters/sev_snp", "Y\n")
            .file("/sys/module/kvm_intel/parameters/tdx", "Y\n")
            .file("/proc/812/comm", "containerd\n")
            .file("/proc/812/limits", LIMITS)
            .file(
                "/proc/812/status",
                "Name:\tcontainerd\nCapEff:\t000001ffffffffff\n",
            )
            .file("/proc/900/comm", "kubelet\n")
            .file(
                "/proc/900/cmdline",
                "/usr/bin/kubelet\0--config=/var/lib/kubelet/config.yaml\0",
            )
            .file(
                "/var/lib/kubelet/config.yaml",
                "kind: KubeletConfiguration\nruntimeRequestTimeout: 15m0s\n",
            )
            .file(
                "/var/lib/kubelet/device-plugins/kubelet_internal_checkpoint",
                "{}",
            )
            .file("/dev/vfio/devices/vfio0", "")
            .write(place.root());
        place.file(
            &format!("{}/config", place.sys(PORT)),
            port_space(Some(true)),
        );
        NODES.iter().for_each(|node| place.node(node));
        let socket = place.path(SOCKET);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        drop(UnixListener::bind(socket).unwrap());
        place
    }

    /// One GPU, with VFIO.
    pub(crate) fn good() -> Place {
        Place::with(vec![port(), gpu().vfio(0)])
    }

    /// An empty root, and good software.
    pub(crate) fn bare() -> Place {
        let software = Software {
            containerd: Ok(Containerd {
                version: "2.1.4".to_owned(),
                enable_cdi: Some(true),
                spec_dirs: vec!["/etc/cdi".to_owned(), "/var/run/cdi".to_owned()],
                reads_ours: true,
            }),
            kata: Kata {
                prefix: "/opt/kata".to_owned(),
                version: Fact::new("/opt/kata/VERSION", Found::Is("4.1.0".to_owned())),
                shims: vec!["/opt/kata/bin/containerd-shim-kata-v2".to_owned()],
                missing: Ok(Vec::new()),
            },
            handlers: Ok(Vec::new()),
            specs: Ok(Vec::new()),
        };
        Place {
            dir: tempfile::tempdir().unwrap(),
            software,
            wants: Wants {
                snp: vec!["kata-qemu-nvidia-gpu-snp".to_owned()],
                tdx: vec!["kata-qemu-nvidia-gpu-tdx".to_owned()],
                ..Wants::default()
            },
        }
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, host: &str) -> PathBuf {
        self.root().join(host.trim_start_matches('/'))
    }

    /// The folder of a function, by its real path: the name in `bus` is a link.
    pub(crate) fn sys(&self, address: &str) -> String {
        let real = fs::canonicalize(self.path(&format!("/sys/bus/pci/devices/{address}"))).unwrap();
        let root = fs::canonicalize(self.root()).unwrap();
        format!("/{}", real.strip_prefix(root).unwrap().display())
    }

    pub(crate) fn file(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(crate) fn remove(&self, path: &str) {
        let path = self.path(path);
        match path.is_dir() && !path.is_symlink() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
    }

    /// A character device; without the right to make one, a file in its place, which [`Place::look`] takes for one.
    fn node(&self, path: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let null = rustix::fs::makedev(1, 3);
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, mode, null) {
            Ok(()) => {}
            Err(rustix::io::Errno::PERM) => fs::write(path, "not permitted").unwrap(),
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn look(&self) -> Host {
        let mut host = Host::observe(&Root::new(self.root()).unwrap());
        let facts = [
            &mut host.kvm,
            &mut host.vhost_vsock,
            &mut host.vhost_net,
            &mut host.iommufd,
        ];
        for fact in facts {
            let stands_in =
                fs::read(self.path(&fact.source)).is_ok_and(|text| text == b"not permitted");
            if fact.found == Found::Is(Node::Other) && stands_in {
                fact.found = Found::Is(Node::Device);
            }
        }
        host
    }

    pub(crate) fn examine(&self) -> Vec<Finding> {
        self.judge(&self.look())
    }

    pub(crate) fn judge(&self, host: &Host) -> Vec<Finding> {
        examine(Case {
            host,
            software: &self.software,
            wants: &self.wants,
        })
    }

    pub(crate) fn find(&self, check: Check) -> Finding {
        let found = self
            .examine()
            .into_iter()
            .find(|finding| finding.check == check);
        found.unwrap()
    }
}
