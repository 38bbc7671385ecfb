//! `kata-manager devices` on a real kernel: what it says is held against the shape file, what it does against sysfs and the
//! emulated devices' own journal.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::process::Finished;

use crate::shown::{Device, Listed};

/// The generic VFIO driver; no emulated device has a variant of its own on x86.
pub(crate) const VFIO: &str = "vfio-pci";

/// A driver in the place of NVIDIA's: it takes any PCI function whose numbers it is told, and has a node for it.
const HOST: &str = "uio_pci_generic";

/// How long one command may take before we say that it hangs in the kernel.
const PROMPT: Duration = Duration::from_secs(30);

/// What the list says is what the shape says, before anything is bound.
pub(crate) fn list(node: &mut Node) -> Result<()> {
    let listed = Listed::of(node)?;
    listed.is_the_shape(node)?;
    listed.all_on(None, false)
}

/// Binds all to VFIO; a second time changes nothing.
pub(crate) fn bind_all(node: &mut Node) -> Result<()> {
    node.kata_manager(&["devices", "bind", "--all"], 0)?;
    let listed = Listed::of(node)?;
    listed.is_the_shape(node)?;
    listed.all_on(Some(VFIO), true)?;
    for device in &listed.devices {
        let group = device.iommu_group.context("a bound function has a group")?;
        node.shell(&format!("test -c /dev/vfio/{group}"))?;
    }
    let again = node.kata_manager(&["devices", "bind", "--all"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "it {again}");
    Ok(())
}

/// Gives all back; a second time changes nothing.
pub(crate) fn unbind_all(node: &mut Node) -> Result<()> {
    node.kata_manager(&["devices", "unbind", "--all"], 0)?;
    Listed::of(node)?.all_on(None, false)?;
    let left = node.shell("find /dev/vfio -type c")?;
    ensure!(left.trim() == "/dev/vfio/vfio", "there is still {left:?}");
    let again = node.kata_manager(&["devices", "unbind", "--all"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "it {again}");
    Ok(())
}

/// Unbinds one function with all that goes with it, and binds it again.
pub(crate) fn rebind(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    node.kata_manager(&["devices", "unbind", &address], 0)?;
    let listed = Listed::of(node)?;
    let group = listed.at(&address)?.iommu_group;
    for device in &listed.devices {
        let with_it = device.iommu_group == group;
        ensure!(device.driver.is_none() == with_it, "{device:?}");
    }
    node.kata_manager(&["devices", "bind", &address], 0)?;
    Listed::of(node)?.all_on(Some(VFIO), true)
}

/// A shell that has a file open and waits to be ended. What it waits with has not.
pub(crate) fn holding(file: &str) -> [String; 3] {
    let script = format!("exec 3<>{file}; echo >$READY; while :; do sleep 1000 3>&-; done");
    ["/usr/bin/bash".to_owned(), "-c".to_owned(), script]
}

/// A process has a group open: it is named, and nothing is touched, let alone waited for.
pub(crate) fn held_group(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let group = Listed::of(node)?.at(&address)?.iommu_group;
    let file = format!("/dev/vfio/{}", group.context("it has a group")?);
    let holder = node.hold(&holding(&file))?;
    refused(node, &address, &["in use by bash[", &file])?;
    let listed = Listed::of(node)?;
    let named = listed.at(&address)?.holders.first();
    let named = named.context("the list names no holder")?;
    ensure!(
        (named.name.as_str(), &named.file) == ("bash", &file),
        "{named:?}"
    );
    node.release(holder)?;
    rebind(node, name).context("after the holder has gone")
}

/// A process has a device open and closed its group: older kernels do not tell which device it is.
pub(crate) fn held_device(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let group = Listed::of(node)?.at(&address)?.iommu_group;
    let group = group.context("it has a group")?.to_string();
    let holder = node.hold(&["/usr/local/bin/vfio-hold", &group, &address])?;
    refused(node, &address, &["in use by vfio-hold["])?;
    node.release(holder)?;
    rebind(node, name).context("after the holder has gone")
}

/// That unbinding is refused at once, with these words, and that everything stays on VFIO.
pub(crate) fn refused(node: &mut Node, address: &str, mentions: &[&str]) -> Result<()> {
    for words in [
        &["devices", "unbind", address][..],
        &["devices", "unbind", "--all"],
    ] {
        let refused = node.kata_manager(words, 3)?;
        says(&refused, mentions)?;
        ensure!(refused.took < PROMPT, "it took {:?}", refused.took);
    }
    Listed::of(node)?.all_on(Some(VFIO), true)
}

fn says(finished: &Finished, mentions: &[&str]) -> Result<()> {
    for mention in mentions {
        ensure!(
            finished.stderr.contains(mention),
            "not a word of {mention:?}: it {finished}"
        );
    }
    Ok(())
}

/// A function that has fallen off the bus is listed as such, and not bound.
pub(crate) fn dead(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    node.emulator().kill(name)?;
    ensure!(
        Listed::of(node)?.at(&address)?.dead,
        "it is listed as alive"
    );
    let failed = node.kata_manager(&["devices", "bind", &address], 9)?;
    says(&failed, &[&address, "fallen off the bus"])?;
    node.emulator().revive(name)?;
    ensure!(
        !Listed::of(node)?.at(&address)?.dead,
        "it is listed as dead"
    );
    Ok(())
}

/// Without an IOMMU, binding is refused with what to do, and nothing changes.
pub(crate) fn no_iommu(node: &mut Node) -> Result<()> {
    let refused = node.kata_manager(&["devices", "bind", "--all"], 3)?;
    says(&refused, &["no IOMMU group", "intel_iommu=on"])?;
    Listed::of(node)?.all_on(None, false)
}

/// A driver of the host has the functions: binding takes them from it, unbinding gives them back, and a step that fails in the
/// middle leaves them with it.
pub(crate) fn from_a_host_driver(node: &mut Node, names: &[String]) -> Result<()> {
    let first = node.address(&names[0])?;
    let last = node.address(names.last().context("a shape has functions")?)?;
    let listed = Listed::of(node)?;
    let ids: BTreeSet<String> = listed.devices.iter().map(Device::id).collect();
    node.shell(&format!("modprobe {HOST}"))?;
    for id in ids {
        node.shell(&format!("echo {id} >/sys/bus/pci/drivers/{HOST}/new_id"))?;
    }
    Listed::of(node)?.all_on(Some(HOST), false)?;

    // Its node is open: named, and left alone.
    let file = "/dev/uio0";
    let holder = node.hold(&holding(file))?;
    let failed = node.kata_manager(&["devices", "bind", "--all"], 3)?;
    says(&failed, &["in use by bash[", file])?;
    Listed::of(node)?.all_on(Some(HOST), false)?;
    node.release(holder)?;

    // The last function's override goes nowhere, so that it falls back to the old driver.
    let attribute = format!("/sys/bus/pci/devices/{last}/driver_override");
    node.shell(&format!(
        "touch /run/nowhere; mount --bind /run/nowhere {attribute}"
    ))?;
    let failed = node.kata_manager(&["devices", "bind", "--all"], 9)?;
    says(&failed, &[&last, HOST, "everything is as it was before"])?;
    ensure!(
        failed
            .stderr
            .contains(&format!("{first}: {HOST} -> {VFIO}")),
        "it {failed}"
    );
    node.shell(&format!("umount {attribute}"))?;
    Listed::of(node)?.all_on(Some(HOST), false)?;

    node.kata_manager(&["devices", "bind", "--all"], 0)?;
    Listed::of(node)?.all_on(Some(VFIO), true)?;
    node.kata_manager(&["devices", "unbind", "--all"], 0)?;
    Listed::of(node)?.all_on(Some(HOST), false)?;
    node.shell(&format!("modprobe -r {HOST}"))?;
    Listed::of(node)?.all_on(None, false)
}

/// The host's modprobe loads the module, with what the administrator wrote for it.
pub(crate) fn modprobe_counts(node: &mut Node, name: &str) -> Result<()> {
    const FILE: &str = "/etc/modprobe.d/box.conf";
    let address = node.address(name)?;
    ensure!(
        node.shell("ls /sys/module")?
            .lines()
            .all(|module| module != "vfio_pci")
    );
    for (text, says_so) in [
        ("blacklist vfio-pci\n", "blacklisted"),
        (
            "install vfio-pci echo not on this node >&2; exit 1\n",
            "not on this node",
        ),
    ] {
        node.put(FILE, 0o644, text.as_bytes())?;
        let failed = node.kata_manager(&["devices", "bind", &address], 9)?;
        says(&failed, &["vfio-pci", "/etc/modprobe.d", says_so])?;
        Listed::of(node)?.all_on(None, false)?;
    }
    node.put(FILE, 0o644, b"options vfio-pci disable_idle_d3=1\n")?;
    node.kata_manager(&["devices", "bind", &address], 0)?;
    let option = node.shell("cat /sys/module/vfio_pci/parameters/disable_idle_d3")?;
    ensure!(option.trim() == "Y", "the option is {option:?}");
    node.kata_manager(&["devices", "unbind", &address], 0)?;
    Listed::of(node)?.all_on(None, false)?;
    // The other functions are to sleep, as they do by default.
    node.shell(&format!("rm {FILE}; modprobe -r vfio-pci"))?;
    Ok(())
}

/// After a reboot the function and all of its group are with VFIO again, and the others are as they were.
pub(crate) fn over_a_reboot(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    node.kata_manager(&["devices", "bind", "--persist", &address], 0)?;
    let before = node.shell("cat /proc/sys/kernel/random/boot_id")?;
    node.reboot()?;
    let after = node.shell("cat /proc/sys/kernel/random/boot_id; udevadm settle")?;
    ensure!(before != after, "it has not been restarted");
    let listed = Listed::of(node)?;
    listed.is_the_shape(node)?;
    let group = listed.at(&address)?.iommu_group;
    for device in &listed.devices {
        let wanted = (device.iommu_group == group).then_some(VFIO);
        ensure!(device.driver.as_deref() == wanted, "{device:?}");
    }
    node.kata_manager(&["devices", "unbind", "--all"], 0)?;
    Listed::of(node)?.all_on(None, false)
}

/// A binding that was asked to last comes back when the function does, by udev, and goes with an unbind.
pub(crate) fn persistent(node: &mut Node, name: &str) -> Result<()> {
    const RULES: &str = "/etc/udev/rules.d/70-kata-manager-vfio.rules";
    let address = node.address(name)?;
    node.kata_manager(&["devices", "bind", "--persist", &address], 0)?;
    // udev looks for new rules every three seconds at most; a reboot takes longer.
    node.shell("udevadm control --reload")?;
    for module in ["modprobe -r vfio-pci", "true"] {
        node.shell(&format!(
            "echo 1 >/sys/bus/pci/devices/{address}/remove; {module}; echo 1 >/sys/bus/pci/rescan; udevadm settle"
        ))?;
        let listed = Listed::of(node)?;
        let driver = listed.at(&address)?.driver.as_deref();
        ensure!(driver == Some(VFIO), "after {module:?}: {listed:?}");
    }
    node.kata_manager(&["devices", "unbind", &address], 0)?;
    node.shell(&format!("test ! -e {RULES}"))?;
    Ok(())
}
