//! The shim in real containerds, with runc's shim behind it: pods start, exec, survive restarts and upgrades, and stop; a device is
//! written where the sandbox finds it; a start that is killed anywhere leaves nothing half done.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::images;
use km_tests_e2e::process::running;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::tracer::{self, Fault, Injection};
use km_tests_sysfs::shapes;
use serde_json::{Value, json};

use super::node::{Class, Node, SMALL, names, walk};

pub(crate) const TESTS: &[Test] = &[
    ("pods_outlive_restarts_and_upgrades", lives),
    ("a_killed_start_leaves_nothing_half_done", killed),
];

const HANDLER: &str = "shimmed";

/// Where `apply` puts things.
const INSTALLED: &str = "/opt/kata-manager";
const SETTINGS: &str = "/etc/kata-manager";

/// Where claims are.
const CLAIMS: &str = "/run/kata-manager/sandboxes";

/// runc's shim of 1.7, which works under every containerd here.
pub(super) fn inner(sandbox: &Sandbox) -> PathBuf {
    let dir = sandbox.parts().containerd_dir(Version::V1_7.group());
    dir.join("containerd-shim-runc-v2")
}

/// One after the other: what is installed has one place.
fn lives(sandbox: &Sandbox) -> Result<()> {
    sandbox.cover("/opt".as_ref())?;
    // Nothing of it stays on the machine, not even an empty folder.
    let _settings = sandbox.make(SETTINGS.as_ref())?;
    for version in Version::ALL {
        lives_in(sandbox, version).with_context(|| format!("{version:?}"))?;
    }
    Ok(())
}

fn lives_in(sandbox: &Sandbox, version: Version) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(version))?;
    let original = fs::read(node.containerd.config())?;
    let folder = sandbox.folder("shim")?;
    let shim = folder.join("shim");
    fs::copy(node.km.shim()?, &shim)?;
    let more = format!(
        "shim: {{program: {}, kubeletSocket: {}/no-kubelet.sock}}\n",
        shim.display(),
        folder.display()
    );
    node.configure_with(&[Class::runc(HANDLER, node.proxy.reference(SMALL))], &more)?;
    let inner = format!("innerShim: {}\n  runtimeType:", inner(sandbox).display());
    node.reconfigure("runtimeType:", &inner)?;
    let planned = node.km.expect(&["plan"], 0)?;
    ensure!(planned.stdout.contains("+ shim "), "{planned}");
    node.apply(&[HANDLER])?;
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");

    let link = format!("{INSTALLED}/bin/containerd-shim-{HANDLER}-v2");
    let cri = node.containerd.cri();
    let pod = cri.run_pod(HANDLER, images::BUSYBOX, &["/bin/sleep", "1000"])?;
    let speaks = |when: &str| -> Result<()> {
        let said = cri.exec(&pod.container, &["/bin/echo", "here"])?;
        ensure!(said.stdout == "here\n", "{when}: {said:?}");
        Ok(())
    };
    speaks("at first")?;
    let claim = claim(&pod.sandbox)?.context("the sandbox has no claim")?;
    ensure!(
        claim["generation"] == 1 && claim["handler"] == HANDLER,
        "{claim}"
    );
    let bundle = PathBuf::from(claim["bundle"].as_str().context("a bundle")?);
    // What containerd goes by when it comes back is the link, which stays where it is.
    let recorded = fs::read_to_string(bundle.join("shim-binary-path"));
    match version {
        Version::V1_6 => {}
        _ => ensure!(
            recorded.as_deref().is_ok_and(|path| path.trim() == link),
            "{recorded:?}"
        ),
    }
    // No process of ours is left.
    let ours = fs::canonicalize(&link)?;
    ensure!(running(&ours)?.is_empty(), "{:?} run", running(&ours)?);
    node.containerd.restart()?;
    speaks("after a restart")?;

    // An upgrade: other bytes are another version, and the pod's stays while it runs.
    let mut bytes = fs::read(&shim)?;
    bytes.extend(b"another build");
    fs::write(&shim, &bytes)?;
    let restarts = node.containerd.restarts()?;
    node.km.expect(&["apply"], 0)?;
    ensure!(
        node.containerd.restarts()? == restarts,
        "an upgrade restarted containerd"
    );
    ensure!(fs::canonicalize(&link)? != ours, "the link did not move");
    ensure!(ours.exists(), "the version of a pod that runs is gone");
    node.containerd.restart()?;
    speaks("after an upgrade and a restart")?;
    node.demo_on(HANDLER)?;

    // Uninstall is refused, and forced says what stays.
    let refused = node.km.expect(&["uninstall"], 3)?;
    ensure!(refused.stderr.contains(HANDLER), "{refused}");
    let forced = node.km.expect(&["uninstall", "--force"], 0)?;
    ensure!(
        forced.stdout.contains(&format!(
            "Stays: {link} is the shim of sandbox {}",
            pod.sandbox
        )),
        "{forced}"
    );
    ensure!(
        Path::new(&link).exists(),
        "the shim of a pod that runs is gone"
    );
    node.containerd.restart()?;
    cri.remove_sandbox(&pod.sandbox)?;
    ensure!(!bundle.exists(), "the bundle stays");
    node.km.expect(&["uninstall"], 0)?;
    let left = names(SETTINGS.as_ref())?;
    ensure!(left.is_empty(), "{left:?} is left in {SETTINGS}");
    let left = walk(INSTALLED.as_ref())?;
    ensure!(left.is_empty(), "{left:?} is left");
    node.is_clean(&original)
}

