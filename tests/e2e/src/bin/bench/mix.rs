//! The artifact that is moved: a real kernel, an image that packs like one, and a small configuration.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use km_tests_e2e::parts::Parts;

/// Blocks of ext4: files in an image begin at one.
const BLOCK: u64 = 4096;

/// How much of an image is in use, in hundredths; the rest is zeros.
const USED: u64 = 90;

/// Files of a guest, in the order in which they are published.
pub(crate) const FILES: [&str; 3] = ["vmlinuz.container", "kata.image", "configuration-kata.toml"];

/// Writes [`FILES`] into a folder, the image with `size` bytes: real programs and libraries one behind the other, as an ext4
/// image has them, and free space at its end.
///
/// # Errors
/// When something cannot be read or written.
pub(crate) fn write(parts: &Parts, folder: &Path, size: u64) -> Result<()> {
    let [kernel, image, configuration] = FILES.map(|name| folder.join(name));
    fs::copy(parts.kernel()?, kernel).context("copy the kernel")?;
    let text =
        "[hypervisor.qemu]\npath = \"/opt/kata/bin/qemu-system-x86_64\"\n# a comment\n".repeat(5);
    fs::write(configuration, text)?;
    let mut programs = Vec::new();
    list(&parts.dir().join("tree"), &mut programs)?;
    // The order of a folder is not the same everywhere.
    programs.sort();
    ensure!(!programs.is_empty(), "the parts hold no files");
    let file = File::create(&image).with_context(|| format!("make {}", image.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let (mut written, used) = (0, size * USED / 100 / BLOCK * BLOCK);
    for path in programs.iter().cycle() {
        if written == used {
            break;
        }
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let taken = std::io::copy(&mut BufReader::new(file).take(used - written), &mut out)?;
        let padding = taken.next_multiple_of(BLOCK) - taken;
        out.write_all(&vec![0; usize::try_from(padding)?])?;
        written += taken + padding;
    }
    out.flush()?;
    out.get_ref().set_len(size)?;
    out.get_ref().sync_all()?;
    Ok(())
}

/// The regular files below a folder that are worth a block.
fn list(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(&entry.path(), found)?;
        } else if kind.is_file() && entry.metadata()?.len() >= BLOCK {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Packs [`FILES`] into a tar below `prefix`, compressed with zstd at its usual level.
///
/// # Errors
/// When something cannot be read or written.
pub(crate) fn pack_zstd(folder: &Path, prefix: &str, to: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("make {}", to.display()))?;
    let mut tar = tar::Builder::new(zstd::Encoder::new(file, zstd::DEFAULT_COMPRESSION_LEVEL)?);
    tar.sparse(false);
    for name in FILES {
        let mut file = File::open(folder.join(name))?;
        tar.append_file(format!("{prefix}/{name}"), &mut file)?;
    }
    tar.into_inner()?.finish()?.sync_all()?;
    Ok(())
}
