//! Everything of the host that a check looks at, gathered once. Reads only, and judges nothing.

use std::collections::{BTreeMap, BTreeSet};

use km_host::Root;
use km_vfio::{Address, BridgeKind, Inventory};

use crate::fact::{Fact, Found, Node, Reader};
use crate::kubelet::Kubelet;
use crate::modules::Modules;
use crate::ports::{self, Acs};

/// Where PCI functions are.
pub(crate) const PCI: &str = "/sys/bus/pci/devices";

/// The most of `/proc/cpuinfo` that is read, in bytes: the first processor takes 2 KiB, and the others are alike.
const CPUINFO: usize = 16 << 10;

/// CAP_IPC_LOCK (linux/capability.h): whoever has it may pin memory without a limit.
const IPC_LOCK: u32 = 14;

/// A host.
#[derive(Clone, Debug)]
pub struct Host {
    /// How many functions the PCI bus has.
    pub pci: Fact<usize>,
    /// The NVIDIA functions.
    pub inventory: Inventory,
    /// The `resource` files of GPUs and NVSwitches.
    pub resources: BTreeMap<Address, Fact<String>>,
    /// Access Control Services of the ports above them.
    pub ports: BTreeMap<Address, Fact<Acs>>,
    /// The IOMMU groups.
    pub groups: Fact<BTreeSet<String>>,
    /// The kernel's command line.
    pub cmdline: Fact<String>,
    /// The processor.
    pub cpu: Fact<Cpu>,
    /// `/dev/kvm`.
    pub kvm: Fact<Node>,
    /// `/dev/vhost-vsock`.
    pub vhost_vsock: Fact<Node>,
    /// `/dev/vhost-net`.
    pub vhost_net: Fact<Node>,
    /// `/dev/iommu`.
    pub iommufd: Fact<Node>,
    /// Kernel modules.
    pub modules: Modules,
    /// The kernel's parameter `kvm_amd.sev_snp`.
    pub sev_snp: Fact<String>,
    /// The kernel's parameter `kvm_intel.tdx`.
    pub tdx: Fact<String>,
    /// What containerd's process may do, and so the QEMU below it.
    pub limits: Fact<Limits>,
    /// The kubelet.
    pub kubelet: Kubelet,
    /// Processes that look like NVIDIA's Sandbox Device Plugin.
    pub nvidia_plugins: Fact<Vec<u32>>,
}

/// Who made a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD.
    Amd,
    /// Intel.
    Intel,
    /// Somebody else.
    Other,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Who made it.
    pub vendor: Vendor,
    /// Whether the firmware lets it run virtual machines (`svm` or `vmx`).
    pub virtualization: bool,
}

/// What a process may pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most memory that it may pin, in bytes; `None`: all.
    pub memlock: Option<u64>,
    /// Whether it has CAP_IPC_LOCK, with which the limit does not count.
    pub ipc_lock: bool,
}

impl Host {
    /// Looks at a host.
    pub fn observe(root: &Root) -> Host {
        let reader = Reader::new(root);
        let mut pci = reader.names(PCI).and_read(|names| Some(names.len()));
        let inventory = Inventory::observe(root).unwrap_or_else(|error| {
            pci.found = Found::Unknown(error.to_string());
            Inventory::default()
        });
        let primaries = inventory.primaries().map(|function| function.address);
        let resources = primaries.map(|address| {
            let file = format!("{PCI}/{address}/resource");
            (address, reader.text(&file, 4096))
        });
        Host {
            resources: resources.collect(),
            ports: ports(reader, &inventory),
            pci,
            groups: reader.names("/sys/kernel/iommu_groups"),
            cmdline: reader.attribute("/proc/cmdline"),
            cpu: reader
                .text("/proc/cpuinfo", CPUINFO)
                .and_read(|text| cpu(&text)),
            kvm: reader.node("/dev/kvm"),
            vhost_vsock: reader.node("/dev/vhost-vsock"),
            vhost_net: reader.node("/dev/vhost-net"),
            iommufd: reader.node("/dev/iommu"),
            modules: Modules::observe(reader),
            sev_snp: reader.attribute("/sys/module/kvm_amd/parameters/sev_snp"),
            tdx: reader.attribute("/sys/module/kvm_intel/parameters/tdx"),
            limits: limits(reader),
            kubelet: Kubelet::observe(reader),
            // Names are cut after 15 bytes: nvidia-sandbox-device-plugin, nvidia-kata-sandbox-device-plugin.
            nvidia_plugins: reader.processes(|name| {
                name.starts_with("nvidia-sandbox-") || name.starts_with("nvidia-kata-san")
            }),
            inventory,
        }
    }
}

/// The ports that decide on isolation: root ports and the downstream ports of switches.
fn ports(reader: Reader<'_>, inventory: &Inventory) -> BTreeMap<Address, Fact<Acs>> {
    let above = inventory.primaries().flat_map(|function| &function.path);
    let above: BTreeSet<Address> = above.copied().collect();
    let decides = |address: &Address| {
        inventory
            .bridge(*address)
            .is_some_and(|bridge| bridge.kind != BridgeKind::UpstreamPort)
    };
    let read = |address: Address| {
        let space = reader.bytes(&format!("{PCI}/{address}/config"), ports::SPACE);
        let fact = match &space.found {
            Found::Is(bytes) if bytes.len() < ports::SPACE => Found::Unknown(format!(
                "only {} bytes of configuration space can be read: run as root",
                bytes.len()
            )),
            _ => space.found.and_read(|bytes| ports::read(&bytes)),
        };
        (address, Fact::new(space.source, fact))
    };
    above.into_iter().filter(decides).map(read).collect()
}

/// The first processor of `/proc/cpuinfo`.
fn cpu(text: &str) -> Option<Cpu> {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim())
        })
    };
    let vendor = match field("vendor_id")? {
        "AuthenticAMD" => Vendor::Amd,
        "GenuineIntel" => Vendor::Intel,
        _ => Vendor::Other,
    };
    let flags = field("flags").unwrap_or_default();
    let virtualization = flags.split(' ').any(|flag| flag == "vmx" || flag == "svm");
    Some(Cpu {
        vendor,
        virtualization,
    })
}

fn limits(reader: Reader<'_>) -> Fact<Limits> {
    let processes = reader.processes(|name| name == "containerd");
    let number = match processes.found {
        Found::Is(all) => match all.first() {
            Some(number) => *number,
            None => return Fact::new(processes.source, Found::Absent),
        },
        Found::Absent => return Fact::new(processes.source, Found::Absent),
        Found::Unknown(reason) => return Fact::new(processes.source, Found::Unknown(reason)),
    };
    let status = reader.attribute(&format!("/proc/{number}/status"));
    let ipc_lock = status.get().and_then(|text| has_ipc_lock(text));
    reader
        .attribute(&format!("/proc/{number}/limits"))
        .and_read(|text| {
            Some(Limits {
                memlock: memlock(&text)?,
                ipc_lock: ipc_lock?,
            })
        })
}

/// The line `Max locked memory  8388608  8388608  bytes` of a process's limits (proc_pid_limits(5)).
fn memlock(text: &str) -> Option<Option<u64>> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        bytes => bytes.parse().ok().map(Some),
    }
}

fn has_ipc_lock(status: &str) -> Option<bool> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    let bits = u64::from_str_radix(line.trim(), 16).ok()?;
    Some(bits >> IPC_LOCK & 1 == 1)
}