fn claim(sandbox: &str) -> Result<Option<Value>> {
    let path = format!("{CLAIMS}/{sandbox}.json");
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| path)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(path),
    }
}

/// The GPU that [`BEFORE`] names, and its IOMMU group.
const GPU: &str = "0000:13:00.0";
const GROUP: u32 = 34;

/// Kills a start in place of each of its calls: config.json is the old one or the new one, and whatever claim is left is gone when
/// the sandbox's bundle is and the next start looks.
fn killed(sandbox: &Sandbox) -> Result<()> {
    let root = sandbox.folder("killed")?;
    let machine = shapes::eight_gpus();
    machine.write(&root);
    fs::remove_dir_all(root.join("proc"))?;
    symlink("/proc", root.join("proc"))?;
    let put = |path: &str, text: &str| -> Result<()> {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(fs::write(path, text)?)
    };
    put(&format!("dev/vfio/{GROUP}"), "")?;
    let node = root.join(format!("dev/vfio/{GROUP}"));
    fs::remove_file(&node)?;
    let mode = rustix::fs::Mode::RWXU;
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &node,
        kind,
        mode,
        rustix::fs::makedev(1, 3),
    )?;
    put(
        "var/run/cdi/nvidia.com-pgpu.yaml",
        &format!(
            "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices: [{{name: \"{GPU}\", containerEdits: {{deviceNodes: [{{path: /dev/vfio/{GROUP}}}]}}}}]\n"
        ),
    )?;
    put("inner", "#!/bin/sh\nexit 0\n")?;
    fs::set_permissions(root.join("inner"), fs::Permissions::from_mode(0o755))?;
    put(
        &format!("etc/kata-manager/handlers/{HANDLER}.json"),
        &json!({
            "handler": HANDLER, "class": HANDLER, "innerShim": "/inner", "kata": {"flavor": "rust", "version": "4.1"},
            "containerd": "2", "kubeletSocket": "/none",
        })
        .to_string(),
    )?;
    let shim = root.join(format!("containerd-shim-{HANDLER}-v2"));
    symlink(km_tests_e2e::km::Km::find()?.shim()?, &shim)?;

    let start = |id: &str, injection: Option<&Injection>| -> Result<(tracer::Traced, PathBuf)> {
        let bundle = root.join("run/bundles").join(id);
        fs::create_dir_all(&bundle)?;
        fs::write(bundle.join("config.json"), BEFORE)?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", tracer::HOLD])
            .arg(&shim)
            .args(["-namespace", "k8s.io", "-id", id, "start"])
            .current_dir(&bundle)
            .env("KATA_MANAGER_HOST_ROOT", &root)
            .env("MAX_SHIM_VERSION", "2");
        let traced = tracer::run(command, &root, injection, Duration::from_secs(30))?;
        Ok((traced, bundle))
    };
    let (whole, bundle) = start("whole", None)?;
    ensure!(whole.finished.code() == Some(0), "{:?}", whole.finished);
    let after = fs::read_to_string(bundle.join("config.json"))?;
    ensure!(
        after.contains("\"/dev/vfio/34\"") && after != BEFORE,
        "{after}"
    );
    fs::remove_dir_all(&bundle)?;
    ensure!(
        whole.calls.len() > 30,
        "only {} calls were seen",
        whole.calls.len()
    );
    for nth in 1..=whole.calls.len() {
        let injection = Injection {
            call: None,
            nth,
            fault: Fault::Kill,
            lasting: false,
        };
        let id = format!("killed-{nth}");
        let (_, bundle) = start(&id, Some(&injection))?;
        let found = fs::read_to_string(bundle.join("config.json"))?;
        let when = format!("killed at call {nth}, {}", whole.calls[nth - 1]);
        ensure!(
            found == BEFORE || found == after,
            "{when}: config.json is {found}"
        );
        // containerd removes the bundle of a start that failed.
        fs::remove_dir_all(&bundle)?;
        let id = format!("next-{nth}");
        let (next, bundle) = start(&id, None)?;
        ensure!(
            next.finished.code() == Some(0),
            "{when}: the next start {:?}",
            next.finished
        );
        let left = names(&root.join("run/kata-manager/sandboxes"))?;
        ensure!(
            left == [".lock".to_owned(), format!("{id}.json")],
            "{when}: {left:?} is left"
        );
        fs::remove_dir_all(&bundle)?;
    }
    Ok(())
}

/// A sandbox whose annotation names the GPU, which runtime-rs gets written.
const BEFORE: &str = r#"{"annotations": {"cdi.k8s.io/gpu": "nvidia.com/pgpu=0000:13:00.0"}, "linux": {"devices": []}}"#;
