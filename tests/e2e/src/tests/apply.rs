//! The main path, on every containerd: plan, apply, a pod, a second apply, uninstall.

use std::fs;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Flavour, Options, Version};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{guest, images, provider};

use super::node::{Class, DEMO, Node, SMALL, Stamped};

pub(crate) const TESTS: &[Test] = &[
    ("containerd_1_6", |s| {
        main_path(s, &Options::new(Version::V1_6))
    }),
    ("containerd_1_7", |s| {
        main_path(s, &Options::new(Version::V1_7))
    }),
    ("containerd_2_x", |s| {
        main_path(s, &Options::new(Version::V2))
    }),
    ("containerd_2_x_with_a_version_2_file", |s| {
        main_path(s, &Options::new(Version::V2).flavour(Flavour::Version2))
    }),
    ("a_plan_is_saved_and_applied", a_plan_is_saved_and_applied),
    ("edits_of_others_survive", edits_of_others_survive),
    (
        "a_new_tag_is_a_new_generation",
        a_new_tag_is_a_new_generation,
    ),
];

const GPU: &str = "kata-qemu-nvidia-gpu";
const SNP: &str = "kata-qemu-nvidia-gpu-snp";

fn main_path(sandbox: &Sandbox, options: &Options) -> Result<()> {
    let node = Node::start(sandbox, options)?;
    provider::assemble(sandbox.parts(), &node.prefix)?;
    let folder = sandbox.folder("guest")?;
    guest::build(sandbox.parts(), &folder, "v1")?;
    node.push(&folder, "kata/guest:v1")?;
    guest::add_configuration(&folder)?;
    node.push(&folder, "kata/guest-confidential:v1")?;
    node.configure(&[
        Class::catalogue(GPU, node.proxy.reference("kata/guest:v1")),
        Class::catalogue(SNP, node.proxy.reference("kata/guest-confidential:v1")),
        Class::runc(DEMO, node.proxy.reference("kata/guest:v1")),
    ])?;
    let original = Stamped::of(&node.containerd.config())?;

    let planned = node.km.expect(&["plan", "--exit-code"], 2)?;
    for name in [GPU, SNP, DEMO, "Plan: "] {
        ensure!(planned.stdout.contains(name), "no {name} in {planned}");
    }
    ensure!(
        Stamped::of(&node.containerd.config())? == original && !node.artifacts.exists(),
        "plan changed the node"
    );

    node.apply(&[GPU, SNP, DEMO])?;
    ensure!(node.containerd.restarts()? == 1);
    runtime_types(&node)?;
    node.store_is_whole()?;
    let class = node.artifacts.join(GPU);
    ensure!(fs::read(class.join(guest::KERNEL))? == fs::read(folder.join(guest::KERNEL))?);
    rerooted(&node)?;
    let pod = node
        .containerd
        .cri()
        .run_pod(DEMO, images::BUSYBOX, &["/bin/sleep", "1000"])?;

    nothing_to_do(&node)?;
    node.containerd.restart()?;
    let said = node
        .containerd
        .cri()
        .exec(&pod.container, &["/bin/echo", "still here"])?;
    ensure!(said.stdout == "still here\n", "{said:?}");

    let refused = node.refuses(&["uninstall"], 3, &[DEMO])?;
    ensure!(
        refused.stderr.contains(&pod.sandbox) || refused.stderr.contains("default/pod-"),
        "the pod is not named: {refused}"
    );
    node.containerd.cri().remove_sandbox(&pod.sandbox)?;
    node.uninstall(&original.bytes, &["runc"])?;
    let again = node.km.expect(&["uninstall"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    Ok(())
}

fn runtime_types(node: &Node) -> Result<()> {
    let config = node.containerd.cri().config()?;
    let runtimes = &config["containerd"]["runtimes"];
    ensure!(runtimes[DEMO]["runtimeType"] == "io.containerd.runc.v2");
    let gpu = runtimes[GPU]["runtimeType"]
        .as_str()
        .context("the runtime type of a GPU class")?;
    ensure!(gpu.contains("kata"), "{GPU} has the runtime type {gpu}");
    let options = runtimes[GPU]["options"].to_string();
    ensure!(options.contains("configuration.toml"), "{options}");
    Ok(())
}

/// Both configurations name files of the installed generation, whether the artifact brought one or not.
fn rerooted(node: &Node) -> Result<()> {
    for class in [GPU, SNP] {
        let path = node.artifacts.join(class).join(guest::CONFIGURATION);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        for key in ["kernel", "initrd"] {
            let file = text
                .lines()
                .find_map(|line| line.split_once('=').filter(|(k, _)| k.trim() == key))
                .and_then(|(_, value)| value.split('"').nth(1))
                .with_context(|| format!("{class}'s configuration has no {key}:\n{text}"))?;
            ensure!(
                file.starts_with(&*node.artifacts.to_string_lossy()) && fs::metadata(file).is_ok(),
                "{class}'s {key} is {file}"
            );
        }
    }
    Ok(())
}

/// A second apply writes, restarts and downloads nothing.
fn nothing_to_do(node: &Node) -> Result<()> {
    let before = Stamped::of(&node.containerd.config())?;
    let restarts = node.containerd.restarts()?;
    node.proxy.take_requests();
    let second = node.km.expect(&["apply"], 0)?;
    ensure!(second.stdout.starts_with("Nothing to do"), "{second}");
    ensure!(
        Stamped::of(&node.containerd.config())? == before,
        "the file was written"
    );
    ensure!(
        node.containerd.restarts()? == restarts,
        "containerd was restarted"
    );
    let requests = node.proxy.take_requests();
    ensure!(
        requests.iter().all(|r| r.path.contains("/manifests/")),
        "more than manifests was asked for: {requests:?}"
    );
    let mut paths: Vec<&str> = requests.iter().map(|r| &*r.path).collect();
    let asked = paths.len();
    paths.sort_unstable();
    paths.dedup();
    ensure!(paths.len() == asked, "asked twice for one: {requests:?}");
    let planned = node.km.expect(&["plan", "--exit-code"], 0)?;
    ensure!(planned.stdout.starts_with("Nothing to do"), "{planned}");
    Ok(())
}

fn a_plan_is_saved_and_applied(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let plan = sandbox.folder("plan")?.join("plan.json");
    let plan = plan.display().to_string();
    node.km.expect(&["plan", "--out", &plan], 0)?;
    let config = fs::read(node.containerd.config())?;
    let edited = [&config[..], b"# a later edit\n"].concat();
    fs::write(node.containerd.config(), &edited)?;
    node.refuses(&["apply", &plan], 3, &["out of date", "containerd"])?;
    fs::write(node.containerd.config(), &config)?;
    node.km.expect(&["apply", &plan], 0)?;
    node.demo_runs()?;
    node.refuses(&["apply", &plan], 3, &["out of date"])?;
    node.uninstall(&config, &["runc"])?;
    Ok(())
}

fn edits_of_others_survive(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    let original = fs::read_to_string(node.containerd.config())?;
    node.apply(&[DEMO])?;
    let path = node.containerd.config();
    let edit = |text: &str| format!("# before\n{text}# after, by somebody else\n");
    fs::write(&path, edit(&fs::read_to_string(&path)?))?;
    node.uninstall(edit(&original).as_bytes(), &["runc"])?;
    Ok(())
}

fn a_new_tag_is_a_new_generation(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_6))?;
    let original = fs::read(node.containerd.config())?;
    node.apply(&[DEMO])?;
    let link = node.artifacts.join(DEMO);
    let first = fs::read_link(&link)?;
    let folder = sandbox.folder("small")?;
    fs::write(folder.join("vmlinuz"), "a newer kernel")?;
    node.push(&folder, SMALL)?;
    node.km.expect(&["plan", "--exit-code"], 2)?;
    node.apply(&[DEMO])?;
    ensure!(fs::read_link(&link)? != first, "the class did not move on");
    ensure!(fs::read(link.join("vmlinuz"))? == b"a newer kernel");
    ensure!(
        fs::read(node.artifacts.join(first).join("vmlinuz"))? == b"a kernel",
        "the generation before is no more what it was"
    );
    ensure!(
        node.containerd.restarts()? == 1,
        "new guest files need no restart"
    );
    nothing_to_do(&node)?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}
