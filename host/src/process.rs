//! Other processes of the host: who answers a socket, what they run, what they hold open.
//!
//! Everything is read from `<root>/proc` (proc(5)) and may vanish while it is read; what has vanished is left out.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::{Error, HostPath, Root};

/// A process found on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its process id as the host's `/proc` has it.
    pub pid: u32,
    /// The program that it runs, as the host sees it; `None` when it cannot be read or has been replaced on disk.
    pub exe: Option<PathBuf>,
    /// Its command's short name (proc_pid_comm(5)).
    pub name: String,
}

/// The process that listens on a unix socket; `None` when nobody does, or in another PID namespace is not found.
///
/// The kernel tells it (`SO_PEERCRED`, unix(7)), but not to a process in another PID namespace, such as a container's. There it is
/// looked up in the host's `/proc`.
///
/// # Errors
/// When the socket is there and cannot be asked; also when its owner takes no connections and cannot be found otherwise.
pub fn socket_peer(root: &Root, socket: &Path) -> Result<Option<Process>, Error> {
    let kernel_tells = own_pid(root).is_none_or(|pid| pid == std::process::id());
    let pid = match connect(socket).map_err(Error::io("connect to", socket))? {
        Answer::Nobody => return Ok(None),
        Answer::Connected(connection) if kernel_tells => {
            let peer = socket_peercred(&connection);
            let peer = peer.map_err(Error::io("ask the peer of", socket))?;
            Some(peer.pid.as_raw_nonzero().get().unsigned_abs())
        }
        Answer::Connected(_) => listener(root, socket),
        Answer::Full => Some(listener(root, socket).ok_or_else(|| busy(socket))?),
    };
    Ok(pid.and_then(|pid| describe(root, pid)))
}

fn busy(socket: &Path) -> Error {
    let why = "its process takes no connections: it hangs, or has too many; look at its log, or restart it";
    Error::io("connect to", socket)(io::Error::new(io::ErrorKind::WouldBlock, why))
}

/// Whether anybody listens on a unix socket. It is not waited for, so one that is too busy to take the connection counts as well.
pub fn is_served(socket: &Path) -> bool {
    matches!(connect(socket), Ok(Answer::Connected(_) | Answer::Full))
}

/// What a unix socket answers at once.
enum Answer {
    Connected(OwnedFd),
    /// Its queue of connections is full: somebody listens, and does not come to take them.
    Full,
    Nobody,
}

/// Connects without waiting: connect(2) to a socket whose queue is full blocks until its owner takes a connection, which may be never.
fn connect(socket: &Path) -> Result<Answer, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connection = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match net::connect(&connection, &SocketAddrUnix::new(socket)?) {
        Ok(()) => Ok(Answer::Connected(connection)),
        Err(Errno::AGAIN) => Ok(Answer::Full),
        Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(Answer::Nobody),
        Err(errno) => Err(errno),
    }
}

/// Our process id as the host's `/proc` has it; none where we are not in it.
fn own_pid(root: &Root) -> Option<u32> {
    let told = fs::read_link(proc_dir(root).join("self")).ok()?;
    told.to_str()?.parse().ok()
}

/// `__SO_ACCEPTCON` (include/uapi/linux/net.h): a socket that listens, in the fourth column of `/proc/net/unix`.
const LISTENS: &str = "00010000";

/// The process in whose hands a listening socket of the host is. systemd may hold a unit's socket too, so process 1 counts last.
fn listener(root: &Root, socket: &Path) -> Option<u32> {
    let proc = proc_dir(root);
    let wanted = identity(socket)?;
    // Process 1 is in the host's network namespace; we need not be.
    let table = fs::read_to_string(proc.join("1/net/unix")).ok()?;
    let inode = table.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (flags, inode, path) = (words.nth(3)?, words.nth(2)?, words.next()?);
        let path = root.resolve(&HostPath::new(path).ok()?).ok()?;
        (flags == LISTENS && identity(&path) == Some(wanted)).then_some(inode)
    })?;
    let name = PathBuf::from(format!("socket:[{inode}]"));
    let holds = |pid: &u32| {
        let files = fs::read_dir(proc.join(pid.to_string()).join("fd"));
        let mut files = files.into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|target| target == name))
    };
    let mut pids: Vec<u32> = fs::read_dir(&proc)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_by_key(|pid| (*pid == 1, *pid));
    pids.into_iter().find(holds)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// What is known of a process; `None` when it is gone.
