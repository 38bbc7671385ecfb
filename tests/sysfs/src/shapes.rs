//! The machines that tests share.

use crate::{Device, Machine, device};

/// NVIDIA.
const NVIDIA: u16 = 0x10de;
/// H100 PCIe.
pub const H100: (u16, u16) = (NVIDIA, 0x2331);
/// H100 SXM5.
pub const H100_SXM: (u16, u16) = (NVIDIA, 0x2330);
/// L40.
pub const L40: (u16, u16) = (NVIDIA, 0x26b5);
/// The NVSwitch of an HGX H100.
pub const NVSWITCH: (u16, u16) = (NVIDIA, 0x22a3);
/// 3D controller.
pub const GPU: u32 = 0x03_0200;
/// PCI-to-PCI bridge.
pub const BRIDGE: u32 = 0x06_0400;

/// A root port of an Intel server.
fn root_port(address: &str, root: &str) -> Device {
    device(address, (0x8086, 0x352a), BRIDGE)
        .under(root, &[])
        .driver("pcieport")
}

/// A port of a PCIe switch.
fn switch_port(address: &str, root: &str, path: &[&str]) -> Device {
    device(address, (0x1000, 0xc030), BRIDGE)
        .under(root, path)
        .driver("pcieport")
}

/// One H100 behind a root port, with no driver.
pub fn one_gpu() -> Machine {
    Machine::new(vec![
        root_port("0000:00:10.0", "pci0000:00").group(3),
        device("0000:01:00.0", H100, GPU)
            .under("pci0000:00", &["0000:00:10.0"])
            .group(12),
    ])
}

/// An H100 on vfio-pci that a virtual machine uses, and an L40 on NVIDIA's driver, on two NUMA nodes.
pub fn two_models() -> Machine {
    Machine::new(vec![
        root_port("0000:00:10.0", "pci0000:00").group(3).numa(0),
        device("0000:01:00.0", H100, GPU)
            .under("pci0000:00", &["0000:00:10.0"])
            .group(12)
            .numa(0)
            .vfio(0),
        root_port("0000:80:01.0", "pci0000:80").group(4).numa(1),
        device("0000:81:00.0", L40, GPU)
            .under("pci0000:80", &["0000:80:01.0"])
            .group(20)
            .numa(1)
            .driver("nvidia"),
    ])
    .process(
        4242,
        "qemu-system-x86",
        &["/dev/kvm", "/dev/vfio/vfio", "/dev/vfio/12"],
    )
    .file(
        "/proc/driver/nvidia/gpus/0000:81:00.0/information",
        "Model: \t\t NVIDIA L40\nDevice Minor: \t 0\n",
    )
}

/// An HGX H100: eight GPUs behind four switches, two a NUMA node, and four NVSwitches.
pub fn eight_gpus() -> Machine {
    let mut devices = Vec::new();
    let mut group = 30;
    for plane in 0..4_u8 {
        let numa = i32::from(plane / 2);
        let bus = 0x10 + 0x40 * plane;
        let at = |offset: u8| format!("0000:{:02x}:", bus + offset);
        let root = format!("pci0000:{bus:02x}");
        let port = format!("{}01.0", at(0));
        let upstream = format!("{}00.0", at(1));
        let mut push = |device: Device| {
            group += 1;
            devices.push(device.group(group).numa(numa));
        };
        push(root_port(&port, &root));
        push(switch_port(&upstream, &root, &[&port]));
        for slot in 0..3_u8 {
            let down = format!("{}{slot:02x}.0", at(2));
            push(switch_port(&down, &root, &[&port, &upstream]));
            let path = [port.as_str(), &upstream, &down];
            let address = format!("{}00.0", at(3 + slot));
            let id = if slot == 2 {
                (NVSWITCH, 0x06_8000)
            } else {
                (H100_SXM, GPU)
            };
            let vfio = u32::from(plane) * 3 + u32::from(slot);
            push(device(&address, id.0, id.1).under(&root, &path).vfio(vfio));
        }
    }
    Machine::new(devices)
}

/// A GPU and its audio function in one group, with a network card that another vendor made and the bridge above.
pub fn shared_group() -> Machine {
    let under = |device: Device| {
        device
            .under("pci0000:00", &["0000:00:01.0"])
            .group(2)
            .numa(0)
    };
    Machine::new(vec![
        device("0000:00:01.0", (0x8086, 0x1901), BRIDGE)
            .driver("pcieport")
            .group(2)
            .numa(0),
        under(device("0000:01:00.0", L40, 0x03_0000)).driver("nouveau"),
        under(device("0000:01:00.1", (NVIDIA, 0x22ba), 0x04_0300)).driver("snd_hda_intel"),
        under(device("0000:02:00.0", (0x8086, 0x1572), 0x02_0000)),
    ])
}

/// One H100 where the IOMMU is off.
pub fn no_iommu() -> Machine {
    let mut machine = one_gpu();
    machine
        .devices
        .iter_mut()
        .for_each(|device| device.group = None);
    machine
}

/// [`eight_gpus`] with four more of another kind, among about this many functions of others: 16 NVIDIA functions.
pub fn crowd(foreign: u32) -> Machine {
    let mut machine = eight_gpus();
    for number in 0..4_u8 {
        machine.devices.push(
            device(&format!("0001:{number:02x}:00.0"), L40, GPU)
                .under("pci0001:00", &[])
                .group(500 + u32::from(number)),
        );
    }
    for number in 0..foreign {
        let (bus, slot) = (number / 32 % 256, number % 32);
        let address = format!("{:04x}:{bus:02x}:{slot:02x}.0", 2 + number / 8192);
        machine.devices.push(
            device(&address, (0x8086, 0x3456), 0x08_8000)
                .under("pci0002:00", &[])
                .group(1000 + number),
        );
    }
    machine
}
