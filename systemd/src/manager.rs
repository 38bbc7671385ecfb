//! systemd's manager on the bus: find a unit, restart it, wait for the job's end.
//!
//! The interface is that of org.freedesktop.systemd1(5).

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::timeout;
use zbus::message::Type;
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant};

use crate::error::Error;
use crate::unit::{MainExit, UnitState};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// A connection to systemd's manager.
#[derive(Clone, Debug)]
pub struct Manager {
    connection: Connection,
    socket: PathBuf,
    timeout: Duration,
}

impl Manager {
    /// Connects to the system bus on its socket and subscribes to systemd's signals. `timeout` is the deadline of
    /// this, and of every call made later (a restart has its own). Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`Error::NoBus`], [`Error::NoSystemd`], [`Error::Denied`], [`Error::Timeout`], [`Error::Bus`].
    pub async fn connect(bus_socket: &Path, timeout: Duration) -> Result<Manager, Error> {
        let operation = "connect to the system bus";
        let connecting = connect(bus_socket, operation);
        let limit = tokio::time::timeout(timeout, connecting).await;
        let connection = limit.map_err(|_| Error::timeout(operation, timeout))??;
        let manager = Manager {
            connection,
            socket: bus_socket.to_path_buf(),
            timeout,
        };
        // Without it systemd sends no signals at all once nobody else listens.
        manager
            .call(
                "subscribe to systemd's signals",
                MANAGER_PATH,
                MANAGER,
                "Subscribe",
                &(),
            )
            .await?;
        Ok(manager)
    }

    /// A unit's state. A unit that exists and is not loaded gets loaded.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Refused`] for a name that is none, [`Error::Timeout`], [`Error::Bus`].
    pub async fn unit(&self, name: &str) -> Result<UnitState, Error> {
        let operation = format!("look up {name}");
        let reply = self
            .call(&operation, MANAGER_PATH, MANAGER, "LoadUnit", &(name,))
            .await?;
        let path: OwnedObjectPath = body(&operation, &reply)?;
        let state = self.read_unit(&operation, path.as_str()).await?;
        if state.load_state == "not-found" {
            return Err(Error::NoSuchUnit {
                unit: name.to_owned(),
            });
        }
        Ok(state)
    }

    /// Restarts a unit (starts it when it is not running), waits until systemd's job is done, and gives the state that
    /// the unit has then. For a service of `Type=notify`, as containerd's is, done means that it said it is ready.
    ///
    /// # Errors
    /// [`Error::JobFailed`] when the unit does not come up, [`Error::Timeout`] when the job is not done `within` that
    /// time (it goes on, it is not cancelled), [`Error::NoSuchUnit`], [`Error::Denied`], [`Error::Refused`],
    /// [`Error::Bus`].
    pub async fn restart(&self, name: &str, within: Duration) -> Result<UnitState, Error> {
        let operation = format!("restart {name}");
        let job = self.run_job(&operation, name);
        let ended = timeout(within, job).await;
        let result = match ended {
            Ok(result) => result?,
            Err(_) => {
                let state = self.unit(name).await.ok().map(Box::new);
                return Err(Error::Timeout {
                    operation,
                    after: within,
                    state,
                });
            }
        };
        let state = self.unit(name).await;
        if result == "done" {
            return state;
        }
        Err(Error::JobFailed {
            unit: name.to_owned(),
            job_result: result,
            state: state.ok().map(Box::new),
        })
    }

    /// Enqueues the job and waits for its result, with no deadline of its own.
    async fn run_job(&self, operation: &str, name: &str) -> Result<String, Error> {
        let mut ended = self.job_ends(operation).await?;
        let arguments = (name, "replace");
        let call = self.connection.call_method(
            Some(SYSTEMD),
            MANAGER_PATH,
            Some(MANAGER),
            "RestartUnit",
            &arguments,
        );
        tokio::pin!(call);
        // A job can end before the call's reply is read. The stream must also be drained meanwhile: a full one stops
        // the connection, and then the reply never comes.
        let mut early = Vec::new();
        let reply = loop {
            tokio::select! {
                reply = &mut call => break reply,
                signal = ended.next() => early.push(job_end(operation, signal)?),
            }
        };
        let reply = reply
            .map_err(|why| no_such_unit(name, Error::from_bus(operation, &self.socket, why)))?;
        let job: OwnedObjectPath = body(operation, &reply)?;
        if let Some((_, result)) = early.into_iter().find(|(path, _)| *path == job) {
            return Ok(result);
        }
        loop {
            let (path, result) = job_end(operation, ended.next().await)?;
            if path == job {
                return Ok(result);
            }
        }
    }

