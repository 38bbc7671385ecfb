use std::future::{Future, pending};
use std::io::Read as _;
use std::os::unix::net::UnixStream;

use futures_util::stream;
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tonic::{Response, Status, async_trait};

use super::*;
use crate::wire::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};

/// How the kubelet behaves.
#[derive(Clone, Debug)]
enum Manner {
    Answer(wire::PodResources),
    Fail(Status),
    Throttle,
    Hang,
}

#[derive(Debug)]
struct Kubelet {
    manner: Manner,
    calls: std::sync::atomic::AtomicUsize,
}

impl Kubelet {
    async fn pod(&self) -> Result<wire::PodResources, Status> {
        let calls = self.calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        match &self.manner {
            Manner::Answer(pod) => Ok(pod.clone()),
            Manner::Fail(status) => Err(status.clone()),
            Manner::Throttle if calls < 2 => {
                Err(Status::resource_exhausted("rejected by rate limit"))
            }
            Manner::Throttle => Ok(sample()),
            Manner::Hang => pending().await,
        }
    }
}

#[async_trait]
impl PodResourcesLister for Kubelet {
    async fn list(
        &self,
        _: tonic::Request<wire::ListPodResourcesRequest>,
    ) -> Result<Response<wire::ListPodResourcesResponse>, Status> {
        Ok(Response::new(wire::ListPodResourcesResponse {
            pod_resources: vec![self.pod().await?],
        }))
    }

    async fn get_allocatable_resources(
        &self,
        _: tonic::Request<wire::AllocatableResourcesRequest>,
    ) -> Result<Response<wire::AllocatableResourcesResponse>, Status> {
        let pod = self.pod().await?;
        let devices = pod.containers.into_iter().flat_map(|given| given.devices);
        Ok(Response::new(wire::AllocatableResourcesResponse {
            devices: devices.collect(),
        }))
    }

    async fn get(
        &self,
        _: tonic::Request<wire::GetPodResourcesRequest>,
    ) -> Result<Response<wire::GetPodResourcesResponse>, Status> {
        Ok(Response::new(wire::GetPodResourcesResponse {
            pod_resources: Some(self.pod().await?),
        }))
    }
}

fn sample() -> wire::PodResources {
    wire::PodResources {
        name: "train".to_owned(),
        namespace: "lab".to_owned(),
        containers: vec![wire::ContainerResources {
            name: "main".to_owned(),
            devices: vec![wire::ContainerDevices {
                resource_name: "nvidia.com/pgpu".to_owned(),
                device_ids: vec!["0000:41:00.0".to_owned(), "0000:42:00.0".to_owned()],
                topology: Some(wire::TopologyInfo {
                    nodes: vec![wire::NumaNode { id: 1 }],
                }),
            }],
            dynamic_resources: vec![wire::DynamicResource {
                claim_name: "fast".to_owned(),
                claim_namespace: "lab".to_owned(),
                claim_resources: vec![wire::ClaimResource {
                    cdi_devices: vec![wire::CdiDevice {
                        name: "k8s.gpu.nvidia.com/claim=7".to_owned(),
                    }],
                    driver_name: "gpu.nvidia.com".to_owned(),
                    pool_name: "node".to_owned(),
                    device_name: "gpu-7".to_owned(),
                }],
            }],
        }],
    }
}

/// What serves a socket, in threads of its own until it is dropped.
struct Served {
    socket: PathBuf,
    _runtime: Runtime,
    _dir: tempfile::TempDir,
}

fn serve<F: Future<Output = ()> + Send + 'static>(with: impl FnOnce(UnixListener) -> F) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kubelet.sock");
    let runtime = Runtime::new().unwrap();
    let listener = {
        let _inside = runtime.enter();
        UnixListener::bind(&socket).unwrap()
    };
    runtime.spawn(with(listener));
    Served {
        socket,
        _runtime: runtime,
        _dir: dir,
    }
}

