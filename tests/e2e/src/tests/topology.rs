//! A planned topology is what a real QEMU and its real firmware make of it: each device behind its own port, on the planned bus
//! numbers. Devices of the host cannot be had here, so an emulated one stands in the place of each.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use km_tests_e2e::km::{Km, LAUNCHER};
use km_tests_e2e::qemu::Machine;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{process, wait};
use km_tests_sysfs::shapes;
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    ("plans_are_what_qemu_makes", plans_are_what_qemu_makes),
    ("injected_launches_start", injected_launches_start),
];

/// What Kata has on the root bus by itself before any port: its bridge in slot 2, and its console, which takes slot 1.
const KATA: &[&str] = &[
    "-device",
    "pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2",
    "-device",
    "virtio-serial-pci,disable-modern=true,id=serial0",
];

const NODES: &[&str] = &[
    "-m",
    "256M",
    "-smp",
    "2",
    "-object",
    "memory-backend-ram,id=m0,size=128M",
    "-object",
    "memory-backend-ram,id=m1,size=128M",
    "-numa",
    "node,nodeid=0,memdev=m0,cpus=0",
    "-numa",
    "node,nodeid=1,memdev=m1,cpus=1",
];

/// A function or port as QEMU has it: the bus that it is on, and the one behind it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    bus: u64,
    behind: Option<u64>,
}

fn plans_are_what_qemu_makes(sandbox: &Sandbox) -> Result<()> {
    let root = sandbox.folder("node")?;
    shapes::eight_gpus().write(&root);
    // Devices have nodes of their own, which runtime-rs and confidential guests need.
    let nodes = root.join("dev/vfio/devices");
    std::fs::create_dir_all(&nodes)?;
    for number in 0..12 {
        std::fs::write(nodes.join(format!("vfio{number}")), "")?;
    }
    let plans: &[&[&str]] = &[
        &["--plan", "all"],
        &["--plan", "all", "--kata-runtime", "rust"],
        &["--plan", "all", "--class", "kata-qemu-nvidia-gpu-snp"],
        &["--plan", "all", "--numa", "0,1", "--vcpus", "2"],
        &[
            "--plan",
            "13:00.0,14:00.0,93:00.0",
            "--layout",
            "switch-port",
        ],
    ];
    for words in plans {
        let plan = plan(&root, words)?;
        let numa = plan["plan"]["layout"] == "numa";
        let arguments: Vec<String> = serde_json::from_value(plan["arguments"].clone())?;
        let mut more: Vec<String> = KATA.iter().map(ToString::to_string).collect();
        more.extend(arguments);
        let seen = start(sandbox, &more, numa)?;
        compare(&plan["plan"], &seen).with_context(|| format!("{words:?}: QEMU has {seen:?}"))?;
    }
    Ok(())
}

fn plan(root: &Path, words: &[&str]) -> Result<Value> {
    let config = root.join("config.yaml");
    std::fs::write(&config, "{}")?;
    let root = root.display().to_string();
    let mut all = vec!["topology", "--host-root", &root, "--output", "json"];
    all.extend(words);
    let said = Km::find()?.config(&config).expect(&all, 0)?;
    Ok(serde_json::from_str(&said.stdout)?)
}

/// Starts QEMU with these devices and waits until its firmware has numbered the buses.
fn start(sandbox: &Sandbox, devices: &[String], numa: bool) -> Result<BTreeMap<String, Seen>> {
    let mut command = Command::new(sandbox.parts().qemu());
    command.args([
        "-accel",
        "tcg",
        "-machine",
        "q35",
        "-nodefaults",
        "-display",
        "none",
    ]);
    if numa {
        command.args(NODES);
    }
    let devices = stand_ins(devices)?;
    command.args(&devices);
    let folder = sandbox.folder("qemu")?;
    let mut machine = Machine::start(&mut command, &folder)?;
    wait::until(
        "the firmware's bus numbers",
        Duration::from_secs(60),
        || {
            let buses = machine.ask("query-pci", &json!({}))?;
            let mut seen = BTreeMap::new();
            for bus in buses.as_array().context("buses")? {
                walk(bus, &mut seen)?;
            }
            let all_numbered = seen.values().all(|one| one.behind != Some(0));
            ensure!(all_numbered, "some bridge has no number yet");
            // While the firmware counts, what is behind a bridge may not be found.
            let ids = devices.iter().flat_map(|value| value.split(','));
            let mut ids = ids.filter_map(|part| part.strip_prefix("id="));
            let hidden = ids.find(|id| !seen.contains_key(*id));
            ensure!(hidden.is_none(), "{hidden:?} is not found yet");
            Ok(seen)
        },
    )
}

/// The same devices, with an emulated one in the place of each of the host's, and no iommufd.
fn stand_ins(arguments: &[String]) -> Result<Vec<String>> {
    let mut made = Vec::new();
    let mut number = 0;
    for pair in arguments.chunks(2) {
        let [option, value] = pair else {
            bail!("{pair:?} is no option with a value");
        };
        if option == "-object" && value.starts_with("iommufd,") {
            continue;
        }
        let value = match value.strip_prefix("vfio-pci,") {
            None => value.clone(),
            Some(rest) => {
                let kept = rest.split(',').filter(|part| {
                    ["id=", "bus=", "addr="]
                        .iter()
                        .any(|key| part.starts_with(key))
                });
                let kept: Vec<&str> = kept.collect();
                let id = match rest.contains("id=") {
                    true => String::new(),
                    false => format!(",id=vfio-{number}"),
                };
                number += 1;
                format!("virtio-rng-pci,{}{id}", kept.join(","))
            }
        };
        made.extend([option.clone(), value]);
    }
    Ok(made)
}