pub fn describe(root: &Root, pid: u32) -> Option<Process> {
    let dir = proc_dir(root).join(pid.to_string());
    let name = fs::read_to_string(dir.join("comm"))
        .ok()?
        .trim_end()
        .to_owned();
    let exe = fs::read_link(dir.join("exe"))
        .ok()
        .filter(|exe| !exe.to_string_lossy().ends_with(" (deleted)"));
    Some(Process { pid, exe, name })
}

/// A variable of a process's environment at its start.
pub fn environment_variable(root: &Root, pid: u32, name: &str) -> Option<OsString> {
    let bytes = fs::read(proc_dir(root).join(pid.to_string()).join("environ")).ok()?;
    bytes.split(|byte| *byte == 0).find_map(|pair| {
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(OsString::from_vec(value.to_owned()))
    })
}

/// The words of a process's command line.
pub fn arguments(root: &Root, pid: u32) -> Option<Vec<OsString>> {
    let bytes = fs::read(proc_dir(root).join(pid.to_string()).join("cmdline")).ok()?;
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    Some(
        bytes
            .split(|byte| *byte == 0)
            .map(|word| OsString::from_vec(word.to_owned()))
            .collect(),
    )
}

/// The processes that have a file below `dir` open or mapped, with one such file each. `dir` is a path of ours; inodes are
/// compared, so that it does not matter under which name or in which mount namespace a process opened the file.
///
/// # Errors
/// When `/proc` or `dir` cannot be listed.
pub fn holders(root: &Root, dir: &Path) -> Result<Vec<(Process, PathBuf)>, Error> {
    let files = inodes_below(dir)?;
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let proc = proc_dir(root);
    let own = own_pid(root);
    let mut found = Vec::new();
    for entry in fs::read_dir(&proc)
        .map_err(Error::io("list", &proc))?
        .flatten()
    {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if Some(pid) == own {
            continue;
        }
        let held = ["fd", "map_files"]
            .iter()
            .find_map(|kind| held_file(&entry.path().join(kind), &files));
        if let (Some(path), Some(process)) = (held, describe(root, pid)) {
            found.push((process, path));
        }
    }
    Ok(found)
}

type Inodes = std::collections::HashMap<(u64, u64), PathBuf>;

fn held_file(links: &Path, files: &Inodes) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    fs::read_dir(links).ok()?.flatten().find_map(|link| {
        let meta = fs::metadata(link.path()).ok()?;
        files.get(&(meta.dev(), meta.ino())).cloned()
    })
}

fn inodes_below(dir: &Path) -> Result<Inodes, Error> {
    use std::os::unix::fs::MetadataExt;
    let mut files = Inodes::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("list", &folder)(error)),
        };
        for entry in entries.flatten() {
            let Ok(meta) = fs::symlink_metadata(entry.path()) else {
                continue;
            };
            if meta.is_dir() {
                folders.push(entry.path());
            } else if meta.is_file() {
                files.insert((meta.dev(), meta.ino()), entry.path());
            }
        }
    }
    Ok(files)
}

/// An open file of a process, as its link in `/proc/<pid>/fd` shows it.
#[derive(Debug)]
pub struct OpenFile<'a> {
    proc: &'a Path,
    number: &'a str,
    name: String,
}

/// What a walk through open files could not see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// How many processes' open files could not be listed.
    pub unseen: usize,
}

impl OpenFile<'_> {
    /// Its path in the process's mount namespace, or the kernel's name for it, such as `anon_inode:[vfio-device]`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its major and minor numbers when it is a character or block device. A file system that does not answer is not waited
    /// for (statx(2), `AT_STATX_DONT_SYNC`).
    pub fn device_number(&self) -> Option<(u32, u32)> {
        use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
        if !self.name.starts_with('/') {
            return None;
        }
        let link = self.proc.join("fd").join(self.number);
        let stat = rustix::fs::statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
        matches!(
            FileType::from_raw_mode(stat.stx_mode.into()),
            FileType::CharacterDevice | FileType::BlockDevice
        )
        .then_some((stat.stx_rdev_major, stat.stx_rdev_minor))
    }

    /// What `/proc/<pid>/fdinfo` tells of it, at most 4 KiB.
    pub fn info(&self) -> Option<String> {
        use std::io::Read;
        let mut text = Vec::new();
        fs::File::open(self.proc.join("fdinfo").join(self.number))
            .ok()?
            .take(4096)
            .read_to_end(&mut text)
            .ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Shows every open file of every other process that is a path or an anonymous inode to `see`; sockets and pipes are passed
/// over.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn open_devices(root: &Root, see: &mut dyn FnMut(u32, &OpenFile<'_>)) -> Result<Walk, Error> {
    let proc = proc_dir(root);
    let mut walk = Walk::default();
    let own = own_pid(root);
    let entries = fs::read_dir(&proc).map_err(Error::io("list", &proc))?;
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if Some(pid) == own {
            continue;
        }
        let proc = entry.path();
        match fs::read_dir(proc.join("fd")) {
            Ok(links) => links
                .flatten()
                .for_each(|link| show(&proc, pid, &link, see)),
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => walk.unseen += 1,
        }
    }
    Ok(walk)
}

