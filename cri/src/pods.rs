//! Runs pods through the CRI, as the kubelet does: sandboxes, containers in them, and commands in those. For proving
//! that a handler works, not for running workloads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::client::Client;
use crate::error::Error;
use crate::sandbox::{Sandbox, time};
use crate::wire;

/// What a pod sandbox is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxSpec {
    /// The pod's name. Together with namespace, uid and attempt it must be new to containerd.
    pub name: String,
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// The pod's UID.
    pub uid: String,
    /// How many sandboxes this pod had before.
    pub attempt: u32,
    /// The runtime handler; empty for containerd's default.
    pub handler: String,
    /// The host name inside; ignored with the host's network.
    pub hostname: String,
    /// The folder of the containers' logs, as containerd sees it.
    pub log_directory: Option<PathBuf>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations. Only those that the handler's `pod_annotations` match reach the runtime.
    pub annotations: BTreeMap<String, String>,
    /// Whether the pod uses the host's network, which needs no CNI.
    pub host_network: bool,
    /// The cgroup above the pod's own; containerd's default when absent.
    pub cgroup_parent: Option<String>,
}

/// What a container is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerSpec {
    /// The container's name inside its pod.
    pub name: String,
    /// How many containers of this name the pod had before.
    pub attempt: u32,
    /// An image that containerd has, by reference or identifier.
    pub image: String,
    /// Replaces the image's entrypoint, unless empty.
    pub command: Vec<String>,
    /// Replaces the image's arguments, unless empty.
    pub args: Vec<String>,
    /// The environment, besides the image's.
    pub env: Vec<(String, String)>,
    /// Folders and files of the host.
    pub mounts: Vec<Mount>,
    /// Device nodes of the host.
    pub devices: Vec<Device>,
    /// CDI devices by fully qualified name, for example `nvidia.com/pgpu=0000:41:00.0`.
    pub cdi_devices: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The log file, relative to the sandbox's log folder; no log is kept without.
    pub log_path: Option<PathBuf>,
    /// Whether the container is privileged.
    pub privileged: bool,
}

/// A folder or file of the host inside a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is on the host, as containerd sees it.
    pub host_path: PathBuf,
    /// Where it appears in the container.
    pub container_path: PathBuf,
    /// Whether the container may only read it.
    pub readonly: bool,
}

/// A device node of the host inside a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The node on the host, as containerd sees it.
    pub host_path: PathBuf,
    /// Where it appears in the container.
    pub container_path: PathBuf,
    /// Any of `r`, `w` and `m` (create).
    pub permissions: String,
}

/// A sandbox in detail.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxStatus {
    /// What a listing would say.
    pub sandbox: Sandbox,
    /// The pod's address; empty with the host's network.
    pub ip: String,
    /// containerd's own view (process, runtime options, OCI configuration); for debugging, its shape is not fixed.
    pub info: Value,
}

/// A container in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// containerd's identifier.
    pub id: String,
    /// The sandbox that it runs in.
    pub sandbox_id: String,
    /// Its name inside its pod.
    pub name: String,
    /// Where it is in its life.
    pub state: ContainerState,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Created, not started.
    Created,
    /// Its process runs.
    Running,
    /// Its process ended.
    Exited,
    /// containerd does not know, or it is a state that this program does not know.
    Unknown,
}

/// A container in detail.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerStatus {
    /// containerd's identifier.
    pub id: String,
    /// Its name inside its pod.
    pub name: String,
    /// Where it is in its life.
    pub state: ContainerState,
    /// When it was started, by containerd's clock.
    pub started_at: Option<SystemTime>,
    /// When it ended, by containerd's clock.
    pub finished_at: Option<SystemTime>,
    /// The exit code, once it ended.
    pub exit_code: i32,
    /// A word for why it is in its state.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// The log file, absolute, as containerd sees it; empty when no log is kept.
    pub log_path: PathBuf,
    /// containerd's own view (process, OCI configuration); for debugging, its shape is not fixed.
    pub info: Value,
}

/// What a command in a container did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub exit_code: i32,
}

impl Client {
    /// Creates and starts a pod sandbox; gives its identifier. A virtual machine takes seconds to boot:
    /// choose the client's timeout accordingly.
    ///
    /// # Errors
    /// See [`Error`]. After [`Error::Timeout`] the sandbox may exist; find it by its labels.
    pub async fn run_sandbox(&self, spec: &SandboxSpec) -> Result<String, Error> {
        let request = wire::RunPodSandboxRequest {
            config: Some(spec.to_wire()),
            runtime_handler: spec.handler.clone(),
        };
        let answer = self
            .call("RunPodSandbox", self.runtime().run_pod_sandbox(request))
            .await?;
        Ok(answer.pod_sandbox_id)
    }

