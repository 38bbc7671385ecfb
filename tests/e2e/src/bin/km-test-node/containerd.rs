//! kata-manager on a whole node: containerd is a unit of systemd, restarted over D-Bus, and the registry is elsewhere.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::cri::{Cri, Pod};
use km_tests_e2e::km::Km;
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::node_in_a_box::image::Payload;
use km_tests_e2e::node_in_a_box::shape::Shape;
use km_tests_e2e::process::Finished;
use km_tests_e2e::registry::{self, Registry};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{guest, images, wait};

use crate::{container, verity};

pub(crate) const TESTS: &[Test] = &[("apply-and-failures", apply_and_failures)];

/// The class: runc runs its pods, for Kata is no Debian package.
pub(crate) const CLASS: &str = "demo";

/// The node's configuration files.
pub(crate) const CONFIG: &str = "/etc/kata-manager/config.yaml";
pub(crate) const CONTAINERD: &str = "/etc/containerd/config.toml";
pub(crate) const ARTIFACTS: &str = "/opt/nvidia-gpu-operator/artifacts/runtimeclasses";

/// Where a test changes containerd's unit.
const DROP_IN: &str = "/etc/systemd/system/containerd.service.d/test.conf";

/// How long containerd's CRI may take to answer.
const UP: Duration = Duration::from_secs(240);

/// What every step looks at.
pub(crate) struct Whole {
    pub(crate) cri: Cri,
    /// A pod from before anything was done: it must live through everything.
    pod: Pod,
    /// containerd's configuration as Debian installs it.
    original: Vec<u8>,
}

fn apply_and_failures(sandbox: &Sandbox) -> Result<()> {
    let registry = Registry::start(sandbox, registry::Options::default())?;
    publish(sandbox, &registry)?;
    let folder = sandbox.folder("whole-node")?;
    let mut payload = Payload::new()?;
    payload.kata_manager()?;
    let shape = Shape::named("one-gpu")?;
    let mut node = Node::boot(sandbox.parts(), &shape, &payload, &folder)?;
    let node = &mut node;
    let whole = node.step("a pod runs", |node| prepare(sandbox, node, &registry))?;
    node.step("a unit that does not start is rolled back", |node| {
        does_not_start(node, &whole)
    })?;
    node.step("a CRI plugin that does not load is rolled back", |node| {
        cri_does_not_load(node, &whole)
    })?;
    node.step("a handler that does not appear is rolled back", |node| {
        handler_does_not_appear(node, &whole)
    })?;
    node.step("apply", |node| apply(node, &whole))?;
    node.step("from a container", |node| {
        container::as_in_a_pod(node, &whole)
    })?;
    node.step("the kernel guards what is live", verity::guards)?;
    node.step("uninstall", |node| uninstall(node, &whole))
}

/// A real guest artifact, pushed by kata-manager outside.
fn publish(sandbox: &Sandbox, registry: &Registry) -> Result<()> {
    let folder = sandbox.folder("guest")?;
    guest::build(sandbox.parts(), &folder, "v1")?;
    let folder = folder.display().to_string();
    let reference = registry.reference("kata/guest:v1");
    Km::find()?.expect(&["artifacts", "push", &folder, &reference], 0)?;
    Ok(())
}

/// Configures kata-manager, gives containerd its images, and runs a pod.
fn prepare(sandbox: &Sandbox, node: &mut Node, registry: &Registry) -> Result<Whole> {
    let host = format!("10.0.2.2:{}", registry.port());
    let config = format!(
        "runtimeClasses:\n- name: {CLASS}\n  runtimeType: io.containerd.runc.v2\n  artifacts:\n    \
         url: {host}/kata/guest:v1\ncontainerd:\n  restart:\n    readyTimeoutSeconds: 10\nregistry:\n  plainHttp: [\"{host}\"]\n"
    );
    node.put(CONFIG, 0o644, config.as_bytes())?;
    let cri = node.cri()?;
    if let Err(error) = wait::until("containerd", UP, || cri.version()) {
        let state = node.shell(
            "systemctl --no-pager status containerd-door.socket containerd-door.service containerd node-network || true; ip address",
        );
        return Err(error.context(format!("in the node: {}", state?)));
    }
    self::images(sandbox, node)?;
    let whole = Whole {
        pod: cri.run_pod("runc", images::BUSYBOX, &["/bin/sleep", "100000"])?,
        original: node.get(CONTAINERD)?,
        cri,
    };
    whole.is_untouched(node)?;
    Ok(whole)
}

/// Gives containerd the images that pods are made of, the pause image under the name that it wants.
pub(crate) fn images(sandbox: &Sandbox, node: &mut Node) -> Result<()> {
    for archive in images::write(sandbox.parts(), &sandbox.folder("images")?)? {
        node.put("/run/image.tar", 0o644, &fs::read(archive)?)?;
        node.shell("ctr --namespace k8s.io images import /run/image.tar; rm /run/image.tar")?;
    }
    let wanted =
        node.shell("containerd config dump | sed -n \"s/^ *sandbox = '\\(.*\\)'$/\\1/p\"")?;
    node.run(&[
        "/usr/bin/ctr",
        "--namespace",
        "k8s.io",
        "images",
        "tag",
        images::PAUSE,
        wanted.trim(),
    ])?
    .success()?;
    Ok(())
}