fn walk(bus: &Value, seen: &mut BTreeMap<String, Seen>) -> Result<()> {
    for device in bus["devices"].as_array().context("devices of a bus")? {
        let id = device["qdev_id"].as_str().unwrap_or_default();
        let bridge = device.get("pci_bridge");
        let behind = bridge.and_then(|bridge| bridge["bus"]["secondary"].as_u64());
        if !id.is_empty() {
            let bus = device["bus"].as_u64().context("a bus number")?;
            seen.insert(id.to_owned(), Seen { bus, behind });
        }
        if let Some(bridge) = bridge.filter(|bridge| bridge["devices"].is_array()) {
            walk(bridge, seen)?;
        }
    }
    Ok(())
}

fn compare(plan: &Value, seen: &BTreeMap<String, Seen>) -> Result<()> {
    let list = |key: &str| plan[key].as_array().cloned().unwrap_or_default();
    let text = |of: &Value, key: &str| of[key].as_str().unwrap_or_default().to_owned();
    let found = |id: &str| seen.get(id).with_context(|| format!("QEMU has no {id}"));
    let mut parents = BTreeMap::from([("pcie.0".to_owned(), 0)]);
    for one in list("expanders").iter().chain(&list("switches")) {
        parents.insert(text(one, "id"), one["bus"].as_u64().unwrap_or_default());
    }
    for port in list("ports") {
        let (id, parent) = (text(&port, "id"), text(&port, "parent"));
        let expected = Seen {
            bus: *parents.get(&parent).context("its parent is planned")?,
            behind: port["bus"].as_u64(),
        };
        ensure!(*found(&id)? == expected, "{id} should be {expected:?}");
    }
    let devices = list("devices");
    for device in &devices {
        let port = text(device, "port");
        let bus = found(&port)?.behind.context("a port has a bus")?;
        let id = text(device, "id");
        ensure!(found(&id)?.bus == bus, "{id} is not behind {port}");
        let neighbours = seen.values().filter(|other| other.bus == bus).count();
        ensure!(neighbours == 1, "{port} has {neighbours} devices");
    }
    ensure!(!devices.is_empty(), "nothing is planned");
    Ok(())
}

/// What Kata writes when it attaches nothing: Go 3.x and 4.x, and runtime-rs, each with a port of its own.
const LAUNCHES: &[(&str, &str, &str)] = &[
    (
        "go",
        "3.20.0",
        "pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off",
    ),
    (
        "go",
        "4.1.0",
        "pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off",
    ),
    (
        "rust",
        "4.1.0",
        "pcie-root-port,id=rp0,addr=0x09,chassis=10,slot=9,bus=pcie.0,multifunction=off",
    ),
];

/// A QEMU that tells its arguments.
const TELLS: &str = "#!/bin/sh\nfor word in \"$@\"; do echo \"$word\"; done\n";

fn injected_launches_start(sandbox: &Sandbox) -> Result<()> {
    let launcher = Km::find()?.shim()?;
    let root = sandbox.folder("node")?;
    shapes::eight_gpus().write(&root);
    let qemu = root.join("opt/kata/bin/qemu");
    let write = |path: &str, text: &str| -> Result<()> {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(std::fs::write(path, text)?)
    };
    write("opt/kata/bin/qemu", TELLS)?;
    std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755))?;
    write("proc/sys/kernel/random/boot_id", "this-boot")?;
    write("run/bundle/config.json", "{}")?;
    let given = ["0000:13:00.0", "0000:14:00.0", "0000:93:00.0"].map(|address| {
        json!({"address": address, "class": 0x03_0200, "numaNode": 0, "iommuGroup": 1, "cdev": "vfio0"})
    });
    let claim = json!({
        "format": 1, "sandbox": "abc", "namespace": "k8s.io", "handler": "gpu", "class": "kata-qemu-nvidia-gpu", "generation": 1,
        "devices": given, "bundle": "/run/bundle", "process": {"pid": 1, "started": 1, "boot": "this-boot"},
    });
    write("run/kata-manager/sandboxes/abc.json", &claim.to_string())?;
    for (flavor, version, port) in LAUNCHES {
        let settings = json!({
            "handler": "gpu", "class": "kata-qemu-nvidia-gpu", "innerShim": "/opt/kata/bin/shim", "qemu": "/opt/kata/bin/qemu",
            "kata": {"flavor": flavor, "version": version}, "containerd": "2", "kubeletSocket": "/k.sock",
            "launch": {"mode": "inject"},
        });
        write("etc/kata-manager/handlers/gpu.json", &settings.to_string())?;
        let mut command = Command::new(&launcher);
        command.arg0(LAUNCHER).env("KATA_MANAGER_HOST_ROOT", &root);
        command
            .args(["-name", "sandbox-abc"])
            .args(KATA)
            .args(["-device", port]);
        let said = process::run(&mut command, Duration::from_secs(20))?.success()?;
        let words: Vec<String> = said.stdout.lines().map(str::to_owned).collect();
        let seen = start(sandbox, &words, false)?;
        for number in 0..3 {
            let port = seen.get(&format!("km-rp{number}")).context("a port")?;
            let device = seen.get(&format!("km-vfio-{number}")).context("a device")?;
            let there = seen.values().filter(|one| one.bus == device.bus).count();
            ensure!(
                port.behind == Some(device.bus) && there == 1,
                "{flavor} {version}: {seen:?}"
            );
        }
        ensure!(seen.contains_key("rp0"), "Kata's own port is still there");
    }
    Ok(())
}
