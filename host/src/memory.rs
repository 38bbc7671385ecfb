//! How much memory a host has.

use std::fs;

use crate::{Error, Root};

/// The host's memory in MiB (`MemTotal` of `/proc/meminfo`, proc_meminfo(5)); `None` where that is not told.
///
/// # Errors
/// When it is there and cannot be read.
pub fn total_mib(root: &Root) -> Result<Option<u64>, Error> {
    let path = root.path().join("proc/meminfo");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", &path)(error)),
    }
}

fn parse(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_mib() {
        let text = "MemTotal:       2113456789 kB\nMemFree: 1 kB\n";
        assert_eq!(parse(text), Some(2_063_922));
        assert_eq!(parse("MemFree: 1 kB\n"), None);
        assert_eq!(parse("MemTotal: many kB\n"), None);
        assert!(total_mib(&Root::new("/").unwrap()).unwrap() > Some(64));
    }
}
