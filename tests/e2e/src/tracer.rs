//! Runs a program and makes one of its system calls go wrong: the program is killed there, or the call fails, or does less.
//!
//! Like `strace -e inject`, with two differences that make a fault exact and worth repeating: calls are counted over all
//! threads of the program together, where strace counts for each thread; and only calls that concern one folder, or a
//! socket, are counted, so that no fault is spent on the loading of libraries.
//!
//! x86_64 alone: the harness's programs are for it, too.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno as NixErrno;
use nix::libc::{self, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::io::Errno;

use crate::process::{Finished, read_back};

/// A shell's script that stops, so that it can be seized, and then becomes the program in its arguments.
pub const HOLD: &str = "kill -STOP $$; exec \"$0\" \"$@\"";

/// How a call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The program is killed (SIGKILL) in place of the call.
    Kill,
    /// The call does not happen, and gives this error.
    Error(Errno),
    /// It reads or writes half of the bytes.
    Short,
}

/// Which call goes wrong.
#[derive(Clone, Debug)]
pub struct Injection {
    /// Only calls of this name on the folder count; every one, those on sockets included, when there is none.
    pub call: Option<String>,
    /// The number of the call among those that count, from 1.
    pub nth: usize,
    /// What happens to it.
    pub fault: Fault,
    /// And to all those that count after it.
    pub lasting: bool,
}

/// A call that the program made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The system call's name.
    pub name: &'static str,
    /// The path below the folder; none for a socket.
    pub path: Option<PathBuf>,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}({})", self.name, path.display()),
            None => write!(f, "{}(a socket)", self.name),
        }
    }
}

/// How a traced program ended.
#[derive(Debug)]
pub struct Traced {
    /// As for any other program.
    pub finished: Finished,
    /// What it called, in order.
    pub calls: Vec<Call>,
    /// The first call that went wrong; none when the program ended before.
    pub hit: Option<Call>,
}

/// Which of a call's arguments say what it concerns.
#[derive(Clone, Copy)]
enum Concerns {
    /// A descriptor.
    Fd(usize),
    /// A path.
    Path(usize),
    /// A descriptor of a folder, and after it a path.
    At(usize),
    /// Two paths.
    Paths(usize, usize),
    /// Twice a folder and a path.
    Ats(usize, usize),
}

use Concerns::{At, Ats, Fd, Path as Named, Paths};

/// The calls by which a program changes or looks at files, and speaks over sockets.
const CALLS: &[(libc::c_long, &str, Concerns)] = &[
    (libc::SYS_read, "read", Fd(0)),
    (libc::SYS_pread64, "pread64", Fd(0)),
    (libc::SYS_readv, "readv", Fd(0)),
    (libc::SYS_preadv, "preadv", Fd(0)),
    (libc::SYS_write, "write", Fd(0)),
    (libc::SYS_pwrite64, "pwrite64", Fd(0)),
    (libc::SYS_writev, "writev", Fd(0)),
    (libc::SYS_pwritev, "pwritev", Fd(0)),
    (libc::SYS_copy_file_range, "copy_file_range", Fd(2)),
    (libc::SYS_sendfile, "sendfile", Fd(0)),
    (libc::SYS_fsync, "fsync", Fd(0)),
    (libc::SYS_fdatasync, "fdatasync", Fd(0)),
    (libc::SYS_syncfs, "syncfs", Fd(0)),
    (libc::SYS_sync_file_range, "sync_file_range", Fd(0)),
    (libc::SYS_fallocate, "fallocate", Fd(0)),
    (libc::SYS_ftruncate, "ftruncate", Fd(0)),
    (libc::SYS_fchmod, "fchmod", Fd(0)),
    (libc::SYS_fchown, "fchown", Fd(0)),
    (libc::SYS_fstat, "fstat", Fd(0)),
    (libc::SYS_lseek, "lseek", Fd(0)),
    (libc::SYS_flock, "flock", Fd(0)),
    (libc::SYS_fcntl, "fcntl", Fd(0)),
    (libc::SYS_ioctl, "ioctl", Fd(0)),
    (libc::SYS_getdents64, "getdents64", Fd(0)),
    (libc::SYS_fstatfs, "fstatfs", Fd(0)),
    (libc::SYS_connect, "connect", Fd(0)),
    (libc::SYS_sendto, "sendto", Fd(0)),
    (libc::SYS_recvfrom, "recvfrom", Fd(0)),
    (libc::SYS_sendmsg, "sendmsg", Fd(0)),
    (libc::SYS_recvmsg, "recvmsg", Fd(0)),
    (libc::SYS_open, "open", Named(0)),
    (libc::SYS_stat, "stat", Named(0)),
    (libc::SYS_lstat, "lstat", Named(0)),
    (libc::SYS_statfs, "statfs", Named(0)),
    (libc::SYS_access, "access", Named(0)),
    (libc::SYS_readlink, "readlink", Named(0)),
    (libc::SYS_mkdir, "mkdir", Named(0)),
    (libc::SYS_rmdir, "rmdir", Named(0)),
    (libc::SYS_unlink, "unlink", Named(0)),
    (libc::SYS_chmod, "chmod", Named(0)),
    (libc::SYS_truncate, "truncate", Named(0)),
    (libc::SYS_symlink, "symlink", Named(1)),
    (libc::SYS_rename, "rename", Paths(0, 1)),
    (libc::SYS_link, "link", Paths(0, 1)),
    (libc::SYS_openat, "openat", At(0)),
    (libc::SYS_openat2, "openat2", At(0)),
    (libc::SYS_newfstatat, "newfstatat", At(0)),
    (libc::SYS_statx, "statx", At(0)),
    (libc::SYS_faccessat2, "faccessat2", At(0)),
    (libc::SYS_readlinkat, "readlinkat", At(0)),
    (libc::SYS_mkdirat, "mkdirat", At(0)),
    (libc::SYS_unlinkat, "unlinkat", At(0)),
    (libc::SYS_fchmodat, "fchmodat", At(0)),
    (libc::SYS_utimensat, "utimensat", At(0)),
    (libc::SYS_symlinkat, "symlinkat", At(1)),
    (libc::SYS_renameat, "renameat", Ats(0, 2)),
    (libc::SYS_renameat2, "renameat2", Ats(0, 2)),
    (libc::SYS_linkat, "linkat", Ats(0, 2)),
];

