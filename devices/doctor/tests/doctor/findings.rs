//! Each check on a prepared root: what it says where all is well, where it is not, and where that cannot be told.

use crate::support::{GPU, PORT, Place, RELEASE, SOCKET, gpu, port, port_space};
use km_doctor::fact::{Fact, Found};
use km_doctor::software::{Handler, Spec};
use km_doctor::{Check, Finding, State};
use km_tests_sysfs::{device, shapes};

/// That a check says this of a place, with these words somewhere in its message, evidence or fix.
#[track_caller]
fn says(place: &Place, check: Check, state: State, words: &[&str]) -> Finding {
    let finding = place.find(check);
    assert_eq!(finding.state, state, "{finding:#?}");
    let all = format!("{finding:?}");
    for word in words {
        assert!(all.contains(word), "not a word of {word:?}: {finding:#?}");
    }
    let told = matches!(state, State::Failed | State::Warning);
    assert!(
        !told || !finding.fix.is_empty(),
        "nothing to do: {finding:#?}"
    );
    assert!(
        !told || !finding.evidence.is_empty(),
        "no evidence: {finding:#?}"
    );
    finding
}

use Check::*;
use State::{CouldNotCheck, Failed, NotApplicable, Ok as Good, Warning};

#[test]
fn a_good_host_has_nothing_to_do() {
    let findings = Place::good().examine();
    assert_eq!(findings.len(), Check::ALL.len());
    for (finding, check) in findings.iter().zip(Check::ALL) {
        assert_eq!(
            (finding.check, finding.state),
            (*check, Good),
            "{finding:#?}"
        );
        assert!(finding.fix.is_empty(), "{finding:#?}");
    }
}

#[test]
fn an_empty_root_is_no_success() {
    for finding in Place::bare().examine() {
        let told_by_software = matches!(
            finding.check,
            ContainerdCdi | Kata | NvidiaPlugin | Handlers
        );
        assert!(told_by_software || finding.state != Good, "{finding:#?}");
    }
    says(&Place::bare(), Devices, CouldNotCheck, &["--host-root"]);
}

#[test]
fn names_are_each_ones_own() {
    let names: std::collections::BTreeSet<_> =
        Check::ALL.iter().map(|check| check.name()).collect();
    assert_eq!(names.len(), Check::ALL.len());
}

#[test]
fn devices() {
    says(
        &Place::with(vec![port()]),
        Devices,
        Failed,
        &["no NVIDIA GPU"],
    );
    let mut place = Place::good();
    place.wants.devices = vec!["02:00.0".parse().unwrap()];
    says(&place, Devices, Failed, &["0000:02:00.0"]);
    place.wants.devices = vec![GPU.parse().unwrap()];
    says(&place, Devices, Good, &[GPU]);
    let mut dead = gpu().vfio(0);
    dead.dead = true;
    says(
        &Place::with(vec![port(), dead]),
        Devices,
        Failed,
        &["fallen off the bus", "config"],
    );
}

#[test]
fn kvm() {
    let place = Place::good();
    place.remove("/dev/kvm");
    says(&place, Kvm, Failed, &["/dev/kvm", "modprobe kvm_amd"]);
    place.file("/proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu\n");
    says(&place, Kvm, Failed, &["VT-x", "neither vmx nor svm"]);
    place.file("/dev/kvm", "");
    says(&place, Kvm, Failed, &["neither a device nor a socket"]);
}

#[test]
fn iommu() {
    let mut without = gpu().vfio(0);
    without.group = None;
    let mut bridge = port();
    bridge.group = None;
    let place = Place::with(vec![bridge, without.clone()]);
    says(&place, Iommu, Failed, &["AMD-Vi", "0 groups"]);
    place.file("/proc/cpuinfo", "vendor_id : GenuineIntel\nflags : vmx\n");
    place.file("/proc/cmdline", "quiet intel_iommu=off\n");
    says(
        &place,
        Iommu,
        Failed,
        &["intel_iommu=on", "Take intel_iommu=off", "VT-d"],
    );
    for check in [Acs, Groups] {
        says(&place, check, NotApplicable, &["IOMMU"]);
    }
    says(
        &Place::with(vec![port(), without]),
        Iommu,
        Failed,
        &["1 groups", "is in no group"],
    );
}