/// A kubelet behind a socket, and a client of it.
fn client(manner: Manner, within: Duration) -> (Served, Client) {
    let service = PodResourcesListerServer::new(Kubelet {
        manner,
        calls: 0.into(),
    });
    let served = serve(async |listener| {
        let incoming = stream::unfold(listener, async |listener| {
            let accepted = listener.accept().await.map(|(connection, _)| connection);
            Some((accepted, listener))
        });
        let server = tonic::transport::Server::builder();
        server.serve_with_incoming(service, incoming).await.unwrap();
    });
    let client = Client::connect(&served.socket, within).unwrap();
    (served, client)
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn all_calls_tell_what_was_given() {
    let (_dir, client) = client(Manner::Answer(sample()), SOON);
    let pod = client.get("lab", "train").unwrap();
    assert_eq!(client.list().unwrap(), std::slice::from_ref(&pod));
    let devices = &pod.containers[0].devices;
    assert_eq!(&client.allocatable().unwrap(), devices);
    assert_eq!(devices[0].numa_nodes, [1]);
    let given: Vec<_> = pod.plugin_devices().collect();
    assert_eq!(
        given,
        [
            ("nvidia.com/pgpu", "0000:41:00.0"),
            ("nvidia.com/pgpu", "0000:42:00.0")
        ]
    );
    let claimed: Vec<_> = pod.claim_devices().flat_map(|claim| &claim.cdi).collect();
    assert_eq!(claimed, ["k8s.gpu.nvidia.com/claim=7"]);
    assert_eq!(pod.containers[0].claims[0].driver, "gpu.nvidia.com");
}

#[test]
fn an_answer_about_another_pod_is_refused() {
    let (_dir, client) = client(Manner::Answer(sample()), SOON);
    for (namespace, name) in [("lab", "other"), ("other", "train")] {
        let error = client.get(namespace, name).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}

#[test]
fn what_the_kubelet_says_no_to_is_told_apart() {
    for (status, unsupported, not_found) in [
        (
            Status::unknown("PodResources API Get method disabled"),
            true,
            false,
        ),
        (Status::unimplemented("unknown method Get"), true, false),
        (
            Status::unknown("pod train in namespace lab not found"),
            false,
            true,
        ),
        (Status::not_found("pod train"), false, true),
        (Status::internal("the cow is on the ice"), false, false),
    ] {
        let (_dir, client) = client(Manner::Fail(status), SOON);
        let error = client.get("lab", "train").unwrap_err();
        assert_eq!(error.is_unsupported(), unsupported, "{error}");
        assert_eq!(error.is_not_found(), not_found, "{error}");
    }
}

#[test]
fn a_kubelet_that_is_busy_is_asked_again() {
    let (_dir, client) = client(Manner::Throttle, SOON);
    assert_eq!(client.get("lab", "train").unwrap().name, "train");
}

#[test]
fn the_deadline_is_for_everything_together() {
    let start = Instant::now();
    let (_dir, client) = client(Manner::Hang, Duration::from_millis(200));
    for _ in 0..5 {
        let error = client.get("lab", "train").unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("within 0.2 s"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn nobody_or_somebody_else_behind_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let error = Client::connect(&dir.path().join("s"), SOON).unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error}");
    let served = serve(async |listener| {
        while let Ok((mut connection, _)) = listener.accept().await {
            use tokio::io::AsyncWriteExt as _;
            let greeting = b"HTTP/1.1 200 OK\r\n\r\n";
            connection.write_all(greeting).await.unwrap();
        }
    });
    let error = Client::connect(&served.socket, SOON).and_then(|client| client.list());
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
}

/// The kubelet is woken once for a question, and not for each of HTTP/2's frames. A socket of packets keeps apart what is written apart.
#[test]
fn a_question_is_one_packet() {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let socket = PathBuf::from("/run/pair");
    let within = Duration::from_millis(50);
    let client = Client::over(Conversation::over(ours.into()), &socket, within).unwrap();
    let error = client.get("lab", "train").unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    let mut theirs = UnixStream::from(theirs);
    let mut sent = [0; 4096];
    let length = theirs.read(&mut sent).unwrap();
    let sent = &sent[..length];
    assert!(sent.starts_with(b"PRI * HTTP/2.0"), "{sent:?}");
    let asked = b"\n\x05train\x12\x03lab";
    assert!(sent.windows(asked.len()).any(|part| part == asked));
    // A frame of no data that ends stream 1 (RFC 9113, section 6.1).
    assert!(sent.ends_with(&[0, 0, 0, 0, 1, 0, 0, 0, 1]), "{sent:?}");
    // And nothing is left of a client that has gone.
    drop(client);
    let mut rest = Vec::new();
    theirs.read_to_end(&mut rest).unwrap();
}

#[test]
fn a_full_queue_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = Client::connect(&socket, SOON).unwrap();
    let error = Client::connect(&socket, SOON).unwrap_err();
    assert!(
        error.to_string().contains("the kubelet is stuck"),
        "{error}"
    );
}

#[test]
fn a_long_answer_comes_whole_and_half_of_one_is_none() {
    let mut long = sample();
    long.containers[0].name = "x".repeat(MAX_ANSWER / 2);
    let (_served, client) = client(Manner::Answer(long.clone()), SOON);
    let pod = client.get("lab", "train").unwrap();
    assert_eq!(pod.containers[0].name, long.containers[0].name);

    let served = serve(async |listener| {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut connection, _) = listener.accept().await.unwrap();
        let _asked = connection.read(&mut [0; 4096]).await.unwrap();
        // Settings, and an answer's headers of which half is there.
        let half = [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 9, 1, 4, 0, 0, 0, 1, 0x88];
        connection.write_all(&half).await.unwrap();
    });
    let error = Client::connect(&served.socket, SOON).and_then(|client| client.get("lab", "train"));
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
}

#[test]
fn too_large_and_too_many() {
    let mut large = sample();
    large.containers[0].name = "x".repeat(MAX_ANSWER);
    let mut many = sample();
    many.containers[0].devices[0].device_ids = vec!["a".to_owned(); MAX_DEVICES + 1];
    for pod in [large, many] {
        let (_dir, client) = client(Manner::Answer(pod), SOON);
        let error = client.get("lab", "train").unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_an_answer_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        use prost::Message as _;
        if let Ok(answer) = wire::GetPodResourcesResponse::decode(&bytes[..]) {
            let mut left = MAX_DEVICES;
            let _ = pod("Get", answer.pod_resources.unwrap_or_default(), &mut left);
        }
    }
}