fn show(proc: &Path, pid: u32, link: &fs::DirEntry, see: &mut dyn FnMut(u32, &OpenFile<'_>)) {
    let (Ok(target), number) = (fs::read_link(link.path()), link.file_name()) else {
        return;
    };
    let (name, Some(number)) = (target.to_string_lossy().into_owned(), number.to_str()) else {
        return;
    };
    if name.starts_with('/') || name.starts_with("anon_inode:") {
        see(pid, &OpenFile { proc, number, name });
    }
}

fn proc_dir(root: &Root) -> PathBuf {
    root.path().join("proc")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_peer_of_a_socket_is_found_and_an_absent_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new("/").unwrap();
        let socket = dir.path().join("s");
        assert_eq!(socket_peer(&root, &socket).unwrap(), None);
        let listener = UnixListener::bind(&socket).unwrap();
        let peer = socket_peer(&root, &socket).unwrap().unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.exe, std::env::current_exe().ok());
        assert!(environment_variable(&root, peer.pid, "PATH").is_some());
        assert_eq!(environment_variable(&root, peer.pid, "PAT"), None);
        assert!(!arguments(&root, peer.pid).unwrap().is_empty());
        drop(listener);
        assert_eq!(socket_peer(&root, &socket).unwrap(), None);
    }

    #[test]
    fn a_listener_is_found_without_being_asked() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new("/").unwrap();
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        // Process 1 may be in another network namespace than this test, and then knows no such socket.
        let in_table = |path: &str| {
            let table = fs::read_to_string(path).unwrap_or_default();
            table.contains(socket.to_str().unwrap())
        };
        assert!(in_table("/proc/self/net/unix"));
        let expected = in_table("/proc/1/net/unix").then(std::process::id);
        assert_eq!(listener(&root, &socket), expected);
        assert_eq!(listener(&root, &dir.path().join("other")), None);
        assert_eq!(own_pid(&root), Some(std::process::id()));
    }

    #[test]
    fn a_listener_that_takes_no_connection_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new("/").unwrap();
        let socket = dir.path().join("s");
        let bound = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        net::bind(&bound, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        assert!(!is_served(&socket), "nobody listens yet");
        net::listen(&bound, 0).unwrap();
        let mut waiting = Vec::new();
        while let Answer::Connected(connection) = connect(&socket).unwrap() {
            waiting.push(connection);
        }
        assert!(!waiting.is_empty());
        assert!(is_served(&socket));
        // The table of process 1 tells whose it is, where this test is in the same network namespace.
        if let Some(pid) = listener(&root, &socket) {
            assert_eq!(pid, std::process::id());
            assert_eq!(socket_peer(&root, &socket).unwrap(), describe(&root, pid));
        }
        let without_proc = Root::new(dir.path()).unwrap();
        let error = socket_peer(&without_proc, &socket).unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("takes no connections"), "{error}: {why}");
    }

    #[test]
    fn holders_are_found_by_inode() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new("/").unwrap();
        fs::create_dir(dir.path().join("generation")).unwrap();
        fs::write(dir.path().join("image"), b"x").unwrap();
        fs::hard_link(
            dir.path().join("image"),
            dir.path().join("generation/image"),
        )
        .unwrap();
        assert!(
            holders(&root, &dir.path().join("generation"))
                .unwrap()
                .is_empty()
        );
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(fs::File::open(dir.path().join("image")).unwrap())
            .spawn()
            .unwrap();
        let found = holders(&root, &dir.path().join("generation")).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0.pid, child.id());
        assert_eq!(found[0].1, dir.path().join("generation/image"));
    }
}
