//! containerd as the transaction needs it: restarted, asked for its handlers, and its own reading of a configuration.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use km_containerd_config::live::LiveHandlers;
use km_containerd_config::shim::ShimSearch;
use km_containerd_config::transaction::{BoxError, Daemon as Seam};
use km_host::{HostPath, Root, command, process};

use crate::config::{Containerd, RestartMode};
use crate::failure::{Failure, Kind};
use crate::node::ANSWER;

/// How long systemd, or the restart command, may take.
const RESTART: Duration = Duration::from_secs(180);

/// How long one dry run may take.
const DUMP: Duration = Duration::from_secs(30);

/// Where containerd puts binaries of its own unless its configuration says otherwise (`io.containerd.internal.v1.opt`).
const DEFAULT_OPT: &str = "/opt/containerd";

/// containerd on a node.
#[derive(Debug)]
pub(crate) struct Daemon<'a> {
    root: &'a Root,
    settings: &'a Containerd,
    socket: PathBuf,
}

impl<'a> Daemon<'a> {
    pub(crate) fn new(root: &'a Root, settings: &'a Containerd) -> Result<Daemon<'a>> {
        Ok(Daemon {
            root,
            settings,
            socket: root.resolve(&settings.socket)?,
        })
    }

    /// A connection to its CRI.
    pub(crate) async fn cri(&self) -> Result<km_cri::Client, km_cri::Error> {
        km_cri::Client::connect(&self.socket, ANSWER).await
    }

    /// Where it looks for shims.
    pub(crate) fn shim_search(&self, opt: Option<&str>) -> Result<ShimSearch> {
        let peer = process::socket_peer(self.root, &self.socket)?;
        let path = peer
            .as_ref()
            .and_then(|peer| process::environment_variable(self.root, peer.pid, "PATH"));
        let path = path
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default();
        let binary = self.binary()?;
        Ok(ShimSearch {
            path: format!("{}/bin:{path}", opt.unwrap_or(DEFAULT_OPT)),
            containerd_dir: binary.and_then(|binary| binary.parent()),
        })
    }

    /// How it is restarted, in words.
    pub(crate) fn restart_words(settings: &Containerd) -> String {
        match settings.restart.mode {
            RestartMode::Systemd => format!("systemd restarts {}", settings.restart.unit),
            RestartMode::Command => format!("{} is run", settings.restart.command.join(" ")),
            RestartMode::None => {
                "you restart containerd: containerd.restart.mode is \"none\"".to_owned()
            }
        }
    }

    /// The program that runs, or the one that the configuration names.
    fn binary(&self) -> Result<Option<HostPath>> {
        if let Some(binary) = &self.settings.binary {
            return Ok(Some(binary.clone()));
        }
        let peer = process::socket_peer(self.root, &self.socket)?;
        Ok(peer
            .and_then(|peer| peer.exe)
            .and_then(|exe| HostPath::new(exe).ok()))
    }

    async fn restart_unit(&self) -> Result<(), BoxError> {
        let bus = self
            .root
            .resolve(&HostPath::new("/run/dbus/system_bus_socket")?)?;
        let unit = &self.settings.restart.unit;
        let began = SystemTime::now();
        let manager = km_systemd::Manager::connect(&bus, ANSWER).await?;
        match manager.restart(unit, RESTART).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let log = command::run(self.root, &km_systemd::log_tail_argv(unit, began), ANSWER);
                let log = log.map(|output| output.tail(20)).unwrap_or_default();
                let message = if log.is_empty() {
                    error.to_string()
                } else {
                    format!("{error}; its log ends:\n{log}")
                };
                Err(Failure::because(Kind::Containerd, message, error).into())
            }
        }
    }

    fn restart_by_command(&self) -> Result<(), BoxError> {
        let argv = &self.settings.restart.command;
        let output = command::run(self.root, argv, RESTART)?;
        if output.status.success() {
            return Ok(());
        }
        let message = format!(
            "the restart command {:?} ended with {}:\n{}",
            argv.join(" "),
            output.status,
            output.tail(20)
        );
        Err(Failure::new(Kind::Containerd, message).into())
    }
}

impl Seam for Daemon<'_> {
    async fn restart(&self) -> Result<(), BoxError> {
        match self.settings.restart.mode {
            RestartMode::Systemd => self.restart_unit().await,
            RestartMode::Command => self.restart_by_command(),
            RestartMode::None => Err("containerd.restart.mode is \"none\"".into()),
        }
    }

    async fn handlers(&self) -> Result<LiveHandlers, BoxError> {
        let status = self.cri().await?.status().await?;
        Ok(LiveHandlers::from_cri_config(&status.config))
    }

    async fn dump(&self, config: &Path) -> Result<Option<String>, BoxError> {
        let Some(binary) = self.binary()? else {
            return Ok(None);
        };
        let file = self
            .root
            .host_path(config)
            .ok_or_else(|| format!("{} is not on the host", config.display()))?;
        let words: &[&str] = if config.exists() {
            &["--config", file.as_str(), "config", "dump"]
        } else {
            &["config", "default"]
        };
        let argv: Vec<&str> = std::iter::once(binary.as_str())
            .chain(words.iter().copied())
            .collect();
        let output = match command::run(self.root, &argv, DUMP) {
            Ok(output) => output,
            Err(command::CommandError::Start { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if !output.status.success() {
            return Err(format!("{} said:\n{}", argv.join(" "), output.tail(10)).into());
        }
        Ok(Some(String::from_utf8(output.stdout)?))
    }
}
