//! Stands in for systemd on a bus: the part of org.freedesktop.systemd1(5) that km-systemd uses, with a unit for each
//! course that a restart can take.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use zbus::object_server::SignalEmitter;
use zbus::{BoxDBusError, Connection, DBusError, OwnedObjectPath, fdo, interface};

const MANAGER: &str = "/org/freedesktop/systemd1";

/// The errors of systemd's own; others are D-Bus's.
#[derive(Debug, DBusError)]
#[zbus(prefix = "org.freedesktop.systemd1")]
enum Refusal {
    #[zbus(error)]
    Bus(zbus::Error),
    NoSuchUnit(String),
    UnitMasked(String),
}

/// The stand-in; it is on its bus until it is dropped.
pub(crate) struct StandIn {
    _connection: Connection,
    stuck: Arc<Notify>,
}

impl StandIn {
    /// Waits until a restart of `stuck.service` was asked for.
    pub(crate) async fn stuck(&self) {
        self.stuck.notified().await;
    }
}

struct Manager {
    stuck: Arc<Notify>,
}

struct Unit {
    name: &'static str,
    load: &'static str,
    active: &'static str,
    sub: &'static str,
}

struct Service {
    pid: u32,
    result: &'static str,
    code: i32,
    status: i32,
}

/// Every unit but `none.service`, which systemd knows as one that is not there.
const UNITS: [(Unit, Service); 8] = [
    unit("good.service", "active", "running", "success"),
    unit("early.service", "active", "running", "success"),
    unit("bad.service", "failed", "failed", "exit-code"),
    unit("stuck.service", "activating", "start", "success"),
    unit("denied.service", "active", "running", "success"),
    unit("polkit.service", "active", "running", "success"),
    unit("masked.service", "inactive", "dead", "success"),
    unit("none.service", "inactive", "dead", "success"),
];

const fn unit(
    name: &'static str,
    active: &'static str,
    sub: &'static str,
    result: &'static str,
) -> (Unit, Service) {
    let failed = matches!(active.as_bytes(), b"failed");
    let load = match name.as_bytes() {
        b"none.service" => "not-found",
        b"masked.service" => "masked",
        _ => "loaded",
    };
    let pid = if matches!(sub.as_bytes(), b"running") {
        4242
    } else {
        0
    };
    let (code, status) = if failed { (1, 3) } else { (0, 0) };
    (
        Unit {
            name,
            load,
            active,
            sub,
        },
        Service {
            pid,
            result,
            code,
            status,
        },
    )
}

/// Puts the stand-in on a bus.
pub(crate) async fn start(socket: &Path) -> StandIn {
    let stuck = Arc::new(Notify::new());
    let manager = Manager {
        stuck: Arc::clone(&stuck),
    };
    let address = format!("unix:path={}", socket.display());
    let mut builder =
        zbus::connection::Builder::address(address.as_str()).serve_at(MANAGER, manager);
    for (unit, service) in UNITS {
        let path = path(unit.name);
        builder = builder.serve_at(path.clone(), unit).serve_at(path, service);
    }
    let builder = builder.name("org.freedesktop.systemd1");
    StandIn {
        _connection: builder.build().await.unwrap(),
        stuck,
    }
}

fn path(name: &str) -> OwnedObjectPath {
    let name = name.replace('.', "_2e");
    OwnedObjectPath::try_from(format!("{MANAGER}/unit/{name}")).unwrap()
}

fn job(id: u32) -> OwnedObjectPath {
    OwnedObjectPath::try_from(format!("{MANAGER}/job/{id}")).unwrap()
}

#[interface(name = "org.freedesktop.systemd1.Manager")]
impl Manager {
    fn subscribe(&self) {}

    fn load_unit(&self, name: &str) -> fdo::Result<OwnedObjectPath> {
        match UNITS.iter().any(|(unit, _)| unit.name == name) {
            true => Ok(path(name)),
            false => Err(fdo::Error::InvalidArgs(format!(
                "Unit name {name} is not valid."
            ))),
        }
    }

    async fn restart_unit(
        &self,
        name: &str,
        mode: &str,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, BoxDBusError> {
        assert_eq!(mode, "replace");
        let refuse = |error: Refusal| -> Result<_, BoxDBusError> { Err(Box::new(error)) };
        let deny = |error: fdo::Error| -> Result<_, BoxDBusError> { Err(Box::new(error)) };
        match name {
            "none.service" => {
                return refuse(Refusal::NoSuchUnit(format!("Unit {name} not found.")));
            }
            "masked.service" => {
                return refuse(Refusal::UnitMasked(format!("Unit {name} is masked.")));
            }
            "denied.service" => {
                return deny(fdo::Error::AccessDenied("Permission denied".to_owned()));
            }
            "polkit.service" => {
                let message = "Interactive authentication required.".to_owned();
                return deny(fdo::Error::InteractiveAuthorizationRequired(message));
            }
            // A busy manager: more ends of other jobs than a client queues, then this job's, all before the reply.
            "early.service" => {
                for id in 1000..1300 {
                    Manager::job_removed(&emitter, id, job(id), "other.service", "failed")
                        .await
                        .map_err(bus)?;
                }
                Manager::job_removed(&emitter, 7, job(7), name, "done")
                    .await
                    .map_err(bus)?;
            }
            "good.service" => later(&emitter, name, "done"),
            "bad.service" => later(&emitter, name, "failed"),
            "stuck.service" => self.stuck.notify_one(),
            other => panic!("no course for {other}"),
        }
        Ok(job(7))
    }

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

fn bus(error: zbus::Error) -> BoxDBusError {
    Box::new(Refusal::Bus(error))
}

/// Ends job 7 after the reply, and the same unit's job 6 with another result before that.
fn later(emitter: &SignalEmitter<'_>, name: &str, result: &'static str) {
    let (emitter, name) = (emitter.to_owned(), name.to_owned());
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Manager::job_removed(&emitter, 6, job(6), &name, "canceled")
            .await
            .unwrap();
        Manager::job_removed(&emitter, 7, job(7), &name, result)
            .await
            .unwrap();
    });
}

#[interface(name = "org.freedesktop.systemd1.Unit")]
impl Unit {
    #[zbus(property)]
    fn id(&self) -> &str {
        self.name
    }

    #[zbus(property)]
    fn load_state(&self) -> &str {
        self.load
    }

    #[zbus(property)]
    fn active_state(&self) -> &str {
        self.active
    }

    #[zbus(property)]
    fn sub_state(&self) -> &str {
        self.sub
    }

    #[zbus(property)]
    fn fragment_path(&self) -> String {
        format!("/lib/systemd/system/{}", self.name)
    }
}

#[interface(name = "org.freedesktop.systemd1.Service")]
impl Service {
    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> u32 {
        self.pid
    }

    #[zbus(property)]
    fn result(&self) -> &str {
        self.result
    }

    #[zbus(property)]
    fn exec_main_code(&self) -> i32 {
        self.code
    }

    #[zbus(property)]
    fn exec_main_status(&self) -> i32 {
        self.status
    }
}
