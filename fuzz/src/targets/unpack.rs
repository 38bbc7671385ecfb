//! Archives of strangers, in each format: no panic, and every name that comes out is harmless.

use std::convert::Infallible;

use km_artifacts::Limits;
use km_artifacts::unpack::{Format, NewFile, Output, normalise, unpack};

/// Counts, and holds the sizes against what was announced.
struct Count;

impl Output for Count {
    type Open = (u64, u64);
    type File = u64;
    type Error = Infallible;

    fn begin(&mut self, file: &NewFile) -> Result<(u64, u64), Infallible> {
        Ok((file.size, 0))
    }

    fn write(&mut self, open: &mut (u64, u64), bytes: &[u8]) -> Result<(), Infallible> {
        open.1 += bytes.len() as u64;
        assert!(open.1 <= open.0, "more than was announced");
        Ok(())
    }

    fn hole(&mut self, open: &mut (u64, u64), bytes: u64) -> Result<(), Infallible> {
        open.1 += bytes;
        assert!(open.1 <= open.0, "more than was announced");
        Ok(())
    }

    fn end(&mut self, (announced, got): (u64, u64)) -> Result<u64, Infallible> {
        assert_eq!(announced, got, "a file ended early and was taken");
        Ok(got)
    }
}

pub(crate) fn run(bytes: &[u8]) {
    let Some((first, archive)) = bytes.split_first() else {
        return;
    };
    let format = match first % 3 {
        0 => Format::Tar,
        1 => Format::TarGzip,
        _ => Format::TarZstd,
    };
    let limits = Limits {
        entries: 1000,
        unpacked_bytes: 16 << 20,
        ..Limits::default()
    };
    let Ok(unpacked) = unpack(archive, format, &limits, &mut Count, &mut |_| {}) else {
        return;
    };
    for (path, _) in &unpacked.files {
        assert_eq!(normalise(path.as_bytes()).as_ref(), Ok(path));
    }
    for (path, target) in &unpacked.links {
        assert_eq!(normalise(path.as_bytes()).as_ref(), Ok(path));
        assert!(!target.starts_with('/'), "a link leads out: {target}");
    }
}
