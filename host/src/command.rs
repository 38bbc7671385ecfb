//! Programs of the host, run in the host's root with a deadline.
//!
//! Output goes to anonymous files, not pipes: a program that starts a daemon (a restart command does) hands its output on
//! to it, and a pipe would then never end.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Root;

/// The most output of a program that is kept, in bytes, for each stream.
pub const OUTPUT_LIMIT: u64 = 64 << 20;

/// The argument by which the program calls itself to enter another root before running a command there; see
/// [`enter_root`].
pub const ENTER_ROOT: &str = "__enter-root";

/// How a program ended.
#[derive(Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed to standard output.
    pub stdout: Vec<u8>,
    /// What it printed to standard error.
    pub stderr: Vec<u8>,
}

/// Why a program could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command has no words.
    #[error("the command is empty")]
    Empty,
    /// It cannot be started.
    #[error("cannot run {program:?}")]
    Start {
        /// The program.
        program: OsString,
        /// The system's answer.
        source: io::Error,
    },
    /// It ran longer than it may and was killed.
    #[error("{program:?} did not end within {} seconds and was killed", deadline.as_secs())]
    Deadline {
        /// The program.
        program: OsString,
        /// How long it had.
        deadline: Duration,
    },
}

impl Output {
    /// The last lines of what it printed, standard error first choice; for error messages.
    pub fn tail(&self, lines: usize) -> String {
        let text = if self.stderr.is_empty() {
            &self.stdout
        } else {
            &self.stderr
        };
        let text = String::from_utf8_lossy(text);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// Runs a host program in the host's root, without standard input, in a process group of its own, and waits for it to
/// end. A relative program name is looked up on the PATH.
///
/// # Errors
/// [`CommandError`] when it cannot be started or does not end in time; it is then killed with its group.
pub fn run<S: AsRef<OsStr>>(
    root: &Root,
    argv: &[S],
    deadline: Duration,
) -> Result<Output, CommandError> {
    let (program, arguments) = argv.split_first().ok_or(CommandError::Empty)?;
    let program = program.as_ref();
    let start = |source| CommandError::Start {
        program: program.to_owned(),
        source,
    };

    let mut command = command_in(root, program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .process_group(0);
    let (mut stdout, mut stderr) = (capture().map_err(start)?, capture().map_err(start)?);
    command
        .stdout(stdout.try_clone().map_err(start)?)
        .stderr(stderr.try_clone().map_err(start)?);
    let mut child = command.spawn().map_err(start)?;
    if !ends_within(&child, deadline).map_err(start)? {
        kill_group(&mut child);
        return Err(CommandError::Deadline {
            program: program.to_owned(),
            deadline,
        });
    }
    let status = child.wait().map_err(start)?;
    Ok(Output {
        status,
        stdout: captured(&mut stdout).map_err(start)?,
        stderr: captured(&mut stderr).map_err(start)?,
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place that starts host programs"
)]
fn command_in(root: &Root, program: &OsStr) -> Command {
    if root.is_slash() {
        return Command::new(program);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg(ENTER_ROOT).arg(root.path()).arg(program);
    command
}

/// The other half of running a program in another root: makes `root` this process's own and becomes `argv`. The binary's
/// main calls it when its first argument is [`ENTER_ROOT`]; it returns only on failure.
///
/// # Errors
/// Why the root could not be entered or the program not run.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place that starts host programs"
)]
pub fn enter_root(root: &Path, argv: &[OsString]) -> io::Error {
    let Some((program, arguments)) = argv.split_first() else {
        return io::Error::from(io::ErrorKind::InvalidInput);
    };
    if let Err(errno) = rustix::process::chroot(root).and_then(|()| rustix::process::chdir("/")) {
        return errno.into();
    }
    Command::new(program).args(arguments).exec()
}

fn capture() -> io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create(
        "output",
        MemfdFlags::CLOEXEC,
    )?))
}

fn captured(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(OUTPUT_LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub(crate) fn ends_within(child: &Child, deadline: Duration) -> io::Result<bool> {
    let pidfd = rustix::process::pidfd_open(pid_of(child)?, PidfdFlags::empty())?;
    let timeout =
        Timespec::try_from(deadline).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    loop {
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn kill_group(child: &mut Child) {
    if let Ok(pid) = pid_of(child) {
        // It may have ended meanwhile; then there is nothing left to kill.
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
    let _ = child.wait();
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("the child's process id is out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_told() {
        let root = Root::new("/").unwrap();
        let output = run(
            &root,
            &["sh", "-c", "echo out; echo one >&2; echo two >&2; exit 3"],
            Duration::from_secs(20),
        )
        .unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(output.stdout, b"out\n");
        assert_eq!(output.tail(1), "two");
    }

    #[test]
    fn a_daemon_that_keeps_the_output_open_does_not_hold_us_up() {
        let root = Root::new("/").unwrap();
        let output = run(
            &root,
            &["sh", "-c", "sleep 300 & echo $!"],
            Duration::from_secs(20),
        )
        .unwrap();
        let pid: i32 = String::from_utf8(output.stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        assert!(output.status.success());
    }

    #[test]
    fn a_program_that_hangs_or_is_absent_is_an_error() {
        let root = Root::new("/").unwrap();
        let error = run(&root, &["sleep", "300"], Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, CommandError::Deadline { .. }), "{error}");
        let error = run(&root, &["/no/such/program"], Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, CommandError::Start { .. }), "{error}");
        assert!(matches!(
            run::<&str>(&root, &[], Duration::from_secs(1)),
            Err(CommandError::Empty)
        ));
    }
}