/// The GPU with another vendor's network card in its group.
fn shared(driver: Option<&str>) -> Place {
    let mut card = device("0000:02:00.0", (0x8086, 0x1572), 0x02_0000)
        .under("pci0000:00", &[PORT])
        .group(12);
    card.driver = driver.map(str::to_owned);
    Place::with(vec![port(), gpu().vfio(0), card])
}

#[test]
fn acs() {
    let place = shared(None);
    let space = format!("{}/config", place.sys(PORT));
    says(&place, Acs, Warning, &["although the ports"]);
    place.file(&space, port_space(Some(false)));
    says(&place, Acs, Failed, &["has ACS, and it is off", "Firmware"]);
    place.file(&space, port_space(None));
    says(&place, Acs, Failed, &["has no ACS", "AER"]);
    // What everybody but root may read.
    place.file(&space, &port_space(None)[..64]);
    says(&place, Acs, CouldNotCheck, &["64 bytes", "root"]);
    let place = Place::good();
    place.file(&format!("{}/config", place.sys(PORT)), port_space(None));
    says(&place, Acs, Good, &["has no ACS"]);
    place.file("/proc/cmdline", "pcie_acs_override=downstream\n");
    says(&place, Acs, Warning, &["pcie_acs_override=downstream"]);
}

#[test]
fn groups() {
    says(
        &shared(Some("i40e")),
        Groups,
        Failed,
        &["0000:02:00.0", "i40e", "--whole-group"],
    );
    says(
        &shared(None),
        Groups,
        Warning,
        &["0000:02:00.0", "no driver", "together"],
    );
    let second = device("0000:02:00.0", shapes::L40, shapes::GPU).under("pci0000:00", &[PORT]);
    let place = Place::with(vec![port(), gpu().vfio(0), second.group(12).vfio(1)]);
    says(&place, Groups, Warning, &["together"]);
    // A GPU's own audio function goes with it.
    let audio = device("0000:01:00.1", (0x10de, 0x22ba), 0x04_0300).under("pci0000:00", &[PORT]);
    let place = Place::with(vec![port(), gpu().vfio(0), audio.group(12).vfio(1)]);
    says(&place, Groups, Good, &[]);
}

#[test]
fn bar_space() {
    let line =
        |start: u64, end: u64, flags: u64| format!("{start:#018x} {end:#018x} {flags:#018x}\n");
    let none = line(0, 0, 0);
    let small = line(0xf000_0000, 0xf0ff_ffff, 0x4_0200);
    let cases = [
        // IORESOURCE_UNSET, and an address of nothing.
        format!(
            "{small}{none}{}{none}{none}{none}",
            line(0, 0x1f_ffff_ffff, 0x2014_220c)
        ),
        // What older kernels write.
        format!("{small}{none}{none}{none}{none}{none}"),
        none.repeat(6),
    ];
    for resource in cases {
        let place = Place::with(vec![port(), gpu().vfio(0).with("resource", &resource)]);
        says(&place, BarSpace, Failed, &["Above 4G", "pci=realloc"]);
    }
    let odd = Place::with(vec![port(), gpu().vfio(0).with("resource", "nonsense\n")]);
    says(&odd, BarSpace, CouldNotCheck, &["another form"]);
}

#[test]
fn vfio_modules() {
    let place = Place::good();
    place.remove("/sys/module/vfio_pci");
    says(&place, VfioModules, Good, &["installed, not loaded"]);
    let list = format!("/lib/modules/{RELEASE}/modules.dep");
    place.file(&list, "kernel/fs/xfs/xfs.ko:\n");
    says(
        &place,
        VfioModules,
        Failed,
        &["vfio_pci", "linux-modules-extra"],
    );
    place.remove(&list);
    says(
        &place,
        VfioModules,
        CouldNotCheck,
        &["modules.dep is not there"],
    );
    // With iommufd nothing else keeps mappings.
    let place = Place::good();
    place.remove("/sys/module/vfio_iommu_type1");
    place.file(&list, "kernel/drivers/vfio/pci/vfio-pci.ko:\n");
    says(&place, VfioModules, Good, &[]);
    place.remove("/dev/iommu");
    says(&place, VfioModules, Failed, &["vfio_iommu_type1"]);
}

