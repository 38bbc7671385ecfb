//! What becomes of generations: rolled back to, kept, listed, collected; and that a guest never loses what it has mapped.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::proxy::Fault;
use km_tests_e2e::qemu::Mapped;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use serde_json::Value;

use super::node::{Class, DEMO, Node};

pub(crate) const TESTS: &[Test] = &[
    (
        "rollback_holds_until_released",
        rollback_holds_until_released,
    ),
    (
        "rollback_refuses_what_is_damaged",
        rollback_refuses_what_is_damaged,
    ),
    ("gc_keeps_what_is_needed", gc_keeps_what_is_needed),
    (
        "a_pulled_folder_is_mapped_and_pulled_again",
        a_pulled_folder_is_mapped_and_pulled_again,
    ),
    ("a_shared_file_is_there_once", a_shared_file_is_there_once),
    ("a_site_without_a_network", a_site_without_a_network),
];

/// The tag that the tests move.
const MOVING: &str = "kata/moving:v1";

/// Bytes of each version's kernel: as much as [`Mapped`] maps.
const SIZE: usize = 4 << 20;

/// Publishes a version under the moving tag: a kernel of its own, an image that all share.
fn publish(sandbox: &Sandbox, node: &Node, version: u8) -> Result<()> {
    let folder = sandbox.folder("version")?;
    fs::write(folder.join("vmlinuz"), vec![version; SIZE])?;
    fs::write(folder.join("kata.img"), vec![7; 500_000])?;
    node.push(&folder, MOVING)
}

/// A node with [`DEMO`] at generation `versions`, each of another version.
fn with_versions(sandbox: &Sandbox, versions: u8) -> Result<Node> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    node.configure(&[Class::runc(DEMO, node.proxy.reference(MOVING))])?;
    for version in 1..=versions {
        publish(sandbox, &node, version)?;
        node.apply(&[DEMO])?;
    }
    Ok(node)
}

fn kernel(node: &Node) -> Result<u8> {
    let path = node.artifacts.join(DEMO).join("vmlinuz");
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(bytes.first().copied().unwrap_or_default())
}

/// The states of [`DEMO`]'s generations by number, as `artifacts list` tells them.
fn states(node: &Node) -> Result<BTreeMap<u64, Vec<String>>> {
    let listed = node
        .km
        .expect(&["artifacts", "list", "--output", "json"], 0)?;
    let listed: Value = serde_json::from_str(&listed.stdout)?;
    let rows = listed["generations"].as_array().context("a list")?;
    let state = |row: &Value| -> Result<(u64, Vec<String>)> {
        let states = row["state"].as_array().context("states")?;
        let states = states
            .iter()
            .filter_map(|state| state.as_str().map(str::to_owned));
        Ok((
            row["generation"].as_u64().context("a number")?,
            states.collect(),
        ))
    };
    rows.iter()
        .filter(|row| row["class"] == DEMO)
        .map(state)
        .collect()
}

fn state(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn rollback_holds_until_released(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 2)?;
    let restarts = node.containerd.restarts()?;
    node.proxy.take_requests();
    let rolled = node.km.expect(&["rollback", DEMO], 0)?;
    ensure!(rolled.stdout.contains("generation 2 -> 1"), "{rolled}");
    ensure!(kernel(&node)? == 1, "the old kernel is not live");
    ensure!(states(&node)? == BTreeMap::from([(1, state(&["live", "held"])), (2, state(&[]))]));

    // Neither a plan nor an apply moves it; each says why, and asks no registry.
    let planned = node.km.expect(&["plan", "--exit-code"], 0)?;
    ensure!(
        planned.to_string().contains("rollback demo --release"),
        "{planned}"
    );
    let applied = node.km.expect(&["apply"], 0)?;
    ensure!(applied.stdout.starts_with("Nothing to do"), "{applied}");
    ensure!(kernel(&node)? == 1, "apply undid the rollback");
    let asked = node.proxy.take_requests();
    ensure!(asked.is_empty(), "a registry was asked: {asked:?}");
    let status = node.km.expect(&["status"], 0)?;
    ensure!(status.stdout.contains("held"), "{status}");
    node.km.expect(&["artifacts", "gc"], 0)?;
    ensure!(
        states(&node)?.len() == 2,
        "gc took what could be gone forward to"
    );

    node.km.expect(&["rollback", DEMO, "--release"], 0)?;
    ensure!(kernel(&node)? == 1, "the release itself moved it");
    node.apply(&[DEMO])?;
    ensure!(kernel(&node)? == 2, "apply did not go on after the release");
    let asked = node.proxy.take_requests();
    let blobs = asked
        .iter()
        .filter(|request| request.path.contains("/blobs/"));
    ensure!(
        blobs.count() == 0,
        "what was here was fetched again: {asked:?}"
    );
    ensure!(
        node.containerd.restarts()? == restarts,
        "a switch restarted containerd"
    );
    node.refuses(
        &["rollback", DEMO, "--to", "9"],
        3,
        &["no generation 9", "1, 2 (live)"],
    )?;
    node.refuses(
        &["rollback", "other"],
        3,
        &["other has no generation", DEMO],
    )?;
    Ok(())
}

