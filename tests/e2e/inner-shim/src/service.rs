//! The task API (containerd, api/runtime/task/v3/shim.proto) of one pod.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::ttrpc::{self, Code};
use containerd_shim::{ExitSignal, Task, TtrpcContext, TtrpcResult, api};
use serde_json::Value;

use crate::process::{Pod, Process};
use crate::settings::Settings;
use crate::{agent, devices, vm};

/// How often QEMU is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// What something that was killed is told as.
const KILLED: u32 = 128 + 9;

/// The service. Clones are the same.
#[derive(Clone)]
pub(crate) struct Service {
    exit: Arc<ExitSignal>,
    pod: Arc<(Mutex<Pod>, Condvar)>,
    /// The machine. Its lock is held while it is ended, and never with the pod's inside.
    machine: Arc<Mutex<Option<Child>>>,
}

impl Service {
    pub(crate) fn new(exit: Arc<ExitSignal>) -> Self {
        Self {
            exit,
            pod: Arc::default(),
            machine: Arc::default(),
        }
    }

    fn pod(&self) -> MutexGuard<'_, Pod> {
        self.pod.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self) -> MutexGuard<'_, Option<Child>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.pod.1.notify_all();
    }

    /// Launches the sandbox's machine, as Kata does when the sandbox is created.
    fn launch(&self, id: &str, bundle: &Path, options: Option<&Any>) -> Result<u32> {
        let settings = Settings::load(options)?;
        let functions = devices::functions(bundle)?;
        let child = vm::launch(&settings, id, &functions)?;
        let pid = child.id();
        *self.machine() = Some(child);
        {
            let mut pod = self.pod();
            id.clone_into(&mut pod.sandbox);
            pod.pid = pid;
        }
        Ok(pid)
    }

    /// When QEMU ends, everything in it has.
    fn watch(&self) {
        loop {
            let ended = match self.machine().as_mut() {
                Some(child) => child.try_wait(),
                None => return,
            };
            match ended {
                Ok(None) => thread::sleep(INTERVAL),
                Ok(Some(_)) | Err(_) => {
                    self.pod()
                        .tasks
                        .values_mut()
                        .for_each(|task| task.end(KILLED));
                    self.changed();
                    return;
                }
            }
        }
    }

    fn end_machine(&self) -> Result<()> {
        if let Some(child) = self.machine().as_mut() {
            vm::end(child)?;
        }
        Ok(())
    }

    /// Runs what is executed, and hands on what it says.
    fn execute(&self, id: &str, exec: &str) {
        let (command, stdout, stderr, socket) = {
            let pod = self.pod();
            let Some(process) = pod.process(id, exec) else {
                return;
            };
            let socket = vm::folder(&pod.sandbox).join("agent");
            (
                process.command.clone(),
                process.stdout.clone(),
                process.stderr.clone(),
                socket,
            )
        };
        let (code, said, failed) = match agent::run(&socket, &command) {
            Ok((said, code)) => (code, said, String::new()),
            Err(error) => (255, String::new(), format!("{error:#}\n")),
        };
        // Both are opened, also for nothing: whoever reads one waits for its writer.
        for (fifo, text) in [(stdout, said), (stderr, failed)] {
            if let Err(error) = hand_on(&fifo, &text) {
                log::warn!("{fifo}: {error}");
            }
        }
        if let Some(process) = self.pod().process_mut(id, exec) {
            process.end(code);
        }
        self.changed();
    }
}

fn hand_on(fifo: &str, text: &str) -> std::io::Result<()> {
    match fifo {
        "" => Ok(()),
        path => File::options()
            .write(true)
            .open(path)?
            .write_all(text.as_bytes()),
    }
}

/// A FIFO with both its ends here, so that opening it waits for nobody; its reader sees the end when this is dropped.
fn keep(path: &str) -> Result<Vec<File>> {
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let fifo = File::options().read(true).write(true).open(path);
    Ok(vec![fifo.with_context(|| format!("open {path}"))?])
}

fn failed<T>(code: Code, message: impl ToString) -> TtrpcResult<T> {
    Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
        code,
        message.to_string(),
    )))
}

fn gone<T>(id: &str, exec: &str) -> TtrpcResult<T> {
    failed(Code::NOT_FOUND, format!("no process {id} {exec}"))
}

fn plain<T>(result: Result<T>) -> TtrpcResult<T> {
    result.or_else(|error| failed(Code::INTERNAL, format!("{error:#}")))
}