#[test]
fn iommufd() {
    let mut place = Place::good();
    place.remove("/dev/vfio/devices/vfio0");
    says(&place, Iommufd, Failed, &["CONFIG_VFIO_DEVICE_CDEV", GPU]);
    place.remove("/dev/iommu");
    says(
        &place,
        Iommufd,
        Failed,
        &["modprobe iommufd", "kata-qemu-nvidia-gpu-snp"],
    );
    place.file(
        &format!("/lib/modules/{RELEASE}/modules.dep"),
        "kernel/fs/xfs/xfs.ko:\n",
    );
    says(&place, Iommufd, Failed, &["CONFIG_IOMMUFD"]);
    place.wants.snp.clear();
    place.wants.tdx.clear();
    says(&place, Iommufd, NotApplicable, &["runtime-rs"]);
}

#[test]
fn drivers() {
    let with = |driver: &str| Place::with(vec![port(), gpu().driver(driver)]);
    says(
        &with("nouveau"),
        Drivers,
        Failed,
        &["nouveau", "bind --all", "modprobe.blacklist=nouveau"],
    );
    says(
        &with("nvidia"),
        Drivers,
        Failed,
        &["nvidia", "nvidia-persistenced"],
    );
    says(
        &with("nvgrace_gpu_vfio_pci"),
        Drivers,
        Good,
        &["nvgrace_gpu_vfio_pci"],
    );
    says(
        &Place::with(vec![port(), gpu()]),
        Drivers,
        Warning,
        &["no driver", "bind"],
    );
    let second = device("0000:81:00.0", shapes::L40, shapes::GPU)
        .group(20)
        .driver("nvidia");
    let mut place = Place::with(vec![port(), gpu().vfio(0), second]);
    says(&place, Drivers, Failed, &["bind 81:00.0"]);
    // What is not wanted may stay where it is.
    place.wants.devices = vec![GPU.parse().unwrap()];
    says(&place, Drivers, Good, &[]);
}

#[test]
fn vhost() {
    let place = Place::good();
    place.remove("/dev/vhost-vsock");
    place.remove("/dev/vhost-net");
    says(
        &place,
        VhostVsock,
        Failed,
        &["/dev/vhost-vsock", "modprobe vhost_vsock", "not loaded"],
    );
    says(&place, VhostNet, Warning, &["modprobe vhost_net"]);
    place.file("/sys/module/vhost_vsock/refcnt", "0");
    says(
        &place,
        VhostVsock,
        Failed,
        &["although its module is loaded"],
    );
}

#[test]
fn memlock() {
    let place = Place::good();
    let limited = "Max locked memory         8388608              8388608              bytes\n";
    place.file("/proc/812/limits", limited);
    says(&place, Memlock, Good, &["CAP_IPC_LOCK"]);
    place.file("/proc/812/status", "CapEff:\t0000000000000000\n");
    says(
        &place,
        Memlock,
        Failed,
        &["8388608", "LimitMEMLOCK=infinity"],
    );
    place.remove("/proc/812/status");
    says(&place, Memlock, CouldNotCheck, &["/proc/812/limits"]);
    place.remove("/proc/812");
    says(
        &place,
        Memlock,
        CouldNotCheck,
        &["No process of containerd"],
    );
}

