//! Namespaces and a work folder around a whole run, so that nothing of it survives: no process, mount, socket or file.
//!
//! The running program starts itself again, twice:
//!
//! 1. *outer*: makes the work folder, starts `unshare` (own mounts, network and processes), waits, removes the folder. A signal
//!    makes it kill `unshare`, which takes every process of the namespace along, however deep.
//! 2. *init*: the first process of the namespace. Gives it a `/run` of its own and a loopback device, and reaps orphans: a
//!    containerd's shims outlive their parents, and a zombie would look alive to whoever asks.
//! 3. *inside*: the program proper.

use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use rustix::process::{Pid, WaitOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::parts::Parts;
use crate::process;
use crate::registry::OUTSIDE;

const ROLE: &str = "KM_E2E_ROLE";
const WORK: &str = "KM_E2E_WORK";
/// Where the work folder shows inside: short, as a socket's path may have 108 bytes, and the same in every run.
const INSIDE: &str = "/run/km";
const PARTS: &str = "KM_E2E_PARTS";

/// Private mounts, network and processes; all processes die with `unshare` itself (util-linux 2.32 and later).
const UNSHARE: &[&str] = &[
    "unshare",
    "--mount",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
    "--",
];

/// Where the program stands after [`enter`].
#[derive(Debug)]
pub enum Entered {
    /// In the sandbox: go on.
    Inside(Sandbox),
    /// Outside, and the program inside has ended: exit with this code.
    Left(ExitCode),
    /// This machine cannot give a sandbox, and why: every test that needs one is to be reported as ignored.
    Unavailable(String),
}

/// A private machine: empty `/run`, loopback alone, a work folder on a real file system. Clones are the same sandbox.
#[derive(Clone, Debug)]
pub struct Sandbox {
    parts: Parts,
    work: PathBuf,
    next_port: Arc<AtomicU16>,
}

impl Sandbox {
    /// The programs that were asked for.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// A new empty folder, mode 0755, called `name`, or `name-2` and so on when that is taken. It lasts as long as the sandbox.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let mut path = self.work.join(name);
        for n in 2.. {
            match fs::create_dir(&path) {
                Ok(()) => break,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    path = self.work.join(format!("{name}-{n}"));
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("make {}", path.display()));
                }
            }
        }
        Ok(path)
    }

    /// The folder that all others lie in: a short name inside the sandbox, on a real file system outside.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// A TCP port that nobody else has been given: the network is ours alone, so counting is enough. The first is 5000.
    pub fn port(&self) -> u16 {
        self.next_port.fetch_add(1, Ordering::Relaxed)
    }

    /// Covers an existing folder (`/opt`, `/etc/kubernetes`) with an empty one in memory, within the sandbox only.
    ///
    /// # Errors
    /// When the kernel refuses the mount.
    pub fn cover(&self, folder: &Path) -> Result<()> {
        cover(folder, c"mode=0755")
    }

    /// A new folder as by [`Self::folder`], on a file system in memory that holds `mebibytes` MiB: a disk to fill up.
    ///
    /// # Errors
    /// When the kernel refuses the mount.
    pub fn small_disk(&self, name: &str, mebibytes: u32) -> Result<PathBuf> {
        let folder = self.folder(name)?;
        let options = CString::new(format!("mode=0755,size={mebibytes}m"))?;
        cover(&folder, &options)?;
        Ok(folder)
    }

    /// Covers a folder as [`Self::cover`] does, until the guard is dropped. A folder that is not there is made for as long; only the
    /// sandbox sees what is in it.
    ///
    /// # Errors
    /// When the kernel refuses the mount.
    pub fn make(&self, folder: &Path) -> Result<Shown> {
        let made = !folder.exists();
        if made {
            fs::create_dir(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let mut shown = Shown {
            path: folder.to_owned(),
            made,
            mounted: false,
        };
        cover(folder, c"mode=0755")?;
        shown.mounted = true;
        Ok(shown)
    }

    /// Shows devices of the machine under other names, in a folder that has nothing else, until the guard is dropped; else as
    /// [`Self::make`].
    ///
    /// # Errors
    /// When the kernel refuses a mount.
    pub fn devices(&self, folder: &Path, names: &[(&str, &str)]) -> Result<Shown> {
        let shown = self.make(folder)?;
        for (name, device) in names {
            let node = folder.join(name);
            fs::write(&node, "")?;
            mount_bind(*device, &node).with_context(|| format!("show {device} as {name}"))?;
        }
        Ok(shown)
    }

    /// Makes a folder read-only (EROFS, also for root) until the guard is dropped.
    ///
    /// # Errors
    /// When the kernel refuses the mount.
    pub fn read_only(&self, folder: &Path) -> Result<ReadOnly> {
        mount_bind(folder, folder)
            .and_then(|()| mount_remount(folder, MountFlags::BIND | MountFlags::RDONLY, c""))
            .with_context(|| format!("make {} read-only", folder.display()))?;
        Ok(ReadOnly(folder.to_owned()))
    }
}

/// What [`Sandbox::make`] and [`Sandbox::devices`] show, until this is dropped.
#[derive(Debug)]
pub struct Shown {
    path: PathBuf,
    made: bool,
    mounted: bool,
}

impl Drop for Shown {
    fn drop(&mut self) {
        // Should something stay, what a later test does there fails and says so.
        if self.mounted {
            let _ = unmount(&self.path, UnmountFlags::DETACH);
        }
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// A folder that is read-only until this is dropped.
#[derive(Debug)]
pub struct ReadOnly(PathBuf);

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // Should it stay mounted, what the test does next fails and says so.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Whether the running program is one of those that [`enter`] starts: what it prepares outside must not be done again.
pub fn is_inside() -> bool {
    std::env::var_os(ROLE).is_some()
}

/// Moves the running program into a sandbox that has `groups` of [`Parts`].
///
/// Call it first in `main`, before any thread is started.
///
/// # Errors
/// When something breaks that should work on any machine that can give a sandbox.
pub fn enter(groups: &[&str]) -> Result<Entered> {
    match std::env::var(ROLE).as_deref() {
        Ok("init") => {
            prepare().context("prepare the sandbox")?;
            let status = init().context("first process of the sandbox")?;
            Ok(Entered::Left(code(status)))
        }
        Ok("inside") => Ok(Entered::Inside(Sandbox {
            parts: Parts::at(&from_env(PARTS)?)?,
            work: PathBuf::from(INSIDE),
            next_port: Arc::new(AtomicU16::new(5000)),
        })),
        _ => outer(groups),
    }
}

fn from_env(name: &str) -> Result<PathBuf> {
    let value = std::env::var_os(name).with_context(|| format!("{name} is not set"))?;
    Ok(PathBuf::from(value))
}

fn outer(groups: &[&str]) -> Result<Entered> {
    if let Err(reason) = available() {
        return Ok(Entered::Unavailable(format!("{reason:#}")));
    }
    let parts = match Parts::get(groups) {
        Ok(parts) => parts,
        Err(reason) => return Ok(Entered::Unavailable(format!("{reason:#}"))),
    };
    let work = tempfile::Builder::new()
        .prefix("kata-manager-e2e-")
        .tempdir()
        .context("make the work folder")?;
    let cgroups = Cgroups::observe();
    let exit = supervise(&parts, work.path())?;
    cgroups.remove_new();
    remove(work.keep());
    Ok(Entered::Left(exit))
}

/// Whether this machine lets us make namespaces.
fn available() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "needs root, for namespaces, mounts and containers"
    );
    let mut probe = Command::new("setpriv");
    probe
        .args(["--pdeathsig", "KILL"])
        .args(UNSHARE)
        .arg("true");
    process::run(&mut probe, Duration::from_secs(10))?
        .success()
        .context("namespaces are not to be had here")?;
    Ok(())
}

/// Starts the program in its namespaces and waits for it, or for a signal.
fn supervise(parts: &Parts, work: &Path) -> Result<ExitCode> {
    let me = std::env::current_exe().context("find this program")?;
    let mut command = tokio::process::Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .args(UNSHARE)
        .arg(me)
        .args(std::env::args_os().skip(1))
        .env(ROLE, "init")
        .env(WORK, work)
        .env(PARTS, parts.dir());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime for signals")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut child = command.spawn().context("start the sandbox")?;
        let number = tokio::select! {
            status = child.wait() => return Ok(code(status.context("wait for the sandbox")?)),
            _ = interrupt.recv() => 2,
            _ = terminate.recv() => 15,
            _ = hangup.recv() => 1,
        };
        child.kill().await.context("end the sandbox")?;
        Ok(ExitCode::from(128 + number))
    })
}

