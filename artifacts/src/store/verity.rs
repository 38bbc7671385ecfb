//! fs-verity: the kernel refuses every write to a file for good, root's too, and checks each page that is read against a tree of
//! hashes (<https://docs.kernel.org/filesystems/fsverity.html>). It must not know what the files are.

use std::fs::File;
use std::path::Path;

use km_host::Error as HostError;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use crate::error::Result;

/// `FS_VERITY_HASH_ALG_SHA256` (include/uapi/linux/fsverity.h).
const SHA256: u32 = 1;

/// Bytes that one hash is of: the only size that every file system with fs-verity takes.
const BLOCK: u32 = 4096;

/// `struct fsverity_enable_arg` (include/uapi/linux/fsverity.h).
#[repr(C)]
struct Enable {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt: u64,
    signature_size: u32,
    reserved: u32,
    signature: u64,
    reserved_too: [u64; 11],
}

/// `FS_IOC_ENABLE_VERITY` (include/uapi/linux/fsverity.h).
const ENABLE: Opcode = opcode::write::<Enable>(b'f', 133);

/// Seals a file that nobody has open for writing, where the file system can. It is an extra: without it, everything else works as
/// before. A sealed file can be removed as any other, and its mode, owner and names can be changed.
///
/// # Errors
/// When the file cannot be opened or the disk fails.
pub(super) fn seal(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(HostError::io("open", path))?;
    let enable = Enable {
        version: 1,
        hash_algorithm: SHA256,
        block_size: BLOCK,
        salt_size: 0,
        salt: 0,
        signature_size: 0,
        reserved: 0,
        signature: 0,
        reserved_too: [0; 11],
    };
    #[expect(unsafe_code, reason = "rustix has no call for it")]
    // SAFETY: the request's argument is a pointer to this structure, which it reads; nothing in it points anywhere.
    let sealed = unsafe { ioctl(&file, Setter::<ENABLE, Enable>::new(enable)) };
    match sealed {
        // Another link of the same content may have been sealed.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        // The file system has none, has it switched off, has blocks that it does not fit, or the kernel is built without.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOPKG | Errno::NOSYS) => Ok(()),
        Err(Errno::IO) => Err(HostError::io("switch fs-verity on for", path)(Errno::IO).into()),
        // No right to write, no room for the hashes, a reader with write access: the file is as good as on any other file system.
        Err(errno) => {
            let path = path.display();
            tracing::warn!("cannot switch fs-verity on for {path}: {errno}");
            Ok(())
        }
    }
}

/// Whether the kernel guards a file: statx(2), `STATX_ATTR_VERITY`.
///
/// # Errors
/// When the disk fails. A file that is not there is not sealed.
pub(super) fn is_sealed(path: &Path) -> Result<bool> {
    match rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::VERITY)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(HostError::io("look at", path)(errno).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_the_kernels() {
        assert_eq!(size_of::<Enable>(), 128);
        assert_eq!(ENABLE, 0x4080_6685);
    }

    #[test]
    fn a_file_stays_readable_whether_it_can_be_sealed_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "content").unwrap();
        seal(&path).unwrap();
        seal(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
        let appended = std::fs::File::options().append(true).open(&path);
        assert_eq!(appended.is_err(), is_sealed(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!is_sealed(&path).unwrap());
        assert!(seal(&path).is_err());
    }
}
