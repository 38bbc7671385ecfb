//! fs-verity under the store: the node's file system has it, so the kernel guards what is live, root and the disk included.

use anyhow::{Result, ensure};
use km_tests_e2e::node_in_a_box::Node;

use crate::containerd::{ARTIFACTS, CLASS};

/// Nobody can write to a live file, and a block that changes on the disk is not read any more; what is damaged so is made again.
pub(crate) fn guards(node: &mut Node) -> Result<()> {
    let verified = node.kata_manager(&["artifacts", "verify"], 0)?;
    let guarded = "The kernel guards every file";
    ensure!(verified.stdout.contains(guarded), "it {verified}");
    let file = format!("{ARTIFACTS}/{CLASS}/initrd.img");
    let opened = node.shell(&format!("if : >>{file}; then echo opened; fi"))?;
    ensure!(opened.is_empty(), "{file} can be written to");

    // Past the file system, onto its disk; then the pages that are in memory are dropped, so that the disk is read.
    node.shell(&format!(
        "sync; block=$(file-block {file})\n\
         printf changed | dd of=/dev/vda bs=1 seek=$((block * 4096)) conv=notrunc,fsync status=none\n\
         echo 3 >/proc/sys/vm/drop_caches"
    ))?;
    let read = node.run(&["/usr/bin/head", "-c", "1", &file])?;
    ensure!(
        read.code() != Some(0) && read.stderr.contains("Input/output error"),
        "the changed block was read: head {read}"
    );
    let verified = node.kata_manager(&["artifacts", "verify"], 6)?;
    ensure!(
        verified.stdout.contains("initrd.img: cannot be read"),
        "it {verified}"
    );
    node.kata_manager(&["apply"], 0)?;
    node.kata_manager(&["artifacts", "verify"], 0)?;
    Ok(())
}