fn rollback_refuses_what_is_damaged(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 2)?;
    let old = node
        .artifacts
        .join(".store/generations")
        .join(DEMO)
        .join("1/vmlinuz");
    let mode = fs::metadata(&old)?.permissions();
    fs::remove_file(&old)?;
    fs::write(&old, vec![9; SIZE])?;
    fs::set_permissions(&old, mode)?;
    node.refuses(
        &["rollback", DEMO],
        6,
        &["damaged", "vmlinuz", "stays where it is"],
    )?;
    ensure!(kernel(&node)? == 2, "the live generation moved");
    ensure!(
        states(&node)?[&2] == state(&["live"]),
        "it is held after all"
    );
    Ok(())
}

fn gc_keeps_what_is_needed(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 1)?;
    // A process with the first generation's image mapped, as a guest has it.
    let image = node.artifacts.join(DEMO).join("kata.img");
    let kernel_1 = fs::canonicalize(node.artifacts.join(DEMO).join("vmlinuz"))?;
    let inode = fs::metadata(&image)?.ino();
    let qemu = sandbox.parts().qemu();
    let mut guest = Mapped::start(&qemu, &kernel_1, &sandbox.folder("guest")?)?;
    ensure!(guest.reads()? == "0x01 0x01 0x01 0x01");
    for version in 2..=4 {
        publish(sandbox, &node, version)?;
        node.apply(&[DEMO])?;
    }
    ensure!(
        fs::metadata(&image)?.ino() == inode,
        "a file that did not change was made anew"
    );
    let kept: Vec<u64> = states(&node)?.into_keys().collect();
    ensure!(
        kept == [1, 3, 4],
        "kept are {kept:?}: one is open, one live, one previous"
    );
    let told = node.km.expect(&["artifacts", "gc"], 0)?;
    ensure!(told.stdout.contains("has it open"), "{told}");
    node.km.expect(&["rollback", DEMO], 0)?;
    let still = guest.reads()?;
    ensure!(
        still == "0x01 0x01 0x01 0x01",
        "the guest now reads {still}"
    );

    // A sandbox that lives claims it, as a shim would.
    let claim = claim(&node, 1)?;
    drop(guest);
    node.km.expect(&["rollback", DEMO, "--release"], 0)?;
    node.apply(&[DEMO])?;
    node.km.expect(&["artifacts", "gc"], 0)?;
    ensure!(
        states(&node)?.contains_key(&1),
        "a live claim was not honoured"
    );
    fs::remove_file(&claim)?;
    let dry = node.km.expect(&["artifacts", "gc", "--dry-run"], 0)?;
    ensure!(
        dry.stdout.contains("remove  demo 1") && states(&node)?.contains_key(&1),
        "{dry}"
    );
    let before = disk_usage(&node.artifacts)?;
    let collected = node
        .km
        .expect(&["artifacts", "gc", "--output", "json"], 0)?;
    let told: Value = serde_json::from_str(&collected.stdout)?;
    let kept: Vec<u64> = states(&node)?.into_keys().collect();
    ensure!(kept == [3, 4], "kept are {kept:?}");
    ensure!(
        told["bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes >= SIZE as u64),
        "{collected}"
    );
    ensure!(
        before > disk_usage(&node.artifacts)? + SIZE as u64,
        "nothing was given back"
    );
    node.store_is_whole()
}

/// What a guest has mapped from a folder of the user's is never written to, whether the tag has moved or not.
fn a_pulled_folder_is_mapped_and_pulled_again(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    publish(sandbox, &node, 1)?;
    let folder = sandbox.folder("pulled")?;
    let (dir, reference) = (folder.display().to_string(), node.proxy.reference(MOVING));
    let pull = || {
        let words = ["artifacts", "pull", &reference, "--to", &dir];
        node.km.expect(&words, 0)
    };
    pull()?;
    let kernel = folder.join("vmlinuz");
    let inode = || fs::metadata(&kernel).map(|meta| meta.ino());
    let first = inode()?;
    let qemu = sandbox.parts().qemu();
    let mut guest = Mapped::start(&qemu, &kernel, &sandbox.folder("guest")?)?;
    pull()?;
    ensure!(inode()? == first, "a file that is right was made anew");
    ensure!(guest.reads()? == "0x01 0x01 0x01 0x01");

    publish(sandbox, &node, 2)?;
    pull()?;
    ensure!(inode()? != first, "the file that is mapped was written to");
    ensure!(fs::read(&kernel)? == vec![2; SIZE], "another kernel came");
    let still = guest.reads()?;
    ensure!(
        still == "0x01 0x01 0x01 0x01",
        "the guest now reads {still}"
    );
    Ok(())
}

