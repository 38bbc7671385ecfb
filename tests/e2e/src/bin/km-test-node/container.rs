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

/// Runs kata-manager in a container of its own: privileged, in its own mount, process and IPC namespaces.
fn contained(node: &mut Node, words: &[&str], code: i32) -> Result<Finished> {
    let before = [
        "/usr/bin/ctr",
        "run",
        "--rm",
        "--privileged",
        "--net-host",
        "--rootfs",
        "--mount",
        "type=bind,src=/,dst=/host,options=rbind:rslave:rw",
        "--mount",
        "type=bind,src=/etc/kata-manager,dst=/etc/kata-manager,options=rbind:ro",
        "/run/container",
        "kata-manager",
        "/usr/local/bin/kata-manager",
        "--host-root",
        "/host",
    ];
    let finished = node.run(&[&before, words].concat())?;
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
