//! The command line that shows the end of a unit's log.

use std::ffi::OsString;
use std::time::{SystemTime, UNIX_EPOCH};

/// Lines of log to show: a screen of a terminal, more than a daemon writes when it fails to start.
const LINES: u32 = 40;

/// The command line that prints the last 40 lines that a unit logged since a moment, oldest first; nothing if there
/// are none. systemd's D-Bus interface has no logs, so the caller runs this program in the host's root, where both
/// `journalctl` and the journal are. A `since` before 1970 counts as 1970.
///
/// Options are those of journalctl(1); the form of the time is that of systemd.time(7).
pub fn log_tail_argv(unit: &str, since: SystemTime) -> Vec<OsString> {
    let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = format!("--since=@{}.{:06}", since.as_secs(), since.subsec_micros());
    // The unit is part of its option, so that no name can be taken for another option.
    let (unit, lines) = (format!("--unit={unit}"), format!("--lines={LINES}"));
    [
        "journalctl",
        "--no-pager",
        "--quiet",
        "--output=short-iso",
        &unit,
        &since,
        &lines,
    ]
    .map(OsString::from)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_command_line_names_unit_and_time() {
        let argv = log_tail_argv(
            "containerd.service",
            UNIX_EPOCH + Duration::new(1_700_000_000, 5_000),
        );
        let argv: Vec<&str> = argv.iter().map(|part| part.to_str().unwrap()).collect();
        assert_eq!(
            argv,
            [
                "journalctl",
                "--no-pager",
                "--quiet",
                "--output=short-iso",
                "--unit=containerd.service",
                "--since=@1700000000.000005",
                "--lines=40"
            ]
        );
    }

    #[test]
    fn a_time_before_1970_is_1970() {
        let argv = log_tail_argv("a.service", UNIX_EPOCH - Duration::from_secs(1));
        assert!(argv.contains(&OsString::from("--since=@0.000000")));
    }
}
