//! `kata-manager-qemu` as a process: it becomes QEMU with its pid, descriptors, environment and arguments, or refuses with a reason.
//! QEMU is a script that tells what it got.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files and start their program plainly, and fail by panicking"
)]

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use km_shim::launch::PROGRAM;
use km_tests_sysfs::shapes;
use serde_json::{Value, json};
use tempfile::TempDir;

const BOOT: &str = "this-boot";

/// Tells its pid, its arguments, a variable and what it reads.
const QEMU: &str = "#!/bin/sh\necho \"pid $$\"\nfor word in \"$@\"; do echo \"arg $word\"; done\necho \"env $MARK\"\necho \"stdin $(cat)\"\n";

const PORT: &str = "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0";
const GPU: &str = "-device vfio-pci,host=0000:01:00.0,id=vfio-a,bus=rp0";

struct Node {
    dir: TempDir,
}

struct Said {
    pid: u32,
    ok: bool,
    stdout: String,
    stderr: String,
}

impl Node {
    /// A node with an H100 at 01:00.0 and an L40 at 81:00.0, and one handler.
    fn new(mode: &str) -> Node {
        let node = Node {
            dir: TempDir::new().unwrap(),
        };
        shapes::two_models().write(node.dir.path());
        node.write("proc/sys/kernel/random/boot_id", BOOT);
        node.write("opt/kata/bin/qemu", QEMU);
        let script = node.dir.path().join("opt/kata/bin/qemu");
        std::fs::set_permissions(script, std::fs::Permissions::from_mode(0o755)).unwrap();
        node.handler("kata-gpu", "/opt/kata/bin/qemu", mode);
        node
    }

