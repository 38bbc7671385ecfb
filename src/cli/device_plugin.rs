//! `device-plugin`: the kubelet's plugin for GPUs and NVSwitches, until it is told to end.

use std::time::Duration;

use anyhow::{Context as _, Result};
use km_host::{HostPath, Root};
use tokio::signal::unix::{SignalKind, signal};

use super::Global;
use crate::specs::{self, LOCK, Options};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The kubelet's folder on the host.
    #[arg(
        long,
        env = "KATA_MANAGER_KUBELET_DIR",
        value_name = "DIR",
        default_value = "/var/lib/kubelet"
    )]
    kubelet_dir: HostPath,
    /// How often known devices are looked at, in milliseconds: no event tells that one has fallen off the bus.
    #[arg(long, env = "KATA_MANAGER_PROBE_INTERVAL", value_name = "MS", default_value_t = 1250,
        value_parser = clap::value_parser!(u64).range(100..))]
    probe_interval: u64,
    /// How often the whole bus is read when nothing is seen to change, in seconds.
    #[arg(long, env = "KATA_MANAGER_SWEEP_INTERVAL", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..))]
    sweep_interval: u64,
    #[command(flatten)]
    options: Options,
}

pub(super) async fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let specs = specs::Settings::new(&arguments.options, &global.devices()?)?;
    let backend = specs.backend();
    let settings = km_plugin::Settings {
        root: Root::new(&global.host_root)?,
        naming: specs.naming,
        backend,
        kubelet: arguments.kubelet_dir.clone(),
        cdi: specs.dir,
        lock: HostPath::new(LOCK)?,
        lock_timeout: Duration::from_secs(global.lock_timeout),
        probe: Duration::from_millis(arguments.probe_interval),
        sweep: Duration::from_secs(arguments.sweep_interval),
    };
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to signals")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(km_plugin::serve(settings, stop).await?)
}
