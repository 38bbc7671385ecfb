//! The kata-manager binary under test: run to its end, or killed right after one of its own state changes.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::process::{self, Daemon, Finished};
use crate::sandbox::Sandbox;
use crate::tracer::{self, Injection, Traced};
use crate::wait;

/// The system calls that change what a file system shows under a name. A kill after each of them, one run a kill, meets every
/// such state that a crash can leave.
const CHANGES: &str =
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat";

/// The shim, as the build names it.
pub const SHIM: &str = "containerd-shim-kata-qemu-nvidia-gpu-v2";

/// What the same program is called where it stands in QEMU's place.
pub const LAUNCHER: &str = "kata-manager-qemu";

/// The longest that one command may take, downloads and a restart of containerd included.
const DEADLINE: Duration = Duration::from_secs(180);

/// How to call the binary. Its environment has nothing of ours but `PATH` and what [`Self::env`] adds.
#[derive(Clone, Debug)]
pub struct Km {
    binary: PathBuf,
    env: Vec<(OsString, OsString)>,
}

impl Km {
    /// The binary that `KM_BIN` names, else `kata-manager` beside this program, else of the other profile beside it.
    ///
    /// # Errors
    /// When there is none.
    pub fn find() -> Result<Self> {
        let candidates = match std::env::var_os("KM_BIN") {
            Some(path) => vec![PathBuf::from(path)],
            None => {
                let me = std::env::current_exe().context("find this program")?;
                let here = me.parent().context("this program lies in no folder")?;
                let above = here.parent().unwrap_or(here);
                [here, &above.join("release"), &above.join("debug")]
                    .map(|folder| folder.join("kata-manager"))
                    .to_vec()
            }
        };
        match candidates.iter().find(|path| path.is_file()) {
            Some(path) => Ok(Self::at(path)),
            None => bail!(
                "no kata-manager binary at {candidates:?}: build it (`cargo build`), or set KM_BIN"
            ),
        }
    }

    /// A binary at a path.
    pub fn at(binary: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
            env: Vec::new(),
        }
    }

    /// With one more environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// With a configuration file (`KATA_MANAGER_CONFIG`).
    #[must_use]
    pub fn config(self, path: &Path) -> Self {
        self.env("KATA_MANAGER_CONFIG", path)
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The shim that was built with it: `KM_SHIM` names it, else it lies beside the binary.
    ///
    /// # Errors
    /// When there is none.
    pub fn shim(&self) -> Result<PathBuf> {
        let path = match std::env::var_os("KM_SHIM") {
            Some(path) => path.into(),
            None => self.binary.with_file_name(SHIM),
        };
        ensure!(
            path.is_file(),
            "there is no shim at {}: build it (`make shim`, or `cargo build -p km-shim`), or set KM_SHIM",
            path.display()
        );
        Ok(path)
    }

    /// A command that would run it, for callers with wishes of their own.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args);
        self.dress(&mut command);
        command
    }

    fn dress(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .envs(self.env.iter().map(|(name, value)| (name, value)));
    }

    /// Runs it to its end, whatever that is.
    ///
    /// # Errors
    /// When it cannot be started or takes more than three minutes.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Finished> {
        process::run(&mut self.command(args), DEADLINE)
    }

    /// Runs it, and expects it to exit with `code`.
    ///
    /// # Errors
    /// When it ends otherwise, with all that it said.
    pub fn expect<S: AsRef<OsStr>>(&self, args: &[S], code: i32) -> Result<Finished> {
        let finished = self.run(args)?;
        if finished.code() != Some(code) {
            let words: Vec<_> = args
                .iter()
                .map(|arg| arg.as_ref().to_string_lossy())
                .collect();
            bail!(
                "kata-manager {}: expected exit code {code}; it {finished}",
                words.join(" ")
            );
        }
        Ok(finished)
    }

    /// Runs it to its end and lists its state changes, as strace shows them. Programs that it starts are not watched.
    ///
    /// # Errors
    /// When it cannot be run under strace.
    pub fn traced<S: AsRef<OsStr>>(
        &self,
        sandbox: &Sandbox,
        args: &[S],
    ) -> Result<(Finished, Vec<String>)> {
        let log = sandbox.folder("strace")?.join("log");
        let finished = process::run(&mut self.strace(sandbox, &log, &[], args), DEADLINE)?;
        let text = fs::read_to_string(&log)
            .with_context(|| format!("read strace's {}: {finished}", log.display()))?;
        let changes = text
            .lines()
            .filter(|line| line.contains('(') && !line.contains("resumed>"))
            .map(str::to_owned)
            .collect();
        Ok((finished, changes))
    }

    /// Runs it and kills it (SIGKILL) right after its `n`th state change, counted from 1 over all of its threads.
    ///
    /// strace stops it after every change; we count, and let it go on or kill it. Gives true when it was killed, false when
    /// it ended by itself before, having made fewer changes. So a test can go on with n = 1, 2, 3... until it gets false.
    ///
    /// # Errors
    /// When it cannot be run under strace, or neither was killed nor ended.
    pub fn killed_after<S: AsRef<OsStr>>(
        &self,
        sandbox: &Sandbox,
        args: &[S],
        n: usize,
    ) -> Result<bool> {
        let folder = sandbox.folder("strace")?;
        let log = folder.join("log");
        let inject = format!("inject={CHANGES}:signal=SIGSTOP");
        let mut command = self.strace(sandbox, &log, &["-e", &inject], args);
        let mut strace = Daemon::spawn("strace", &mut command, &folder.join("output"))?;
        let started = Instant::now();
        let mut seen = 0;
        while started.elapsed() < DEADLINE {
            if strace.ended()?.is_some() {
                return Ok(false);
            }
            let stops = stops(&log)?;
            if stops.len() <= seen {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            seen = stops.len();
            let Some(process) = stopped_process(stops[seen - 1])? else {
                continue;
            };
            if seen >= n {
                kill_process(process, Signal::KILL).context("kill it")?;
                wait::until("strace to end", Duration::from_secs(10), || {
                    strace.ended()?.context("it still runs")
                })?;
                return Ok(true);
            }
            kill_process(process, Signal::CONT).context("let it go on")?;
        }
        bail!(
            "kata-manager neither made {n} changes nor ended in {DEADLINE:?}; after {seen} changes it had said:\n{}",
            strace.log_tail()
        )
    }

    /// Runs it to its end with one of its system calls on `folder` going wrong, or with none, and lists them.
    ///
    /// # Errors
    /// When it cannot be traced or takes more than three minutes.
    pub fn injected<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        folder: &Path,
        injection: Option<&Injection>,
    ) -> Result<Traced> {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", tracer::HOLD])
            .arg(&self.binary)
            .args(args);
        self.dress(&mut command);
        tracer::run(command, folder, injection, DEADLINE)
    }

    /// `-f`: all threads; `-b execve`: not the programs that it starts.
    fn strace<S: AsRef<OsStr>>(
        &self,
        sandbox: &Sandbox,
        log: &Path,
        extra: &[&str],
        args: &[S],
    ) -> Command {
        let mut command = Command::new(sandbox.parts().strace());
        self.dress(&mut command);
        command
            .args(["-f", "-b", "execve", "-qq", "-o"])
            .arg(log)
            .args(["-e", &format!("trace={CHANGES}")])
            .args(extra)
            .arg("--")
            .arg(&self.binary)
            .args(args);
        command
    }
}

