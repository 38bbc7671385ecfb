//! Pods with the node's GPUs, as a cluster starts them: CRI, containerd 2.x, the shim, an inner shim that launches real QEMU as Kata
//! does (`tests/e2e/inner-shim`), `kata-manager-qemu`, and a guest whose own sysfs tells where its GPUs are.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use km_tests_e2e::cri::{Cri, Pod};
use km_tests_e2e::km::{Km, SHIM};
use km_tests_e2e::node_in_a_box::image::{Payload, beside};
use km_tests_e2e::node_in_a_box::{Holder, Node};
use km_tests_e2e::parts::Firmware;
use km_tests_e2e::registry::{self, Registry};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::{guest, images, wait};
use serde_json::{Value, json};

use crate::inside::{Hung, functions};
use crate::plugin::{STAND_IN, ask};
use crate::shown::{Device, Listed};
use crate::{containerd, nested, specs};

const HANDLER: &str = "kata-qemu-nvidia-gpu";

/// The inner shim, by its name in the node.
const INNER: &str = "km-inner-shim";

/// Where `apply` finds Kata's shim, QEMU and firmware, which no Debian package has there.
const KATA: &str = "/opt/kata";

/// Settings of the class's own.
const SETTINGS: &str = "/etc/kata-manager/kata-qemu-nvidia-gpu.d/test.toml";

/// The version that Kata says it is. It asks the kubelet itself.
const VERSION: &str = "4.1.0";

/// The host as the node sees it.
const OUTSIDE: &str = "10.0.2.2";

/// The namespace of pods that the CRI client makes.
pub(crate) const NAMESPACE: &str = "default";

/// The shapes in which devices are injected as well: a boot more, and what they have is of no account there.
const INJECTED: [&str; 2] = ["two-models", "iommufd"];

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

/// What a pod needs, by the names in the node.
fn programs() -> [(&'static str, Result<PathBuf>); 2] {
    [
        (INNER, beside(INNER).context("`make box` builds it")),
        (SHIM, Km::find().and_then(|km| km.shim())),
    ]
}

/// Which of Kata's runtimes the pods have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    /// The one in Go.
    Go,
    /// runtime-rs, which gives devices away through iommufd alone.
    Rust,
}

impl Runtime {
    /// Its name in our configuration, and in the inner shim's.
    fn name(self) -> &'static str {
        match self {
            Runtime::Go => "go",
            Runtime::Rust => "rust",
        }
    }

    /// Its shim below Kata's prefix.
    fn shim(self) -> &'static str {
        match self {
            Runtime::Go => "bin/containerd-shim-kata-v2",
            Runtime::Rust => "runtime-rs/bin/containerd-shim-kata-v2",
        }
    }
}

/// What a step needs.
struct Ready {
    cri: Cri,
    runtime: Runtime,
    kubelet: Holder,
    /// containerd's configuration before.
    original: Vec<u8>,
    _registry: Registry,
}

/// A node from `apply` to `uninstall`, with a pod between.
pub(crate) fn steps(sandbox: &Sandbox, node: &mut Node, runtime: Runtime) -> Result<()> {
    let of = |what: &str| format!("{what}, {}", runtime.name());
    let ready = node.step(&of("apply for pods"), |node| {
        prepare(sandbox, node, runtime)
    })?;
    node.step_alone(&of("a pod has all devices"), |node| has_all(node, &ready))?;
    if node.shape().numa_nodes > 1 && runtime == Runtime::Go {
        node.step_alone(&of("a pod with NUMA nodes"), |node| numa(node, &ready))?;
    }
    if INJECTED.contains(&node.shape().name.as_str()) {
        node.step_alone(&of("devices are injected"), |node| injected(node, &ready))?;
    }
    node.step(&of("uninstall leaves nothing"), |node| clean(node, ready))?;
    node.step(&of("CDI specs once more"), |node| {
        node.kata_manager(&["cdi", "generate"], 0)?;
        specs::follow(node)
    })
}

