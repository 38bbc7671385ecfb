//! A registry that answers wrongly, or changes its mind, while the program changes from one version to the next.
//!
//! What a broken answer does to one request is tested beside the registry's client. Here: what is live stays, and the next apply
//! ends where it would have ended.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::proxy::{Fault, Proxy};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::wait;
use serde_json::Value;

use super::super::node::{Class, DEMO, Node, SOON};
use super::observer::Observer;
use super::picture::{Picture, copy};
use super::{MOVING, SURVIVED, publish, with_versions};

/// A registry's fault: its name, how it comes, and the exit code that tells of it.
type Wrong = (&'static str, fn(&Proxy), i32);

const ALL: u32 = u32::MAX;

const WRONG: &[Wrong] = &[
    (
        "a manifest without an end",
        |p| p.rule("/manifests/", Fault::Endless, ALL),
        6,
    ),
    (
        "a manifest that is cut",
        |p| p.rule("/manifests/sha256:", Fault::Truncate(99), ALL),
        5,
    ),
    (
        "a manifest with another byte",
        |p| p.rule("/manifests/sha256:", Fault::Corrupt(99), ALL),
        6,
    ),
    (
        "a manifest in a circle",
        |p| p.rule("/manifests/", circle(p), ALL),
        5,
    ),
    (
        "a manifest that is gone",
        |p| p.rule("/manifests/sha256:", Fault::Status(404), ALL),
        5,
    ),
    (
        "a blob without an end",
        |p| p.rule("/blobs/", Fault::Endless, ALL),
        6,
    ),
    (
        "a blob in a circle",
        |p| p.rule("/blobs/", circle(p), ALL),
        5,
    ),
    (
        "a blob that is gone",
        |p| p.rule("/blobs/", Fault::Status(404), ALL),
        5,
    ),
    (
        "a blob with another byte",
        |p| p.rule("/blobs/", Fault::Corrupt(99), ALL),
        6,
    ),
    (
        "a blob of another length",
        |p| p.header("/blobs/", "Content-Length", "5", ALL),
        5,
    ),
];

/// Back to where the request came from.
fn circle(proxy: &Proxy) -> Fault {
    let host = proxy.host();
    let port = host.rsplit(':').next().and_then(|port| port.parse().ok());
    Fault::Redirect(port.unwrap_or_default())
}

/// A node whose class is at the first of two versions, and what it looked like then.
struct Site {
    node: Node,
    before: std::path::PathBuf,
}

impl Site {
    fn start(sandbox: &Sandbox) -> Result<Site> {
        let node = with_versions(sandbox, 1)?;
        let reference = node.proxy.reference(&format!("{}:{}", MOVING.0, MOVING.1));
        node.configure(&[Class::runc(DEMO, reference)])?;
        node.apply(&[DEMO])?;
        let before = sandbox.folder("before")?.join("store");
        copy(&node.artifacts, &before)?;
        Ok(Site { node, before })
    }

    fn restore(&self) -> Result<()> {
        fs::remove_dir_all(&self.node.artifacts)?;
        copy(&self.before, &self.node.artifacts)
    }

    /// What is there after an apply in which nothing goes wrong.
    fn apply(&self) -> Result<Picture> {
        self.node.km.expect(&["apply"], 0)?;
        self.node.store_is_whole()?;
        Picture::take(&self.node.artifacts)
    }

    fn live(&self) -> Result<(u64, String)> {
        let manifest = fs::read(self.node.artifacts.join(DEMO).join(".generation.json"))?;
        let manifest: Value = serde_json::from_slice(&manifest)?;
        let text = manifest["manifest"].as_str().context("a digest")?;
        Ok((
            manifest["number"].as_u64().context("a number")?,
            text.to_owned(),
        ))
    }
}

#[expect(
    clippy::print_stdout,
    reason = "a test that takes samples says how many"
)]
pub(super) fn registry(sandbox: &Sandbox) -> Result<()> {
    let site = Site::start(sandbox)?;
    let node = &site.node;
    publish(node, 2)?;
    let after = site.apply()?;
    for (name, come, code) in WRONG {
        site.restore()?;
        let observer = Observer::start(&node.artifacts.join(DEMO));
        come(&node.proxy);
        node.refuses(&["apply"], *code, &[]).context(*name)?;
        node.store_is_whole().context(*name)?;
        node.proxy.clear();
        let now = site.apply().context(*name)?;
        observer.end().context(*name)?;
        let differences = after.differences(&now);
        ensure!(
            differences.is_empty(),
            "{name}:\n{}",
            differences.join("\n")
        );
    }
    the_tag_moves(&site)?;
    the_tag_moves_and_its_blobs_go(&site)?;
    println!(
        "registry: {} wrong answers and 2 changes of mind survived",
        WRONG.len()
    );
    SURVIVED.fetch_add(WRONG.len() + 2, std::sync::atomic::Ordering::Relaxed);
    Ok(())
}

/// Between the manifest and the blobs: what was looked up is what is made live, whole, and the next apply goes on.
fn the_tag_moves(site: &Site) -> Result<()> {
    let node = &site.node;
    site.restore()?;
    let second = publish(node, 2)?;
    node.proxy.take_requests();
    node.proxy.rule(
        "/blobs/",
        Fault::Stall(0, std::time::Duration::from_secs(2)),
        1,
    );
    let third = std::thread::scope(|scope| -> Result<String> {
        let apply = scope.spawn(|| node.km.expect(&["apply"], 0));
        wait::until_true("the blobs to be asked for", SOON, || {
            let asked = node.proxy.take_requests();
            asked.iter().any(|request| request.path.contains("/blobs/"))
        })?;
        let third = publish(node, 3)?;
        apply
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(third)
    })?;
    ensure!(
        site.live()? == (2, second),
        "not what was looked up: {:?}",
        site.live()?
    );
    node.store_is_whole()?;
    kernel_is(node, 2)?;
    node.km.expect(&["apply"], 0)?;
    ensure!(
        site.live()? == (3, third),
        "not what the tag names now: {:?}",
        site.live()?
    );
    kernel_is(node, 3)
}

/// What came of the version that cannot be had any more is not kept.
fn the_tag_moves_and_its_blobs_go(site: &Site) -> Result<()> {
    let node = &site.node;
    site.restore()?;
    publish(node, 3)?;
    let after = site.apply()?;
    site.restore()?;
    publish(node, 2)?;
    let kernel = km_tests_e2e::images::sha256(&[2; super::KERNEL]);
    node.proxy.rule(&kernel, Fault::Status(404), ALL);
    node.refuses(&["apply"], 5, &[&kernel])?;
    publish(node, 3)?;
    let now = site.apply()?;
    let differences = after.differences(&now);
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    node.proxy.clear();
    Ok(())
}

fn kernel_is(node: &Node, version: u8) -> Result<()> {
    let path: &Path = &node.artifacts.join(DEMO).join("vmlinuz");
    let bytes = fs::read(path)?;
    ensure!(
        bytes.len() == super::KERNEL && bytes.iter().all(|byte| *byte == version),
        "{} is not the kernel of version {version}",
        path.display()
    );
    Ok(())
}
