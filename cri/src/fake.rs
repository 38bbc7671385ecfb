//! A CRI server for this crate's tests: on a unix socket, through tonic's own server, with one pod's worth of state.
//! The verbose status comes from `tests/fixtures/`, recorded from real containerds of Debian (registry credentials and
//! paths replaced, and what km-cri does not read left out).

use std::collections::BTreeMap;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::stream;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::Server;
use tonic::{Request, Response, Status, async_trait};

use crate::wire;
use crate::wire::image_service_server::{ImageService, ImageServiceServer};
use crate::wire::runtime_service_server::{RuntimeService, RuntimeServiceServer};

/// How the server behaves.
#[derive(Clone, Debug)]
pub(crate) enum Manner {
    /// It answers.
    Answer(Box<wire::StatusResponse>),
    /// It refuses as many calls as containerd does while it starts, then answers.
    Starting {
        calls: usize,
        then: Box<wire::StatusResponse>,
    },
    /// The CRI plugin is not there.
    NoCri,
    /// No call is ever answered.
    Hang,
    /// Every call fails so.
    Fail(Status),
}

/// What a test can look at while and after the server runs.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) calls: usize,
    pub(crate) filter: Option<wire::PodSandboxFilter>,
    pub(crate) sandbox: Option<wire::RunPodSandboxRequest>,
    pub(crate) container: Option<wire::CreateContainerRequest>,
    pub(crate) exec: Option<wire::ExecSyncRequest>,
    pub(crate) stop: Option<wire::StopContainerRequest>,
    pub(crate) pull: Option<wire::PullImageRequest>,
    pub(crate) running: bool,
}

/// A running server; it ends with the test. It has a runtime of its own, so that ending it closes its connections too.
#[derive(Debug)]
pub(crate) struct Fake {
    dir: TempDir,
    seen: Arc<Mutex<Seen>>,
    runtime: Option<Runtime>,
}

impl Fake {
    pub(crate) fn start(manner: Manner) -> Fake {
        let mut fake = Fake {
            dir: tempfile::tempdir().unwrap(),
            seen: Arc::default(),
            runtime: None,
        };
        fake.run(manner);
        fake
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("c.sock")
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// Ends the server with its connections, as containerd's end does. The socket's file stays.
    pub(crate) async fn stop(&mut self) {
        let runtime = self.runtime.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(10)))
            .await
            .unwrap();
    }

    /// Starts another server on the same socket.
    pub(crate) fn start_again(&mut self, manner: Manner) {
        std::fs::remove_file(self.socket()).unwrap();
        self.run(manner);
    }

    fn run(&mut self, manner: Manner) {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(self.socket()).unwrap()
        };
        runtime.spawn(serve(
            listener,
            Cri {
                manner,
                seen: Arc::clone(&self.seen),
            },
        ));
        self.runtime = Some(runtime);
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The status that a real containerd of this version gave.
pub(crate) fn recorded(version: &str) -> wire::StatusResponse {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/status-{version}.json"));
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let condition = |from: &Value| wire::RuntimeCondition {
        r#type: text(&from["type"]),
        status: from["status"].as_bool().unwrap(),
        reason: text(&from["reason"]),
        message: text(&from["message"]),
    };
    let handlers = recorded["runtime_handlers"].as_array().unwrap();
    wire::StatusResponse {
        status: Some(wire::RuntimeStatus {
            conditions: recorded["conditions"]
                .as_array()
                .unwrap()
                .iter()
                .map(condition)
                .collect(),
        }),
        info: BTreeMap::from([("config".to_owned(), recorded["config"].to_string())]),
        runtime_handlers: handlers
            .iter()
            .map(|name| wire::RuntimeHandler {
                name: text(name),
                features: None,
            })
            .collect(),
    }
}

async fn serve(listener: UnixListener, cri: Cri) {
    let incoming = stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await.map(|(connection, _)| connection);
        Some((accepted, listener))
    });
    let runtime = RuntimeServiceServer::new(cri.clone());
    let images = ImageServiceServer::new(cri.clone());
    let both = tower::service_fn(move |request: http::Request<Body>| {
        let (cri, runtime, images) = (cri.clone(), runtime.clone(), images.clone());
        async move {
            if let Some(refusal) = cri.refusal(request.uri().path()).await {
                return Ok(refusal.into_http::<Body>());
            }
            match request
                .uri()
                .path()
                .starts_with("/runtime.v1.ImageService/")
            {
                true => tower::ServiceExt::oneshot(images, request).await,
                false => tower::ServiceExt::oneshot(runtime, request).await,
            }
        }
    });
    Server::builder()
        .serve_with_incoming(both, incoming)
        .await
        .unwrap();
}