/// Whether a call takes a number of bytes as its third argument, so that it can be given fewer.
pub fn moves_bytes(name: &str) -> bool {
    matches!(name, "read" | "pread64" | "write" | "pwrite64")
}

/// Whether a call finds something by its name, so that it can fail because there is none.
pub fn names_something(name: &str) -> bool {
    let known = CALLS.iter().find(|(_, known, _)| *known == name);
    known.is_some_and(|(.., concerns)| !matches!(concerns, Fd(_)))
}

/// Runs a command that begins with [`HOLD`] to its end.
///
/// # Errors
/// When it cannot be traced, or `deadline` passes.
pub fn run(
    mut command: Command,
    folder: &Path,
    injection: Option<&Injection>,
    deadline: Duration,
) -> Result<Traced> {
    let mut out = tempfile::tempfile().context("temporary file for output")?;
    let mut err = tempfile::tempfile().context("temporary file for output")?;
    command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?);
    let started = Instant::now();
    let mut tracer = Tracer {
        folder: folder.to_owned(),
        injection: injection.cloned(),
        memory: None,
        counted: 0,
        calls: Vec::new(),
        hit: None,
        answers: HashMap::new(),
    };
    // A thread of its own has no children but this one: waiting for any then takes no other's.
    let ended = std::thread::scope(|scope| {
        let traced = scope.spawn(|| tracer.trace(&mut command, deadline));
        traced
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let finished = Finished {
        stdout: read_back(&mut out)?,
        stderr: read_back(&mut err)?,
        took: started.elapsed(),
        status: ended.context("trace a program")?,
    };
    if finished.took > deadline {
        bail!("it did not end in {deadline:?}, and {finished}");
    }
    Ok(Traced {
        finished,
        calls: tracer.calls,
        hit: tracer.hit,
    })
}

struct Tracer {
    folder: PathBuf,
    injection: Option<Injection>,
    /// The program's, once it runs.
    memory: Option<File>,
    counted: usize,
    calls: Vec<Call>,
    hit: Option<Call>,
    /// What to answer to threads whose call was taken away.
    answers: HashMap<Pid, Errno>,
}

impl Tracer {
    fn trace(&mut self, command: &mut Command, deadline: Duration) -> Result<ExitStatus> {
        let child = command
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        let process = Pid::from_raw(i32::try_from(child.id())?);
        let stopped = waitpid(process, Some(WaitPidFlag::WUNTRACED))?;
        if !matches!(stopped, WaitStatus::Stopped(..)) {
            bail!("it did not stop to be traced: {stopped:?}");
        }
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_EXITKILL;
        ptrace::seize(process, options).context("seize it")?;
        kill(process, Signal::SIGCONT)?;
        // Dropped at the end, which ends the thread that watches the clock.
        let (_ended, watched) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if watched.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
                // It fails for a program that has just ended.
                let _ = kill(process, Signal::SIGKILL);
            }
        });
        loop {
            match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
                Ok(WaitStatus::Exited(thread, code)) if thread == process => {
                    return Ok(ExitStatus::from_raw(code << 8));
                }
                Ok(WaitStatus::Signaled(thread, signal, _)) if thread == process => {
                    return Ok(ExitStatus::from_raw(signal as i32));
                }
                Ok(status) => gone_is_fine(self.stopped(process, status))?,
                Err(NixErrno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for it"),
            }
        }
    }

    fn stopped(&mut self, process: Pid, status: WaitStatus) -> Result<()> {
        match status {
            WaitStatus::PtraceSyscall(thread) => {
                let info = ptrace::syscall_info(thread)?;
                if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
                    self.entry(process, thread)?;
                } else {
                    self.exit(thread)?;
                }
                ptrace::syscall(thread, None)?;
            }
            WaitStatus::PtraceEvent(thread, _, event) => {
                if event == libc::PTRACE_EVENT_EXEC {
                    let path = format!("/proc/{process}/mem");
                    self.memory = Some(File::open(&path).with_context(|| format!("open {path}"))?);
                }
                ptrace::syscall(thread, None)?;
            }
            WaitStatus::Stopped(thread, signal) => ptrace::syscall(thread, signal)?,
            _ => {}
        }
        Ok(())
    }

    fn entry(&mut self, process: Pid, thread: Pid) -> Result<()> {
        if self.memory.is_none() {
            return Ok(());
        }
        let registers = ptrace::getregs(thread)?;
        let Some(call) = self.call(thread, &registers) else {
            return Ok(());
        };
        let injection = self.injection.clone();
        if let Some(injection) = injection
            && injection
                .call
                .as_ref()
                .is_none_or(|name| *name == call.name && call.path.is_some())
        {
            self.counted += 1;
            let due = if injection.lasting {
                self.counted >= injection.nth
            } else {
                self.counted == injection.nth
            };
            if due {
                self.hit.get_or_insert_with(|| call.clone());
                self.inject(process, thread, registers, injection.fault)?;
            }
        }
        self.calls.push(call);
        Ok(())
    }

    fn inject(
        &mut self,
        process: Pid,
        thread: Pid,
        mut registers: user_regs_struct,
        fault: Fault,
    ) -> Result<()> {
        match fault {
            Fault::Kill => kill(process, Signal::SIGKILL)?,
            Fault::Error(errno) => {
                // No such system call: the kernel does nothing, and we put the answer in its place.
                registers.orig_rax = u64::MAX;
                ptrace::setregs(thread, registers)?;
                self.answers.insert(thread, errno);
            }
            Fault::Short => {
                let half = registers.rdx / 2;
                // Direct I/O moves whole blocks.
                registers.rdx = if half >= 4096 {
                    half - half % 4096
                } else {
                    half.max(1)
                };
                ptrace::setregs(thread, registers)?;
            }
        }
        Ok(())
    }

    fn exit(&mut self, thread: Pid) -> Result<()> {
        if let Some(errno) = self.answers.remove(&thread) {
            let mut registers = ptrace::getregs(thread)?;
            registers.rax = (-i64::from(errno.raw_os_error())) as u64;
            ptrace::setregs(thread, registers)?;
        }
        Ok(())
    }

    /// What a call is, if it concerns the folder or a socket.
    fn call(&self, thread: Pid, registers: &user_regs_struct) -> Option<Call> {
        let number = libc::c_long::try_from(registers.orig_rax).ok()?;
        let (_, name, concerns) = CALLS.iter().find(|(known, ..)| *known == number)?;
        let arguments = [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
        ];
        let path = |at: usize| self.path(arguments[at]);
        let descriptor = |at: usize| descriptor(thread, arguments[at]);
        let below = |at: usize| {
            let name = self.path(arguments[at + 1])?;
            if name.is_absolute() {
                return Some(name);
            }
            let folder = descriptor(at)?;
            Some(if name.as_os_str().is_empty() {
                folder
            } else {
                folder.join(name)
            })
        };
        let all = match *concerns {
            Fd(at) => [descriptor(at), None],
            Named(at) => [path(at), None],
            At(at) => [below(at), None],
            // The second is where something comes to be.
            Paths(a, b) => [path(b), path(a)],
            Ats(a, b) => [below(b), below(a)],
        };
        let all = all.into_iter().flatten();
        for path in all {
            if path.to_string_lossy().starts_with("socket:") {
                return Some(Call { name, path: None });
            }
            if let Ok(inner) = path.strip_prefix(&self.folder) {
                return Some(Call {
                    name,
                    path: Some(inner.to_owned()),
                });
            }
        }
        None
    }

    /// A path in the program's memory.
    fn path(&self, address: u64) -> Option<PathBuf> {
        let mut bytes = vec![0; 4096];
        let got = self.memory.as_ref()?.read_at(&mut bytes, address).ok()?;
        let end = bytes[..got].iter().position(|byte| *byte == 0)?;
        bytes.truncate(end);
        Some(std::ffi::OsString::from_vec(bytes).into())
    }
}

/// What a descriptor leads to.
fn descriptor(thread: Pid, number: u64) -> Option<PathBuf> {
    let number = number as u32 as i32;
    fs::read_link(format!("/proc/{thread}/fd/{number}")).ok()
}

/// A thread that is killed is gone before it can be asked or answered.
fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.downcast_ref() == Some(&NixErrno::ESRCH) => Ok(()),
        other => other,
    }
}