    /// A program that says which it is, at a path.
    fn other_qemu(&self, path: &str) {
        self.write(path, &format!("#!/bin/sh\necho this is {path}\n"));
        let script = self.dir.path().join(path);
        std::fs::set_permissions(script, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn handler(&self, name: &str, qemu: &str, mode: &str) {
        let settings = json!({
            "handler": name, "class": "kata-qemu-nvidia-gpu", "innerShim": "/opt/kata/bin/shim", "qemu": qemu,
            "kata": {"flavor": "go", "version": "4.1.0"}, "containerd": "2", "kubeletSocket": "/k.sock",
            "launch": {"mode": mode},
        });
        self.write(
            &format!("etc/kata-manager/handlers/{name}.json"),
            &settings.to_string(),
        );
    }

    fn claim(&self, devices: &[&str]) -> Value {
        let given = |address: &&str| json!({"address": address, "class": 0x03_0200, "numaNode": 0, "iommuGroup": 12});
        json!({
            "format": 1, "sandbox": "abc", "namespace": "k8s.io", "handler": "kata-gpu", "class": "kata-qemu-nvidia-gpu",
            "generation": 1, "devices": devices.iter().map(given).collect::<Vec<_>>(), "bundle": "/run/bundle",
            "process": {"pid": 1, "started": 1, "boot": BOOT},
        })
    }

    fn claimed(mode: &str, devices: &[&str]) -> Node {
        let node = Node::new(mode);
        node.write("run/bundle/config.json", "{}");
        node.write(
            "run/kata-manager/sandboxes/abc.json",
            &node.claim(devices).to_string(),
        );
        node
    }

    fn run(&self, words: &str) -> Said {
        let mut child = Command::new(env!(
            "CARGO_BIN_EXE_containerd-shim-kata-qemu-nvidia-gpu-v2"
        ))
        .arg0(PROGRAM)
        .args(words.split_whitespace())
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("MARK", "kept")
        .env("KATA_MANAGER_HOST_ROOT", self.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
        let pid = child.id();
        // A launch that is refused reads nothing.
        let _ = child.stdin.take().unwrap().write_all(b"untouched");
        let output = child.wait_with_output().unwrap();
        Said {
            pid,
            ok: output.status.success(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn launched(&self, words: &str, expected: &str) {
        let said = self.run(words);
        let arguments: Vec<_> = said
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix("arg "))
            .collect();
        assert_eq!(arguments.join(" "), expected, "{}", said.stderr);
        assert!(said.ok && said.stderr.is_empty(), "{}", said.stderr);
        assert!(
            said.stdout.contains(&format!("pid {}\n", said.pid)),
            "it became QEMU"
        );
        assert!(
            said.stdout.contains("env kept\nstdin untouched\n"),
            "{}",
            said.stdout
        );
    }

    fn refused(&self, words: &str, reason: &str) {
        let said = self.run(words);
        assert!(!said.ok && said.stdout.is_empty(), "{}", said.stdout);
        assert!(said.stderr.contains(reason), "{reason}: {}", said.stderr);
        assert_eq!(said.stderr.lines().count(), 1);
    }
}

#[test]
fn a_right_launch_becomes_qemu() {
    let node = Node::claimed("check", &["0000:01:00.0"]);
    let words = format!("-name sandbox-abc {PORT} {GPU}");
    node.launched(&words, &words);
    node.refused(
        &format!("-name sandbox-abc {PORT}"),
        "0000:01:00.0 was given to this sandbox and is missing",
    );
    node.refused(
        &words.replace("01:00.0", "81:00.0"),
        "0000:81:00.0 is there and was not given",
    );
}

#[test]
fn questions_and_pods_without_devices_pass() {
    let node = Node::new("check");
    node.launched("-version", "-version");
    node.launched("-machine help", "-machine help");
    for mode in ["check", "inject", "tune"] {
        let plain = Node::claimed(mode, &[]);
        let words = "-name sandbox-abc -device virtio-rng-pci";
        plain.launched(words, words);
        plain.refused(
            &format!("{words} {PORT} {GPU}"),
            "0000:01:00.0 is there and was not given",
        );
    }
}

/// With a GPU or without one: nobody says what it may have.
#[test]
fn a_sandbox_without_a_claim_is_refused() {
    let node = Node::new("check");
    node.refused("-name sandbox-abc", "sandbox abc has no claim in ");
    let words = format!("-name sandbox-abc {PORT} {GPU}");
    node.refused(&words, "sandbox abc has no claim in ");
}

#[test]
fn what_is_not_known_is_refused() {
    let words = format!("-name sandbox-abc {PORT} {GPU}");
    let node = Node::claimed("check", &["0000:01:00.0"]);
    std::fs::remove_file(node.dir.path().join("opt/kata/bin/qemu")).unwrap();
    node.refused(&words, "cannot run /opt/kata/bin/qemu");
    std::fs::remove_file(
        node.dir
            .path()
            .join("etc/kata-manager/handlers/kata-gpu.json"),
    )
    .unwrap();
    node.refused(&words, "the settings of the handler kata-gpu");
    node.refused("-version", "names a QEMU");
    node.write("run/kata-manager/sandboxes/abc.json", "{");
    node.refused(&words, "cannot be read");
    node.refused("-name sandbox-../abc", "none of containerd's");
    let dead = Node::claimed("check", &["0000:01:00.0"]);
    std::fs::remove_dir_all(dead.dir.path().join("run/bundle")).unwrap();
    dead.refused(&words, "lives no more");
    let several = Node::new("check");
    several.handler("kata-other", "/opt/kata/bin/other", "check");
    several.launched("-version", "-version");
    let hidden = Node::claimed("check", &[]);
    hidden.refused(
        "-name sandbox-abc -readconfig /tmp/x",
        "behind their arguments",
    );
}

#[test]
fn what_kata_did_not_attach_is_added() {
    let node = Node::claimed("inject", &["0000:01:00.0"]);
    node.launched(
        "-name sandbox-abc -nographic",
        "-name sandbox-abc -nographic -device pcie-root-port,id=km-rp0,bus=pcie.0,chassis=128,slot=0,multifunction=off \
         -device vfio-pci,host=0000:01:00.0,id=km-vfio-0,bus=km-rp0",
    );
    let words = format!("-name sandbox-abc {PORT} {GPU}");
    node.launched(&words, &words);
}

/// The claim says generation 1; the class has moved on to 2, which has another QEMU.
#[test]
fn a_sandbox_has_the_qemu_of_its_generation() {
    let node = Node::claimed("check", &[]);
    node.other_qemu("opt/kata/bin/qemu-one");
    node.other_qemu("opt/kata/bin/qemu-two");
    let settings = node
        .dir
        .path()
        .join("etc/kata-manager/handlers/kata-gpu.json");
    let mut text: Value = serde_json::from_slice(&std::fs::read(&settings).unwrap()).unwrap();
    text["classLink"] = "/opt/artifacts/gpu".into();
    std::fs::write(&settings, text.to_string()).unwrap();
    let launch = |number: u8, text: &str| {
        node.write(
            &format!("opt/artifacts/.store/generations/gpu/{number}/launch.json"),
            text,
        );
    };
    let link = node.dir.path().join("opt/artifacts/gpu");
    launch(2, "{\"qemu\": \"/opt/kata/bin/qemu-two\"}");
    std::os::unix::fs::symlink(".store/generations/gpu/2", link).unwrap();
    let said = || node.run("-name sandbox-abc");
    // A generation that says nothing has the class's.
    assert!(said().stdout.contains("pid "), "{}", said().stderr);
    launch(1, "{\"qemu\": \"/opt/kata/bin/qemu-one\", \"later\": 1}");
    assert_eq!(said().stdout, "this is opt/kata/bin/qemu-one\n");
    for wrong in ["", "{}", "{\"qemu\": \"relative\"}", "[[[["] {
        launch(1, wrong);
        let said = said();
        assert!(!said.ok && said.stdout.is_empty(), "{}", said.stdout);
        assert!(
            said.stderr.contains("generations/gpu/1/launch.json"),
            "{}",
            said.stderr
        );
    }
}
