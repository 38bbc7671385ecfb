//! Programs of the host, run in the host's root with a deadline.
//!
//! Output goes to anonymous files, not pipes: a program that starts a daemon (a restart command does) hands its output on
//! to it, and a pipe would then never end.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
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
    let program = program_of(argv)?;
    let stdout = capture().map_err(start(program))?;
    let stderr = capture().map_err(start(program))?;
    let (status, mut stdout, mut stderr) =
        wait(root, argv, Stdio::null(), stdout, stderr, deadline)?;
    Ok(Output {
        status,
        stdout: captured(&mut stdout).map_err(start(program))?,
        stderr: captured(&mut stderr).map_err(start(program))?,
    })
}

/// As [`run`], with `input` on standard input, and with at most `limit` bytes of output for each stream: the program's
/// writes beyond that fail. For programs that are not trusted with memory.
///
/// # Errors
/// As [`run`].
pub fn run_with_input<S: AsRef<OsStr>>(
    root: &Root,
    argv: &[S],
    input: &[u8],
    limit: u64,
    deadline: Duration,
) -> Result<Output, CommandError> {
    let program = program_of(argv)?;
    let stdin = filled(input).map_err(start(program))?;
    let stdout = bounded(limit).map_err(start(program))?;
    let stderr = bounded(limit).map_err(start(program))?;
    let (status, mut stdout, mut stderr) =
        wait(root, argv, stdin.into(), stdout, stderr, deadline)?;
    Ok(Output {
        status,
        stdout: written(&mut stdout).map_err(start(program))?,
        stderr: written(&mut stderr).map_err(start(program))?,
    })
}

fn program_of<S: AsRef<OsStr>>(argv: &[S]) -> Result<&OsStr, CommandError> {
    argv.first().map(AsRef::as_ref).ok_or(CommandError::Empty)
}

fn start(program: &OsStr) -> impl Fn(io::Error) -> CommandError {
    move |source| CommandError::Start {
        program: program.to_owned(),
        source,
    }
}

/// Runs a program until it ends; gives its status and the files with its output.
fn wait<S: AsRef<OsStr>>(
    root: &Root,
    argv: &[S],
    stdin: Stdio,
    stdout: File,
    stderr: File,
    deadline: Duration,
) -> Result<(ExitStatus, File, File), CommandError> {
    let program = program_of(argv)?;
    let mut command = command_in(root, program);
    command
        .args(&argv[1..])
        .stdin(stdin)
        .stdout(stdout.try_clone().map_err(start(program))?)
        .stderr(stderr.try_clone().map_err(start(program))?)
        .process_group(0);
    let mut child = command.spawn().map_err(start(program))?;
    if !ends_within(&child, deadline).map_err(start(program))? {
        kill_group(&mut child);
        return Err(CommandError::Deadline {
            program: program.to_owned(),
            deadline,
        });
    }
    let status = child.wait().map_err(start(program))?;
    Ok((status, stdout, stderr))
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

/// A file in memory with a program's input.
fn filled(input: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("input", MemfdFlags::CLOEXEC)?);
    file.write_all(input)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// A file in memory that cannot grow beyond `limit` (fcntl(2), `F_SEAL_GROW`). It has that size from the beginning; what is
/// not written takes no memory.
fn bounded(limit: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("output", flags)?);
    file.set_len(limit)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
    Ok(file)
}

/// What was written to a [`bounded`] file: up to the offset, which the program's descriptor shares with ours.
fn written(file: &mut File) -> io::Result<Vec<u8>> {
    let length = file.stream_position()?;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(length).read_to_end(&mut bytes)?;
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
    fn input_arrives_and_output_has_a_bound() {
        let root = Root::new("/").unwrap();
        let long = Duration::from_secs(20);
        let output = run_with_input(&root, &["cat"], b"r.example", 64, long).unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, b"r.example");
        let endless = ["sh", "-c", "while echo 0123456789; do :; done"];
        let output = run_with_input(&root, &endless, b"", 64, long).unwrap();
        assert!(!output.stdout.is_empty() && output.stdout.len() <= 64);
        assert!(output.stderr.len() <= 64);
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
