//! Pods with the node's GPUs, as a cluster starts them: CRI, containerd 2.x, the shim, an inner shim that launches real QEMU as Kata
//! does (`tests/e2e/inner-shim`), `kata-manager-qemu`, and a guest whose own sysfs tells where its GPUs are.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use km_tests_e2e::cri::{Cri, Pod};
use km_tests_e2e::images;
use km_tests_e2e::km::{Km, LAUNCHER, SHIM};
use km_tests_e2e::node_in_a_box::image::{Payload, beside};
use km_tests_e2e::node_in_a_box::{Holder, Node};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::wait;
use serde_json::{Value, json};

use crate::nested;
use crate::plugin::{STAND_IN, ask};
use crate::shown::Listed;

const HANDLER: &str = "kata-qemu-nvidia-gpu";

/// The inner shim, by its name in the node.
const INNER: &str = "km-inner-shim";

/// Where containerd finds the shim.
const LINK: &str = "/opt/kata-manager/bin/containerd-shim-kata-qemu-nvidia-gpu-v2";

const KERNEL: &str = "/run/pods/vmlinuz";
const INITRD: &str = "/run/pods/initrd";

/// The namespace of pods that the CRI client makes.
const NAMESPACE: &str = "default";

/// How long one call may take: a sandbox's start has QEMU's in it, with all devices.
const CALL: Duration = Duration::from_secs(300);

/// How long a guest may take until its agent answers: at first, and when that one is taken for hung. It needs ten to twenty seconds where
/// nothing else runs.
const GUEST: [Duration; 2] = [Duration::from_secs(120), Duration::from_secs(240)];

/// The guest's first program: runs what comes in by the second serial port, line by line (`tests/e2e/inner-shim/src/agent.rs`).
const INIT: &str = r#"#!/bin/sh
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t proc proc /proc
mount -t devtmpfs dev /dev
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
while true; do
    read -r nonce command <&3 || continue
    [ -n "$nonce" ] || continue
    sh -c "$command" >&3 2>&1 </dev/null
    echo "@$nonce $?" >&3
done
"#;

/// Brings the programs along, as far as they are built; a pod's test says which is not.
pub(crate) fn payload(payload: &mut Payload) {
    for (name, path) in programs() {
        if let Ok(path) = path {
            payload.program(name, &path);
        }
    }
}

/// What a pod needs, by the names in the node. The shim is there twice: by the other name it stands in QEMU's place.
fn programs() -> [(&'static str, Result<PathBuf>); 3] {
    let shim = || Km::find()?.shim();
    [
        (INNER, beside(INNER).context("`make box` builds it")),
        (SHIM, shim()),
        (LAUNCHER, shim()),
    ]
}

/// What a step needs.
pub(crate) struct Ready {
    cri: Cri,
    kubelet: Holder,
}

/// Puts everything in its place, as `apply` and the cluster do.
pub(crate) fn prepare(sandbox: &Sandbox, node: &mut Node) -> Result<Ready> {
    for (_, program) in programs() {
        program?;
    }
    nested::guest_files(node, sandbox.parts(), KERNEL, INITRD, INIT)?;
    for archive in images::write(sandbox.parts(), &sandbox.folder("images")?)? {
        node.put("/run/image.tar", 0o644, &fs::read(archive)?)?;
        node.shell("ctr --namespace k8s.io images import /run/image.tar; rm /run/image.tar")?;
    }
    let inner = json!({
        "qemu": "/usr/local/bin/kata-manager-qemu", "kernel": KERNEL, "initrd": INITRD, "memory": "256M",
        "append": "console=ttyS0 quiet panic=-1 mitigations=off no5lvl no_timer_check",
        // As in `nested`: mapping the BARs costs the outer QEMU a complaint for each page.
        "properties": ",x-no-mmap=on",
    });
    node.put(
        "/etc/km-inner-shim.json",
        0o644,
        inner.to_string().as_bytes(),
    )?;
    let settings = json!({
        "handler": HANDLER, "class": HANDLER, "innerShim": "/usr/local/bin/km-inner-shim", "qemu": "/usr/bin/qemu-system-x86_64",
        "kata": {"flavor": "go", "version": "4.1.0"}, "containerd": "2", "kubeletTimeoutMs": 8000,
        "kubeletSocket": "/var/lib/kubelet/pod-resources/kubelet.sock",
    });
    node.shell(&format!(
        "mkdir -p /etc/kata-manager/handlers /opt/kata-manager/bin; ln -sf /usr/local/bin/{SHIM} {LINK}"
    ))?;
    node.put(
        &format!("/etc/kata-manager/handlers/{HANDLER}.json"),
        0o644,
        settings.to_string().as_bytes(),
    )?;
    node.shell(&format!(
        "cp -n /etc/containerd/config.toml /run/config.toml.before
containerd config dump | sed \"s|^\\( *sandbox = \\).*|\\1'{pause}'|\" >/run/config.toml
cat >>/run/config.toml <<'END'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{HANDLER}]
  runtime_type = 'io.containerd.{HANDLER}.v2'
  runtime_path = '{LINK}'
  pod_annotations = ['io.katacontainers.*', 'cdi.k8s.io/*']
  privileged_without_host_devices = true
END
cp /run/config.toml /etc/containerd/config.toml",
        pause = images::PAUSE
    ))?;
    let cri = node.cri()?.patient(CALL);
    restart(node, &cri)?;
    let kubelet = node.hold(&["/usr/bin/bash", "-c", STAND_IN])?;
    ask(node, &json!({ "start": {} }))?;
    Ok(Ready { cri, kubelet })
}