    /// One sandbox in detail.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::is_not_found`] when there is no such sandbox.
    pub async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus, Error> {
        let call = "PodSandboxStatus";
        let request = wire::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: true,
        };
        let answer = self
            .call(call, self.runtime().pod_sandbox_status(request))
            .await?;
        let status = answer.status.ok_or_else(|| empty(call, "status"))?;
        let ip = status.network.clone().unwrap_or_default().ip;
        Ok(SandboxStatus {
            sandbox: Sandbox::from_status(status)?,
            ip,
            info: info(answer.info),
        })
    }

    /// Stops a sandbox and every container in it by force. One that is stopped or gone is fine.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = wire::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.call("StopPodSandbox", self.runtime().stop_pod_sandbox(request))
            .await?;
        Ok(())
    }

    /// Removes a sandbox and every container in it by force. One that is gone is fine.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = wire::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.call(
            "RemovePodSandbox",
            self.runtime().remove_pod_sandbox(request),
        )
        .await?;
        Ok(())
    }

    /// Creates a container in a sandbox that was made from `sandbox`; gives its identifier.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_container(
        &self,
        sandbox_id: &str,
        container: &ContainerSpec,
        sandbox: &SandboxSpec,
    ) -> Result<String, Error> {
        let request = wire::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(container.to_wire(sandbox.host_network)),
            sandbox_config: Some(sandbox.to_wire()),
        };
        let answer = self
            .call("CreateContainer", self.runtime().create_container(request))
            .await?;
        Ok(answer.container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn start_container(&self, id: &str) -> Result<(), Error> {
        let request = wire::StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.call("StartContainer", self.runtime().start_container(request))
            .await?;
        Ok(())
    }

    /// Stops a container: its stop signal, then by force after `grace` (whole seconds, rounded up).
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Error> {
        let request = wire::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: seconds(grace),
        };
        self.call_for(
            "StopContainer",
            grace,
            self.runtime().stop_container(request),
        )
        .await?;
        Ok(())
    }

    /// Removes a container, by force when it runs. One that is gone is fine.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let request = wire::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.call("RemoveContainer", self.runtime().remove_container(request))
            .await?;
        Ok(())
    }

    /// The containers of a sandbox.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn containers(&self, sandbox_id: &str) -> Result<Vec<Container>, Error> {
        let filter = wire::ContainerFilter {
            pod_sandbox_id: sandbox_id.to_owned(),
            ..Default::default()
        };
        let request = wire::ListContainersRequest {
            filter: Some(filter),
        };
        let answer = self
            .call("ListContainers", self.runtime().list_containers(request))
            .await?;
        Ok(answer
            .containers
            .into_iter()
            .map(Container::from_wire)
            .collect())
    }

    /// One container in detail.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::is_not_found`] when there is no such container.
    pub async fn container_status(&self, id: &str) -> Result<ContainerStatus, Error> {
        let call = "ContainerStatus";
        let request = wire::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        let answer = self
            .call(call, self.runtime().container_status(request))
            .await?;
        let status = answer.status.ok_or_else(|| empty(call, "status"))?;
        ContainerStatus::from_wire(call, status, answer.info)
    }

    /// Runs a command in a container and waits until it ends. containerd kills it after `limit` (whole seconds,
    /// rounded up); with zero it never does, and only the wait ends, at the client's own timeout.
    ///
    /// # Errors
    /// See [`Error`]; a command that ends with an error is no error of the call.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<ExecOutput, Error> {
        let request = wire::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|part| (*part).to_owned()).collect(),
            timeout: seconds(limit),
        };
        let answer = self
            .call_for("ExecSync", limit, self.runtime().exec_sync(request))
            .await?;
        Ok(ExecOutput {
            stdout: answer.stdout,
            stderr: answer.stderr,
            exit_code: answer.exit_code,
        })
    }
}