impl Whole {
    /// The pod answers.
    pub(crate) fn pod_lives(&self) -> Result<()> {
        let said = self
            .cri
            .exec(&self.pod.container, &["/bin/echo", "alive"])?;
        ensure!(said.stdout == "alive\n", "the pod said {said:?}");
        Ok(())
    }

    /// containerd's configuration, its handlers and the class are as before anything was done, and the pod answers.
    fn is_untouched(&self, node: &mut Node) -> Result<()> {
        let now = node.get(CONTAINERD)?;
        ensure!(
            now == self.original,
            "containerd's file is {}",
            String::from_utf8_lossy(&now)
        );
        let drop_ins = node.shell("ls /etc/containerd/conf.d 2>/dev/null || true")?;
        ensure!(!drop_ins.contains("kata-manager"), "there is {drop_ins}");
        let handlers = wait::until("containerd", UP, || self.cri.handlers())?;
        ensure!(handlers == ["runc"], "the handlers are {handlers:?}");
        node.shell(&format!("test ! -e {ARTIFACTS}/{CLASS}"))?;
        self.pod_lives()
    }
}

/// Applies, which must fail as containerd does, name these words, and leave everything as it was.
fn fails(node: &mut Node, whole: &Whole, mentions: &[&str]) -> Result<Finished> {
    let failed = node.kata_manager(&["apply"], 8)?;
    for mention in mentions {
        ensure!(
            failed.stderr.contains(mention),
            "not a word of {mention:?}: it {failed}"
        );
    }
    whole
        .is_untouched(node)
        .with_context(|| format!("after an apply that {failed}"))?;
    Ok(failed)
}

fn change_unit(node: &mut Node, service: &str) -> Result<()> {
    node.put(DROP_IN, 0o644, format!("[Service]\n{service}").as_bytes())?;
    node.shell("systemctl daemon-reload")?;
    Ok(())
}

/// The unit's own check does not like the new configuration: systemd's job fails, and the unit's log says why.
fn does_not_start(node: &mut Node, whole: &Whole) -> Result<()> {
    let check = "#!/bin/sh\nif containerd config dump | grep -q runtimes.demo; then echo this node wants no demo >&2; exit 1; fi\n";
    node.put("/usr/local/bin/check", 0o755, check.as_bytes())?;
    change_unit(node, "ExecStartPre=/usr/local/bin/check\n")?;
    fails(
        node,
        whole,
        &["containerd.service", "this node wants no demo"],
    )?;
    node.shell(&format!("rm {DROP_IN}; systemctl daemon-reload"))?;
    Ok(())
}

/// containerd starts, and its CRI plugin does not: with the new configuration it is given a default handler that is none.
fn cri_does_not_load(node: &mut Node, whole: &Whole) -> Result<()> {
    let start = "#!/bin/sh\nset -- /usr/bin/containerd\nif $1 config dump >/run/merged.toml && grep -q runtimes.demo /run/merged.toml; then\n  \
                 sed -i 's/default_runtime_name = .*/default_runtime_name = \"nowhere\"/' /run/merged.toml\n  \
                 set -- $1 --config /run/merged.toml\nfi\nexec \"$@\"\n";
    node.put("/usr/local/bin/start", 0o755, start.as_bytes())?;
    change_unit(node, "ExecStart=\nExecStart=/usr/local/bin/start\n")?;
    fails(node, whole, &[CLASS])?;
    let log = node.shell("journalctl --unit containerd --no-pager | grep -c nowhere || true")?;
    ensure!(
        log.trim() != "0",
        "containerd has not met the wrong handler"
    );
    node.shell(&format!("rm {DROP_IN}; systemctl daemon-reload"))?;
    Ok(())
}

/// containerd starts, and reads another file than the one that was changed.
fn handler_does_not_appear(node: &mut Node, whole: &Whole) -> Result<()> {
    node.put("/run/other.toml", 0o644, &whole.original)?;
    change_unit(
        node,
        "ExecStart=\nExecStart=/usr/bin/containerd --config /run/other.toml\n",
    )?;
    fails(node, whole, &[CLASS])?;
    node.shell(&format!(
        "rm {DROP_IN}; systemctl daemon-reload; systemctl restart containerd"
    ))?;
    wait::until("containerd", UP, || whole.cri.version())?;
    Ok(())
}

fn apply(node: &mut Node, whole: &Whole) -> Result<()> {
    let pid = |node: &mut Node| node.shell("systemctl show --property MainPID containerd");
    let before = pid(node)?;
    node.kata_manager(&["plan", "--exit-code"], 2)?;
    node.kata_manager(&["apply"], 0)?;
    let after = pid(node)?;
    ensure!(before != after, "containerd was not restarted: {before}");
    let handlers = whole.cri.handlers()?;
    ensure!(handlers == [CLASS, "runc"], "{handlers:?}");
    let said = whole.cri.prove_handler(CLASS, images::BUSYBOX)?;
    ensure!(said.contains(CLASS), "the pod said {said:?}");
    whole.pod_lives()?;
    let again = node.kata_manager(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "it {again}");
    ensure!(pid(node)? == after, "the second apply restarted containerd");
    Ok(())
}

fn uninstall(node: &mut Node, whole: &Whole) -> Result<()> {
    node.kata_manager(&["uninstall"], 0)?;
    whole.is_untouched(node)?;
    let left = node.shell(&format!("ls {ARTIFACTS} 2>&1 || true"))?;
    ensure!(left.contains("No such file"), "there is {left}");
    whole.cri.remove_sandbox(&whole.pod.sandbox)
}