#[derive(Clone, Debug)]
struct Cri {
    manner: Manner,
    seen: Arc<Mutex<Seen>>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Cri {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    async fn refusal(&self, path: &str) -> Option<Status> {
        let call = {
            let mut seen = self.seen();
            seen.calls += 1;
            seen.calls
        };
        match &self.manner {
            Manner::Answer(_) => None,
            Manner::Starting { calls, .. } if call > *calls => None,
            Manner::Starting { .. } => Some(Status::unknown("server is not initialized yet")),
            Manner::NoCri => {
                let service = path.split('/').nth(1).unwrap();
                Some(Status::unimplemented(format!("unknown service {service}")))
            }
            Manner::Hang => pending().await,
            Manner::Fail(status) => Some(status.clone()),
        }
    }
}

#[async_trait]
impl RuntimeService for Cri {
    async fn version(&self, _: Request<wire::VersionRequest>) -> Answer<wire::VersionResponse> {
        Ok(Response::new(wire::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: "containerd".to_owned(),
            runtime_version: "v2.1.4".to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn status(&self, request: Request<wire::StatusRequest>) -> Answer<wire::StatusResponse> {
        assert!(request.get_ref().verbose);
        match &self.manner {
            Manner::Answer(status) | Manner::Starting { then: status, .. } => {
                Ok(Response::new((**status).clone()))
            }
            other => Err(Status::internal(format!("{other:?}"))),
        }
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<wire::RunPodSandboxRequest>,
    ) -> Answer<wire::RunPodSandboxResponse> {
        self.seen().sandbox = Some(request.into_inner());
        Ok(Response::new(wire::RunPodSandboxResponse {
            pod_sandbox_id: "pod".to_owned(),
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<wire::ListPodSandboxRequest>,
    ) -> Answer<wire::ListPodSandboxResponse> {
        let mut seen = self.seen();
        seen.filter = request.into_inner().filter;
        let items = seen.sandbox.iter().map(listed).collect();
        Ok(Response::new(wire::ListPodSandboxResponse { items }))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<wire::PodSandboxStatusRequest>,
    ) -> Answer<wire::PodSandboxStatusResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let seen = self.seen();
        let Some(run) = seen.sandbox.as_ref().filter(|_| id == "pod") else {
            return Err(Status::not_found(format!(
                "an error occurred when try to find sandbox {id:?}: not found"
            )));
        };
        let pod = listed(run);
        let status = wire::PodSandboxStatus {
            id: pod.id,
            metadata: pod.metadata,
            state: pod.state,
            created_at: pod.created_at,
            network: Some(wire::PodSandboxNetworkStatus {
                ip: "10.0.0.7".to_owned(),
                additional_ips: vec![],
            }),
            labels: pod.labels,
            annotations: pod.annotations,
            runtime_handler: pod.runtime_handler,
        };
        let info = BTreeMap::from([
            ("info".to_owned(), r#"{"pid":42}"#.to_owned()),
            ("note".to_owned(), "not JSON".to_owned()),
        ]);
        Ok(Response::new(wire::PodSandboxStatusResponse {
            status: Some(status),
            info,
        }))
    }

    async fn stop_pod_sandbox(
        &self,
        _: Request<wire::StopPodSandboxRequest>,
    ) -> Answer<wire::StopPodSandboxResponse> {
        self.seen().running = false;
        Ok(Response::new(wire::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        _: Request<wire::RemovePodSandboxRequest>,
    ) -> Answer<wire::RemovePodSandboxResponse> {
        self.seen().sandbox = None;
        Ok(Response::new(wire::RemovePodSandboxResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<wire::CreateContainerRequest>,
    ) -> Answer<wire::CreateContainerResponse> {
        self.seen().container = Some(request.into_inner());
        Ok(Response::new(wire::CreateContainerResponse {
            container_id: "box".to_owned(),
        }))
    }

    async fn start_container(
        &self,
        request: Request<wire::StartContainerRequest>,
    ) -> Answer<wire::StartContainerResponse> {
        assert_eq!(request.get_ref().container_id, "box");
        self.seen().running = true;
        Ok(Response::new(wire::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<wire::StopContainerRequest>,
    ) -> Answer<wire::StopContainerResponse> {
        let mut seen = self.seen();
        seen.running = false;
        seen.stop = Some(request.into_inner());
        Ok(Response::new(wire::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        _: Request<wire::RemoveContainerRequest>,
    ) -> Answer<wire::RemoveContainerResponse> {
        self.seen().container = None;
        Ok(Response::new(wire::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Answer<wire::ListContainersResponse> {
        assert_eq!(
            request.get_ref().filter.as_ref().unwrap().pod_sandbox_id,
            "pod"
        );
        let seen = self.seen();
        let containers = seen.container.iter().map(|create| wire::Container {
            id: "box".to_owned(),
            pod_sandbox_id: create.pod_sandbox_id.clone(),
            metadata: create.config.as_ref().unwrap().metadata.clone(),
            state: state(&seen),
            ..Default::default()
        });
        Ok(Response::new(wire::ListContainersResponse {
            containers: containers.collect(),
        }))
    }

    async fn container_status(
        &self,
        _: Request<wire::ContainerStatusRequest>,
    ) -> Answer<wire::ContainerStatusResponse> {
        let seen = self.seen();
        let config = seen.container.clone().unwrap().config.unwrap();
        let status = wire::ContainerStatus {
            id: "box".to_owned(),
            metadata: config.metadata,
            state: state(&seen),
            started_at: 1_700_000_000_000_000_001,
            exit_code: 3,
            reason: "Error".to_owned(),
            log_path: "/var/log/pods/p/box.log".to_owned(),
            ..Default::default()
        };
        Ok(Response::new(wire::ContainerStatusResponse {
            status: Some(status),
            info: BTreeMap::new(),
        }))
    }

    async fn exec_sync(
        &self,
        request: Request<wire::ExecSyncRequest>,
    ) -> Answer<wire::ExecSyncResponse> {
        let request = request.into_inner();
        let stdout = request.cmd.join(" ").into_bytes();
        self.seen().exec = Some(request);
        Ok(Response::new(wire::ExecSyncResponse {
            stdout,
            stderr: b"oops".to_vec(),
            exit_code: 7,
        }))
    }
}

#[async_trait]
impl ImageService for Cri {
    async fn list_images(
        &self,
        _: Request<wire::ListImagesRequest>,
    ) -> Answer<wire::ListImagesResponse> {
        Ok(Response::new(wire::ListImagesResponse {
            images: vec![image()],
        }))
    }

    async fn image_status(
        &self,
        request: Request<wire::ImageStatusRequest>,
    ) -> Answer<wire::ImageStatusResponse> {
        let wanted = request.into_inner().image.unwrap().image;
        let image = Some(image()).filter(|image| image.repo_tags.contains(&wanted));
        Ok(Response::new(wire::ImageStatusResponse {
            image,
            info: BTreeMap::new(),
        }))
    }

    async fn pull_image(
        &self,
        request: Request<wire::PullImageRequest>,
    ) -> Answer<wire::PullImageResponse> {
        self.seen().pull = Some(request.into_inner());
        Ok(Response::new(wire::PullImageResponse {
            image_ref: image().id,
        }))
    }
}

fn listed(run: &wire::RunPodSandboxRequest) -> wire::PodSandbox {
    let config = run.config.clone().unwrap();
    wire::PodSandbox {
        id: "pod".to_owned(),
        metadata: config.metadata,
        state: wire::PodSandboxState::SandboxReady.into(),
        created_at: 1_700_000_000_000_000_000,
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: run.runtime_handler.clone(),
    }
}

fn state(seen: &Seen) -> i32 {
    match seen.running {
        true => wire::ContainerState::ContainerRunning.into(),
        false => wire::ContainerState::ContainerExited.into(),
    }
}

fn image() -> wire::Image {
    wire::Image {
        id: "sha256:11".to_owned(),
        repo_tags: vec!["localhost/test/busybox:1".to_owned()],
        repo_digests: vec![],
        size: 1234,
        pinned: false,
    }
}
