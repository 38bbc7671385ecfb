//! The store, read by other people's programs as the OCI image layout that it is.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{images, process};
use serde_json::Value;

use super::node::{Class, DEMO, Node, SMALL, names};

pub(crate) const TESTS: &[Test] = &[(
    "oras_and_skopeo_read_the_store",
    oras_and_skopeo_read_the_store,
)];

fn run(program: &Path, words: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(words);
    let finished = process::run(&mut command, Duration::from_secs(30))?.success();
    Ok(finished.with_context(|| words.join(" "))?.stdout)
}

fn oras_and_skopeo_read_the_store(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    node.apply(&[DEMO])?;
    let class = node.artifacts.join(DEMO);
    let generation: Value = serde_json::from_slice(&fs::read(class.join(".generation.json"))?)?;
    let digest = generation["manifest"].as_str().context("a digest")?;
    let layout = node.artifacts.join(".store/oci").display().to_string();
    let parts = sandbox.parts();

    // oras, by digest: every file as it is in the generation.
    let pulled = sandbox.folder("oras")?;
    let at = format!("{layout}@{digest}");
    let to = pulled.display().to_string();
    run(
        &parts.oras(),
        &["pull", "--oci-layout", &at, "--output", &to],
    )?;
    for file in ["vmlinuz", "share/kata.img"] {
        ensure!(
            fs::read(pulled.join(file))? == fs::read(class.join(file))?,
            "oras reads another {file}"
        );
    }

    // skopeo, by the name in index.json.
    let name = format!("oci:{layout}:{}", node.proxy.reference(SMALL));
    let manifest = run(&parts.skopeo(), &["inspect", "--raw", &name])?;
    ensure!(
        images::sha256(manifest.as_bytes()) == digest,
        "skopeo reads another manifest: {manifest}"
    );
    let copy = sandbox.folder("skopeo")?;
    let to = format!("dir:{}", copy.display());
    run(&parts.skopeo(), &["copy", "--insecure-policy", &name, &to])?;
    ensure!(images::sha256(&fs::read(copy.join("manifest.json"))?) == digest);
    let mut blobs = 0;
    for hex in names(&copy)? {
        if hex.len() == 64 {
            let bytes = fs::read(copy.join(&hex))?;
            ensure!(
                images::sha256(&bytes) == format!("sha256:{hex}"),
                "skopeo reads another {hex}"
            );
            blobs += 1;
        }
    }
    let manifest: Value = serde_json::from_str(&manifest)?;
    let layers = manifest["layers"].as_array().context("layers")?.len();
    ensure!(
        blobs == layers + 1,
        "skopeo reads {blobs} blobs of {layers} layers and a configuration"
    );
    an_older_version_is_read_too(sandbox, &node, digest)
}

/// A tag that moved: what it led to before is found by its digest, as long as a generation has it.
fn an_older_version_is_read_too(sandbox: &Sandbox, node: &Node, old: &str) -> Result<()> {
    let folder = sandbox.folder("newer")?;
    fs::write(folder.join("vmlinuz"), "another kernel")?;
    node.push(&folder, SMALL)?;
    node.configure(&[Class::runc(DEMO, node.proxy.reference(SMALL))])?;
    node.apply(&[DEMO])?;
    let layout = node.artifacts.join(".store/oci").display().to_string();
    let oras = sandbox.parts().oras();
    let at = format!("{layout}@{old}");
    let fetched = run(&oras, &["manifest", "fetch", "--oci-layout", &at])?;
    ensure!(
        images::sha256(fetched.as_bytes()) == old,
        "oras reads another manifest: {fetched}"
    );
    let name = format!("oci:{layout}:{}", node.proxy.reference(SMALL));
    let new = run(&sandbox.parts().skopeo(), &["inspect", "--raw", &name])?;
    ensure!(
        images::sha256(new.as_bytes()) != old,
        "the name did not move"
    );
    Ok(())
}