impl Task for Service {
    fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> TtrpcResult<api::CreateTaskResponse> {
        let bundle = Path::new(&request.bundle);
        let pid = match plain(devices::sandbox_of(bundle))? {
            None => plain(self.launch(&request.id, bundle, request.options.as_ref()))?,
            Some(_) => self.pod().pid,
        };
        let mut kept = plain(keep(&request.stdout))?;
        kept.extend(plain(keep(&request.stderr))?);
        let process = Process {
            bundle: request.bundle,
            stdout: request.stdout,
            stderr: request.stderr,
            kept,
            ..Process::default()
        };
        let is_sandbox = {
            let mut pod = self.pod();
            let is_sandbox = pod.sandbox == request.id;
            pod.tasks.insert(request.id, process);
            is_sandbox
        };
        if is_sandbox {
            let watched = self.clone();
            thread::spawn(move || watched.watch());
        }
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> TtrpcResult<api::StartResponse> {
        let mut pod = self.pod();
        let pid = pod.pid;
        let Some(process) = pod.process_mut(&request.id, &request.exec_id) else {
            return gone(&request.id, &request.exec_id);
        };
        process.started = true;
        drop(pod);
        if !request.exec_id.is_empty() {
            let service = self.clone();
            thread::spawn(move || service.execute(&request.id, &request.exec_id));
        }
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> TtrpcResult<api::Empty> {
        // The process of the runtime specification, as JSON.
        let spec: Value = match serde_json::from_slice(&request.spec.value) {
            Ok(spec) => spec,
            Err(error) => return failed(Code::INVALID_ARGUMENT, error),
        };
        let words = spec["args"].as_array().into_iter().flatten();
        let words = words.filter_map(|word| word.as_str().map(str::to_owned));
        let process = Process {
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            command: words.collect(),
            ..Process::default()
        };
        let mut pod = self.pod();
        let Some(task) = pod.tasks.get_mut(&request.id) else {
            return gone(&request.id, "");
        };
        task.inside.insert(request.exec_id, process);
        Ok(api::Empty::default())
    }

    fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> TtrpcResult<api::StateResponse> {
        let pod = self.pod();
        let Some(process) = pod.process(&request.id, &request.exec_id) else {
            return gone(&request.id, &request.exec_id);
        };
        let status = match (process.started, &process.ended) {
            (_, Some(_)) => api::Status::STOPPED,
            (true, None) => api::Status::RUNNING,
            (false, None) => api::Status::CREATED,
        };
        let mut response = api::StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: process.bundle.clone(),
            pid: pod.pid,
            status: status.into(),
            stdout: process.stdout.clone(),
            stderr: process.stderr.clone(),
            ..Default::default()
        };
        if let Some((code, at)) = &process.ended {
            response.exit_status = *code;
            response.exited_at = Some(at.clone()).into();
        }
        Ok(response)
    }

    fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> TtrpcResult<api::WaitResponse> {
        let mut pod = self.pod();
        loop {
            match pod.process(&request.id, &request.exec_id) {
                None => return gone(&request.id, &request.exec_id),
                Some(process) => {
                    if let Some((code, at)) = &process.ended {
                        return Ok(api::WaitResponse {
                            exit_status: *code,
                            exited_at: Some(at.clone()).into(),
                            ..Default::default()
                        });
                    }
                }
            }
            pod = self.pod.1.wait(pod).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A container's process is nothing here but what containerd knows of it; the sandbox's is the machine.
    fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> TtrpcResult<api::Empty> {
        let is_sandbox = {
            let pod = self.pod();
            if pod.process(&request.id, &request.exec_id).is_none() {
                return gone(&request.id, &request.exec_id);
            }
            pod.sandbox == request.id && request.exec_id.is_empty()
        };
        if is_sandbox {
            plain(self.end_machine())?;
        }
        if let Some(process) = self.pod().process_mut(&request.id, &request.exec_id) {
            process.end(128 + request.signal);
        }
        self.changed();
        Ok(api::Empty::default())
    }

    fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> TtrpcResult<api::DeleteResponse> {
        let is_sandbox = self.pod().sandbox == request.id && request.exec_id.is_empty();
        if is_sandbox {
            plain(self.end_machine())?;
            plain(vm::forget(&request.id))?;
        }
        let mut pod = self.pod();
        let pid = pod.pid;
        let removed = match request.exec_id.as_str() {
            "" => pod.tasks.remove(&request.id),
            exec => pod
                .tasks
                .get_mut(&request.id)
                .and_then(|task| task.inside.remove(exec)),
        };
        drop(pod);
        self.changed();
        let Some(mut process) = removed else {
            return gone(&request.id, &request.exec_id);
        };
        process.end(KILLED);
        let (code, at) = process.ended.unwrap_or_default();
        Ok(api::DeleteResponse {
            pid,
            exit_status: code,
            exited_at: Some(at).into(),
            ..Default::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, _: api::PidsRequest) -> TtrpcResult<api::PidsResponse> {
        Ok(api::PidsResponse {
            processes: vec![containerd_shim::protos::api::ProcessInfo {
                pid: self.pod().pid,
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    fn connect(
        &self,
        _: &TtrpcContext,
        _: api::ConnectRequest,
    ) -> TtrpcResult<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod().pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    fn close_io(&self, _: &TtrpcContext, _: api::CloseIORequest) -> TtrpcResult<api::Empty> {
        Ok(api::Empty::default())
    }

    fn update(&self, _: &TtrpcContext, _: api::UpdateTaskRequest) -> TtrpcResult<api::Empty> {
        Ok(api::Empty::default())
    }

    fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> TtrpcResult<api::Empty> {
        if self.pod().tasks.is_empty() {
            self.exit.signal();
        }
        Ok(api::Empty::default())
    }
}
