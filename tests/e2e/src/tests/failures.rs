//! What can go wrong, one thing a test: its exit code, a text that says what and where, and a node that is as it was.

use std::fs;

use anyhow::{Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::proxy::Fault;
use km_tests_e2e::registry::{self, User};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{guest, provider};

use super::node::{Class, DEMO, Node, SMALL};

pub(crate) const TESTS: &[Test] = &[
    ("wrong_configurations", wrong_configurations),
    ("registry_is_down", registry_is_down),
    ("registry_wants_credentials", registry_wants_credentials),
    ("registry_has_no_such_tag", registry_has_no_such_tag),
    ("blob_is_corrupt", |s| {
        broken_blob(s, Fault::Corrupt(5), 6, &["sha256:"])
    }),
    ("blob_is_truncated", |s| {
        broken_blob(s, Fault::Truncate(1000), 5, &["sha256:"])
    }),
    ("connection_is_reset", |s| {
        broken_blob(s, Fault::Reset(1000), 5, &["sha256:"])
    }),
    ("registry_answers_500", |s| {
        broken_blob(s, Fault::Status(500), 5, &["500"])
    }),
    ("a_passing_fault_is_overcome", a_passing_fault_is_overcome),
    ("disk_is_full", disk_is_full),
    ("containerd_is_not_running", containerd_is_not_running),
    (
        "containerd_does_not_come_back",
        containerd_does_not_come_back,
    ),
    ("a_restart_that_is_none", a_restart_that_is_none),
    (
        "a_restart_program_that_is_not_there",
        a_restart_program_that_is_not_there,
    ),
    ("containerds_file_is_broken", containerds_file_is_broken),
    ("etc_is_read_only", etc_is_read_only),
    ("provider_is_incomplete", provider_is_incomplete),
    ("a_handler_in_use_is_kept", a_handler_in_use_is_kept),
];

fn demo_node(sandbox: &Sandbox) -> Result<Node> {
    Node::start(sandbox, &Options::new(Version::V1_7))
}

/// That the node works once the fault is gone.
fn recovers(node: &Node) -> Result<()> {
    let original = fs::read(node.containerd.config())?;
    node.apply(&[DEMO])?;
    node.store_is_whole()?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

fn wrong_configurations(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let file = node.config.display().to_string();
    let good = fs::read_to_string(&node.config)?;
    let url = node.proxy.reference(SMALL);
    let again = format!("- name: {DEMO}\n  runtimeType: io.containerd.runc.v2\nprovider:");
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "readyTimeoutSeconds",
            "readyTimeoutSecond",
            &["line 15", "did you mean `readyTimeoutSeconds`"],
        ),
        (
            "artifactsDir",
            "artifactDir",
            &["line 1", "did you mean `artifactsDir`"],
        ),
        (
            "mode: command",
            "mode: comand",
            &["line 13", "did you mean `command`"],
        ),
        ("provider:", &again, &["line 7", "twice", DEMO]),
        (&url, "Not A Reference", &["line 5", "Not A Reference"]),
        ("runtimeClasses:", "runtimeClasses: [", &["line "]),
    ];
    for (from, to, mentions) in cases {
        node.reconfigure(from, to)?;
        for command in ["apply", "plan", "status"] {
            let mentions = [&[&*file], *mentions].concat();
            node.refuses(&[command], 4, &mentions)?;
        }
        fs::write(&node.config, &good)?;
    }
    fs::remove_file(&node.config)?;
    node.refuses(&["apply"], 4, &[&file, "--config"])?;
    fs::write(&node.config, good)?;
    ensure!(!node.artifacts.exists(), "a refused apply made folders");
    recovers(&node)
}

fn registry_is_down(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let nobody = format!("127.0.0.1:{}/{SMALL}", sandbox.port());
    let there = node.proxy.reference(SMALL);
    node.reconfigure(&there, &nobody)?;
    node.refuses(&["plan"], 5, &[&nobody, "refused"])?;
    node.refuses(&["apply"], 5, &[&nobody, "refused"])?;
    ensure!(!node.artifacts.exists(), "a failed apply made folders");
    node.reconfigure(&nobody, &there)?;
    recovers(&node)
}

