//! Each shape, booted once: first the box itself, whose hardware must be what the shape says and which Linux must be able to use,
//! then kata-manager in it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_gpu_emulator::journal::{Event, ResetKind};
use km_tests_e2e::node_in_a_box::image::{Payload, beside};
use km_tests_e2e::node_in_a_box::shape::Shape;
use km_tests_e2e::node_in_a_box::{Node, pci};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::wait;

use crate::nested::Way;
use crate::pods::Runtime;
use crate::shown::Listed;
use crate::{devices, doctor, nested, plugin, pods, specs};

/// A boot of each shape.
pub(crate) const TESTS: &[Test] = &[
    ("one-gpu", one_gpu),
    ("two-models", two_models),
    ("shared-group", shared_group),
    ("eight-gpus", |sandbox| {
        let (mut node, names) = boot(sandbox, "eight-gpus")?;
        common(sandbox, &mut node, &names)
    }),
    ("no-iommu", no_iommu),
];

/// Boots a shape, and holds the hardware against it. Gives the functions' names too.
pub(crate) fn boot(sandbox: &Sandbox, name: &str) -> Result<(Node, Vec<String>)> {
    let shape = Shape::named(name)?;
    let folder = sandbox.folder(name)?;
    let mut payload = Payload::new()?;
    payload.kata_manager()?;
    payload.program("kubelet-stand-in", &beside("kubelet-stand-in")?);
    pods::payload(&mut payload);
    let mut node = Node::boot(sandbox.parts(), &shape, &payload, &folder)?;
    node.step("the hardware is what the shape says", hardware)?;
    node.step("containerd answers", containerd)?;
    node.step("devices list is what the shape says", devices::list)?;
    node.step("doctor knows the shape", doctor::unbound)?;
    let placed = shape.placed();
    let names = placed.iter().map(|placed| placed.named.name.clone());
    Ok((node, names.collect()))
}

/// What every shape with an IOMMU can do.
fn common(sandbox: &Sandbox, node: &mut Node, names: &[String]) -> Result<()> {
    let first = &names[0];
    node.step("bind all", devices::bind_all)?;
    node.step("CDI specs follow", specs::follow)?;
    node.step("doctor sees what is bound", doctor::bound)?;
    pods::steps(sandbox, node, Runtime::Go)?;
    node.step("unbind and bind one", |node| devices::rebind(node, first))?;
    node.step("CDI specs are as before", specs::follow)?;
    // Times are judged in it.
    node.step_alone("the device plugin", |node| plugin::works(node, first))?;
    node.step("a held group is refused", |node| {
        devices::held_group(node, first)
    })?;
    node.step("reset reaches the device", |node| reset(node, first))?;
    node.step("remove and rescan", |node| remove_and_rescan(node, first))?;
    node.step("bind what came back", |node| {
        let address = node.address(first)?;
        node.kata_manager(&["devices", "bind", &address], 0)?;
        Listed::of(node)?.all_on(Some(devices::VFIO), true)
    })?;
    node.step("unbind all", devices::unbind_all)?;
    node.step("CDI specs are gone", specs::are_gone)
}

fn one_gpu(sandbox: &Sandbox) -> Result<()> {
    let (mut node, names) = boot(sandbox, "one-gpu")?;
    let node = &mut node;
    let first = &names[0];
    node.step("modprobe's settings count", |node| {
        devices::modprobe_counts(node, first)
    })?;
    node.step("a dead device reads as ones", |node| dead(node, first))?;
    node.step("a dead device is not bound", |node| {
        devices::dead(node, first)
    })?;
    node.step("doctor sees a dead device", |node| {
        doctor::dead(node, first)
    })?;
    node.step("a binding that lasts", |node| {
        devices::persistent(node, first)
    })?;
    node.step("bind all", devices::bind_all)?;
    node.step("a held device is refused", |node| {
        devices::held_device(node, first)?;
        devices::unbind_all(node)
    })?;
    common(sandbox, node, &names)?;
    node.step("a device of a virtual machine is refused", |node| {
        nested::prepare(node, sandbox.parts())?;
        devices::bind_all(node)?;
        nested::held(node, Way::Group, first)?;
        devices::unbind_all(node)
    })
}

fn shared_group(sandbox: &Sandbox) -> Result<()> {
    let (mut node, names) = boot(sandbox, "shared-group")?;
    let node = &mut node;
    common(sandbox, node, &names)?;
    node.step("a binding that lasts over a reboot", |node| {
        devices::over_a_reboot(node, &names[0])
    })
}

fn two_models(sandbox: &Sandbox) -> Result<()> {
    let (mut node, names) = boot(sandbox, "two-models")?;
    let node = &mut node;
    node.step("from a driver of the host and back", |node| {
        devices::from_a_host_driver(node, &names)
    })?;
    common(sandbox, node, &names)
}

fn no_iommu(sandbox: &Sandbox) -> Result<()> {
    let (mut node, names) = boot(sandbox, "no-iommu")?;
    let first = &names[0];
    node.step("bind is refused", devices::no_iommu)?;
    node.step("the device plugin has nothing", plugin::has_nothing)?;
    node.step("reset reaches the device", |node| reset(node, first))?;
    node.step("remove and rescan", |node| remove_and_rescan(node, first))
}

fn hardware(node: &mut Node) -> Result<()> {
    let functions = node.pci()?;
    pci::check(&functions, node.shape())
}

fn containerd(node: &mut Node) -> Result<()> {
    wait::until("containerd", Duration::from_secs(240), || {
        let said = node.run(&["/usr/bin/ctr", "version"])?.success()?.stdout;
        ensure!(
            said.contains("Version:  2."),
            "it is no containerd 2: {said}"
        );
        Ok(())
    })
}

/// Asks for a reset, and looks for it in the emulator's journal.
fn reset(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let folder = format!("/sys/bus/pci/devices/{address}");
    let methods = node.shell(&format!("cat {folder}/reset_method"))?;
    ensure!(methods.contains("flr"), "reset methods: {methods}");
    let before = node.emulator().resets(name)?;
    node.shell(&format!("echo 1 >{folder}/reset"))?;
    wait::until("the reset in the journal", Duration::from_secs(10), || {
        let events = node.emulator().events(name)?;
        ensure!(node.emulator().resets(name)? > before, "no reset was seen");
        let last = events
            .iter()
            .rev()
            .find(|e| matches!(e, Event::Reset { .. }));
        let flr = ResetKind::FunctionLevel;
        ensure!(
            matches!(last, Some(Event::Reset { by, .. }) if *by == flr),
            "the last one was {last:?}"
        );
        Ok(())
    })
}

fn remove_and_rescan(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    node.shell(&format!(
        "echo 1 >/sys/bus/pci/devices/{address}/remove; test ! -e /sys/bus/pci/devices/{address}"
    ))?;
    node.shell("echo 1 >/sys/bus/pci/rescan")?;
    hardware(node).context("after the rescan")?;
    let listed = Listed::of(node)?;
    listed.is_the_shape(node)?;
    let driver = &listed.at(&address)?.driver;
    ensure!(driver.is_none(), "it came back with {driver:?}");
    Ok(())
}

fn dead(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let config = format!("od -An -tx4 -N4 /sys/bus/pci/devices/{address}/config");
    ensure!(node.shell(&config)?.trim().ends_with("10de"), "it is alive");
    node.emulator().kill(name)?;
    let read = node.shell(&config)?;
    node.emulator().revive(name)?;
    ensure!(read.trim() == "ffffffff", "a dead device read as {read}");
    ensure!(node.shell(&config)?.trim().ends_with("10de"), "it is back");
    Ok(())
}
