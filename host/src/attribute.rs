//! Writes to attributes of the kernel (sysfs), each with a deadline.
//!
//! Some writes wait in the kernel for something that may never come, and no signal ends the wait: taking a device from its
//! driver is one while a descriptor of it is open. A thread in such a wait keeps its process from ending. So each write is
//! done by a process of its own, a copy of this program, which is left behind when it does not end in time.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::Error;
use crate::command::ends_within;

/// The argument by which the program calls itself to write; see [`write_here`].
pub const WRITE_ATTRIBUTE: &str = "__write-attribute";

/// Why an attribute was not written.
#[derive(Debug, thiserror::Error)]
pub enum AttributeError {
    /// The kernel refused, or the write could not be started.
    #[error(transparent)]
    Io(#[from] Error),
    /// The kernel has not answered yet.
    #[error("{} took no answer within {} seconds; the write still waits in the kernel, as process {pid}", path.display(), deadline.as_secs())]
    Deadline {
        /// The attribute, as this process sees it.
        path: PathBuf,
        /// How long it had.
        deadline: Duration,
        /// The process that waits.
        pid: u32,
    },
}

/// Writes to an attribute that is there, in one write.
///
/// # Errors
/// [`AttributeError`] with the kernel's answer, or that there was none in time.
#[expect(
    clippy::disallowed_methods,
    reason = "this starts no host program, but a copy of this one"
)]
pub fn write(path: &Path, value: &str, deadline: Duration) -> Result<(), AttributeError> {
    let failed = |source: io::Error| Error::io("write", path)(source);
    let mut child = Command::new("/proc/self/exe")
        .arg(WRITE_ATTRIBUTE)
        .arg(path)
        .arg(value)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if !ends_within(&child, deadline).map_err(failed)? {
        // It ends as soon as the kernel lets it, if ever; waiting for that is what must not happen.
        let _ = child.kill();
        return Err(AttributeError::Deadline {
            path: path.to_owned(),
            deadline,
            pid: child.id(),
        });
    }
    let status = child.wait().map_err(failed)?;
    match status.code() {
        Some(0) => Ok(()),
        Some(errno) => Err(failed(io::Error::from_raw_os_error(errno)).into()),
        None => Err(failed(io::Error::other(status.to_string())).into()),
    }
}

/// The other half of [`write()`], in the copy: writes, and gives the error's number as the exit code, 0 for none. The binary's
/// main calls it when its first argument is [`WRITE_ATTRIBUTE`].
pub fn write_here(words: &[OsString]) -> u8 {
    let [path, value] = words else {
        return errno(&io::Error::from_raw_os_error(
            rustix::io::Errno::INVAL.raw_os_error(),
        ));
    };
    let result = OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_encoded_bytes()));
    result.map_or_else(|error| errno(&error), |()| 0)
}

fn errno(error: &io::Error) -> u8 {
    let unknown = rustix::io::Errno::IO.raw_os_error();
    let number = error.raw_os_error().unwrap_or(unknown);
    u8::try_from(number).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_tells_the_kernels_answer() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("attribute");
        let words = |path: &Path| vec![path.into(), OsString::from("value\n")];
        assert_eq!(write_here(&words(&file)), 2, "nothing is created");
        std::fs::write(&file, "").unwrap();
        assert_eq!(write_here(&words(&file)), 0);
        assert_eq!(std::fs::read(&file).unwrap(), b"value\n");
        assert_eq!(write_here(&[]), 22);
        assert_eq!(write_here(&words(Path::new("/dev/full"))), 28);
    }
}