/// The exit code that stands for how a program ended, as a shell gives it.
fn code(status: ExitStatus) -> ExitCode {
    let number = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}

/// Makes the namespace's own `/run` and loopback device.
fn prepare() -> Result<()> {
    // Shim sockets (/run/containerd/s) and runc's state (/run/containerd/runc) are hardwired there.
    let work = from_env(WORK)?;
    cover(Path::new("/run"), c"mode=0755")?;
    fs::create_dir(INSIDE).context("make the work folder's mount point")?;
    mount_bind(&work, INSIDE).with_context(|| format!("show {} as {INSIDE}", work.display()))?;
    let parts = Parts::at(&from_env(PARTS)?)?;
    let outside = format!("{OUTSIDE}/32");
    for words in [
        &["ip", "link", "set", "lo", "up"][..],
        &["ip", "address", "add", &outside, "dev", "lo"],
    ] {
        process::run(
            Command::new(parts.busybox()).args(words),
            Duration::from_secs(5),
        )?
        .success()
        .context("set up the loopback device")?;
    }
    Ok(())
}

fn cover(folder: &Path, options: &CStr) -> Result<()> {
    mount(
        "tmpfs",
        folder,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(options),
    )
    .with_context(|| format!("cover {} with an empty folder", folder.display()))
}