    /// The stream of systemd's JobRemoved signals. The bus itself holds the sender against who owns systemd's name.
    async fn job_ends(&self, operation: &str) -> Result<MessageStream, Error> {
        let rule = || -> zbus::Result<MatchRule<'static>> {
            MatchRule::builder()
                .msg_type(Type::Signal)
                .sender(SYSTEMD)
                .path(MANAGER_PATH)
                .interface(MANAGER)
                .member("JobRemoved")
                .build()
        };
        let stream = async { MessageStream::for_match_rule(rule()?, &self.connection, None).await };
        stream
            .await
            .map_err(|why| Error::from_bus(operation, &self.socket, why))
    }

    async fn read_unit(&self, operation: &str, path: &str) -> Result<UnitState, Error> {
        let fragment: String = self.property(operation, path, UNIT, "FragmentPath").await?;
        let mut state = UnitState {
            name: self.property(operation, path, UNIT, "Id").await?,
            load_state: self.property(operation, path, UNIT, "LoadState").await?,
            active_state: self.property(operation, path, UNIT, "ActiveState").await?,
            sub_state: self.property(operation, path, UNIT, "SubState").await?,
            fragment_path: Some(fragment)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            ..UnitState::default()
        };
        // Other kinds of units have no processes.
        if state.name.ends_with(".service") {
            let pid: u32 = self.property(operation, path, SERVICE, "MainPID").await?;
            let code: i32 = self
                .property(operation, path, SERVICE, "ExecMainCode")
                .await?;
            let status: i32 = self
                .property(operation, path, SERVICE, "ExecMainStatus")
                .await?;
            state.main_pid = Some(pid).filter(|pid| *pid != 0);
            state.main_exit = MainExit::from_properties(code, status);
            state.result = self.property(operation, path, SERVICE, "Result").await?;
        }
        Ok(state)
    }

    async fn property<T>(
        &self,
        operation: &str,
        path: &str,
        interface: &str,
        name: &str,
    ) -> Result<T, Error>
    where
        T: TryFrom<OwnedVariant>,
        T::Error: Into<zbus::Error>,
    {
        let reply = self
            .call(operation, path, PROPERTIES, "Get", &(interface, name))
            .await?;
        let value: OwnedVariant = body(operation, &reply)?;
        T::try_from(value).map_err(|why| Error::Bus {
            operation: operation.to_owned(),
            why: why.into(),
        })
    }

    /// Calls a method under this manager's deadline.
    async fn call<B>(
        &self,
        operation: &str,
        path: &str,
        interface: &str,
        method: &str,
        arguments: &B,
    ) -> Result<Message, Error>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let call =
            self.connection
                .call_method(Some(SYSTEMD), path, Some(interface), method, arguments);
        match timeout(self.timeout, call).await {
            Ok(reply) => reply.map_err(|why| Error::from_bus(operation, &self.socket, why)),
            Err(_) => Err(Error::timeout(operation, self.timeout)),
        }
    }
}

async fn connect(socket: &Path, operation: &str) -> Result<Connection, Error> {
    let no_bus = |why: io::Error| Error::NoBus {
        socket: socket.to_path_buf(),
        why,
    };
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .map_err(no_bus)?;
    let stream = stream.into_std().map_err(no_bus)?;
    let building = zbus::connection::Builder::unix_stream(stream).build();
    building
        .await
        .map_err(|why| Error::from_bus(operation, socket, why))
}

/// Reads a JobRemoved signal: the job's path, and its result. The stream ends when the connection does.
fn job_end(
    operation: &str,
    signal: Option<zbus::Result<Message>>,
) -> Result<(OwnedObjectPath, String), Error> {
    let closed = || {
        Err(zbus::Error::InputOutput(
            io::Error::from(io::ErrorKind::ConnectionReset).into(),
        ))
    };
    let signal = signal
        .unwrap_or_else(closed)
        .map_err(|why| broken(operation, why))?;
    let (_id, job, _unit, result): (u32, OwnedObjectPath, String, String) =
        body(operation, &signal)?;
    Ok((job, result))
}

fn body<T>(operation: &str, message: &Message) -> Result<T, Error>
where
    T: serde::de::DeserializeOwned + zbus::Type,
{
    message
        .body()
        .deserialize()
        .map_err(|why| broken(operation, why))
}

fn broken(operation: &str, why: zbus::Error) -> Error {
    Error::Bus {
        operation: operation.to_owned(),
        why,
    }
}

/// systemd's own error for a unit that it cannot find becomes ours.
fn no_such_unit(name: &str, error: Error) -> Error {
    match error {
        Error::Refused { name: reply, .. } if reply == "org.freedesktop.systemd1.NoSuchUnit" => {
            Error::NoSuchUnit {
                unit: name.to_owned(),
            }
        }
        other => other,
    }
}
