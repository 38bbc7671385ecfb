//! Restarts by the real systemd. A machine that was not booted with systemd can still run it as a user's manager, which
//! serves the same D-Bus interface over a user bus; so can one that was. It gets its own mount and process namespaces,
//! a home and a runtime folder in a temporary folder, and a cgroup of its own, and leaves nothing behind.
//!
//! Needs root and Debian's systemd and dbus-daemon. Where it cannot run, the test says "skipped" and why.

#![allow(clippy::unwrap_used, reason = "a test's harness")]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use km_systemd::{Error, MainExit, Manager};
use support::{program, skipped, write};
use tempfile::TempDir;

const SHORT: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(30);

/// $1 is the temporary folder, $2 the cgroup's name, $3 systemd. A user's manager refuses to run as process 1, wants the
/// folder by which programs tell that the host runs systemd (/run outside stays as it is), and finds no units but ours.
const START: &str = r#"
set -eu
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
  if [ -e "$hierarchy/cgroup.procs" ]; then mkdir "$hierarchy/$2"; echo 0 >"$hierarchy/$2/cgroup.procs"; fi
done
exec unshare --mount --pid --fork --kill-child --mount-proc --propagation private -- sh -euc '
  mount -t tmpfs tmpfs /run
  mkdir -p /run/systemd/system
  export HOME="$1/home" XDG_RUNTIME_DIR="$1/run"
  export SYSTEMD_UNIT_PATH="$HOME/.config/systemd/user"
  unset DBUS_SESSION_BUS_ADDRESS NOTIFY_SOCKET
  "$2" --user
  exit $?
' sh "$1" "$3"
"#;

/// Where a user's manager finds units, below the temporary folder.
const UNITS: &str = "home/.config/systemd/user";

/// The units that every service depends on, and those by which systemd tells that there is a bus to be on.
fn write_base(dir: &Path, bus: &Path) {
    let config = dir.join("bus.conf");
    write(&config, &support::configuration(dir, ""));
    let daemon = format!(
        "{} --config-file={} --address=systemd: --nofork --nopidfile --nosyslog",
        bus.display(),
        config.display()
    );
    for (name, text) in [
        ("default.target", "[Unit]\nRequires=dbus.socket\n"),
        ("basic.target", "[Unit]\nDescription=Nothing\n"),
        ("shutdown.target", "[Unit]\nDefaultDependencies=no\n"),
        (
            "dbus.socket",
            "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=%t/bus\n",
        ),
        (
            "dbus.service",
            &format!(
                "[Unit]\nRequires=dbus.socket\nDefaultDependencies=no\n[Service]\nExecStart={daemon}\n"
            ),
        ),
    ] {
        write(&dir.join(UNITS).join(name), text);
    }
}

/// A real systemd; it ends with the test.
struct Systemd {
    child: Child,
    cgroup: String,
    dir: TempDir,
}

impl Systemd {
    /// Starts it; `None`, with a message, where that cannot be.
    fn start() -> Option<Systemd> {
        let systemd = program("systemd").or_else(|| {
            skipped("there is no systemd on this machine");
            None
        })?;
        let Some(bus) = program("dbus-daemon") else {
            skipped("there is no dbus-daemon on this machine");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        for folder in ["run", UNITS] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        write_base(dir.path(), &bus);
        let cgroup = format!("km-systemd-test-{}", std::process::id());
        let log = File::create(dir.path().join("log")).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test runs the real program")]
        let child = Command::new("sh")
            .args(["-c", START, "sh"])
            .arg(dir.path())
            .arg(&cgroup)
            .arg(systemd)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Systemd { child, cgroup, dir })
    }

    fn unit(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(UNITS).join(name);
        write(&path, text);
        path
    }

