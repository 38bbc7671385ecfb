//! The program itself, on prepared roots: a kubelet's stand-in behind a socket, and a script in the place of Kata's shim that says what
//! it was given.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files and start their programs plainly"
)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use km_podresources::wire;
use km_podresources::wire::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use km_tests_sysfs::shapes;
use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Value, json};
use tonic::{Request, Response, Status, async_trait};

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-kata-qemu-nvidia-gpu-v2");
const HANDLER: &str = "kata-qemu-nvidia-gpu";
const GPU: &str = "0000:13:00.0";
const NODE: &str = "/dev/vfio/34";

/// Says what it was given, in the place of Kata's shim.
const INNER: &str = "#!/bin/sh\necho \"$0 $*\"\necho \"cwd $PWD\"\necho \"address $TTRPC_ADDRESS\"\nls -l /proc/self/fd >&2\ncat\nexit 7\n";

struct Node {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

/// A kubelet that gave these devices to every pod.
#[derive(Clone)]
struct Kubelet(Vec<&'static str>);

#[async_trait]
impl PodResourcesLister for Kubelet {
    async fn get(
        &self,
        request: Request<wire::GetPodResourcesRequest>,
    ) -> Result<Response<wire::GetPodResourcesResponse>, Status> {
        let request = request.into_inner();
        let devices = wire::ContainerDevices {
            resource_name: "nvidia.com/pgpu".to_owned(),
            device_ids: self.0.iter().map(|id| (*id).to_owned()).collect(),
            topology: None,
        };
        Ok(Response::new(wire::GetPodResourcesResponse {
            pod_resources: Some(wire::PodResources {
                name: request.pod_name,
                namespace: request.pod_namespace,
                containers: vec![wire::ContainerResources {
                    name: "main".to_owned(),
                    devices: vec![devices],
                    dynamic_resources: Vec::new(),
                }],
            }),
        }))
    }
}

impl Node {
    /// Eight GPUs on VFIO with their specs, and a Kata of this version.
    fn new(kata: &str) -> Node {
        let node = Node {
            dir: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Runtime::new().unwrap(),
        };
        let machine = shapes::eight_gpus();
        machine.write(node.root());
        fs::remove_dir(node.root().join("proc")).unwrap();
        symlink("/proc", node.root().join("proc")).unwrap();
        let mut spec = "cdiVersion: \"0.5.0\"\nkind: nvidia.com/pgpu\ndevices:\n".to_owned();
        fs::create_dir_all(node.root().join("dev/vfio")).unwrap();
        for device in machine
            .devices
            .iter()
            .filter(|device| device.vfio.is_some())
        {
            let (address, group) = (&device.address, device.group.unwrap());
            spec.push_str(&format!("- name: \"{address}\"\n  containerEdits: {{deviceNodes: [{{path: /dev/vfio/{group}}}, {{path: /dev/vfio/vfio}}]}}\n"));
            let path = node.root().join(format!("dev/vfio/{group}"));
            // 0:0 needs no privilege (Linux, fs/namei.c, `vfs_mknod`).
            rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::RWXU, 0).unwrap();
        }
        node.put("var/run/cdi/nvidia.com-pgpu.yaml", &spec);
        node.put("opt/kata/bin/containerd-shim-kata-v2", INNER);
        let inner = node.root().join("opt/kata/bin/containerd-shim-kata-v2");
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o755)).unwrap();
        symlink(PROGRAM, node.program()).unwrap();
        node.put(
            &format!("etc/kata-manager/handlers/{HANDLER}.json"),
            &json!({
                "handler": HANDLER, "class": HANDLER, "innerShim": "/opt/kata/bin/containerd-shim-kata-v2",
                "kata": {"flavor": "go", "version": kata}, "containerd": "2", "kubeletSocket": "/kubelet.sock", "kubeletTimeoutMs": 700,
                "classLink": "/opt/classes/c",
            })
            .to_string(),
        );
        fs::create_dir_all(node.root().join("opt/classes")).unwrap();
        symlink(".store/generations/c/5", node.root().join("opt/classes/c")).unwrap();
        node
    }

    fn root(&self) -> &Path {
        self.dir.path()
    }

    fn program(&self) -> PathBuf {
        self.root().join(format!("containerd-shim-{HANDLER}-v2"))
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn kubelet(&self, gave: &[&'static str]) {
        let _inside = self.runtime.enter();
        let listener = tokio::net::UnixListener::bind(self.root().join("kubelet.sock")).unwrap();
        let incoming = futures_util::stream::unfold(listener, async |listener| {
            let accepted = listener.accept().await.map(|(connection, _)| connection);
            Some((accepted, listener))
        });
        let service = PodResourcesListerServer::new(Kubelet(gave.to_vec()));
        self.runtime
            .spawn(tonic::transport::Server::builder().serve_with_incoming(service, incoming));
    }

    fn bundle(&self, id: &str, kind: &str) -> PathBuf {
        let spec = json!({
            "ociVersion": "1.1.0", "root": {"path": "rootfs"}, "x-later": 1,
            "annotations": {
                "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": id,
                "io.kubernetes.cri.sandbox-name": "train", "io.kubernetes.cri.sandbox-namespace": "lab",
            },
            "linux": {"devices": [], "resources": {"devices": [{"allow": false}]}},
        });
        self.put(&format!("run/bundles/{id}/config.json"), &spec.to_string());
        self.root().join(format!("run/bundles/{id}"))
    }

    fn run(&self, dir: &Path, words: &[&str]) -> Output {
        let mut child = Command::new(self.program())
            .args(words)
            .current_dir(dir)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("TTRPC_ADDRESS", "/run/c.sock.ttrpc")
            .env("MAX_SHIM_VERSION", "2")
            .env("KATA_MANAGER_HOST_ROOT", self.root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A refused start does not read it.
        let _ = child.stdin.take().unwrap().write_all(b"options\0");
        child.wait_with_output().unwrap()
    }

    fn start(&self, id: &str) -> Output {
        let dir = self.root().join(format!("run/bundles/{id}"));
        self.run(&dir, &["-namespace", "k8s.io", "-id", id, "start"])
    }

    fn spec(&self, id: &str) -> Value {
        let path = self.root().join(format!("run/bundles/{id}/config.json"));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn claim(&self, id: &str) -> Value {
        let path = format!("run/kata-manager/sandboxes/{id}.json");
        serde_json::from_slice(&fs::read(self.root().join(path)).unwrap()).unwrap()
    }

    fn claims(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root().join("run/kata-manager/sandboxes")) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name != ".lock").collect();
        names.sort();
        names
    }
}

/// That the inner shim was run with all that ours was given.
fn ran(node: &Node, output: &Output, dir: &Path, words: &str) {
    let said = String::from_utf8_lossy(&output.stdout);
    let inner = node.root().join("opt/kata/bin/containerd-shim-kata-v2");
    let expected = format!(
        "{} {words}\ncwd {}\naddress /run/c.sock.ttrpc\noptions\0",
        inner.canonicalize().unwrap().display(),
        dir.canonicalize().unwrap().display()
    );
    assert_eq!(said, expected, "{output:?}");
    assert_eq!(output.status.code(), Some(7));
    // Nothing of ours stays open: no file, no socket, no runtime's.
    let open = String::from_utf8_lossy(&output.stderr);
    for ours in [
        "socket:",
        "anon_inode",
        "config.json",
        "kata-manager",
        "bundles",
    ] {
        assert!(!open.contains(ours), "{open}");
    }
}

/// That it was not, and why; standard output is empty.
fn refused(output: &Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(
        said.starts_with("kata-manager: ") && said.contains(why),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(said.matches(why).count(), 1, "said twice: {said}");
}

#[test]
fn everything_but_a_start_is_handed_on_at_once() {
    let node = Node::new("4.1");
    let dir = node.root().join("run");
    fs::create_dir(&dir).unwrap();
    for words in [
        "-info",
        "-v",
        "-namespace k8s.io -id abc -bundle /b delete",
        "start",
        "what ever",
    ] {
        let list: Vec<&str> = words.split(' ').collect();
        ran(&node, &node.run(&dir, &list), &dir, words);
    }
    // Also when nothing is known of the handler any more.
    fs::remove_dir_all(node.root().join("etc")).unwrap();
    ran(
        &node,
        &node.run(&dir, &["-id", "abc", "delete"]),
        &dir,
        "-id abc delete",
    );
    node.bundle("abc", "sandbox");
    refused(
        &node.start("abc"),
        "settings of the handler kata-qemu-nvidia-gpu",
    );
    assert_eq!(node.claims(), [""; 0]);
}

#[test]
fn a_container_of_a_sandbox_is_handed_on_and_claims_nothing() {
    let node = Node::new("3.2");
    let dir = node.bundle("abc", "container");
    ran(
        &node,
        &node.start("abc"),
        &dir,
        "-namespace k8s.io -id abc start",
    );
    assert_eq!(node.claims(), [""; 0]);
}

#[test]
fn an_older_kata_gets_the_node_written_and_a_newer_one_finds_it() {
    for (kata, written) in [("3.2", true), ("3.24", false), ("4.1.0", false)] {
        let node = Node::new(kata);
        node.kubelet(&[GPU]);
        let dir = node.bundle("abc", "sandbox");
        let before = node.spec("abc");
        ran(
            &node,
            &node.start("abc"),
            &dir,
            "-namespace k8s.io -id abc start",
        );
        let mut expected = before;
        if written {
            expected["linux"]["devices"] = json!([{
                "path": NODE, "type": "c", "major": 0, "minor": 0, "fileMode": 384, "uid": 0, "gid": 0,
            }]);
            expected["linux"]["resources"]["devices"] = json!([
                {"allow": false}, {"allow": true, "type": "c", "major": 0, "minor": 0, "access": "rwm"},
            ]);
        }
        assert_eq!(node.spec("abc"), expected, "Kata {kata}");
        assert_eq!(node.claims(), ["abc.json"]);
        let claim = node.claim("abc");
        assert_eq!(
            claim["devices"],
            json!([{"address": GPU, "class": 0x03_0200, "numaNode": 0, "iommuGroup": 34}])
        );
        assert_eq!(
            (&claim["bundle"], &claim["generation"]),
            (&json!("/run/bundles/abc"), &json!(5))
        );
    }
}

/// What holds QEMU's arguments against the claim must not take such a sandbox for one that nobody prepared.
#[test]
fn a_sandbox_without_devices_has_a_claim() {
    for (kata, kubelet) in [("3.2", false), ("4.1", false), ("4.1", true)] {
        let node = Node::new(kata);
        if kubelet {
            node.kubelet(&[]);
        }
        let dir = node.bundle("abc", "sandbox");
        let before = node.spec("abc");
        ran(
            &node,
            &node.start("abc"),
            &dir,
            "-namespace k8s.io -id abc start",
        );
        assert_eq!(node.spec("abc"), before);
        let claim = node.claim("abc");
        assert_eq!(
            (&claim["devices"], &claim["handler"]),
            (&json!([]), &json!(HANDLER))
        );
    }
}

#[test]
fn a_gpu_is_one_sandboxs_until_that_has_ended() {
    let node = Node::new("3.2");
    node.kubelet(&[GPU]);
    let first = node.bundle("first", "sandbox");
    assert_eq!(node.start("first").status.code(), Some(7));
    node.bundle("second", "sandbox");
    let before = node.spec("second");
    refused(
        &node.start("second"),
        "0000:13:00.0 is in use by sandbox first (its claim)",
    );
    refused(
        &node.start("first"),
        "is in use by sandbox first (its claim)",
    );
    assert_eq!(
        (node.claims(), node.spec("second")),
        (vec!["first.json".to_owned()], before)
    );
    fs::remove_dir_all(first).unwrap();
    assert_eq!(node.start("second").status.code(), Some(7));
    assert_eq!(node.claims(), ["second.json"]);
    // The node lost power: /run was kept, and the boot is another.
    let path = node.root().join("run/kata-manager/sandboxes/second.json");
    let mut claim: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    claim["process"]["boot"] = json!("an earlier one");
    fs::write(&path, claim.to_string()).unwrap();
    node.bundle("third", "sandbox");
    assert_eq!(node.start("third").status.code(), Some(7));
    assert_eq!(node.claims(), ["third.json"]);
    fs::write(&path, "{").unwrap();
    node.bundle("fourth", "sandbox");
    refused(&node.start("fourth"), "is no claim that can be read");
}

#[test]
fn a_kubelet_that_does_not_answer_ends_the_start() {
    let node = Node::new("4.1");
    node.bundle("abc", "sandbox");
    let socket = node.root().join("kubelet.sock");
    let _listens = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let begin = Instant::now();
    refused(&node.start("abc"), "no answer within 0.7 s");
    assert!(begin.elapsed() < Duration::from_secs(10));
    fs::remove_file(&socket).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    refused(&node.start("abc"), "nothing listens on this socket");
    assert_eq!(node.claims(), [""; 0]);
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_left() {
    let node = Node::new("4.1");
    node.kubelet(&[GPU]);
    let dir = node.bundle("abc", "sandbox");
    let driver = node
        .root()
        .join("sys/bus/pci/devices")
        .join(GPU)
        .join("driver");
    fs::remove_file(&driver).unwrap();
    refused(&node.start("abc"), "is not bound to VFIO: no driver has it");
    fs::remove_file(dir.join("config.json")).unwrap();
    refused(&node.start("abc"), "sandboxer = \"shim\"");
    for hostile in [
        "",
        "{",
        "[]",
        r#"{"annotations": 7}"#,
        r#"{"linux": {"devices": 7}}"#,
    ] {
        fs::write(dir.join("config.json"), hostile).unwrap();
        refused(&node.start("abc"), "cannot use");
    }
    assert_eq!(node.claims(), [""; 0]);
    // The inner shim is gone: the claim goes, too.
    let node = Node::new("4.1");
    node.bundle("abc", "sandbox");
    fs::remove_dir_all(node.root().join("opt/kata")).unwrap();
    let output = node.start("abc");
    refused(&output, "cannot run");
    refused(&output, ", the shim behind this handler");
    assert_eq!(node.claims(), [""; 0]);
    let log = fs::read_to_string(node.root().join("run/kata-manager/shim.log")).unwrap();
    assert!(log.contains("sandbox abc: "), "{log}");
}