/// Everything is put in its place by `apply`, with a guest from a registry, as on a node of a cluster.
fn prepare(sandbox: &Sandbox, node: &mut Node, runtime: Runtime) -> Result<Ready> {
    for (_, program) in programs() {
        program?;
    }
    let cri = node.cri()?.patient(CALL);
    let registry = Registry::start(sandbox, registry::Options::default())?;
    publish(sandbox, &registry)?;
    nested::kvm(node)?;
    containerd::images(sandbox, node)?;
    kata(sandbox, node, runtime)?;
    let host = format!("{OUTSIDE}:{}", registry.port());
    let config = format!(
        "runtimeClasses:\n- name: {HANDLER}\n  artifacts: {{url: {host}/kata/guest:pods}}\n\
         provider: {{version: {VERSION}, runtime: {}}}\nregistry: {{plainHttp: [\"{host}\"]}}\n\
         shim: {{program: /usr/local/bin/{SHIM}, kubeletTimeoutMilliseconds: 8000}}\n",
        runtime.name()
    );
    node.put(containerd::CONFIG, 0o644, config.as_bytes())?;
    let original = node.get(containerd::CONTAINERD)?;
    node.kata_manager(&["apply"], 0)?;
    let handlers = cri.handlers()?;
    ensure!(handlers == [HANDLER, "runc"], "{handlers:?}");
    let kubelet = node.hold(&["/usr/bin/bash", "-c", STAND_IN])?;
    ask(node, &json!({ "start": {} }))?;
    Ok(Ready {
        cri,
        runtime,
        kubelet,
        original,
        _registry: registry,
    })
}

/// A guest artifact with a configuration of its own, as Kata's GPU images have.
#[expect(
    clippy::disallowed_methods,
    reason = "a folder of the test's own, which nobody else reads meanwhile"
)]
fn publish(sandbox: &Sandbox, registry: &Registry) -> Result<()> {
    let folder = sandbox.folder("pods-guest")?;
    fs::copy(nested::kernel(sandbox.parts())?, folder.join(guest::KERNEL))?;
    let initrd = nested::initrd(sandbox.parts(), INIT)?;
    fs::write(folder.join(guest::INITRD), initrd)?;
    let configuration = format!(
        "[hypervisor.qemu]\npath = \"{KATA}/bin/qemu-system-x86_64\"\nkernel = \"/build/{}\"\ninitrd = \"/build/{}\"\n\
         default_memory = 256\n\
         kernel_params = \"console=ttyS0 quiet panic=-1 mitigations=off no5lvl no_timer_check\"\n",
        guest::KERNEL,
        guest::INITRD
    );
    fs::write(folder.join(guest::CONFIGURATION), configuration)?;
    let folder = folder.display().to_string();
    let reference = registry.reference("kata/guest:pods");
    Km::find()?.expect(&["artifacts", "push", &folder, &reference], 0)?;
    Ok(())
}

/// What Kata's payload would have put there.
fn kata(sandbox: &Sandbox, node: &mut Node, runtime: Runtime) -> Result<()> {
    node.shell(&format!(
        "mkdir -p {KATA}/bin {KATA}/runtime-rs/bin {KATA}/share/ovmf
ln -sf /usr/local/bin/{INNER} {KATA}/{}
ln -sf /usr/bin/qemu-system-x86_64 {KATA}/bin/qemu-system-x86_64",
        runtime.shim()
    ))?;
    let firmware = sandbox.parts().firmware(Firmware::Generic);
    node.put(
        &format!("{KATA}/share/ovmf/OVMF.fd"),
        0o644,
        &fs::read(&firmware).with_context(|| format!("read {}", firmware.display()))?,
    )?;
    inner(node, runtime, None)
}

/// Settings of the inner shim: the bus that it puts devices on; behind ports of their own without.
fn inner(node: &mut Node, runtime: Runtime, bus: Option<&str>) -> Result<()> {
    // As in `nested`: mapping the BARs costs the outer QEMU a complaint for each page.
    let settings = json!({ "properties": ",x-no-mmap=on", "bus": bus, "runtime": runtime.name() });
    let settings = settings.to_string();
    node.put("/etc/km-inner-shim.json", 0o644, settings.as_bytes())
}