fn registry_wants_credentials(sandbox: &Sandbox) -> Result<()> {
    let user = User {
        name: "platform".to_owned(),
        password: "correct horse".to_owned(),
    };
    let access = registry::Options {
        user: Some(user),
        ..Default::default()
    };
    let node = Node::with_registry(sandbox, &Options::new(Version::V1_7), access)?;
    let reference = node.proxy.reference(SMALL);
    let failed = node.refuses(&["apply"], 5, &["no credentials are known", &reference])?;
    ensure!(
        failed.stderr.contains("docker login"),
        "no word of what to do: {failed}"
    );
    let credentials = node.registry.docker_config(&node.proxy.host())?;
    let wrong = fs::read_to_string(&credentials)?.replace("\"auth\":\"", "\"auth\":\"QUFB");
    let right = fs::read_to_string(&credentials)?;
    let class = Class::runc(DEMO, reference);
    let more = format!("registry: {{credentialsFile: {}}}\n", credentials.display());
    node.configure_with(&[class], &more)?;
    fs::write(&credentials, wrong)?;
    let failed = node.refuses(&["apply"], 5, &[&node.registry.host()[..9], "credentials"])?;
    ensure!(
        !failed.stderr.contains("correct horse"),
        "the password shows: {failed}"
    );
    fs::write(&credentials, right)?;
    recovers(&node)
}

fn registry_has_no_such_tag(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    node.reconfigure(SMALL, "kata/small:v2")?;
    node.refuses(&["apply"], 5, &["kata/small:v2 is not at"])?;
    node.reconfigure("kata/small:v2", "kata/nothing:v1")?;
    node.refuses(&["apply"], 5, &["kata/nothing:v1 is not at"])?;
    node.reconfigure("kata/nothing:v1", SMALL)?;
    recovers(&node)
}

fn broken_blob(sandbox: &Sandbox, fault: Fault, code: i32, mentions: &[&str]) -> Result<()> {
    let node = demo_node(sandbox)?;
    node.proxy.rule("/blobs/", fault, u32::MAX);
    node.refuses(&["apply"], code, mentions)?;
    node.store_is_whole()?;
    node.proxy.clear();
    recovers(&node)
}

fn a_passing_fault_is_overcome(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    node.proxy.rule("/blobs/", Fault::Reset(1000), 1);
    node.proxy.rule("/manifests/", Fault::Status(503), 1);
    recovers(&node)
}

fn disk_is_full(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let disk = sandbox.small_disk("full", 1)?;
    let big = sandbox.folder("big")?;
    fs::write(big.join("image"), vec![9; 3 << 20])?;
    node.push(&big, "kata/big:v1")?;
    let there = node.artifacts.display().to_string();
    let small = disk.join("artifacts").display().to_string();
    node.reconfigure(&there, &small)?;
    node.reconfigure(SMALL, "kata/big:v1")?;
    let failed = node.refuses(&["apply"], 7, &[&small])?;
    ensure!(
        failed.stderr.contains("space") || failed.stderr.contains("free"),
        "not a word of room: {failed}"
    );
    node.km.expect(&["uninstall"], 0)?;
    ensure!(!disk.join("artifacts").exists(), "folders of ours are left");
    node.reconfigure(&small, &there)?;
    recovers(&node)
}

fn containerd_is_not_running(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    node.containerd.stop()?;
    let socket = node.containerd.socket().display().to_string();
    for command in ["plan", "apply"] {
        node.refuses(&[command], 8, &[&socket, "containerd"])?;
    }
    ensure!(!node.artifacts.exists(), "a failed apply made folders");
    node.containerd.start_again()?;
    recovers(&node)
}

fn containerd_does_not_come_back(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let original = fs::read(node.containerd.config())?;
    node.containerd.refuse_to_start(Some("a test says so"))?;
    let failed = node.km.expect(&["apply"], 8)?;
    ensure!(failed.stderr.contains("a test says so"), "{failed}");
    ensure!(
        fs::read(node.containerd.config())? == original,
        "containerd's configuration was not put back: {failed}"
    );
    ensure!(
        !node.artifacts.join(DEMO).is_symlink(),
        "the class is still active: {failed}"
    );
    node.containerd.refuse_to_start(None)?;
    node.containerd.start_again()?;
    ensure!(node.containerd.cri().handlers()? == ["runc"]);
    recovers(&node)
}

