//! What a generation has beside Kata's configuration: `kata-manager-qemu` in QEMU's place, there before it is named, for each of Kata's
//! runtimes, as the class says, and gone with the rest; and the user's own settings.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::process::{self, Finished};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{guest, provider};
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount,
};
use serde_json::Value;

use super::node::{Class, Node, names, walk};

pub(crate) const TESTS: &[Test] = &[("a_class_says_how_its_qemu_is_launched", launched)];

const GPU: &str = "kata-qemu-nvidia-gpu";
const SNP: &str = "kata-qemu-nvidia-gpu-snp";

/// What Kata is told in place of QEMU.
const LINK: &str = "/opt/kata-manager/bin/kata-manager-qemu";

/// Kata's runtimes and versions, whose configurations have different keys beside the same two for QEMU.
const KATAS: &[(&str, &str)] = &[
    ("go", "3.20"),
    ("go", "4.1"),
    ("rust", "3.24"),
    ("rust", "4.1"),
];

fn launched(sandbox: &Sandbox) -> Result<()> {
    sandbox.cover("/opt".as_ref())?;
    let _settings = sandbox.make("/etc/kata-manager".as_ref())?;
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    provider::assemble(sandbox.parts(), &node.prefix)?;
    // runtime-rs has its shim in a folder of its own.
    let shim = "bin/containerd-shim-kata-v2";
    let rust = node.prefix.join("runtime-rs");
    fs::create_dir_all(rust.join("bin"))?;
    fs::copy(node.prefix.join(shim), rust.join(shim))?;
    let folder = sandbox.folder("guest")?;
    guest::build(sandbox.parts(), &folder, "v1")?;
    node.push(&folder, "kata/guest:v1")?;
    // This one brings a configuration, which names another QEMU than the class has.
    guest::add_configuration(&folder)?;
    node.push(&folder, "kata/guest-confidential:v1")?;
    let classes = [(GPU, "kata/guest:v1"), (SNP, "kata/guest-confidential:v1")]
        .map(|(name, artifact)| Class::catalogue(name, node.proxy.reference(artifact)));
    let shim = sandbox.folder("shim")?.join("shim");
    fs::copy(node.km.shim()?, &shim)?;
    let original = fs::read(node.containerd.config())?;
    let configure = |runtime: &str, version: &str| -> Result<()> {
        node.configure_with(
            &classes,
            &format!("shim: {{program: {}}}\n", shim.display()),
        )?;
        let kata = format!("provider:\n  runtime: {runtime}\n  version: \"{version}\"\n");
        node.reconfigure("provider:\n", &kata)
    };

    for (runtime, version) in KATAS {
        configure(runtime, version)?;
        let planned = node.km.expect(&["plan"], 0)?;
        let line = format!("+ path = \"{LINK}\"");
        ensure!(
            *runtime != "go" || *version != "3.20" || planned.stdout.contains(&line),
            "{planned}"
        );
        node.apply(&[GPU, SNP])?;
        for class in [GPU, SNP] {
            let text = drop_in(&node, class)?;
            let lines = [
                format!("path = \"{LINK}\"\n"),
                format!("valid_hypervisor_paths = [\"{LINK}\"]\n"),
            ];
            ensure!(
                lines.iter().all(|line| text.contains(line.as_str())),
                "{runtime} {version}: {text}"
            );
            let settings = settings(class)?;
            ensure!(
                settings["launch"]["mode"] == "check" && settings["confidential"] == (class == SNP),
                "{settings}"
            );
            ensure!(settings["kata"]["flavor"] == *runtime, "{settings}");
            launches_what_is_configured(&node, class)?;
        }
    }
    stands_in_qemus_place(&node)?;

    // A class says otherwise: settings alone follow, and the generation stays.
    let generation = fs::read_link(node.artifacts.join(GPU))?;
    let tune = format!("- name: {GPU}\n  launch: {{mode: tune, clique: 3}}\n");
    node.reconfigure(&format!("- name: {GPU}\n"), &tune)?;
    node.apply(&[GPU, SNP])?;
    let tuned = settings(GPU)?;
    ensure!(
        tuned["launch"]["mode"] == "tune" && tuned["launch"]["clique"] == 3,
        "{tuned}"
    );
    ensure!(fs::read_link(node.artifacts.join(GPU))? == generation);
    ensure!(settings(SNP)?["launch"]["mode"] == "check");

    // Without it the generation is another one, and rolling back brings it again.
    node.reconfigure("mode: tune, clique: 3", "mode: none")?;
    node.apply(&[GPU, SNP])?;
    ensure!(!drop_in(&node, GPU)?.contains("kata-manager-qemu"));
    ensure!(drop_in(&node, SNP)?.contains(LINK));
    node.km.expect(&["rollback", GPU], 0)?;
    ensure!(drop_in(&node, GPU)?.contains(LINK));
    // Without the shim there are no claims, and no pod of that generation would start.
    let installed = format!("shim: {{program: {}}}\n", shim.display());
    node.reconfigure(&installed, "")?;
    node.refuses(
        &["apply"],
        3,
        &["generation 4", "--release", "shim.program"],
    )?;
    node.refuses(&["rollback", GPU, "--to", "4"], 3, &["shim.program"])?;
    let config = fs::read_to_string(&node.config)?;
    fs::write(&node.config, config + &installed)?;
    node.km.expect(&["rollback", GPU, "--release"], 0)?;
    node.apply(&[GPU, SNP])?;
    ensure!(!drop_in(&node, GPU)?.contains(LINK));

    own_settings(&node)?;

    // Nor does an artifact put another program in the launcher's place.
    fs::create_dir_all(folder.join("config.d"))?;
    let later = "[hypervisor.qemu]\npath = \"/bin/true\"\n";
    fs::write(folder.join("config.d/70-path.toml"), later)?;
    node.push(&folder, "kata/guest-otherwise:v1")?;
    let now = node.proxy.reference("kata/guest-confidential:v1");
    let otherwise = node.proxy.reference("kata/guest-otherwise:v1");
    node.reconfigure(&now, &otherwise)?;
    node.refuses(&["apply"], 3, &["config.d/70-path.toml", "launch.mode"])?;
    node.reconfigure(&otherwise, &now)?;

    // An upgrade moves the link; what is the old version's goes when nothing runs.
    let before = fs::canonicalize(LINK)?;
    let mut bytes = fs::read(&shim)?;
    bytes.extend(b"another build");
    fs::write(&shim, &bytes)?;
    node.apply(&[GPU, SNP])?;
    let after = fs::canonicalize(LINK)?;
    ensure!(after != before && !before.exists(), "{before:?} {after:?}");
    stands_in_qemus_place(&node)?;

    node.uninstall(&original, &["runc"])?;
    let gone = || !Path::new("/opt/kata-manager").exists();
    ensure!(gone(), "programs are left");
    in_a_container(sandbox, &node)?;
    node.uninstall(&original, &["runc"])?;
    ensure!(gone(), "programs of a container are left");
    Ok(())
}

