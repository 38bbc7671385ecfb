//! The command line: global options, one file a subcommand.

mod apply;
mod artifacts;
mod cdi;
mod config;
mod containerd;
mod device_plugin;
mod devices;
mod doctor;
mod plan;
mod rollback;
mod runtimeclasses;
mod status;
mod topology;
mod uninstall;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use tokio::runtime::Builder;

use crate::failure::{self, Kind};
use crate::log;
use crate::node::Node;
use crate::output::{self, Format};

/// Puts Kata guest artifacts and GPU runtime handlers on a containerd node, and takes them off again.
///
/// Begin with a configuration file (NVIDIA Kata Manager's config.yaml works), see what would change with "plan", and change
/// it with "apply". "status" tells how the node stands, "uninstall" takes everything off.
#[derive(Debug, Parser)]
#[command(name = "kata-manager",
    bin_name = "kata-manager", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes:
   0  done, or nothing to do
   2  plan --exit-code found changes
   3  refused: in use, conflict, something is missing, locked
   4  configuration or usage
   5  registry or network
   6  verification: digest, signature, hostile content
   7  host: disk, permission
   8  containerd
   9  device
  70  a bug of kata-manager";

/// Options of every command.
#[derive(Debug, clap::Args)]
struct Global {
    /// The configuration file.
    #[arg(long, global = true, env = "KATA_MANAGER_CONFIG", value_name = "FILE", default_value = crate::config::DEFAULT_PATH)]
    config: PathBuf,
    /// The folder where the host's root is: / on the host, its mount point in a container.
    #[arg(
        long,
        global = true,
        env = "KATA_MANAGER_HOST_ROOT",
        value_name = "DIR",
        default_value = "/"
    )]
    host_root: PathBuf,
    /// How results are printed.
    #[arg(
        long,
        global = true,
        env = "KATA_MANAGER_OUTPUT",
        value_enum,
        default_value_t
    )]
    output: Format,
    /// Which distribution's containerd this node runs, in place of containerd.flavor.
    #[arg(long, global = true, env = "KATA_MANAGER_FLAVOR", value_enum)]
    flavor: Option<crate::config::Flavor>,
    /// How long to wait for another kata-manager to finish, in seconds.
    #[arg(
        long,
        global = true,
        env = "KATA_MANAGER_LOCK_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 60
    )]
    lock_timeout: u64,
    /// Certificates (PEM) of registries' authorities to trust, besides the system's and registry.caFile.
    #[arg(long, global = true, env = "KATA_MANAGER_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// What is said on standard error of what goes on: error, warn, info or debug.
    #[arg(
        long,
        global = true,
        env = "KATA_MANAGER_LOG",
        value_name = "LEVEL",
        default_value = "warn"
    )]
    log: tracing::Level,
}

impl Global {
    fn node(&self) -> Result<Node> {
        self.open(crate::config::load(&self.config)?)
    }

    /// As [`Global::node`], for work that needs no configuration.
    fn node_if_configured(&self) -> Result<Node> {
        self.open(crate::config::load_if_there(&self.config)?)
    }

    /// For work that is not about the node at all.
    fn elsewhere(&self) -> Result<Node> {
        let config = crate::config::load_if_there(&self.config)?;
        let mut node = Node::elsewhere(config, &self.host_root, self.lock_wait())?;
        node.ca_file.clone_from(&self.ca_file);
        Ok(node)
    }

    fn open(&self, config: (crate::config::Config, Vec<u8>)) -> Result<Node> {
        let mut node = Node::open(config, &self.host_root, self.lock_wait(), self.flavor)?;
        node.ca_file.clone_from(&self.ca_file);
        Ok(node)
    }

    fn lock_wait(&self) -> Duration {
        Duration::from_secs(self.lock_timeout)
    }

    /// How devices are named and given away, by the configuration if there is one.
    fn devices(&self) -> Result<crate::config::Devices> {
        Ok(crate::config::load_if_there(&self.config)?.0.devices)
    }
}

