//! Stands in Kata's place in tests: a shim that launches real QEMU as Kata in Go does, and serves containerd's task API for the pod.
//! README.md says what it covers, and what not.

#![expect(
    clippy::disallowed_methods,
    reason = "it stands in a program's place in tests, outside any host root"
)]

mod agent;
mod devices;
mod numa;
mod process;
mod service;
mod settings;
mod vm;

use std::sync::Arc;

use containerd_shim::{
    Config, DeleteResponse, Error, ExitSignal, Flags, Shim, StartOpts, publisher::RemotePublisher,
    spawn,
};

use crate::service::Service;

/// What it calls itself, to containerd.
const RUNTIME: &str = "io.containerd.km-inner.v2";

/// What a sandbox's end by force is told as: 128 and SIGKILL.
const KILLED: u32 = 137;

struct Inner {
    id: String,
    exit: Arc<ExitSignal>,
}

impl Shim for Inner {
    type T = Service;

    fn new(_runtime: &str, flags: &Flags, _config: &mut Config) -> Self {
        Self {
            id: flags.id.clone(),
            exit: Arc::default(),
        }
    }

    /// One process for a pod: a container's `start` gives the address of its sandbox's.
    fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let sandbox = devices::sandbox_of(".".as_ref()).map_err(told)?;
        let group = sandbox.unwrap_or_else(|| opts.id.clone());
        let (_, address) = spawn(opts, &group, Vec::new())?;
        Ok(address)
    }

    /// The process is gone: what it left is ended by what it wrote down.
    fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        vm::end_by_file(&self.id).map_err(told)?;
        let mut response = DeleteResponse::new();
        response.set_exit_status(KILLED);
        response.set_exited_at(containerd_shim::util::timestamp()?);
        Ok(response)
    }

    fn wait(&mut self) {
        self.exit.wait();
    }

    fn create_task_service(&self, _publisher: RemotePublisher) -> Service {
        Service::new(Arc::clone(&self.exit))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn told(error: anyhow::Error) -> Error {
    Error::Other(format!("{error:#}"))
}

fn main() {
    let config = Config {
        // Children are waited for where they are started.
        no_reaper: true,
        ..Config::default()
    };
    containerd_shim::run::<Inner>(RUNTIME, Some(config));
}