/// As in a pod, which sees the host's root elsewhere: everything that is written for the host has the host's paths.
fn in_a_container(sandbox: &Sandbox, node: &Node) -> Result<()> {
    // containerd must not be restarted there: it would be left without its root.
    node.reconfigure("mode: command", "mode: none")?;
    let root = sandbox.folder("hosts-root")?;
    mount_bind_recursive("/", &root)?;
    // What is unmounted here stays where it is mounted.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change(&root, slave)?;
    let elsewhere = root.display().to_string();
    let said = node.km.expect(&["apply", "--host-root", &elsewhere], 0);
    unmount(&root, UnmountFlags::DETACH)?;
    said?;
    let mut written = 0;
    let folders = [
        node.artifacts.clone(),
        node.containerd.dir().join("etc"),
        "/etc/kata-manager".into(),
    ];
    for folder in folders {
        for path in walk(&folder)? {
            if fs::symlink_metadata(&path)?.is_file() {
                let bytes = fs::read(&path)?;
                let text = String::from_utf8_lossy(&bytes);
                ensure!(
                    !text.contains(&elsewhere),
                    "{} names {elsewhere}",
                    path.display()
                );
                written += usize::from(text.contains(LINK));
            }
        }
    }
    ensure!(written == 1, "{written} drop-ins name the launcher");
    // What the host is told is there on the host, and nothing of it would be written otherwise there.
    stands_in_qemus_place(node)?;
    let again = node.km.expect(&["plan"], 0)?;
    let written = ["  + ", "  ~ ", "  - "];
    ensure!(
        !written.iter().any(|sign| again.stdout.contains(sign)),
        "{again}"
    );
    Ok(())
}

