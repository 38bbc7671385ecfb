//! The least that the `containerd-shim` crate can be: a shim that serves, and does nothing. `hack/bench shim` reads what memory one such
//! process takes, which a proxy between containerd and Kata would take for each pod at the least.

use std::sync::Arc;

use containerd_shim::{
    Config, DeleteResponse, Error, ExitSignal, Flags, Shim, StartOpts, Task, TtrpcContext,
    TtrpcResult, api, publisher::RemotePublisher, spawn,
};

#[derive(Clone)]
struct Resident {
    exit: Arc<ExitSignal>,
}

impl Shim for Resident {
    type T = Self;

    fn new(_runtime: &str, _flags: &Flags, _config: &mut Config) -> Self {
        Self {
            exit: Arc::default(),
        }
    }

    fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let id = opts.id.clone();
        let (_, address) = spawn(opts, &id, Vec::new())?;
        Ok(address)
    }

    fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        Ok(DeleteResponse::new())
    }

    fn wait(&mut self) {
        self.exit.wait();
    }

    fn create_task_service(&self, _publisher: RemotePublisher) -> Self {
        self.clone()
    }
}

impl Task for Resident {
    fn connect(
        &self,
        _: &TtrpcContext,
        _: api::ConnectRequest,
    ) -> TtrpcResult<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            ..Default::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> TtrpcResult<api::Empty> {
        self.exit.signal();
        Ok(api::Empty::default())
    }
}

fn main() {
    containerd_shim::run::<Resident>("io.containerd.km-resident.v2", None);
}
