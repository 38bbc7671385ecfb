//! Which devices a pod has, in real containerds, with runc's shim behind ours and the kubelet's stand-in: what the kubelet gave gets to the
//! pause container in each way that it can tell of it, and what it does not tell starts nothing.
//!
//! The shim's root is the sandbox's work folder, in which containerd's bundles are and a machine with GPUs is prepared. A GPU's node
//! there is a device that can be opened and does nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use km_tests_e2e::containerd::{Instance, Options, Version};
use km_tests_e2e::kubelet::Kubelet;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{images, km};
use km_tests_sysfs::shapes;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use serde_json::{Value, json};

use super::node::names;
use super::shim::inner;

pub(crate) const TESTS: &[Test] = &[("what_the_kubelet_gave_is_in_the_sandbox", given)];

const HANDLER: &str = "gpus";

/// A GPU of the prepared machine, and its group's node.
const GPU: &str = "0000:13:00.0";
const NODE: &str = "/dev/vfio/34";

/// One after the other: the machine is one.
fn given(sandbox: &Sandbox) -> Result<()> {
    let root = sandbox.work().to_owned();
    machine(&root)?;
    fs::copy(inner(sandbox), root.join("inner-shim"))?;
    let programs = sandbox.folder("programs")?;
    let shim = programs.join(format!("containerd-shim-{HANDLER}-v2"));
    symlink(km::Km::find()?.shim()?, &shim)?;
    // containerd hands its environment to shims, and this is not in it.
    let path = sandbox.folder("path")?;
    let wrapper = path.join(format!("containerd-shim-{HANDLER}-v2"));
    let script = format!(
        "#!/bin/sh\nKATA_MANAGER_HOST_ROOT={} exec {} \"$@\"\n",
        root.display(),
        shim.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let mut kubelet = Kubelet::new(&root.join("kubelet"), &root.join("kubelet.log"))?;
    kubelet.start()?;
    for version in Version::ALL {
        let options = Options::new(version)
            .path(&path)
            .handler(HANDLER, &format!("io.containerd.{HANDLER}.v2"));
        let mut pods = Pods {
            containerd: Instance::start(sandbox, &options)?,
            root: root.clone(),
            kubelet,
        };
        in_each_way(&mut pods, version).with_context(|| format!("{version:?}"))?;
        kubelet = pods.kubelet;
    }
    Ok(())
}

struct Pods {
    containerd: Instance,
    root: PathBuf,
    kubelet: Kubelet,
}

fn in_each_way(pods: &mut Pods, version: Version) -> Result<()> {
    pods.kata("3.2")?;
    pods.give("plain", &[])?;
    pods.runs("plain", &[])?;
    pods.give("get", &[GPU])?;
    pods.runs("get", &[NODE])?;
    pods.serve("withoutGet")?;
    pods.give("list", &[GPU])?;
    pods.runs("list", &[NODE])?;
    // A Kata that asks by itself asks by Get.
    pods.kata("4.1")?;
    pods.fails("list", "does not serve PodResources' Get")?;
    pods.serve("whole")?;
    let claim = json!({ "claim": {
        "claim": "gpus", "cdi": [format!("nvidia.com/pgpu={GPU}")], "namespace": "default", "pod": "claim", "container": "main",
    } });
    pods.kubelet.ask(&claim)?;
    match version {
        Version::V1_6 => pods.fails("claim", "containerd 1.6 knows no CDI devices in CRI")?,
        _ => pods.runs("claim", &[NODE])?,
    }
    pods.serve("stalled")?;
    pods.fails(
        "get",
        "cannot learn which devices the kubelet gave to this pod",
    )?;
    pods.fails("get", "no answer within 2 s")?;
    pods.serve("whole")?;
    for pod in ["get", "list", "claim"] {
        let release = json!({ "release": { "namespace": "default", "pod": pod } });
        pods.kubelet.ask(&release)?;
    }
    // The GPU is free for the next containerd, and no sandbox that is gone has a claim.
    pods.runs("plain", &[])?;
    let release = json!({ "release": { "namespace": "default", "pod": "plain" } });
    pods.kubelet.ask(&release)?;
    let left = names(&pods.root.join("run/kata-manager/sandboxes"))?;
    ensure!(left.len() <= 2, "{left:?} is left");
    Ok(())
}

impl Pods {
    /// Which Kata the handler's settings speak of.
    fn kata(&self, version: &str) -> Result<()> {
        let settings = json!({
            "handler": HANDLER, "class": HANDLER, "innerShim": "/inner-shim", "kata": {"flavor": "go", "version": version},
            "containerd": "2", "kubeletSocket": "/kubelet/pod-resources/kubelet.sock", "kubeletTimeoutMs": 2000,
        });
        put(
            &self.root,
            &format!("etc/kata-manager/handlers/{HANDLER}.json"),
            &settings.to_string(),
        )
    }

    /// The pod is there, and has these devices.
    fn give(&mut self, pod: &str, ids: &[&str]) -> Result<()> {
        let give = json!({ "give": {
            "resource": "nvidia.com/pgpu", "ids": ids, "namespace": "default", "pod": pod, "container": "main",
        } });
        self.kubelet.ask(&give).map(drop)
    }

    fn serve(&mut self, how: &str) -> Result<()> {
        let serve = json!({ "serve": { "podresources": how } });
        self.kubelet.ask(&serve).map(drop)
    }

    /// A pod of this name starts, speaks and ends, and its sandbox has these nodes: in its specification and in its /dev.
    fn runs(&self, name: &str, nodes: &[&str]) -> Result<()> {
        let cri = self.containerd.cri();
        let pod = cri
            .run_pod_named(HANDLER, name, images::BUSYBOX, &["/bin/sleep", "1000"])
            .with_context(|| format!("the pod {name}"))?;
        let claim = self
            .root
            .join(format!("run/kata-manager/sandboxes/{}.json", pod.sandbox));
        let claim: Value = serde_json::from_slice(&fs::read(&claim)?)?;
        let devices = claim["devices"].as_array().map(Vec::len);
        ensure!(devices == Some(nodes.len()), "{name}: the claim is {claim}");
        let bundle = claim["bundle"].as_str().context("a bundle")?;
        let spec = fs::read(format!("{}{bundle}/config.json", self.root.display()))?;
        let spec: Value = serde_json::from_slice(&spec)?;
        let written: Vec<&str> = spec["linux"]["devices"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|device| device["path"].as_str())
            .filter(|path| path.starts_with("/dev/vfio/"))
            .collect();
        ensure!(
            written == nodes,
            "{name}: the specification has {written:?}"
        );
        let pid = self.pid(&pod.sandbox)?;
        for node in nodes {
            let there = fs::metadata(format!("/proc/{pid}/root{node}"));
            ensure!(there.is_ok(), "{name}: the pause container has no {node}");
        }
        let said = cri.exec(&pod.container, &["/bin/echo", "here"])?;
        ensure!(said.stdout == "here\n", "{name}: {said:?}");
        cri.remove_sandbox(&pod.sandbox)
    }

    fn pid(&self, id: &str) -> Result<u32> {
        let tasks = self.containerd.ctr(&["tasks", "list"])?.stdout;
        let line = tasks.lines().find(|line| line.starts_with(id));
        let pid = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(pid.with_context(|| tasks.clone())?.parse()?)
    }

    /// The sandbox does not start, and the error that the kubelet is told says why. No claim stays, and no bundle.
    fn fails(&self, name: &str, why: &str) -> Result<()> {
        let cri = self.containerd.cri();
        match cri.run_sandbox_named(HANDLER, name) {
            Ok(sandbox) => {
                cri.remove_sandbox(&sandbox)?;
                bail!("the pod {name} started, and {why:?} was expected")
            }
            Err(error) => {
                let said = format!("{error:#}");
                ensure!(said.contains(why), "not a word of {why:?}: {said}");
                Ok(())
            }
        }
    }
}

/// Eight GPUs on VFIO, one of which has a node and a name.
fn machine(root: &Path) -> Result<()> {
    let machine = shapes::eight_gpus();
    machine.write(root);
    fs::remove_dir_all(root.join("proc"))?;
    symlink("/proc", root.join("proc"))?;
    fs::create_dir_all(root.join("dev/vfio"))?;
    let node = root.join(NODE.trim_start_matches('/'));
    mknodat(
        CWD,
        &node,
        FileType::CharacterDevice,
        Mode::RWXU,
        makedev(1, 3),
    )?;
    put(
        root,
        "var/run/cdi/nvidia.com-pgpu.yaml",
        &format!(
            "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices: [{{name: \"{GPU}\", containerEdits: {{deviceNodes: [{{path: {NODE}}}]}}}}]\n"
        ),
    )
}

fn put(root: &Path, path: &str, text: &str) -> Result<()> {
    let path = root.join(path);
    fs::create_dir_all(path.parent().context("a folder")?)?;
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}