/// What the launcher becomes is what the configuration names that it stands in.
fn launches_what_is_configured(node: &Node, class: &str) -> Result<()> {
    let folder = node.artifacts.join(class);
    let launch: Value = serde_json::from_slice(&fs::read(folder.join("launch.json"))?)?;
    let configuration = fs::read_to_string(folder.join(guest::CONFIGURATION))?;
    let named = configuration.lines().find(|line| line.starts_with("path "));
    let qemu = launch["qemu"].as_str().context("a path of QEMU")?;
    ensure!(
        named.is_some_and(|line| line.contains(&format!("\"{qemu}\""))),
        "{launch} beside {named:?}"
    );
    Ok(())
}

/// A user's file is part of the generation while it is there, and one that Kata could not take changes nothing.
fn own_settings(node: &Node) -> Result<()> {
    const OWN: &str = "[hypervisor.qemu]\nkernel_params = \"quiet\"\n";
    let folder = Path::new("/etc/kata-manager").join(format!("{SNP}.d"));
    let file = folder.join("params.toml");
    fs::create_dir_all(&folder)?;
    for (text, said) in [
        ("[hypervisor", "TOML"),
        ("[hypervisor.qemu]\npath = \"/bin/true\"\n", "launch.mode"),
        ("[runtime]\nvfio_mode = 1\n", "runtime.vfio_mode"),
    ] {
        fs::write(&file, text)?;
        node.refuses(&["apply"], 4, &[said, "params.toml"])?;
    }
    fs::write(&file, OWN)?;
    let planned = node.km.expect(&["plan"], 0)?;
    ensure!(
        planned
            .stdout
            .contains("with your config.d/70-user-params.toml")
            && planned.stdout.contains("+ kernel_params = \"quiet\""),
        "{planned}"
    );
    node.apply(&[GPU, SNP])?;
    let inside = node
        .artifacts
        .join(SNP)
        .join("config.d/70-user-params.toml");
    ensure!(fs::read_to_string(&inside)? == OWN);
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    fs::remove_dir_all(&folder)?;
    node.apply(&[GPU, SNP])?;
    ensure!(!inside.exists(), "a file that is gone is still there");
    Ok(())
}

fn drop_in(node: &Node, class: &str) -> Result<String> {
    let path = node
        .artifacts
        .join(class)
        .join("config.d/60-kata-manager.toml");
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn settings(class: &str) -> Result<Value> {
    let text = fs::read(format!("/etc/kata-manager/handlers/{class}.json"))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Kata follows links and starts what it finds: by its own name, it is QEMU for what is no sandbox's, and refuses a sandbox without a
/// claim.
fn stands_in_qemus_place(node: &Node) -> Result<()> {
    let resolved = fs::canonicalize(LINK)?;
    let folder = resolved.parent().context("a version's folder")?;
    let files = names(folder)?;
    ensure!(
        resolved.ends_with("kata-manager-qemu") && files.len() == 2,
        "{resolved:?} beside {files:?}"
    );
    let mut inodes = Vec::new();
    for file in &files {
        inodes.push(fs::metadata(folder.join(file))?.ino());
    }
    ensure!(inodes[0] == inodes[1], "{files:?} are two files");
    let run = |words: &[&str]| -> Result<Finished> {
        process::run(Command::new(&resolved).args(words), Duration::from_secs(30))
    };
    let version = run(&["-version"])?.success()?;
    ensure!(version.stdout.contains("QEMU emulator"), "{version}");
    let refused = run(&["-name", "sandbox-nobody"])?;
    ensure!(
        refused.code() == Some(1) && refused.stderr.contains("claim") && refused.stdout.is_empty(),
        "{refused}"
    );
    let qemu = &settings(GPU)?["qemu"];
    let expected = node.prefix.join("bin/qemu-system-x86_64");
    ensure!(qemu.as_str() == expected.to_str(), "{qemu}");
    Ok(())
}