/// Starts the program proper and reaps everything until it ends.
fn init() -> Result<ExitStatus> {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let child = Command::new(std::env::current_exe()?)
        .args(args)
        .env(ROLE, "inside")
        .spawn()
        .context("start the program in the sandbox")?;
    let wanted = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == wanted => {
                return Ok(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => bail!("wait for the program in the sandbox: {error}"),
        }
    }
}

/// Removes the work folder. Processes of the namespace may need a moment to be gone after a kill.
fn remove(work: PathBuf) {
    let removed = crate::wait::until(
        "the work folder to be removable",
        Duration::from_secs(5),
        || match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        },
    );
    if let Err(error) = removed {
        eprint_line(&format!("cannot remove {}: {error:#}", work.display()));
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a test program")]
fn eprint_line(text: &str) {
    eprintln!("{text}");
}

/// The folders named `k8s.io` that containerd leaves in the cgroup file systems, which no namespace hides.
struct Cgroups {
    before: Vec<PathBuf>,
}

impl Cgroups {
    fn observe() -> Self {
        Self {
            before: Self::now(),
        }
    }

    fn now() -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = fs::read_dir(root).into_iter().flatten().flatten();
        controllers
            .map(|entry| entry.path().join("k8s.io"))
            .chain([root.join("k8s.io")])
            .filter(|path| path.is_dir())
            .collect()
    }

    /// Removes what was not there before. Best effort: a cgroup that is still in use stays, and harms nobody.
    fn remove_new(&self) {
        for path in Self::now() {
            if !self.before.contains(&path) {
                remove_cgroup(&path);
            }
        }
    }
}

/// Removes a cgroup with those below it: only folders can be removed, the files in them are the kernel's.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    drop(fs::remove_dir(path));
}
