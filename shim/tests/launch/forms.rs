//! The arguments that each Kata writes, and the sandbox that they are for.

use std::collections::BTreeSet;
use std::ffi::OsString;

use km_host::claims::Device;
use km_shim::launch::argv::Argv;
use km_shim::launch::check::{self, Wanted};
use km_shim::launch::view::View;
use km_topology::{Flavor, Kata, Version};
use km_vfio::Address;

/// What both runtimes write before devices of the host.
pub(crate) const MACHINE: &str = "-name sandbox-abc -machine q35,accel=kvm -m 8192M,slots=10,maxmem=65536M -nodefaults -nographic --no-reboot \
    -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k \
    -device virtio-serial-pci,disable-modern=true,id=serial0 -object rng-random,id=rng0,filename=/dev/urandom \
    -device virtio-rng-pci,rng=rng0 -append root=/dev/vda1,ro -smp 1,cores=1";

/// The Go runtime, 3.24 to 4.1, with iommufd.
pub(crate) const GO: &str = "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off \
    -device pcie-root-port,id=rp1,bus=pcie.0,chassis=0,slot=1,multifunction=off \
    -object iommufd,id=iommufdvfio-a \
    -device vfio-pci,host=0000:21:00.0,id=vfio-a,x-pci-vendor-id=0x10de,x-pci-device-id=0x2321,bus=rp0,iommufd=iommufdvfio-a \
    -object iommufd,id=iommufdvfio-b \
    -device vfio-pci,host=0000:a1:00.0,id=vfio-b,x-pci-vendor-id=0x10de,x-pci-device-id=0x2321,bus=rp1,iommufd=iommufdvfio-b";

/// runtime-rs 4.x.
pub(crate) const RUST: &str = "-object iommufd,id=iommufdrp0 \
    -device pcie-root-port,id=rp0,addr=0x09,chassis=10,slot=9,bus=pcie.0,multifunction=off \
    -device pcie-root-port,id=rp1,addr=0x0a,chassis=11,slot=10,bus=pcie.0,multifunction=off \
    -device vfio-pci,host=0000:21:00.0,bus=rp0,addr=0x0,iommufd=iommufdrp0 -object iommufd,id=iommufdrp1 \
    -device vfio-pci,host=0000:a1:00.0,bus=rp1,addr=0x0,iommufd=iommufdrp1";

/// The Go runtime with `enable_numa`.
pub(crate) const NUMA: &str = "-object memory-backend-ram,id=numa-mem0,size=4096M,host-nodes=0,policy=bind -numa node,nodeid=0,memdev=numa-mem0,cpus=0 \
    -object memory-backend-ram,id=numa-mem1,size=4096M,host-nodes=1,policy=bind -numa node,nodeid=1,memdev=numa-mem1,cpus=1 \
    -device pxb-pcie,id=pxb-numa0,bus=pcie.0,bus_nr=32,numa_node=0 -device pxb-pcie,id=pxb-numa1,bus=pcie.0,bus_nr=64,numa_node=1 \
    -device pcie-root-port,id=rp-numa0-0,bus=pxb-numa0,chassis=10,slot=0,multifunction=off \
    -device pcie-root-port,id=rp-numa1-0,bus=pxb-numa1,chassis=11,slot=0,multifunction=off \
    -object iommufd,id=iommufdvfio-a -device vfio-pci,host=0000:21:00.0,id=vfio-a,bus=rp-numa0-0,iommufd=iommufdvfio-a \
    -object iommufd,id=iommufdvfio-b -device vfio-pci,host=0000:a1:00.0,id=vfio-b,bus=rp-numa1-0,iommufd=iommufdvfio-b";

/// The Go runtime with `cold_plug_vfio = "switch-port"` and groups.
pub(crate) const SWITCH: &str = "-device pcie-root-port,id=srp0,bus=pcie.0,chassis=1,slot=0,multifunction=off -device x3130-upstream,id=swup0,bus=srp0 \
    -device xio3130-downstream,id=swdp0,bus=swup0,chassis=2,slot=0,multifunction=off \
    -device xio3130-downstream,id=swdp1,bus=swup0,chassis=2,slot=1,multifunction=off \
    -device vfio-pci,host=0000:21:00.0,id=vfio-a,bus=swdp0 -device vfio-pci,host=0000:a1:00.0,id=vfio-b,bus=swdp1";

/// A command line of parts, with single spaces between words.
pub(crate) fn argv(parts: &[&str]) -> Argv {
    let words = parts.iter().flat_map(|part| part.split_whitespace());
    Argv::parse(words.map(OsString::from).collect())
}

/// A GPU as a claim has it.
pub(crate) fn device(address: &str, node: u16, cdev: bool) -> Device {
    Device {
        address: address.to_owned(),
        class: 0x03_0200,
        numa_node: Some(node),
        iommu_group: Some(40 + u32::from(node)),
        cdev: cdev.then(|| format!("vfio{node}")),
    }
}

/// Two GPUs on two NUMA nodes, and the Kata that starts their guest.
pub(crate) struct Sandbox {
    pub(crate) devices: Vec<Device>,
    pub(crate) confidential: bool,
    pub(crate) kata: Kata,
    pub(crate) guarded: BTreeSet<Address>,
}

impl Sandbox {
    pub(crate) fn of(flavor: Flavor, cdev: bool) -> Sandbox {
        let guarded = ["0000:21:00.0", "0000:a1:00.0", "0000:c1:00.0"];
        Sandbox {
            devices: vec![
                device("0000:21:00.0", 0, cdev),
                device("0000:a1:00.0", 1, cdev),
            ],
            confidential: false,
            kata: Kata {
                flavor,
                version: Version::new(4, 1),
            },
            guarded: guarded
                .iter()
                .map(|one| one.parse().expect("an address"))
                .collect(),
        }
    }

    pub(crate) fn wanted(&self) -> Wanted<'_> {
        Wanted {
            devices: &self.devices,
            confidential: self.confidential,
            kata: self.kata,
            guarded: &self.guarded,
        }
    }

    pub(crate) fn problems(&self, argv: &Argv) -> Vec<String> {
        match check::check(&View::of(argv), &self.wanted()) {
            Ok(()) => Vec::new(),
            Err(refused) => refused.0,
        }
    }
}
