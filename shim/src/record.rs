//! The shim's own log: one entry for each prepared or refused sandbox. To journald where it is, else to a file of bounded size. Nothing
//! here can fail a start, and nothing waits.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;

use km_host::{HostPath, Root};

/// journald's socket (systemd, "Native Journal Protocol").
const JOURNAL: &str = "/run/systemd/journal/socket";

/// The file where journald is not.
const FILE: &str = "/run/kata-manager/shim.log";

/// The size in bytes at which the file begins anew: some thousand sandboxes.
const FULL: u64 = 1 << 20;

/// How bad it is (syslog(3)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The sandbox does not start.
    Error = 3,
    /// It was prepared.
    Info = 6,
}

/// Says something about a sandbox.
pub fn say(root: &Root, level: Level, sandbox: &str, message: &str) {
    let line = message.replace('\n', " ");
    if !to_journal(root, level, sandbox, &line) {
        // There is nowhere left to say that this failed.
        let _ = to_file(root, level, sandbox, &line);
    }
}

fn to_journal(root: &Root, level: Level, sandbox: &str, line: &str) -> bool {
    let entry = format!(
        "MESSAGE=sandbox {sandbox}: {line}\nPRIORITY={}\nSYSLOG_IDENTIFIER=kata-manager-shim\nKATA_MANAGER_SANDBOX={sandbox}\n",
        level as u8
    );
    let send = || {
        let path = root.resolve(&HostPath::new(JOURNAL).ok()?).ok()?;
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_nonblocking(true).ok()?;
        socket.send_to(entry.as_bytes(), path).ok()
    };
    send().is_some()
}

fn to_file(root: &Root, level: Level, sandbox: &str, line: &str) -> Option<()> {
    let path = root.resolve(&HostPath::new(FILE).ok()?).ok()?;
    km_host::atomic::create_dir_all(path.parent()?, 0o755).ok()?;
    if fs::metadata(&path).is_ok_and(|meta| meta.len() > FULL) {
        fs::rename(&path, path.with_extension("log.1")).ok()?;
    }
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(&path)
        .ok()?;
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().ok()?;
    // One write: entries of several shims do not mix.
    let entry = format!(
        "{}.{:03} <{}> sandbox {sandbox}: {line}\n",
        now.as_secs(),
        now.subsec_millis(),
        level as u8
    );
    file.write_all(entry.as_bytes()).ok()
}
