//! A virtual machine inside the node takes the device through VFIO, as Kata's would, and gives it back.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::cpio;
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::node_in_a_box::image::Image;
use km_tests_e2e::node_in_a_box::shape::Kernel;
use km_tests_e2e::parts::Parts;
use km_tests_e2e::process::Finished;
use km_tests_e2e::wait;

use crate::devices;
use crate::shown::Listed;

/// Where the guest's files lie in the node.
const KERNEL: &str = "/run/guest/vmlinuz";
const INITRD: &str = "/run/guest/initrd";

/// The guest's first program: tells its functions, and switches off.
const INIT: &str = "\
#!/bin/sh
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
/bin/functions
poweroff -f
";

/// Tells each PCI function of a guest with its place and its NUMA node.
const FUNCTIONS: &str = r#"#!/bin/sh
for function in /sys/bus/pci/devices/*; do
    echo "function $(readlink -f $function) $(cat $function/vendor) $(cat $function/device) $(cat $function/numa_node)"
done
echo these are all
"#;

/// How long a guest may take. It needs ten to twenty seconds with another node beside it.
const GUEST: Duration = Duration::from_secs(150);

/// By what QEMU takes a device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    /// By `/dev/vfio/GROUP`.
    Group,
    /// By `/dev/vfio/devices/vfioN` and `/dev/iommu`.
    Iommufd,
}

/// Time for `timeout` itself to end it.
const SPARE: Duration = Duration::from_secs(60);

/// Puts the guest's files into the node, and switches its /dev/kvm on.
pub(crate) fn prepare(node: &mut Node, parts: &Parts) -> Result<()> {
    node.put(INITRD, 0o644, &initrd(parts, INIT)?)?;
    let kernel = fs::read(kernel(parts)?).context("read the kernel")?;
    node.put(KERNEL, 0o644, &kernel)?;
    kvm(node)
}

/// The kernel of a guest: Debian's.
pub(crate) fn kernel(parts: &Parts) -> Result<PathBuf> {
    Ok(Image::at(parts.dir(), Kernel::Debian)?.kernel())
}

/// An initrd with busybox, `/bin/functions` and a first program.
pub(crate) fn initrd(parts: &Parts, init: &str) -> Result<Vec<u8>> {
    let busybox = fs::read(parts.busybox()).context("read busybox")?;
    let mut archive = cpio::Archive::new();
    for folder in ["bin", "dev", "proc", "sys"] {
        archive.folder(folder);
    }
    archive
        .device("dev/console", 5, 1)
        .file("bin/busybox", 0o755, &busybox)
        .file("bin/functions", 0o755, FUNCTIONS.as_bytes())
        .link("bin/sh", "busybox")
        .file("init", 0o755, init.as_bytes());
    Ok(archive.finish())
}

/// Switches the node's /dev/kvm on.
pub(crate) fn kvm(node: &mut Node) -> Result<()> {
    node.shell("test -c /dev/kvm || modprobe kvm-amd; test -c /dev/kvm")?;
    Ok(())
}

/// QEMU as Kata calls it for a cold-plugged GPU: a root port, and the device behind it. Without `x-no-mmap` this QEMU maps the
/// BARs for other devices' sake, and the outer one complains of each page.
fn qemu(way: Way, address: &str) -> Vec<String> {
    let (object, property) = match way {
        Way::Group => ("", ""),
        Way::Iommufd => ("-object iommufd,id=iommufd0", ",iommufd=iommufd0"),
    };
    let words = format!(
        "/usr/bin/qemu-system-x86_64 -accel kvm -cpu host -machine q35 -m 256M -nodefaults -nographic -vga none -serial stdio \
         -no-reboot {object} -device pcie-root-port,id=rp0,bus=pcie.0,addr=0x10,chassis=1,slot=1 \
         -device vfio-pci,host={address},bus=rp0,x-no-mmap=on{property} -kernel {KERNEL} -initrd {INITRD}"
    );
    let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    words.push("-append".to_owned());
    words.push("console=ttyS0 quiet panic=-1 mitigations=off no5lvl no_timer_check".to_owned());
    words
}

/// A virtual machine that stands still has the device: unbinding is refused, with QEMU's name, and nothing waits.
pub(crate) fn held(node: &mut Node, way: Way, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let line = qemu(way, &address).join("' '");
    let script = format!("echo >$READY; exec '{line}' -S");
    let holder = node.hold(&["/usr/bin/bash", "-c", &script])?;
    wait::until("QEMU to open the device", GUEST, || {
        let listed = Listed::of(node)?;
        let holders = &listed.at(&address)?.holders;
        ensure!(
            holders.iter().any(|holder| holder.name.starts_with("qemu")),
            "{holders:?}"
        );
        Ok(())
    })?;
    devices::refused(node, &address, &["in use by qemu-system-x86["])?;
    node.release(holder)
}

/// A guest boots with the device and sees it behind a root port; afterwards the node has it again.
pub(crate) fn guest(node: &mut Node, way: Way, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let id = Listed::of(node)?.at(&address)?.id().replace(' ', " 0x");
    let said = boot(node, way, &address)?.stdout;
    let wanted = format!("function /sys/devices/pci0000:00/0000:00:10.0/0000:01:00.0 0x{id}");
    ensure!(
        said.contains(&wanted),
        "the guest does not have {wanted:?}: {said}"
    );
    ensure!(
        said.contains("these are all"),
        "the guest did not end: {said}"
    );
    let listed = Listed::of(node)?;
    ensure!(listed.at(&address)?.holders.is_empty(), "{listed:?}");
    Ok(())
}

/// Boots the guest, which the caller does alone. About one in forty of these boots stops or resets early, without a word on the console: a guest in a guest of a
/// software processor; on the kernel with iommufd it was three of six. Such a one, and no other, is tried again, and the output says so.
fn boot(node: &mut Node, way: Way, address: &str) -> Result<Finished> {
    let qemu = qemu(way, address);
    let seconds = GUEST.as_secs().to_string();
    let mut words = vec!["/usr/bin/timeout", "--kill-after=20", &seconds];
    words.extend(qemu.iter().map(String::as_str));
    let most = match way {
        Way::Group => 1,
        Way::Iommufd => 3,
    };
    let mut retries = 0;
    loop {
        let finished = node.run_for(&words, GUEST + SPARE)?;
        let said = finished.stdout.contains("function ");
        if finished.status.success() && said {
            node.note(&format!("nested guest booted, retries: {retries}"));
            return Ok(finished);
        }
        // A guest that resets itself ends QEMU with success; timeout(1) ends with 124 when the time was up, and is killed with the rest
        // when that did not end it.
        let over = matches!(finished.code(), None | Some(0 | 124 | 137));
        let hung = over && !said;
        ensure!(hung && retries < most, "the nested guest {finished}");
        retries += 1;
    }
}