/// Takes it away.
pub(crate) fn clean(node: &mut Node, ready: Ready) -> Result<()> {
    node.release(ready.kubelet)?;
    node.shell(
        "rm -r /etc/kata-manager/handlers /opt/kata-manager /var/lib/kubelet/pod-resources; cp /run/config.toml.before /etc/containerd/config.toml",
    )?;
    restart(node, &ready.cri)
}

fn restart(node: &mut Node, cri: &Cri) -> Result<()> {
    node.shell("systemctl restart containerd")?;
    wait::until("containerd", CALL, || cri.version())?;
    Ok(())
}

/// All GPUs of the node, and what goes with them, in one pod: through a claim of dynamic resource allocation, which no Kata reads, so
/// that the shim has to write them.
pub(crate) fn has_all(node: &mut Node, ready: &Ready) -> Result<()> {
    let listed = Listed::of(node)?;
    let primaries = listed.devices.iter().filter(|device| device.is_primary());
    let names: Vec<String> = primaries
        .map(|device| format!("nvidia.com/{}={}", device.class(), device.address))
        .collect();
    claim(node, "all", &names)?;
    for (retries, patience) in GUEST.into_iter().enumerate() {
        let command = &["/bin/sleep", "100000"];
        let pod = ready
            .cri
            .run_pod_named(HANDLER, "all", images::BUSYBOX, command)?;
        match lives(node, ready, &pod, &listed, &names, patience) {
            Ok(()) => {
                node.note(&format!("the pod's guest answered, retries: {retries}"));
                return ends(node, ready, &pod);
            }
            Err(error) if retries == 0 && error.is::<Hung>() => {
                ready.cri.remove_sandbox(&pod.sandbox)?;
            }
            Err(error) => return Err(with_console(node, &pod, error)),
        }
    }
    bail!("the pod's guest hung twice")
}

/// A pod and its guest, before and after a restart of containerd.
fn lives(
    node: &mut Node,
    ready: &Ready,
    pod: &Pod,
    listed: &Listed,
    names: &[String],
    patience: Duration,
) -> Result<()> {
    pause_spec(node, pod, listed)?;
    let seen = functions(ready, pod, patience)?;
    is_the_plan(node, listed, &seen)?;
    held(node, ready, names)?;
    restart(node, &ready.cri)?;
    let again = functions(ready, pod, patience).context("after a restart of containerd")?;
    ensure!(again == seen, "after a restart: {again:?}");
    Ok(())
}

/// Nothing of a pod is left when it is removed.
fn ends(node: &mut Node, ready: &Ready, pod: &Pod) -> Result<()> {
    ready.cri.remove_sandbox(&pod.sandbox)?;
    let listed = Listed::of(node)?;
    for device in &listed.devices {
        ensure!(device.holders.is_empty(), "after the pod: {device:?}");
    }
    let left = node.shell("pgrep -a qemu-system || true; pgrep -a km-inner-shim || true")?;
    ensure!(left.is_empty(), "after the pod there is {left}");
    Ok(())
}

/// The guest says nothing, or no more. As in [`nested`], such a one, and no other, is tried once more, and the output says so.
#[derive(Debug)]
struct Hung;

impl std::fmt::Display for Hung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the pod's guest does not answer")
    }
}

fn claim(node: &mut Node, pod: &str, names: &[String]) -> Result<Value> {
    let claim = json!({ "claim": {
        "claim": "gpus", "cdi": names, "namespace": NAMESPACE, "pod": pod, "container": "main",
    } });
    ask(node, &claim)
}