#[test]
fn confidential() {
    for (check, parameter, fix) in [
        (
            SevSnp,
            "/sys/module/kvm_amd/parameters/sev_snp",
            "kvm_amd.sev_snp=1",
        ),
        (
            Tdx,
            "/sys/module/kvm_intel/parameters/tdx",
            "Take these classes out",
        ),
    ] {
        let mut place = Place::good();
        place.file(parameter, "N\n");
        says(&place, check, Failed, &[parameter, fix]);
        place.file(parameter, "perhaps\n");
        says(&place, check, CouldNotCheck, &["perhaps"]);
        place.remove(parameter);
        says(&place, check, Failed, &["not there"]);
        place.wants.snp.clear();
        place.wants.tdx.clear();
        says(&place, check, NotApplicable, &["no configured class"]);
        place.file(parameter, "Y\n");
        says(&place, check, Good, &[]);
    }
    let place = Place::good();
    place.file("/proc/cpuinfo", "vendor_id : GenuineIntel\nflags : vmx\n");
    place.file("/sys/module/kvm_intel/parameters/tdx", "N\n");
    says(&place, Tdx, Failed, &["kvm_intel.tdx=1", "TME-MT"]);
}

#[test]
fn pod_resources() {
    let place = Place::good();
    place.remove(SOCKET);
    says(&place, PodResources, Failed, &[SOCKET, "Start the kubelet"]);
    place.file(SOCKET, "");
    says(
        &place,
        PodResources,
        Failed,
        &["neither a device nor a socket"],
    );
    place.remove("/var/lib/kubelet");
    place.remove("/proc/900");
    for check in [PodResources, KubeletTimeout] {
        says(&place, check, NotApplicable, &["no kubelet"]);
    }
}

#[test]
fn kubelet_timeout() {
    const FILE: &str = "/var/lib/kubelet/config.yaml";
    const COMMAND: &str = "/proc/900/cmdline";
    let place = Place::good();
    place.file(FILE, "runtimeRequestTimeout: 0s\n");
    says(
        &place,
        KubeletTimeout,
        Warning,
        &["120 seconds", FILE, "15m"],
    );
    place.file(FILE, "kind: KubeletConfiguration\n");
    says(&place, KubeletTimeout, Warning, &["not set"]);
    place.file(FILE, "runtimeRequestTimeout: soon\n");
    says(&place, KubeletTimeout, CouldNotCheck, &["soon"]);
    place.file(FILE, "runtimeRequestTimeout: [1\n");
    says(&place, KubeletTimeout, CouldNotCheck, &[FILE]);
    // A file of --config-dir comes before that of --config, a flag before both.
    let flags = "kubelet\0--config\0/var/lib/kubelet/config.yaml\0--config-dir=/etc/kubelet.d\0";
    place.file(COMMAND, flags);
    place.file(
        "/etc/kubelet.d/10-early.conf",
        "runtimeRequestTimeout: 2m\n",
    );
    place.file(
        "/etc/kubelet.d/20-late.conf",
        "runtimeRequestTimeout: 20m\n",
    );
    place.file("/etc/kubelet.d/30-not.yaml", "runtimeRequestTimeout: 1s\n");
    says(
        &place,
        KubeletTimeout,
        Good,
        &["20-late.conf", "1200 seconds"],
    );
    place.file(COMMAND, format!("{flags}--runtime-request-timeout=4m\0"));
    says(&place, KubeletTimeout, Warning, &["240 seconds", COMMAND]);
    place.remove("/proc/900");
    says(&place, KubeletTimeout, CouldNotCheck, &["k3s"]);
}

#[test]
fn containerd_cdi() {
    let mut place = Place::good();
    place.software.containerd.as_mut().unwrap().enable_cdi = Some(false);
    says(
        &place,
        ContainerdCdi,
        Warning,
        &["enableCdi", "Kata reads the specs itself"],
    );
    place.software.kata.version.found = Found::Is("3.20.0".to_owned());
    says(&place, ContainerdCdi, Failed, &["without an error"]);
    place.software.containerd.as_mut().unwrap().enable_cdi = None;
    says(&place, ContainerdCdi, Failed, &["cannot inject", "1.7"]);
    place.software.containerd.as_mut().unwrap().enable_cdi = Some(true);
    place.software.containerd.as_mut().unwrap().reads_ours = false;
    says(&place, ContainerdCdi, Failed, &["cdiSpecDirs"]);
    place.software.containerd = Err("connection refused".to_owned());
    says(
        &place,
        ContainerdCdi,
        CouldNotCheck,
        &["connection refused"],
    );
}

