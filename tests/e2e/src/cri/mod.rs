//! A CRI client for tests: readiness, the configuration in force, and pods. It does what kubelet would do, and is not the
//! product's own client, so that the two check each other.

mod messages;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use messages as m;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

/// CRI's `NamespaceMode.NODE`: the pod uses the machine's own network, so that no CNI plugin is needed.
const NODE: i32 = 2;

/// The longest that a call may take on a busy machine: a pod's start, with its shim.
const DEADLINE: Duration = Duration::from_secs(60);

/// A client of one containerd. Calls block, and each connects anew: a connection from before a restart would fail late.
#[derive(Debug)]
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    endpoint: Endpoint,
}

/// A running pod with one running container.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The sandbox.
    pub sandbox: String,
    /// The container in it.
    pub container: String,
}

/// What a command in a container said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
}

impl Cri {
    /// A client of the containerd that listens on `socket`, which need not be up yet.
    ///
    /// # Errors
    /// When the path cannot be an address.
    pub fn new(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime for the CRI client")?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .with_context(|| format!("{} as an address", socket.display()))?;
        Ok(Self {
            runtime,
            endpoint: endpoint.timeout(DEADLINE),
        })
    }

    /// The same client with another deadline for each call.
    #[must_use]
    pub fn patient(mut self, deadline: Duration) -> Self {
        self.endpoint = self.endpoint.timeout(deadline);
        self
    }

    fn call<Q, S>(&self, method: &'static str, request: Q) -> Result<S>
    where
        Q: prost::Message + Send + Sync + 'static,
        S: prost::Message + Default + Send + Sync + 'static,
    {
        self.runtime.block_on(async {
            let channel = self
                .endpoint
                .connect()
                .await
                .with_context(|| format!("{method}: containerd does not answer"))?;
            let mut client = tonic::client::Grpc::new(channel);
            client.ready().await?;
            let response = client
                .unary(
                    tonic::Request::new(request),
                    PathAndQuery::from_static(method),
                    ProstCodec::<Q, S>::default(),
                )
                .await
                .map_err(|status| anyhow::anyhow!("{}: {}", status.code(), status.message()))
                .with_context(|| format!("CRI call {method}"))?;
            Ok(response.into_inner())
        })
    }

    /// The runtime's version, such as `1.7.24~ds1`. That it answers is what "containerd is up" means.
    ///
    /// # Errors
    /// When the CRI service does not answer.
    pub fn version(&self) -> Result<String> {
        let version: m::VersionResponse =
            self.call("/runtime.v1.RuntimeService/Version", m::VersionRequest {})?;
        Ok(version.runtime_version)
    }

    /// The CRI plugin's configuration in force, as `Status` with `verbose` reports it.
    ///
    /// # Errors
    /// When the call fails or carries no configuration.
    pub fn config(&self) -> Result<serde_json::Value> {
        let status: m::StatusResponse = self.call(
            "/runtime.v1.RuntimeService/Status",
            m::StatusRequest { verbose: true },
        )?;
        let config = status
            .info
            .get("config")
            .context("CRI Status has no info.config")?;
        serde_json::from_str(config).context("CRI Status: info.config is no JSON")
    }

    /// The names of the runtime handlers in force, sorted.
    ///
    /// # Errors
    /// When the call fails.
    pub fn handlers(&self) -> Result<Vec<String>> {
        let config = self.config()?;
        let runtimes = config["containerd"]["runtimes"]
            .as_object()
            .context("CRI Status: info.config has no containerd.runtimes")?;
        let mut names: Vec<String> = runtimes.keys().cloned().collect();
        names.sort();
        Ok(names)
    }

    /// Whether an image is there.
    ///
    /// # Errors
    /// When the call fails.
    pub fn has_image(&self, image: &str) -> Result<bool> {
        let status: m::ImageStatusResponse =
            self.call("/runtime.v1.ImageService/ImageStatus", image_request(image))?;
        Ok(status.image.is_some())
    }

    /// Pulls an image, over plain HTTP when its registry is on this machine.
    ///
    /// # Errors
    /// When the pull fails.
    pub fn pull(&self, image: &str) -> Result<String> {
        let pulled: m::PullImageResponse =
            self.call("/runtime.v1.ImageService/PullImage", image_request(image))?;
        Ok(pulled.image_ref)
    }

    /// Runs a pod sandbox on a runtime handler, with no container yet, and gives its ID.
    ///
    /// # Errors
    /// When containerd refuses: the handler is unknown, its shim is missing, the shim fails.
    pub fn run_sandbox(
        &self,
        handler: &str,
        annotations: &HashMap<String, String>,
    ) -> Result<String> {
        self.run_configured(handler, pod_config(annotations))
    }

    /// As [`Self::run_sandbox`], in the namespace `default` and with a name that a kubelet can know.
    ///
    /// # Errors
    /// As [`Self::run_sandbox`].
    pub fn run_sandbox_named(&self, handler: &str, name: &str) -> Result<String> {
        let mut config = pod_config(&HashMap::new());
        if let Some(metadata) = &mut config.metadata {
            name.clone_into(&mut metadata.name);
        }
        self.run_configured(handler, config)
    }

    fn run_configured(&self, handler: &str, config: m::PodSandboxConfig) -> Result<String> {
        let run: m::PodSandboxId = self.call(
            "/runtime.v1.RuntimeService/RunPodSandbox",
            m::RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: handler.to_owned(),
            },
        )?;
        Ok(run.pod_sandbox_id)
    }

