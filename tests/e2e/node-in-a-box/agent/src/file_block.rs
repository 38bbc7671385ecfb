//! `file-block PATH`: prints on which block of its disk a file begins, so that a test can change it there, behind the file system.

#![expect(
    unsafe_code,
    reason = "an ioctl, in a program that runs in a virtual machine made for that"
)]

use std::fs::File;
use std::io::Write as _;

use anyhow::{Context, Result, ensure};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `FIBMAP` (include/uapi/linux/fs.h): the number of a block in a file becomes its number on the disk.
const FIBMAP: Opcode = opcode::none(0, 1);

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: file-block PATH")?;
    let file = File::open(&path).with_context(|| format!("open {path}"))?;
    let mut block: i32 = 0;
    // SAFETY: the request's argument is a pointer to an int, which the kernel reads and writes.
    unsafe { ioctl(&file, Updater::<FIBMAP, i32>::new(&mut block)) }
        .with_context(|| format!("ask where {path} is"))?;
    ensure!(block > 0, "{path} is not on its disk yet");
    writeln!(std::io::stdout(), "{block}")?;
    Ok(())
}