#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Show what "apply" would change, and change nothing.
    Plan(plan::Arguments),
    /// Make the node as the configuration says.
    Apply(apply::Arguments),
    /// Tell how the node stands: classes, generations, handlers.
    Status,
    /// Take everything off the node again.
    Uninstall(uninstall::Arguments),
    /// Point a class at an earlier generation, and hold it there.
    Rollback(rollback::Arguments),
    /// Push, pull, list and collect guest artifacts.
    #[command(subcommand)]
    Artifacts(artifacts::Command),
    /// Look at containerd's configuration: show, diff, restore.
    #[command(subcommand)]
    Containerd(containerd::Command),
    /// List GPUs and NVSwitches, and hand them to VFIO and back.
    #[command(subcommand)]
    Devices(devices::Command),
    /// Write, list and check CDI specs, by which containerd and Kata find devices.
    #[command(subcommand)]
    Cdi(cdi::Command),
    /// Say what keeps this host from passing GPUs through, and what to do.
    Doctor(doctor::Arguments),
    /// Offer GPUs and NVSwitches that VFIO has to the kubelet, as its device plugin, until SIGTERM.
    DevicePlugin(device_plugin::Arguments),
    /// Draw the PCI tree with GPUs, switches, IOMMU groups, NUMA nodes, drivers and users; or the one that a guest will have.
    Topology(topology::Arguments),
    /// Print Kubernetes RuntimeClass objects.
    #[command(subcommand)]
    Runtimeclasses(runtimeclasses::Command),
    /// Check the configuration file, or print its JSON Schema.
    #[command(subcommand)]
    Config(config::Command),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Runs the program and gives its exit code.
pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    let parsed = Cli::command()
        .try_get_matches_from(arguments)
        .and_then(|matches| {
            let told = matches.value_source("log") != Some(ValueSource::DefaultValue);
            Ok((Cli::from_arg_matches(&matches)?, told))
        });
    let (cli, told) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            let code = if error.use_stderr() {
                Kind::Configuration as u8
            } else {
                0
            };
            // Where neither stream can be written there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let format = cli.global.output;
    // What runs for long says what it does.
    let level = match &cli.command {
        Command::DevicePlugin(_) if !told => tracing::Level::INFO,
        _ => cli.global.log,
    };
    log::start(level);
    match dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::error(format, &error);
            ExitCode::from(failure::kind(&error) as u8)
        }
    }
}

/// Two workers: one for each CPU would reserve hundreds of megabytes on a GPU server.
fn on_threads<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut builder = Builder::new_multi_thread();
    let threads = builder.worker_threads(2).enable_all().build();
    threads.context("cannot start threads")?.block_on(work)
}

/// For work that mostly waits: starting threads would take longer.
fn on_one_thread<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let one = Builder::new_current_thread().enable_all().build();
    one.context("cannot prepare to wait for events")?
        .block_on(work)
}

fn dispatch(cli: Cli) -> Result<u8> {
    let global = &cli.global;
    match cli.command {
        Command::Plan(arguments) => return on_threads(plan::run(global, &arguments)),
        Command::Apply(arguments) => on_threads(apply::run(global, &arguments))?,
        Command::Status => on_threads(status::run(global))?,
        Command::Uninstall(arguments) => on_threads(uninstall::run(global, &arguments))?,
        Command::Rollback(arguments) => rollback::run(global, &arguments)?,
        Command::Artifacts(command) => artifacts::run(global, &command)?,
        Command::Containerd(command) => on_threads(containerd::run(global, &command))?,
        Command::Devices(command) => devices::run(global, &command)?,
        Command::Cdi(command) => on_threads(cdi::run(global, &command))?,
        Command::Doctor(arguments) => on_threads(doctor::run(global, &arguments))?,
        Command::DevicePlugin(arguments) => on_one_thread(device_plugin::run(global, &arguments))?,
        Command::Topology(arguments) => on_threads(topology::run(global, &arguments))?,
        Command::Runtimeclasses(command) => runtimeclasses::run(global, &command)?,
        Command::Config(command) => config::run(global, &command)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "kata-manager", &mut script);
            output::to_stdout(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