    /// Runs a pod on a runtime handler: a sandbox, and one container of `image` with `command`.
    ///
    /// # Errors
    /// When any step of it fails; a sandbox that was made is removed then.
    pub fn run_pod(&self, handler: &str, image: &str, command: &[&str]) -> Result<Pod> {
        self.run_pod_with(handler, image, command, &[], &HashMap::new())
    }

    /// As [`Self::run_pod`], with CDI devices and annotations for the container.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn run_pod_with(
        &self,
        handler: &str,
        image: &str,
        command: &[&str],
        cdi_devices: &[&str],
        annotations: &HashMap<String, String>,
    ) -> Result<Pod> {
        let sandbox = self.run_sandbox(handler, &HashMap::new())?;
        self.fill(sandbox, image, command, cdi_devices, annotations)
    }

    /// As [`Self::run_pod`], with a name as [`Self::run_sandbox_named`] gives it.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn run_pod_named(
        &self,
        handler: &str,
        name: &str,
        image: &str,
        command: &[&str],
    ) -> Result<Pod> {
        let sandbox = self.run_sandbox_named(handler, name)?;
        self.fill(sandbox, image, command, &[], &HashMap::new())
    }

    /// Runs the one container of a sandbox, or removes the sandbox.
    fn fill(
        &self,
        sandbox: String,
        image: &str,
        command: &[&str],
        cdi_devices: &[&str],
        annotations: &HashMap<String, String>,
    ) -> Result<Pod> {
        let config = m::ContainerConfig {
            metadata: Some(m::ContainerMetadata {
                name: "main".to_owned(),
            }),
            image: Some(m::ImageSpec {
                image: image.to_owned(),
            }),
            command: strings(command),
            annotations: annotations.clone(),
            cdi_devices: strings(cdi_devices)
                .into_iter()
                .map(|name| m::CdiDevice { name })
                .collect(),
            ..Default::default()
        };
        let container = match self.run_container(&sandbox, config) {
            Ok(container) => container,
            Err(error) => {
                return Err(match self.remove_sandbox(&sandbox) {
                    Ok(()) => error,
                    Err(second) => error.context(format!("and its sandbox stays: {second:#}")),
                });
            }
        };
        Ok(Pod { sandbox, container })
    }

    fn run_container(&self, sandbox: &str, config: m::ContainerConfig) -> Result<String> {
        let created: m::ContainerId = self.call(
            "/runtime.v1.RuntimeService/CreateContainer",
            m::CreateContainerRequest {
                pod_sandbox_id: sandbox.to_owned(),
                config: Some(config),
                sandbox_config: Some(pod_config(&HashMap::new())),
            },
        )?;
        let _: m::Empty = self.call(
            "/runtime.v1.RuntimeService/StartContainer",
            m::ContainerId {
                container_id: created.container_id.clone(),
            },
        )?;
        Ok(created.container_id)
    }

    /// Runs a command in a running container, with ten seconds to end.
    ///
    /// # Errors
    /// When it cannot be run; its own exit code is part of the answer.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<Said> {
        self.exec_within(container, command, 10)
    }

    /// As [`Self::exec`], with so many seconds to end.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn exec_within(&self, container: &str, command: &[&str], seconds: i64) -> Result<Said> {
        let said: m::ExecSyncResponse = self.call(
            "/runtime.v1.RuntimeService/ExecSync",
            m::ExecSyncRequest {
                container_id: container.to_owned(),
                cmd: strings(command),
                timeout: seconds,
            },
        )?;
        Ok(Said {
            stdout: String::from_utf8_lossy(&said.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&said.stderr).into_owned(),
            code: said.exit_code,
        })
    }

    /// Stops and removes a sandbox with all that is in it.
    ///
    /// # Errors
    /// When containerd cannot.
    pub fn remove_sandbox(&self, sandbox: &str) -> Result<()> {
        for method in [
            "/runtime.v1.RuntimeService/StopPodSandbox",
            "/runtime.v1.RuntimeService/RemovePodSandbox",
        ] {
            let _: m::Empty = self.call(
                method,
                m::PodSandboxId {
                    pod_sandbox_id: sandbox.to_owned(),
                },
            )?;
        }
        Ok(())
    }

    /// Proves that a handler runs pods: runs one of `image`, has it speak, and removes it. Gives what it said.
    ///
    /// # Errors
    /// When any step of it fails.
    pub fn prove_handler(&self, handler: &str, image: &str) -> Result<String> {
        let pod = self.run_pod(handler, image, &["/bin/sleep", "1000"])?;
        let said = self.exec(&pod.container, &["/bin/echo", "a pod on", handler])?;
        self.remove_sandbox(&pod.sandbox)?;
        ensure!(said.code == 0, "echo in a pod ended with {}", said.code);
        Ok(said.stdout)
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn image_request(image: &str) -> m::ImageRequest {
    m::ImageRequest {
        image: Some(m::ImageSpec {
            image: image.to_owned(),
        }),
    }
}

/// A pod of its own name and UID, on the machine's network.
fn pod_config(annotations: &HashMap<String, String>) -> m::PodSandboxConfig {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    m::PodSandboxConfig {
        metadata: Some(m::PodSandboxMetadata {
            name: format!("pod-{n}"),
            uid: format!("uid-{n}"),
            namespace: "default".to_owned(),
        }),
        log_directory: String::new(),
        annotations: annotations.clone(),
        linux: Some(m::LinuxPodSandboxConfig {
            security_context: Some(m::SandboxSecurityContext {
                namespace_options: Some(m::NamespaceOption { network: NODE }),
            }),
        }),
    }
}
