//! Two at a time: one waits, or says who holds the lock.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::proxy::Fault;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::wait;

use super::node::{DEMO, Node, SOON};

pub(crate) const TESTS: &[Test] = &[
    ("the_holder_is_named", the_holder_is_named),
    ("the_second_waits", the_second_waits),
];

fn wait_for_a_download(node: &Node) -> Result<()> {
    let mut seen = Vec::new();
    wait::until("the first apply to download", SOON, || {
        seen.extend(node.proxy.take_requests());
        let asks = seen.iter().any(|request| request.path.contains("/blobs/"));
        ensure!(asks, "it has asked for {seen:?}");
        Ok(())
    })
}

fn the_holder_is_named(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let original = fs::read(node.containerd.config())?;
    let pause = Duration::from_secs(60);
    node.proxy.rule("/blobs/", Fault::Stall(0, pause), u32::MAX);
    let mut first = node
        .km
        .command(&["apply"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let outcome = wait_for_a_download(&node).and_then(|()| {
        let pid = first.id().to_string();
        for command in ["apply", "uninstall"] {
            let failed = node.refuses(&["--lock-timeout", "1", command], 3, &[&pid, "lock"])?;
            ensure!(failed.took < pause / 2, "it waited {:?}", failed.took);
        }
        // Looking needs no lock.
        node.km.expect(&["plan"], 0)?;
        node.km.expect(&["status"], 0)
    });
    first.kill()?;
    first.wait()?;
    outcome?;
    node.proxy.clear();
    node.apply(&[DEMO])?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

fn the_second_waits(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let pause = Duration::from_secs(2);
    node.proxy.rule("/blobs/", Fault::Stall(0, pause), 1);
    let output = sandbox.folder("two")?;
    let start = |name: &str| {
        let file = fs::File::create(output.join(name))?;
        let mut command = node.km.command(&["apply"]);
        command.stdin(Stdio::null()).stdout(file.try_clone()?);
        command.stderr(file).spawn().context("start an apply")
    };
    let mut first = start("first")?;
    wait_for_a_download(&node)?;
    let mut second = start("second")?;
    let statuses = [first.wait()?, second.wait()?];
    let said = ["first", "second"].map(|name| fs::read_to_string(output.join(name)));
    ensure!(
        statuses.iter().all(std::process::ExitStatus::success),
        "{statuses:?} {said:?}"
    );
    let [_, second] = said;
    ensure!(second?.contains("Nothing to do"), "the second did it again");
    ensure!(node.containerd.restarts()? == 1, "two restarts");
    node.demo_runs()
}