    /// Connects once it is up; `None`, with a message, when this machine does not let it run.
    async fn connect(&mut self) -> Option<Manager> {
        let (socket, start) = (self.dir.path().join("run/bus"), Instant::now());
        loop {
            let error = match Manager::connect(&socket, LONG).await {
                Ok(manager) => return Some(manager),
                Err(error) => error,
            };
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || start.elapsed() > LONG {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
                skipped(&format!(
                    "systemd does not run here as a user's manager: {ended:?} {error} {log}"
                ));
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // unshare takes the whole process namespace with it. Nothing more can be done about what fails here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let start = Instant::now();
        while !remove_cgroups(&self.cgroup) && start.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Removes the cgroup from every hierarchy; false while processes in it still end.
fn remove_cgroups(name: &str) -> bool {
    let hierarchies = fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let roots: Vec<PathBuf> = hierarchies
        .chain([PathBuf::from("/sys/fs/cgroup")])
        .map(|path| path.join(name))
        .collect();
    let left = roots
        .iter()
        .filter(|root| root.exists() && !remove_tree(root));
    left.count() == 0
}

fn remove_tree(folder: &Path) -> bool {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(folder).is_ok()
}

async fn a_real_systemd_restarts_or_tells_why_not() {
    let Some(mut systemd) = Systemd::start() else {
        return;
    };
    let good = systemd.unit("good.service", "[Service]\nExecStart=/bin/sleep 1000\n");
    systemd.unit(
        "bad.service",
        "[Service]\nType=notify\nExecStart=/bin/sh -c 'exit 3'\n",
    );
    systemd.unit(
        "killed.service",
        "[Service]\nType=notify\nExecStart=/bin/sh -c 'kill -9 $$$$'\n",
    );
    systemd.unit(
        "slow.service",
        "[Service]\nType=notify\nTimeoutStartSec=600\nExecStart=/bin/sleep 1000\n",
    );
    let masked = systemd.dir.path().join(UNITS).join("masked.service");
    std::os::unix::fs::symlink("/dev/null", masked).unwrap();
    let Some(manager) = systemd.connect().await else {
        return;
    };

    succeeds(&manager, &good).await;
    fails(&manager, "bad.service", MainExit::Exited(3)).await;
    fails(&manager, "killed.service", MainExit::Killed(9)).await;
    takes_too_long(&manager).await;
    is_refused(&manager).await;
}

async fn succeeds(manager: &Manager, fragment: &Path) {
    let before = manager.unit("good.service").await.unwrap();
    assert_eq!(
        (before.active_state.as_str(), before.main_pid),
        ("inactive", None)
    );
    let first = manager.restart("good.service", LONG).await.unwrap();
    assert_eq!(
        (first.active_state.as_str(), first.sub_state.as_str()),
        ("active", "running")
    );
    assert_eq!(
        (first.load_state.as_str(), first.result.as_str()),
        ("loaded", "success")
    );
    assert_eq!(first.fragment_path.as_deref(), Some(fragment));
    let second = manager.restart("good.service", LONG).await.unwrap();
    assert!(first.main_pid.is_some() && second.main_pid.is_some());
    assert_ne!(first.main_pid, second.main_pid);
}

async fn fails(manager: &Manager, unit: &str, exit: MainExit) {
    let error = manager.restart(unit, LONG).await.unwrap_err();
    let Error::JobFailed {
        job_result,
        state: Some(state),
        ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!(
        (job_result.as_str(), state.active_state.as_str()),
        ("failed", "failed")
    );
    assert_eq!((state.main_exit, state.main_pid), (Some(exit), None));
}

async fn takes_too_long(manager: &Manager) {
    let error = manager.restart("slow.service", SHORT).await.unwrap_err();
    let Error::Timeout {
        state: Some(state), ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!(state.active_state, "activating");
}

async fn is_refused(manager: &Manager) {
    for error in [
        manager.restart("none.service", LONG).await.unwrap_err(),
        manager.unit("none.service").await.unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::NoSuchUnit { unit } if unit == "none.service"),
            "{error:?}"
        );
    }
    for unit in ["masked.service", "not a unit", "nosuffix"] {
        let error = manager.restart(unit, LONG).await.unwrap_err();
        assert!(matches!(&error, Error::Refused { .. }), "{error:?}");
    }
    assert_eq!(
        manager.unit("masked.service").await.unwrap().load_state,
        "masked"
    );
}

support::tests!(a_real_systemd_restarts_or_tells_why_not);