impl SandboxSpec {
    fn to_wire(&self) -> wire::PodSandboxConfig {
        wire::PodSandboxConfig {
            metadata: Some(wire::PodSandboxMetadata {
                name: self.name.clone(),
                uid: self.uid.clone(),
                namespace: self.namespace.clone(),
                attempt: self.attempt,
            }),
            hostname: self.hostname.clone(),
            log_directory: self.log_directory.as_ref().map(text).unwrap_or_default(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            linux: Some(wire::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone().unwrap_or_default(),
                security_context: Some(wire::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(self.host_network)),
                    privileged: false,
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

impl ContainerSpec {
    fn to_wire(&self, host_network: bool) -> wire::ContainerConfig {
        wire::ContainerConfig {
            metadata: Some(wire::ContainerMetadata {
                name: self.name.clone(),
                attempt: self.attempt,
            }),
            image: Some(wire::ImageSpec {
                image: self.image.clone(),
                ..Default::default()
            }),
            command: self.command.clone(),
            args: self.args.clone(),
            envs: self.env.iter().map(environment).collect(),
            mounts: self.mounts.iter().map(Mount::to_wire).collect(),
            devices: self.devices.iter().map(Device::to_wire).collect(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            log_path: self.log_path.as_ref().map(text).unwrap_or_default(),
            linux: Some(wire::LinuxContainerConfig {
                security_context: Some(wire::LinuxContainerSecurityContext {
                    privileged: self.privileged,
                    namespace_options: Some(namespaces(host_network)),
                }),
                ..Default::default()
            }),
            cdi_devices: self
                .cdi_devices
                .iter()
                .map(|name| wire::CdiDevice { name: name.clone() })
                .collect(),
            ..Default::default()
        }
    }
}

impl Mount {
    fn to_wire(&self) -> wire::Mount {
        wire::Mount {
            container_path: text(&self.container_path),
            host_path: text(&self.host_path),
            readonly: self.readonly,
        }
    }
}

impl Device {
    fn to_wire(&self) -> wire::Device {
        wire::Device {
            container_path: text(&self.container_path),
            host_path: text(&self.host_path),
            permissions: self.permissions.clone(),
        }
    }
}

impl Container {
    fn from_wire(item: wire::Container) -> Container {
        Container {
            id: item.id,
            sandbox_id: item.pod_sandbox_id,
            name: item.metadata.unwrap_or_default().name,
            state: ContainerState::from_wire(item.state),
        }
    }
}

impl ContainerState {
    fn from_wire(number: i32) -> ContainerState {
        match wire::ContainerState::try_from(number) {
            Ok(wire::ContainerState::ContainerCreated) => ContainerState::Created,
            Ok(wire::ContainerState::ContainerRunning) => ContainerState::Running,
            Ok(wire::ContainerState::ContainerExited) => ContainerState::Exited,
            Ok(wire::ContainerState::ContainerUnknown) | Err(_) => ContainerState::Unknown,
        }
    }
}

impl ContainerStatus {
    fn from_wire(
        call: &'static str,
        status: wire::ContainerStatus,
        details: BTreeMap<String, String>,
    ) -> Result<ContainerStatus, Error> {
        // Zero stands for "not yet".
        let when = |at: i64| {
            if at == 0 {
                Ok(None)
            } else {
                time(call, &status.id, at).map(Some)
            }
        };
        Ok(ContainerStatus {
            started_at: when(status.started_at)?,
            finished_at: when(status.finished_at)?,
            name: status.metadata.unwrap_or_default().name,
            state: ContainerState::from_wire(status.state),
            exit_code: status.exit_code,
            reason: status.reason,
            message: status.message,
            log_path: PathBuf::from(status.log_path),
            info: info(details),
            id: status.id,
        })
    }
}

fn namespaces(host_network: bool) -> wire::NamespaceOption {
    let network = if host_network {
        wire::NamespaceMode::Node
    } else {
        wire::NamespaceMode::Pod
    };
    wire::NamespaceOption {
        network: network.into(),
        pid: wire::NamespaceMode::Container.into(),
        ipc: wire::NamespaceMode::Pod.into(),
        target_id: String::new(),
    }
}

fn environment((key, value): &(String, String)) -> wire::KeyValue {
    wire::KeyValue {
        key: key.clone(),
        value: value.clone().into_bytes(),
    }
}

/// A path as the CRI wants it: UTF-8. What is not is shown with replacement characters, and containerd finds no such file.
fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

fn seconds(duration: Duration) -> i64 {
    let whole = duration
        .as_secs()
        .saturating_add(u64::from(duration.subsec_nanos() > 0));
    i64::try_from(whole).unwrap_or(i64::MAX)
}

/// The verbose part: values are JSON where containerd says so much, and text otherwise.
fn info(details: BTreeMap<String, String>) -> Value {
    let parse = |text: String| serde_json::from_str(&text).unwrap_or(Value::String(text));
    Value::Object(
        details
            .into_iter()
            .map(|(key, text)| (key, parse(text)))
            .collect(),
    )
}

fn empty(call: &'static str, field: &str) -> Error {
    Error::Malformed {
        call,
        what: format!("it has no {field}"),
    }
}

#[cfg(test)]
mod tests;