#[test]
fn kata() {
    let mut place = Place::good();
    place.software.kata.version.found = Found::Is("3.20.0".to_owned());
    says(&place, Kata, Warning, &["3.24"]);
    place.software.kata.version = Fact::new("/opt/kata/VERSION", Found::Is("\u{1b}".to_owned()));
    says(&place, Kata, CouldNotCheck, &["/opt/kata/VERSION"]);
    place.software.kata.missing = Err("permission denied".to_owned());
    says(&place, Kata, CouldNotCheck, &["permission denied"]);
    place.software.kata.missing = Ok(vec!["kata-qemu-nvidia-gpu needs QEMU".to_owned()]);
    says(&place, Kata, Failed, &["needs QEMU", "provider.prefix"]);
    place.software.kata.shims.clear();
    says(&place, Kata, Failed, &["/opt/kata"]);
    let switch = device("0000:05:00.0", shapes::NVSWITCH, 0x06_8000)
        .group(30)
        .vfio(9);
    let mut place = Place::with(vec![port(), gpu().vfio(0), switch]);
    says(&place, Kata, Good, &["4.1.0"]);
    place.software.kata.version.found = Found::Is("4.0.0".to_owned());
    says(&place, Kata, Warning, &["NVSwitches", "4.1"]);
}

#[test]
fn nvidia_plugin() {
    let mut place = Place::good();
    place.software.specs = Err("permission denied".to_owned());
    says(&place, NvidiaPlugin, CouldNotCheck, &["permission denied"]);
    place.software.specs = Ok(vec![Spec {
        file: "/var/run/cdi/nvidia.com-pgpu.yaml".to_owned(),
        kind: "nvidia.com/pgpu".to_owned(),
    }]);
    says(
        &place,
        NvidiaPlugin,
        Warning,
        &["nvidia.com-pgpu.yaml", "gpuAlias"],
    );
    let place = Place::good();
    place.file("/var/lib/kubelet/device-plugins/sandbox-pgpu.sock", "");
    says(
        &place,
        NvidiaPlugin,
        Warning,
        &["sandbox-pgpu.sock", "kubectl label"],
    );
    let place = Place::good();
    place.file("/proc/77/comm", "nvidia-sandbox-\n");
    says(&place, NvidiaPlugin, Warning, &["process 77"]);
}

#[test]
fn handlers() {
    let mut place = Place::good();
    place.software.handlers = Ok(vec![Handler {
        name: "kata-qemu-nvidia-gpu".to_owned(),
        who: "kata-deploy".to_owned(),
        file: "/etc/containerd/conf.d/kata-deploy.toml".to_owned(),
    }]);
    says(&place, Handlers, Warning, &["kata-deploy.toml", "--adopt"]);
    place.software.handlers = Err("no such file".to_owned());
    says(&place, Handlers, CouldNotCheck, &["no such file"]);
}

#[test]
fn what_may_not_be_read_is_no_failure() {
    use std::os::unix::fs::PermissionsExt as _;
    // Root may read everything, so somebody who is root tests with what nobody may: a folder in a file's place.
    let place = Place::good();
    for file in ["/proc/812/limits", "/var/lib/kubelet/config.yaml"] {
        place.remove(file);
        std::fs::create_dir(place.path(file)).unwrap();
        let none = std::fs::Permissions::from_mode(0o000);
        std::fs::set_permissions(place.path(file), none).unwrap();
    }
    says(&place, Memlock, CouldNotCheck, &["/proc/812/limits"]);
    says(&place, KubeletTimeout, CouldNotCheck, &["config.yaml"]);
}

#[test]
fn hostile_names_stay_text() {
    let mut place = Place::good();
    place.file("/proc/cmdline", "pcie_acs_override=\u{1b}[2J\n");
    place.software.containerd = Err("\u{1b}[31m".to_owned());
    for finding in place.examine() {
        assert!(!format!("{}{:?}", finding.message, finding.fix).contains('\u{1b}'));
        assert!(
            finding
                .evidence
                .iter()
                .all(|seen| !seen.value.contains('\u{1b}'))
        );
    }
}