fn a_shared_file_is_there_once(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 1)?;
    let one = disk_usage(&node.artifacts)?;
    let reference = node.proxy.reference(MOVING);
    node.configure(&[
        Class::runc(DEMO, reference.clone()),
        Class::runc("second", reference),
    ])?;
    node.apply(&[DEMO, "second"])?;
    let two = disk_usage(&node.artifacts)?;
    // A folder and a manifest of some kilobytes are what the second class costs: measured in bytes of files, not of folders.
    ensure!(
        two - one <= one / 100,
        "one class takes {one} bytes, two take {two}"
    );
    let inodes: Vec<u64> = [DEMO, "second"]
        .iter()
        .map(|class| Ok(fs::metadata(node.artifacts.join(class).join("kata.img"))?.ino()))
        .collect::<Result<_>>()?;
    ensure!(inodes[0] == inodes[1], "the image is there twice");
    Ok(())
}

fn a_site_without_a_network(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 1)?;
    let original = node.km.expect(&["status", "--output", "json"], 0)?;
    let file = sandbox.folder("carried")?.join("guest.tar");
    let file = file.display().to_string();
    let exported = node.km.expect(&["artifacts", "export", &file], 0)?;
    ensure!(exported.stdout.contains(MOVING), "{exported}");

    // oras reads both the file and the store's own layout.
    let layout = node.artifacts.join(".store/oci").display().to_string();
    let digest = exported.stdout.split(' ').next().unwrap_or_default();
    for place in [&file, &layout] {
        let mut oras = std::process::Command::new(sandbox.parts().oras());
        oras.args([
            "manifest",
            "fetch",
            "--oci-layout",
            &format!("{place}@{digest}"),
        ]);
        let manifest = km_tests_e2e::process::run(&mut oras, Duration::from_secs(20))?.success()?;
        ensure!(manifest.stdout.contains("vmlinuz"), "{manifest}");
    }

    // Another site: nothing on the node, and no registry that answers.
    node.km.expect(&["uninstall"], 0)?;
    node.proxy.rule("/", Fault::Status(403), u32::MAX);
    node.refuses(&["apply"], 5, &[MOVING])?;
    node.km.expect(&["artifacts", "import", &file], 0)?;
    let applied = node.apply(&[DEMO])?;
    ensure!(applied.stderr.contains("what is here"), "{applied}");
    ensure!(kernel(&node)? == 1, "another kernel came out");
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    let now = node.km.expect(&["status", "--output", "json"], 0)?;
    let digest_of = |said: &str| -> Result<Value> {
        let status: Value = serde_json::from_str(said)?;
        Ok(status["classes"][0]["manifest"].clone())
    };
    ensure!(
        digest_of(&now.stdout)? == digest_of(&original.stdout)?,
        "another artifact is live"
    );

    // A file that was cut or changed on the way brings nothing.
    let bytes = fs::read(&file)?;
    node.km.expect(&["uninstall"], 0)?;
    for (what, bytes) in [
        ("cut", bytes[..bytes.len() / 2].to_vec()),
        (
            "changed",
            bytes
                .iter()
                .enumerate()
                .map(|(at, byte)| if at == bytes.len() / 2 { !byte } else { *byte })
                .collect(),
        ),
    ] {
        fs::write(&file, bytes)?;
        let refused = node.km.expect(&["artifacts", "import", &file], 6);
        refused.with_context(|| format!("a file that was {what}"))?;
        node.refuses(&["apply"], 5, &[MOVING])?;
        node.store_is_whole()?;
    }
    Ok(())
}

/// Bytes of all files below a folder, each inode once, as du(1) counts apparent sizes.
fn disk_usage(folder: &Path) -> Result<u64> {
    let mut seen = BTreeMap::new();
    for path in super::node::walk(folder)? {
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_file() {
            seen.insert((meta.dev(), meta.ino()), meta.len());
        }
    }
    Ok(seen.into_values().sum())
}

/// Writes a claim of a sandbox that lives: its maker is this process.
fn claim(node: &Node, generation: u64) -> Result<std::path::PathBuf> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let started = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(19));
    let folder = Path::new("/run/kata-manager/sandboxes");
    fs::create_dir_all(folder)?;
    let path = folder.join("a-sandbox.json");
    let claim = serde_json::json!({
        "format": 1, "sandbox": "a-sandbox", "namespace": "k8s.io", "handler": DEMO, "class": DEMO, "generation": generation,
        "bundle": node.containerd.dir().join("no-bundle"),
        "process": {
            "pid": std::process::id(), "started": started.context("a start time")?.parse::<u64>()?,
            "boot": fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim(),
        },
    });
    fs::write(&path, claim.to_string())?;
    Ok(path)
}