/// `uninstall` takes it away: nothing of it is left.
fn clean(node: &mut Node, ready: Ready) -> Result<()> {
    node.release(ready.kubelet)?;
    node.kata_manager(&["uninstall"], 0)?;
    ensure!(
        node.get(containerd::CONTAINERD)? == ready.original,
        "containerd's configuration is another"
    );
    let handlers = wait::until("containerd", CALL, || ready.cri.handlers())?;
    ensure!(handlers == ["runc"], "{handlers:?}");
    let left = format!(
        "ls -d /etc/kata-manager/handlers /opt/kata-manager {} 2>/dev/null || true",
        containerd::ARTIFACTS
    );
    let left = node.shell(&left)?;
    ensure!(left.is_empty(), "there is {left}");
    specs::are_gone(node)?;
    node.shell(&format!(
        "rm -f {SETTINGS}; rm -r {KATA} {} /var/lib/kubelet/pod-resources",
        containerd::CONFIG
    ))?;
    Ok(())
}

fn restart(node: &mut Node, cri: &Cri) -> Result<()> {
    node.shell("systemctl restart containerd")?;
    wait::until("containerd", CALL, || cri.version())?;
    Ok(())
}

/// All GPUs of the node, and what goes with them, in one pod: through a claim of dynamic resource allocation, which no Kata reads, so
/// that the shim has to write them.
fn has_all(node: &mut Node, ready: &Ready) -> Result<()> {
    let names = primaries(&Listed::of(node)?);
    claim(node, "all", &names)?;
    with_pod(node, ready, "all", |node, pod, patience| {
        lives(node, ready, pod, &names, patience)
    })?;
    misplaced(node, ready, &names)
}

/// The names of all devices that a pod can ask for.
fn primaries(listed: &Listed) -> Vec<String> {
    let primaries = listed.devices.iter().filter(|device| device.is_primary());
    let name = |device: &Device| format!("nvidia.com/{}={}", device.class(), device.address);
    primaries.map(name).collect()
}

/// Runs a pod, does something with it, and removes it. One whose guest hangs is taken once more.
fn with_pod(
    node: &mut Node,
    ready: &Ready,
    name: &str,
    mut check: impl FnMut(&mut Node, &Pod, Duration) -> Result<()>,
) -> Result<()> {
    for (retries, patience) in GUEST.into_iter().enumerate() {
        let command = &["/bin/sleep", "100000"];
        let pod = ready
            .cri
            .run_pod_named(HANDLER, name, images::BUSYBOX, command);
        let pod = pod.map_err(|error| with_journal(node, error))?;
        match check(node, &pod, patience) {
            Ok(()) => {
                node.note(&format!("the pod's guest answered, retries: {retries}"));
                return ends(node, ready, &pod);
            }
            Err(error) if retries == 0 && error.is::<Hung>() => ends(node, ready, &pod)?,
            Err(error) => return Err(with_console(node, &pod, error)),
        }
    }
    bail!("the guest of the pod {name} hung twice")
}

/// A pod and its guest, before and after a restart of containerd.
fn lives(
    node: &mut Node,
    ready: &Ready,
    pod: &Pod,
    names: &[String],
    patience: Duration,
) -> Result<()> {
    pause_spec(node, pod)?;
    let seen = functions(&ready.cri, pod, patience)?;
    seen.is_planned(node, pod, "all", &[])?;
    held(node, ready, names)?;
    restart(node, &ready.cri)?;
    let again = functions(&ready.cri, pod, patience).context("after a restart of containerd")?;
    ensure!(again == seen, "after a restart: {again:?}");
    Ok(())
}

/// A guest with the host's NUMA nodes, which the class's own settings ask for: each device is behind its node's root bus, as drawn, and the
/// guest's kernel knows its node.
fn numa(node: &mut Node, ready: &Ready) -> Result<()> {
    let names = primaries(&Listed::of(node)?);
    settings(node, "[hypervisor.qemu]\nenable_numa = true\n")?;
    claim(node, "numa", &names)?;
    let nodes: Vec<String> = (0..node.shape().numa_nodes)
        .map(|one| one.to_string())
        .collect();
    let nodes = nodes.join(",");
    with_pod(node, ready, "numa", |node, pod, patience| {
        let seen = functions(&ready.cri, pod, patience)?;
        seen.is_planned(node, pod, "numa", &["--numa", &nodes])
    })
}

