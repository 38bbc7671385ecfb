//! kata-manager in a container on the node, with the mounts of a DaemonSet's pod and no more: the host's root at `/host`, and
//! its configuration.

use anyhow::{Result, ensure};
use km_tests_e2e::node_in_a_box::Node;
use km_tests_e2e::process::Finished;

use crate::containerd::Whole;
use crate::devices::VFIO;
use crate::shown::Listed;

/// Lays out the container's root: the program, its libraries where it has some, and mount points.
const ROOT: &str = "
root=/run/container
mkdir -p $root/host $root/etc/kata-manager $root/usr/local/bin $root/tmp
cp /usr/local/bin/kata-manager $root/usr/local/bin/
for library in $(ldd /usr/local/bin/kata-manager | grep -o '/[^ ]*' || true); do
  mkdir -p $root/$(dirname $library); cp -L $library $root/$library
done
";

/// Where the container's description lies.
const BUNDLE: &str = "/run/bundle";

/// What `privileged: true` gives, as far as kata-manager needs any of it.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_PTRACE",
];

/// The container, as a DaemonSet's pod has it: namespaces of its own for mounts, processes and IPC, and these mounts. runc runs
/// it, for `ctr` would end with the containerd that is restarted.
fn description(words: &[&str]) -> serde_json::Value {
    let program: &[&str] = &["/usr/local/bin/kata-manager", "--host-root", "/host"];
    let bind = |from: &str, to: &str, options: &[&str]| serde_json::json!({ "type": "bind", "source": from, "destination": to, "options": options });
    let args = [program, words].concat();
    let namespaces = ["pid", "mount", "ipc", "uts"].map(|name| serde_json::json!({ "type": name }));
    serde_json::json!({
        "ociVersion": "1.0.2",
        "hostname": "kata-manager",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            },
        },
        "root": { "path": "/run/container" },
        "mounts": [
            { "type": "proc", "source": "proc", "destination": "/proc" },
            { "type": "tmpfs", "source": "tmpfs", "destination": "/dev", "options": ["nosuid", "mode=755"] },
            bind("/", "/host", &["rbind", "rslave"]),
            bind("/etc/kata-manager", "/etc/kata-manager", &["rbind", "ro"]),
        ],
        "linux": {
            "namespaces": namespaces,
            "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
        },
    })
}

/// Runs kata-manager in the container to its end.
fn contained(node: &mut Node, words: &[&str], code: i32) -> Result<Finished> {
    let config = serde_json::to_vec(&description(words))?;
    node.put(&format!("{BUNDLE}/config.json"), 0o644, &config)?;
    let finished = node.run(&["/usr/sbin/runc", "run", "--bundle", BUNDLE, "kata-manager"])?;
    ensure!(
        finished.code() == Some(code),
        "in a container, kata-manager {}: expected exit code {code}; it {finished}",
        words.join(" ")
    );
    Ok(finished)
}

/// Everything that the node's own kata-manager has done is seen, undone and done again from a container.
pub(crate) fn as_in_a_pod(node: &mut Node, whole: &Whole) -> Result<()> {
    node.shell(ROOT)?;
    contained(node, &["plan", "--exit-code"], 0)?;
    contained(node, &["uninstall"], 0)?;
    ensure!(whole.cri.handlers()? == ["runc"]);
    contained(node, &["apply"], 0)?;
    ensure!(whole.cri.handlers()?.len() == 2);
    // What a container wrote is what the host reads.
    node.kata_manager(&["plan", "--exit-code"], 0)?;
    whole.pod_lives()?;

    contained(node, &["devices", "bind", "--all"], 0)?;
    Listed::of(node)?.all_on(Some(VFIO), true)?;
    let group = node.shell("ls /dev/vfio | grep -v vfio")?;
    let file = format!("/dev/vfio/{}", group.trim());
    let holder = node.hold(&crate::devices::holding(&file))?;
    let refused = contained(node, &["devices", "unbind", "--all"], 3)?;
    ensure!(refused.stderr.contains("in use by bash["), "it {refused}");
    node.release(holder)?;
    contained(node, &["devices", "unbind", "--all"], 0)?;
    Listed::of(node)?.all_on(None, false)
}
