//! CDI specs that `cdi generate` writes, in real containerds: their CDI library is the reference one, in Go. The GPU is a prepared
//! sysfs and a harmless device in the place of its node.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::images;
use km_tests_e2e::km::Km;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_sysfs::shapes;

use super::node::Node;

pub(crate) const TESTS: &[Test] = &[("containerds_inject_from_our_specs", containerds_inject)];

/// The IOMMU group of the H100 of [`shapes::two_models`] that is on VFIO.
const NODE: &str = "/dev/vfio/12";

/// The numbers of the device that stands in the GPU's place (Linux, Documentation/admin-guide/devices.txt: 1, 3 is /dev/null).
const NUMBERS: &str = "1,   3";

const DEVICE: &str = "nvidia.com/pgpu=0000:01:00.0";
const INDEX: &str = "nvidia.com/pgpu=0";

/// One after the other: `/dev/vfio` is the sandbox's.
fn containerds_inject(sandbox: &Sandbox) -> Result<()> {
    let _nodes = sandbox.devices(
        "/dev/vfio".as_ref(),
        &[("12", "/dev/null"), ("vfio", "/dev/zero")],
    )?;
    for version in Version::ALL {
        injects(sandbox, version).with_context(|| format!("{version:?}"))?;
    }
    Ok(())
}

fn injects(sandbox: &Sandbox, version: Version) -> Result<()> {
    let able = version != Version::V1_6;
    let node = Node::start(sandbox, &Options::new(version))?;
    let original = fs::read_to_string(node.containerd.config())?;
    // A folder of its own: the usual one is the sandbox's, where an uninstall of another test would find the specs.
    let machine = sandbox.folder("machine")?;
    shapes::two_models().write(&machine);
    let specs = machine.join("var/run/cdi");
    let settings = format!(
        "  enable_cdi = false\n  cdi_spec_dirs = [\"{}\"]\n  disable_apparmor",
        specs.display()
    );
    let off = original.replacen("  disable_apparmor", &settings, 1);
    ensure!(off != original, "no place for a setting in\n{original}");
    let on = off.replacen("enable_cdi = false", "enable_cdi = true", 1);
    let generate = || {
        let km = Km::find()?.env("KATA_MANAGER_HOST_ROOT", &machine);
        km.expect(&["cdi", "generate"], 0)
    };
    let written = generate()?;
    ensure!(written.stdout.contains("devices: 1"), "{written}");
    let spec = specs.join("nvidia.com-pgpu.yaml").display().to_string();
    let valid = node.km.expect(&["cdi", "validate", &spec], 0)?;
    ensure!(valid.stdout.contains("good: nvidia.com/pgpu"), "{valid}");

    fs::write(node.containerd.config(), &on)?;
    node.containerd.restart()?;
    let listed = node.km.expect(&["cdi", "list"], 0)?;
    let verdict = if able { "injects CDI" } else { "cannot inject" };
    ensure!(listed.stdout.contains(verdict), "{listed}");
    let annotation = HashMap::from([("cdi.k8s.io/gpu".to_owned(), INDEX.to_owned())]);
    has_node(&node, &[DEVICE], &HashMap::new(), able)?;
    has_node(&node, &[INDEX], &HashMap::new(), able)?;
    has_node(&node, &[], &annotation, able)?;

    // The GPU leaves VFIO: its name is gone, without a restart.
    fs::remove_file(machine.join("sys/bus/pci/devices/0000:01:00.0/driver"))?;
    let gone = generate()?;
    ensure!(gone.stdout.contains("remove "), "{gone}");
    if able {
        let Err(error) = has_node(&node, &[DEVICE], &HashMap::new(), false) else {
            bail!("a device is injected that no spec lists");
        };
        ensure!(format!("{error:#}").contains("unresolvable"), "{error:#}");
    }

    if able {
        fs::write(node.containerd.config(), &off)?;
        node.containerd.restart()?;
        let listed = node.km.expect(&["cdi", "list"], 0)?;
        ensure!(listed.stdout.contains("does not inject"), "{listed}");
        has_node(&node, &[DEVICE], &HashMap::new(), false)?;
    }
    Ok(())
}

/// Runs a container with these devices and sees whether the GPU's node is in it, and can be opened.
fn has_node(
    node: &Node,
    devices: &[&str],
    annotations: &HashMap<String, String>,
    expected: bool,
) -> Result<()> {
    let cri = node.containerd.cri();
    let sleep = ["/bin/sleep", "1000"];
    let pod = cri.run_pod_with("runc", images::BUSYBOX, &sleep, devices, annotations)?;
    let seen = cri.exec(&pod.container, &["/bin/ls", "-l", NODE])?;
    let opened = cri.exec(&pod.container, &["/bin/cat", NODE])?;
    cri.remove_sandbox(&pod.sandbox)?;
    let there = seen.code == 0 && seen.stdout.contains(NUMBERS) && opened.code == 0;
    ensure!(
        there == expected && (expected || seen.code != 0),
        "asked for {devices:?} and {annotations:?}: {seen:?}, {opened:?}"
    );
    Ok(())
}