/// The thread of each stop that strace has written down, in order.
fn stops(log: &Path) -> Result<Vec<i32>> {
    let text = match fs::read_to_string(log) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {}", log.display())),
    };
    text.lines()
        .filter(|line| line.contains("--- SIGSTOP {"))
        .map(|line| {
            let thread = line.split(' ').next().unwrap_or_default();
            thread
                .parse()
                .with_context(|| format!("a thread's number in strace's line {line:?}"))
        })
        .collect()
}

/// The process of a thread, once all of its threads stand still; nothing when it has ended. A stop may be lost: when several
/// threads make changes at once, the signal that lets the process go on also discards the stops that wait.
fn stopped_process(thread: i32) -> Result<Option<Pid>> {
    let Some(status) = of_process(fs::read_to_string(format!("/proc/{thread}/status")))? else {
        return Ok(None);
    };
    let process: i32 = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
        .context("a thread without a process")?;
    let stands = wait::until("all threads to stop", Duration::from_secs(10), || {
        let Some(threads) = of_process(fs::read_dir(format!("/proc/{process}/task")))? else {
            return Ok(false);
        };
        let mut stopped = false;
        for thread in threads {
            let Some(stat) = of_process(fs::read_to_string(thread?.path().join("stat")))? else {
                continue;
            };
            // proc(5): the state follows the name, which is in parentheses and may hold some.
            let state = stat.rsplit(") ").next().unwrap_or_default();
            if state.starts_with(['Z', 'X']) {
                continue; // It has ended; strace has yet to be told.
            }
            ensure!(state.starts_with(['t', 'T']), "one still runs: {state}");
            stopped = true;
        }
        Ok(stopped)
    })?;
    if !stands {
        return Ok(None);
    }
    Pid::from_raw(process)
        .map(Some)
        .context("a process without a number")
}

/// What was read of a process; nothing when the process ended meanwhile.
fn of_process<T>(read: std::io::Result<T>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        // ESRCH: it ended between the opening of the file and the reading.
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error).context("look at a process that is to be killed"),
    }
}
