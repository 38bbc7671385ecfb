//! A private message bus for the tests: Debian's real dbus-daemon on a socket in a temporary folder.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "test support outside of test functions")]

pub(crate) mod standin;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Completion, Trial};
use tempfile::TempDir;

thread_local! {
    /// Why the test that runs on this thread does nothing, if it does.
    static SKIPPED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Says why a test does nothing: it is counted as ignored then, never as passed.
pub(crate) fn skipped(why: &str) {
    SKIPPED.with(|skipped| *skipped.borrow_mut() = Some(why.to_owned()));
}

/// A test: its future runs on the thread that the trial was given.
pub(crate) type Test = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

/// Runs tests as trials that can be ignored with a reason.
pub(crate) fn run(tests: &[Test]) -> ExitCode {
    let trials = tests.iter().map(|(name, test)| {
        let test = *test;
        Trial::ignorable_test(*name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(test());
            Ok(match SKIPPED.with(RefCell::take) {
                Some(why) => Completion::ignored_with(why),
                None => Completion::Completed,
            })
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// The main of a test binary: these functions are its tests.
macro_rules! tests {
    ($($name:ident),+ $(,)?) => {
        fn main() -> std::process::ExitCode {
            support::run(&[$((stringify!($name), || Box::pin($name()))),+])
        }
    };
}
pub(crate) use tests;

/// A program's path, if this machine has it.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let folders = [
        "/usr/bin",
        "/bin",
        "/usr/sbin",
        "/sbin",
        "/lib/systemd",
        "/usr/lib/systemd",
    ];
    folders
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists())
}

/// A running message bus; it ends with the test.
pub(crate) struct Bus {
    daemon: Child,
    dir: TempDir,
}

impl Bus {
    /// Starts a bus; `None`, with a message, where there is no dbus-daemon. `policy` is put after rules that allow all.
    pub(crate) fn start(policy: &str) -> Option<Bus> {
        let Some(program) = program("dbus-daemon") else {
            skipped("there is no dbus-daemon; it is in Debian's package dbus-daemon");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let (config, log) = (dir.path().join("bus.conf"), dir.path().join("bus.log"));
        write(&config, &configuration(dir.path(), policy));
        #[expect(clippy::disallowed_methods, reason = "a test runs the real program")]
        let mut daemon = Command::new(program)
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--nopidfile", "--nosyslog", "--print-address=1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        // It prints its address once it listens.
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        let log = fs::read_to_string(&log).unwrap();
        assert!(
            address.starts_with("unix:path="),
            "dbus-daemon did not start: {address}{log}"
        );
        Some(Bus { daemon, dir })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("bus")
    }

    /// Ends the bus as a crash would.
    pub(crate) fn kill(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        // It may be dead already; there is nothing to do about it in either case.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

pub(crate) fn write(path: &Path, text: &str) {
    #[expect(clippy::disallowed_methods, reason = "a file of the test's own")]
    fs::write(path, text).unwrap();
}

/// A bus that lets everyone do everything, but for `policy`.
pub(crate) fn configuration(dir: &Path, policy: &str) -> String {
    format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={dir}/bus</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{dir}</servicedir>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
    {policy}
  </policy>
</busconfig>
"#,
        dir = dir.display()
    )
}