/// The sandbox's specification, as its shim found it, has the node of each group.
fn pause_spec(node: &mut Node, pod: &Pod, listed: &Listed) -> Result<()> {
    let path = format!(
        "/run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
        pod.sandbox
    );
    let spec: Value = serde_json::from_slice(&node.get(&path)?)?;
    let devices = spec["linux"]["devices"].as_array();
    let paths: Vec<&str> = devices
        .into_iter()
        .flatten()
        .filter_map(|device| device["path"].as_str())
        .filter(|path| path.starts_with("/dev/vfio/"))
        .collect();
    let mut wanted: Vec<String> = listed
        .devices
        .iter()
        .filter_map(|device| device.iommu_group)
        .map(|group| format!("/dev/vfio/{group}"))
        .collect();
    wanted.sort();
    wanted.dedup();
    ensure!(
        paths == wanted,
        "{wanted:?} are wanted, the sandbox has {paths:?}"
    );
    Ok(())
}

/// The guest's functions behind ports: the bus that each is on, and what it is.
type Seen = BTreeMap<u64, String>;

fn functions(ready: &Ready, pod: &Pod, patience: Duration) -> Result<Seen> {
    let command = &["/bin/functions"];
    let said = wait::until("the guest's agent", patience, || {
        let said =
            ready
                .cri
                .exec_within(&pod.container, command, patience.as_secs().cast_signed())?;
        ensure!(said.code == 0, "{said:?}");
        Ok(said.stdout)
    })
    .context(Hung)?;
    ensure!(said.contains("these are all"), "it said {said}");
    let mut seen = Seen::new();
    for line in said.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let ["function", path, vendor, device] = words[..] else {
            continue;
        };
        if vendor != "0x10de" {
            continue;
        }
        // /sys/devices/pci0000:00/0000:00:03.0/0000:02:00.0
        let steps: Vec<&str> = path
            .trim_start_matches("/sys/devices/")
            .split('/')
            .collect();
        ensure!(steps.len() == 3, "{path} is not behind one port");
        let bus = steps[2].split(':').nth(1).context("a bus number")?;
        let bus = u64::from_str_radix(bus, 16)?;
        ensure!(steps[2].ends_with(":00.0"), "{path} is not at 00.0");
        let what = device.trim_start_matches("0x").to_owned();
        let other = seen.insert(bus, what);
        ensure!(other.is_none(), "bus {bus} has two functions: {said}");
    }
    Ok(seen)
}

/// What is drawn for the pod is what its guest has.
fn is_the_plan(node: &mut Node, listed: &Listed, seen: &Seen) -> Result<()> {
    let words = [
        "topology",
        "--plan",
        "default/all",
        "--kata-runtime",
        "go",
        "--kata-version",
        "4.1.0",
        "--output",
        "json",
    ];
    let said = node.kata_manager(&words, 0)?.stdout;
    let plan: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    let list = |key: &str| plan["plan"][key].as_array().cloned().unwrap_or_default();
    let mut planned = Seen::new();
    for device in list("devices") {
        let ports = list("ports");
        let port = ports.iter().find(|port| port["id"] == device["port"]);
        let bus = port.and_then(|port| port["bus"].as_u64());
        let address = device["address"].as_str().unwrap_or_default();
        let id = listed.at(address)?.id();
        let what = id.split(' ').nth(1).unwrap_or_default().to_owned();
        planned.insert(bus.context("a port has a bus")?, what);
    }
    ensure!(
        &planned == seen,
        "planned is {planned:?}, the guest has {seen:?}"
    );
    ensure!(!seen.is_empty(), "the guest has no GPU: {said}");
    Ok(())
}

/// While the pod runs, nobody else gets its GPU; and a kubelet that does not answer gives none. The error is what `kubectl describe pod`
/// shows.
fn held(node: &mut Node, ready: &Ready, names: &[String]) -> Result<()> {
    claim(node, "second", &names[..1])?;
    fails(ready, "second", &["is in use by sandbox", "(its claim)"])?;
    ask(node, &json!({ "serve": { "podresources": "stalled" } }))?;
    fails(
        ready,
        "third",
        &["cannot learn which devices", "no answer within"],
    )?;
    ask(node, &json!({ "serve": { "podresources": "whole" } }))?;
    Ok(())
}

fn fails(ready: &Ready, pod: &str, mentions: &[&str]) -> Result<()> {
    match ready.cri.run_sandbox_named(HANDLER, pod) {
        Ok(sandbox) => {
            ready.cri.remove_sandbox(&sandbox)?;
            bail!("the pod {pod} started")
        }
        Err(error) => {
            let said = format!("{error:#}");
            for mention in mentions {
                ensure!(said.contains(mention), "not a word of {mention:?}: {said}");
            }
            Ok(())
        }
    }
}

fn with_console(node: &mut Node, pod: &Pod, error: anyhow::Error) -> anyhow::Error {
    let folder = format!("/run/km-inner/{}", &pod.sandbox[..16]);
    let said = node.shell(&format!(
        "tail -n 20 {folder}/console {folder}/said; journalctl -t kata-manager-shim -n 20 --no-pager; true"
    ));
    error.context(format!("the guest and the shim said: {said:?}"))
}
