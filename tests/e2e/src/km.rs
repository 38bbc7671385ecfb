//! The kata-manager binary under test: run to its end, or killed at one of its own state changes.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{self, Finished};
use crate::sandbox::Sandbox;

/// The system calls that change what a file system shows under a name. A kill before each of them, one run a kill, meets every
/// state that a crash can leave.
const CHANGES: &str =
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat";

/// The longest that one command may take, downloads and a restart of containerd included.
const DEADLINE: Duration = Duration::from_secs(180);

/// How to call the binary. Its environment has nothing of ours but `PATH` and what [`Self::env`] adds.
#[derive(Clone, Debug)]
pub struct Km {
    binary: PathBuf,
    env: Vec<(OsString, OsString)>,
}

/// The state changes that a run made.
#[derive(Clone, Debug)]
pub struct Changes {
    /// Each system call, in order, as strace shows it, with the thread's number before it.
    pub calls: Vec<String>,
}

impl Changes {
    /// The most that any one thread made: the last `n` at which [`Km::killed_at`] can strike, since strace counts by thread.
    pub fn most_in_a_thread(&self) -> usize {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for call in &self.calls {
            *counts
                .entry(call.split(' ').next().unwrap_or_default())
                .or_default() += 1;
        }
        counts.into_values().max().unwrap_or(0)
    }
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

    /// Runs it to its end and lists its state changes. Programs that it starts are not watched.
    ///
    /// # Errors
    /// When it cannot be run under strace.
    pub fn traced<S: AsRef<OsStr>>(
        &self,
        sandbox: &Sandbox,
        args: &[S],
    ) -> Result<(Finished, Changes)> {
        let log = sandbox.folder("strace")?.join("log");
        let finished = process::run(&mut self.strace(sandbox, &log, &[], args), DEADLINE)?;
        let text = fs::read_to_string(&log)
            .with_context(|| format!("read strace's {}: {finished}", log.display()))?;
        let calls = text
            .lines()
            .filter(|line| line.contains('(') && !line.contains("resumed>"))
            .map(str::to_owned)
            .collect();
        Ok((finished, Changes { calls }))
    }

    /// Runs it and kills it (SIGKILL) just before the `n`th state change (from 1) of whichever thread gets there first.
    ///
    /// Gives true when it was killed, false when it ended by itself before, having made fewer changes.
    ///
    /// # Errors
    /// When it cannot be run under strace, or neither was killed nor ended.
    pub fn killed_at<S: AsRef<OsStr>>(
        &self,
        sandbox: &Sandbox,
        args: &[S],
        n: usize,
    ) -> Result<bool> {
        let inject = format!("inject={CHANGES}:signal=SIGKILL:when={n}");
        let log = sandbox.folder("strace")?.join("log");
        let mut command = self.strace(sandbox, &log, &["-e", &inject], args);
        let finished = process::run(&mut command, DEADLINE)?;
        match (finished.status.signal(), finished.code()) {
            (Some(9), _) => Ok(true),
            (None, Some(_)) => Ok(false),
            _ => bail!("kata-manager under strace {finished}"),
        }
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
