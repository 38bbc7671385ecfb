//! A node whose kernel has iommufd: the device has a node of its own, and a virtual machine takes it by that.

use anyhow::{Context, Result, ensure};
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;

use crate::nested::Way;
use crate::pods::Runtime;
use crate::shown::Listed;
use crate::{devices, hardware, nested, plugin, pods, specs};

/// The one boot. Its kernel takes minutes to build, so nothing else runs it.
pub(crate) const TESTS: &[Test] = &[("iommufd", iommufd)];

fn iommufd(sandbox: &Sandbox) -> Result<()> {
    let (mut node, names) = hardware::boot(sandbox, "iommufd")?;
    let node = &mut node;
    let first = &names[0];
    node.step("bind all", devices::bind_all)?;
    node.step("the list names its node", |node| cdev(node, first))?;
    node.step("a guest's files", |node| {
        nested::prepare(node, sandbox.parts())
    })?;
    node.step("a device of a virtual machine is refused", |node| {
        nested::held(node, Way::Iommufd, first)
    })?;
    node.step_alone("a guest sees the device", |node| {
        nested::guest(node, Way::Iommufd, first)
    })?;
    node.step("CDI specs follow", specs::follow)?;
    pods::steps(sandbox, node, Runtime::Go)?;
    pods::steps(sandbox, node, Runtime::Rust)?;
    // Times are judged in it.
    node.step_alone("the device plugin", |node| plugin::works(node, first))?;
    node.step("unbind all", devices::unbind_all)?;
    node.step("its node is gone", |node| {
        let listed = Listed::of(node)?;
        let address = node.address(first)?;
        ensure!(!listed.at(&address)?.cdev, "{listed:?}");
        node.shell("! ls /dev/vfio/devices/vfio* 2>/dev/null")?;
        Ok(())
    })
}

fn cdev(node: &mut Node, name: &str) -> Result<()> {
    let address = node.address(name)?;
    let listed = Listed::of(node)?;
    let device = listed.at(&address)?;
    ensure!(device.cdev, "{device:?}");
    let vfio = device
        .vfio_device
        .as_ref()
        .context("it has a VFIO device")?;
    node.shell(&format!(
        "test -c /dev/vfio/devices/{vfio} -a -c /dev/iommu"
    ))?;
    Ok(())
}
