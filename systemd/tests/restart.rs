//! Restarts over a real message bus, with a stand-in for systemd behind it: courses that a real systemd takes rarely or
//! not at will. tests/real.rs has those that it does take.

#![allow(clippy::unwrap_used, reason = "a test's harness")]

mod support;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use km_systemd::{Error, MainExit, Manager, UnitState};
use support::Bus;
use support::standin::{self, StandIn};

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

/// A bus with the stand-in on it, and a manager connected to it.
async fn start(policy: &str) -> Option<(Bus, StandIn, Manager)> {
    let bus = Bus::start(policy)?;
    let systemd = standin::start(&bus.socket()).await;
    let manager = Manager::connect(&bus.socket(), LONG).await.unwrap();
    Some((bus, systemd, manager))
}

async fn a_restart_gives_the_new_state() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    let want = UnitState {
        name: "good.service".to_owned(),
        load_state: "loaded".to_owned(),
        active_state: "active".to_owned(),
        sub_state: "running".to_owned(),
        main_pid: Some(4242),
        result: "success".to_owned(),
        main_exit: None,
        fragment_path: Some(PathBuf::from("/lib/systemd/system/good.service")),
    };
    assert_eq!(manager.restart("good.service", LONG).await.unwrap(), want);
    assert_eq!(manager.unit("good.service").await.unwrap(), want);
}

async fn a_job_that_ends_before_the_reply_among_many_is_found() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    assert!(
        manager
            .restart("early.service", LONG)
            .await
            .unwrap()
            .is_active()
    );
}

async fn a_failed_job_tells_the_unit_s_state() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    let error = manager.restart("bad.service", LONG).await.unwrap_err();
    let Error::JobFailed {
        unit,
        job_result,
        state: Some(state),
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!(
        (unit.as_str(), job_result.as_str()),
        ("bad.service", "failed")
    );
    assert_eq!(
        (state.main_pid, state.main_exit),
        (None, Some(MainExit::Exited(3)))
    );
    let message = error.to_string();
    assert!(
        message
            .contains("failed (failed), result exit-code, its main process exited with status 3"),
        "{message}"
    );
}

async fn a_job_that_never_ends_is_given_up_at_the_deadline() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    let before = Instant::now();
    let error = manager.restart("stuck.service", SHORT).await.unwrap_err();
    assert!(before.elapsed() >= SHORT && before.elapsed() < LONG);
    let Error::Timeout {
        after,
        state: Some(state),
        ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!((*after, state.active_state.as_str()), (SHORT, "activating"));
    assert!(
        error
            .to_string()
            .contains("the unit is now activating (start)"),
        "{error}"
    );
}

async fn a_unit_that_is_not_there_is_named() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    for error in [
        manager.restart("none.service", LONG).await.unwrap_err(),
        manager.unit("none.service").await.unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::NoSuchUnit { unit } if unit == "none.service"),
            "{error:?}"
        );
    }
}

async fn a_refusal_keeps_systemd_s_words() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    let error = manager.restart("masked.service", LONG).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }), "{error:?}");
    assert!(
        error.to_string().contains("Unit masked.service is masked."),
        "{error}"
    );
    let error = manager.unit("no unit").await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("Unit name no unit is not valid."),
        "{error}"
    );
}

async fn systemd_s_and_polkit_s_denials_are_told() {
    let Some((_bus, _systemd, manager)) = start("").await else {
        return;
    };
    for unit in ["denied.service", "polkit.service"] {
        let error = manager.restart(unit, LONG).await.unwrap_err();
        assert!(matches!(&error, Error::Denied { .. }), "{error:?}");
        assert!(error.to_string().contains(unit), "{error}");
    }
}

async fn the_bus_s_own_denial_is_told() {
    let deny =
        r#"<deny send_interface="org.freedesktop.systemd1.Manager" send_member="RestartUnit"/>"#;
    let Some((_bus, _systemd, manager)) = start(deny).await else {
        return;
    };
    let error = manager.restart("good.service", LONG).await.unwrap_err();
    assert!(matches!(&error, Error::Denied { .. }), "{error:?}");
}

async fn a_bus_without_systemd_is_told() {
    let Some(bus) = Bus::start("") else { return };
    let error = Manager::connect(&bus.socket(), LONG).await.unwrap_err();
    assert!(matches!(&error, Error::NoSystemd { .. }), "{error:?}");
}

/// dbus-daemon starts a name's owner by a service file; Debian's for systemd runs /bin/false, for hosts without it.
async fn a_bus_that_cannot_start_systemd_is_told() {
    let Some(bus) = Bus::start("") else { return };
    let file = bus
        .socket()
        .with_file_name("org.freedesktop.systemd1.service");
    support::write(
        &file,
        "[D-BUS Service]\nName=org.freedesktop.systemd1\nExec=/bin/false\nUser=root\n",
    );
    let error = Manager::connect(&bus.socket(), LONG).await.unwrap_err();
    assert!(matches!(&error, Error::NoSystemd { .. }), "{error:?}");
}

async fn no_bus_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let error = Manager::connect(&dir.path().join("system_bus_socket"), LONG)
        .await
        .unwrap_err();
    let Error::NoBus { why, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(why.kind(), io::ErrorKind::NotFound);
}

async fn a_socket_that_says_nothing_ends_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("bus");
    let _mute = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = Manager::connect(&socket, SHORT).await.unwrap_err();
    assert!(matches!(&error, Error::Timeout { .. }), "{error:?}");
}

async fn a_bus_that_dies_ends_the_wait_at_once() {
    let Some((mut bus, systemd, manager)) = start("").await else {
        return;
    };
    let waiting = tokio::spawn({
        let manager = manager.clone();
        async move { manager.restart("stuck.service", LONG).await }
    });
    systemd.stuck().await;
    bus.kill();
    let before = Instant::now();
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(&error, Error::Bus { .. }), "{error:?}");
    assert!(before.elapsed() < LONG / 2);
}

support::tests!(
    a_restart_gives_the_new_state,
    a_job_that_ends_before_the_reply_among_many_is_found,
    a_failed_job_tells_the_unit_s_state,
    a_job_that_never_ends_is_given_up_at_the_deadline,
    a_unit_that_is_not_there_is_named,
    a_refusal_keeps_systemd_s_words,
    systemd_s_and_polkit_s_denials_are_told,
    the_bus_s_own_denial_is_told,
    a_bus_without_systemd_is_told,
    a_bus_that_cannot_start_systemd_is_told,
    no_bus_is_told,
    a_socket_that_says_nothing_ends_at_the_deadline,
    a_bus_that_dies_ends_the_wait_at_once
);