/// A Kata that attaches nothing: `kata-manager-qemu` does it, for real QEMU.
fn injected(node: &mut Node, ready: &Ready) -> Result<()> {
    let listed = Listed::of(node)?;
    settings(node, "[hypervisor.qemu]\ncold_plug_vfio = \"no-port\"\n")?;
    // Without it the pod has no device.
    claim(node, "bare", &primaries(&listed))?;
    fails(
        ready,
        "bare",
        &["is refused", "was given to this sandbox and is missing"],
    )?;
    nothing_is_left(node)?;
    let config = String::from_utf8(node.get(containerd::CONFIG)?)?;
    let injecting = config.replacen(
        "\n  artifacts:",
        "\n  launch: {mode: inject}\n  artifacts:",
        1,
    );
    node.put(containerd::CONFIG, 0o644, injecting.as_bytes())?;
    // What `properties` of the inner shim's are for, where it is not the inner shim that writes them.
    let qemu = format!("{KATA}/bin/qemu-system-x86_64");
    let script =
        "#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 \"$@\" -global vfio-pci.x-no-mmap=on\n";
    node.shell(&format!("rm {qemu}"))?;
    node.put(&qemu, 0o755, script.as_bytes())?;
    node.kata_manager(&["apply"], 0)?;
    claim(node, "injected", &primaries(&listed))?;
    with_pod(node, ready, "injected", |_, pod, patience| {
        let seen = functions(&ready.cri, pod, patience)?;
        seen.has_all(&listed)
    })
}

/// The class's own settings, which `apply` puts into a generation.
fn settings(node: &mut Node, text: &str) -> Result<()> {
    node.put(SETTINGS, 0o644, text.as_bytes())?;
    node.kata_manager(&["apply"], 0)?;
    Ok(())
}

/// Nothing of a pod is left when it is removed.
fn ends(node: &mut Node, ready: &Ready, pod: &Pod) -> Result<()> {
    ready.cri.remove_sandbox(&pod.sandbox)?;
    nothing_is_left(node)
}

/// A runtime that leaves the ports out does not get its QEMU, and the pod's event says why.
fn misplaced(node: &mut Node, ready: &Ready, names: &[String]) -> Result<()> {
    inner(node, ready.runtime, Some("pcie.0"))?;
    claim(node, "misplaced", &names[..1])?;
    let why = [
        "the launch of sandbox",
        "is refused",
        "no port of that name",
    ];
    fails(ready, "misplaced", &why)?;
    inner(node, ready.runtime, None)?;
    nothing_is_left(node)
}

/// No device is held, and no program of the pod runs; containerd ends the shim of a refused launch after it has said so.
fn nothing_is_left(node: &mut Node) -> Result<()> {
    for device in &Listed::of(node)?.devices {
        ensure!(device.holders.is_empty(), "after the pod: {device:?}");
    }
    wait::until("the pod's programs to end", CALL, || {
        let left = node.shell("pgrep -a qemu-system || true; pgrep -a km-inner-shim || true")?;
        ensure!(left.is_empty(), "there is {left}");
        Ok(())
    })
}

fn claim(node: &mut Node, pod: &str, names: &[String]) -> Result<Value> {
    let claim = json!({ "claim": {
        "claim": "gpus", "cdi": names, "namespace": NAMESPACE, "pod": pod, "container": "main",
    } });
    ask(node, &claim)
}

/// The sandbox's specification, as its shim found it, has the node of each group, or of each function that has one of its own.
fn pause_spec(node: &mut Node, pod: &Pod) -> Result<()> {
    let listed = Listed::of(node)?;
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
    let nodes = listed.devices.iter().filter_map(Device::node);
    let mut wanted: Vec<String> = nodes.collect();
    wanted.sort();
    wanted.dedup();
    ensure!(
        paths == wanted,
        "{wanted:?} are wanted, the sandbox has {paths:?}"
    );
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

fn with_journal(node: &mut Node, error: anyhow::Error) -> anyhow::Error {
    let said = node.shell(
        "journalctl -u containerd -n 20 --no-pager; journalctl -t kata-manager-shim -n 5 --no-pager; dmesg | tail -n 20",
    );
    error.context(format!("the node says: {said:?}"))
}

fn with_console(node: &mut Node, pod: &Pod, error: anyhow::Error) -> anyhow::Error {
    let folder = format!("/run/km-inner/{}", &pod.sandbox[..16]);
    let said = node.shell(&format!(
        "tail -n 20 {folder}/console {folder}/said; journalctl -t kata-manager-shim -n 20 --no-pager; true"
    ));
    error.context(format!("the guest and the shim said: {said:?}"))
}
