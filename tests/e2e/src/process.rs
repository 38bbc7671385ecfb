//! Programs with a deadline, and background programs that end with their owner.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// Time that a background program is given to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// What a program said, and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, bytes that are no UTF-8 replaced.
    pub stdout: String,
    /// Its standard error, bytes that are no UTF-8 replaced.
    pub stderr: String,
    /// Time from start to end.
    pub took: Duration,
}

impl Finished {
    /// The exit code; none when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Itself when the program exited with 0.
    ///
    /// # Errors
    /// Otherwise; carries all that it said.
    pub fn success(self) -> Result<Self> {
        ensure!(self.status.success(), "{self}");
        Ok(self)
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "ended with {}; it said:\n{}{}",
            self.status, self.stdout, self.stderr
        )
    }
}

/// Runs a program to its end, with nothing on its standard input.
///
/// Output goes through files, so that a grandchild that keeps them open cannot hold this up.
///
/// # Errors
/// When it cannot be started, or `deadline` passes (it is killed then). A failing exit code is no error here.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Finished> {
    let mut out = tempfile::tempfile().context("temporary file for output")?;
    let mut err = tempfile::tempfile().context("temporary file for output")?;
    command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?);
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let ended = wait::until(
        &format!("the end of {:?}", command.get_program()),
        deadline,
        || child.try_wait()?.context("it still runs"),
    );
    let took = started.elapsed();
    if ended.is_err() {
        end(&mut child);
    }
    let stdout = read_back(&mut out)?;
    let stderr = read_back(&mut err)?;
    let status = ended.with_context(|| format!("it had said:\n{stdout}{stderr}"))?;
    Ok(Finished {
        status,
        stdout,
        stderr,
        took,
    })
}

/// All that a program wrote into a file.
pub(crate) fn read_back(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut bytes))
        .context("read a program's output back")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Kills and reaps. Both fail only for a process that is gone already, which is what is wanted.
fn end(child: &mut Child) {
    drop(child.kill());
    drop(child.wait());
}

/// A program in the background, with its output in a file. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program; what it says is added to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {} for the output of {name}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}: {:?}", command.get_program()))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, once it has.
    ///
    /// # Errors
    /// When the kernel cannot say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("look after {}", self.name))
    }

    /// Fails when the program has ended, with the end of its log: for use while waiting for something that it should do.
    ///
    /// # Errors
    /// When it has ended.
    pub fn still_runs(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}\n{}", self.name, self.log_tail()),
        }
    }

    /// The last lines of what it said.
    pub fn log_tail(&self) -> String {
        tail(&self.log, 30)
    }

    /// Asks the program to end (SIGTERM), and kills it when it does not.
    ///
    /// # Errors
    /// When it had to be killed.
    pub fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| matches!(self.child.try_wait(), Ok(None))) {
            kill_process(pid, Signal::TERM).with_context(|| format!("stop {}", self.name))?;
        }
        wait::until(&format!("the end of {}", self.name), GRACE, || {
            self.child.try_wait()?.context("it still runs")
        })?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// The last `lines` lines of a log, for error messages; says so when it cannot be read.
pub fn tail(log: &Path, lines: usize) -> String {
    match fs::read(log) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({}: {error})", log.display()),
    }
}

/// The processes that run a program, by its file.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn running(program: &Path) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse() else {
            continue;
        };
        if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// A measure of a process's memory in bytes, such as `VmRSS` (proc(5), `/proc/<pid>/status`).
///
/// # Errors
/// When the process is gone, or the kernel does not tell this one.
pub fn memory(pid: u32, measure: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let told = status.lines().find_map(|line| {
        let kib = line.strip_prefix(measure)?.strip_prefix(':')?;
        kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    let kib = told.with_context(|| format!("{path} has no {measure}"))?;
    Ok(kib << 10)
}