/// containerd answers all the time, and never with the handler.
fn a_restart_that_is_none(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let good = fs::read_to_string(&node.config)?;
    let command = format!("command: {:?}", node.containerd.restart_command());
    node.reconfigure(&command, "command: [/bin/true]")?;
    node.reconfigure("readyTimeoutSeconds: 20", "readyTimeoutSeconds: 2")?;
    node.refuses(&["apply"], 8, &[DEMO])?;
    fs::write(&node.config, good)?;
    recovers(&node)
}

fn a_restart_program_that_is_not_there(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let good = fs::read_to_string(&node.config)?;
    let command = format!("command: {:?}", node.containerd.restart_command());
    node.reconfigure(&command, "command: [/nowhere/restart]")?;
    let failed = node.km.expect(&["apply"], 8)?;
    ensure!(failed.stderr.contains("/nowhere/restart"), "{failed}");
    ensure!(node.containerd.cri().handlers()? == ["runc"]);
    fs::write(&node.config, good)?;
    recovers(&node)
}

fn containerds_file_is_broken(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let path = node.containerd.config();
    let good = fs::read(&path)?;
    fs::write(&path, [&good[..], b"[plugins\n"].concat())?;
    let lines = good.iter().filter(|&&byte| byte == b'\n').count();
    let line = format!("line {}", lines + 1);
    let file = path.display().to_string();
    node.refuses(&["apply"], 3, &[&file, &line])?;
    fs::write(&path, good)?;
    recovers(&node)
}

fn etc_is_read_only(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let etc = node.containerd.dir().join("etc");
    let guard = sandbox.read_only(&etc)?;
    let folder = etc.display().to_string();
    node.refuses(&["apply"], 7, &[&folder, "ead-only"])?;
    drop(guard);
    ensure!(node.containerd.restarts()? == 0, "containerd was restarted");
    recovers(&node)
}

fn provider_is_incomplete(sandbox: &Sandbox) -> Result<()> {
    const GPU: &str = "kata-qemu-nvidia-gpu";
    let node = demo_node(sandbox)?;
    let original = fs::read(node.containerd.config())?;
    let folder = sandbox.folder("guest")?;
    fs::write(folder.join(guest::KERNEL), "a kernel")?;
    fs::write(folder.join(guest::INITRD), "an initrd")?;
    node.push(&folder, "kata/guest:v1")?;
    node.configure(&[Class::catalogue(GPU, node.proxy.reference("kata/guest:v1"))])?;
    let shim = node.prefix.join("bin/containerd-shim-kata-v2");
    let qemu = node.prefix.join("bin/qemu-system-x86_64");
    let (shim_name, qemu_name) = (shim.display().to_string(), qemu.display().to_string());
    for command in ["plan", "apply"] {
        node.refuses(&[command], 3, &[GPU, &shim_name, &qemu_name])?;
    }
    provider::assemble(sandbox.parts(), &node.prefix)?;
    fs::remove_file(&qemu)?;
    let failed = node.refuses(&["apply"], 3, &[GPU, &qemu_name])?;
    ensure!(
        !failed.stderr.contains(&shim_name),
        "the shim is there: {failed}"
    );
    ensure!(!node.artifacts.exists(), "a refused apply made folders");
    provider::assemble(sandbox.parts(), &node.prefix)?;
    node.apply(&[GPU])?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

fn a_handler_in_use_is_kept(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let original = fs::read(node.containerd.config())?;
    node.apply(&[DEMO])?;
    let pod = node
        .containerd
        .cri()
        .run_sandbox(DEMO, &Default::default())?;
    let url = node.proxy.reference(SMALL);
    node.configure(&[Class::runc("other", url.clone())])?;
    node.refuses(&["apply"], 3, &[DEMO])?;
    node.containerd.cri().remove_sandbox(&pod)?;
    node.apply(&["other"])?;
    ensure!(
        !node.artifacts.join(DEMO).is_symlink(),
        "a class that is configured no more is left"
    );
    node.uninstall(&original, &["runc"])?;
    Ok(())
}
