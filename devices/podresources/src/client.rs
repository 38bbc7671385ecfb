//! The connection, its deadline, and the three calls.
//!
//! The connection is hyper's own and not tonic's channel: one errand needs no reconnecting, balancing or buffering, and the shim,
//! which links this, has to stay small.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper::rt::Executor as _;
use tonic::body::Body;
use tonic::codegen::http::{Request, Uri};

use crate::conversation::{Conversation, Late};
use crate::error::Error;
use crate::wire;
use crate::wire::pod_resources_lister_client::PodResourcesListerClient;
use crate::{ClaimDevice, Container, Devices, Pod};

/// Largest answer that is accepted, in bytes: gRPC's usual limit, which Kata's own client has too. A pod takes some hundred bytes.
pub const MAX_ANSWER: usize = 4 << 20;

/// The most devices that an answer may name. A machine has tens; a plugin that shares one device may list thousands.
const MAX_DEVICES: usize = 1 << 16;

/// Pause before a question that the kubelet had no time for is asked again.
const AGAIN: Duration = Duration::from_millis(20);

/// A connection to the kubelet, for one errand.
#[derive(Debug)]
pub struct Client {
    conversation: Conversation,
    socket: PathBuf,
    within: Duration,
    deadline: Cell<Instant>,
    connection: hyper::client::conn::http2::SendRequest<Body>,
}

impl Client {
    /// Connects to the API on a unix socket. `within` is the deadline of connecting and of all calls of this client together. Nothing is
    /// asynchronous here: each call comes back with its answer.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when nothing accepts the connection, [`Error::Timeout`], [`Error::Disconnected`].
    pub fn connect(socket: &Path, within: Duration) -> Result<Client, Error> {
        let conversation =
            Conversation::connect(socket).map_err(|error| Error::not_running(socket, error))?;
        Client::over(conversation, socket, within)
    }

    fn over(conversation: Conversation, socket: &Path, within: Duration) -> Result<Client, Error> {
        let call = "connect";
        let deadline = Instant::now() + within;
        let late = || Error::Timeout {
            call,
            socket: socket.to_path_buf(),
            after: within,
        };
        let (wire, tasks) = (conversation.wire(), conversation.tasks());
        let handshake = hyper::client::conn::http2::handshake(tasks.clone(), wire);
        match conversation.until(handshake, deadline) {
            Ok(Ok((connection, driver))) => {
                // It ends with the client; what goes wrong in it is told by the call that meets it.
                tasks.execute(async { drop(driver.await) });
                Ok(Client {
                    conversation,
                    socket: socket.to_path_buf(),
                    within,
                    deadline: Cell::new(deadline),
                    connection,
                })
            }
            Ok(Err(error)) => Err(Error::disconnected(call, socket, &error)),
            Err(Late) => Err(late()),
        }
    }

    /// What one pod was given.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::is_unsupported`] when this kubelet does not serve `Get`, [`Error::is_not_found`] when it has no
    /// such pod. [`Error::Malformed`] also when the answer is about another pod.
    pub fn get(&self, namespace: &str, name: &str) -> Result<Pod, Error> {
        self.get_and_meanwhile(namespace, name, || {})
    }

    /// [`Client::get`], and something of the caller's while the kubelet looks for its answer. The deadline does not count that; it is not done
    /// where there is nothing to wait for.
    ///
    /// # Errors
    /// Those of [`Client::get`].
    pub fn get_and_meanwhile(
        &self,
        namespace: &str,
        name: &str,
        meanwhile: impl FnOnce(),
    ) -> Result<Pod, Error> {
        let call = "Get";
        let request = || wire::GetPodResourcesRequest {
            pod_name: name.to_owned(),
            pod_namespace: namespace.to_owned(),
        };
        let answer = self.call(call, async || self.lister().get(request()).await, meanwhile)?;
        let pod = answer
            .pod_resources
            .ok_or_else(|| malformed(call, "there is no pod in it"))?;
        if pod.name != name || pod.namespace != namespace {
            return Err(malformed(call, "it is about another pod"));
        }
        let mut left = MAX_DEVICES;
        self::pod(call, pod, &mut left)
    }

    /// What all pods were given that the kubelet runs.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn list(&self) -> Result<Vec<Pod>, Error> {
        let call = "List";
        let request = wire::ListPodResourcesRequest::default;
        let answer = self.call(call, async || self.lister().list(request()).await, || {})?;
        let mut left = MAX_DEVICES;
        let pods = answer.pod_resources.into_iter();
        pods.map(|pod| self::pod(call, pod, &mut left)).collect()
    }

    /// What the kubelet can give to pods in all, given away or not. Devices of dynamic resource allocation are not in it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn allocatable(&self) -> Result<Vec<Devices>, Error> {
        let call = "GetAllocatableResources";
        let request = wire::AllocatableResourcesRequest::default;
        let answer = self.call(
            call,
            async || self.lister().get_allocatable_resources(request()).await,
            || {},
        )?;
        let mut left = MAX_DEVICES;
        devices(call, answer.devices, &mut left)
    }

    fn lister(
        &self,
    ) -> PodResourcesListerClient<
        impl tonic::client::GrpcService<
            Body,
            ResponseBody = hyper::body::Incoming,
            Error = hyper::Error,
        >,
    > {
        let connection = self.connection.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let mut connection = connection.clone();
            async move { connection.send_request(request).await }
        });
        // The address is never resolved: it is only what HTTP/2 calls the authority.
        let origin = Uri::from_static("http://localhost");
        PodResourcesListerClient::with_origin(service, origin).max_decoding_message_size(MAX_ANSWER)
    }

    /// Makes a call under this client's deadline; again while the kubelet has too many questions at once.
    fn call<T, F>(&self, call: &'static str, make: F, meanwhile: impl FnOnce()) -> Result<T, Error>
    where
        F: AsyncFn() -> Result<tonic::Response<T>, tonic::Status>,
    {
        let late = || Error::Timeout {
            call,
            socket: self.socket.clone(),
            after: self.within,
        };
        let mut meanwhile = Some(meanwhile);
        loop {
            let (talk, mut deadline) = (&self.conversation, self.deadline.get());
            let told = talk.until_and_meanwhile(make(), &mut deadline, &mut meanwhile);
            self.deadline.set(deadline);
            let error = match told {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(_)) if Instant::now() >= deadline => return Err(late()),
                Ok(Err(status)) => Error::from_status(call, &self.socket, &status),
                Err(Late) => return Err(late()),
            };
            if !error.is_throttled() || Instant::now() + AGAIN >= deadline {
                return Err(error);
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// Reads an answer to `List` from its bytes, as [`Client::list`] does. For tests.
///
/// # Errors
/// [`Error::Malformed`].
#[cfg(any(test, feature = "server"))]
pub fn decode_list(bytes: &[u8]) -> Result<Vec<Pod>, Error> {
    let call = "List";
    let answer: wire::ListPodResourcesResponse =
        prost::Message::decode(bytes).map_err(|error| malformed(call, &error.to_string()))?;
    let mut left = MAX_DEVICES;
    let pods = answer.pod_resources.into_iter();
    pods.map(|pod| self::pod(call, pod, &mut left)).collect()
}

fn malformed(call: &'static str, what: &str) -> Error {
    Error::Malformed {
        call,
        what: what.to_owned(),
    }
}

/// Counts devices down; an answer with too many is refused.
fn take(call: &'static str, left: &mut usize, devices: usize) -> Result<(), Error> {
    *left = left
        .checked_sub(devices)
        .ok_or_else(|| malformed(call, "it names more devices than any machine has"))?;
    Ok(())
}

fn pod(call: &'static str, pod: wire::PodResources, left: &mut usize) -> Result<Pod, Error> {
    let containers = pod.containers.into_iter();
    Ok(Pod {
        name: pod.name,
        namespace: pod.namespace,
        containers: containers
            .map(|given| container(call, given, left))
            .collect::<Result<_, _>>()?,
    })
}

fn container(
    call: &'static str,
    given: wire::ContainerResources,
    left: &mut usize,
) -> Result<Container, Error> {
    let mut claims = Vec::new();
    for claim in given.dynamic_resources {
        take(call, left, claim.claim_resources.len())?;
        for resource in claim.claim_resources {
            take(call, left, resource.cdi_devices.len())?;
            let cdi = resource.cdi_devices.into_iter();
            claims.push(ClaimDevice {
                claim: claim.claim_name.clone(),
                namespace: claim.claim_namespace.clone(),
                driver: resource.driver_name,
                pool: resource.pool_name,
                device: resource.device_name,
                cdi: cdi.map(|device| device.name).collect(),
            });
        }
    }
    Ok(Container {
        name: given.name,
        devices: devices(call, given.devices, left)?,
        claims,
    })
}

fn devices(
    call: &'static str,
    given: Vec<wire::ContainerDevices>,
    left: &mut usize,
) -> Result<Vec<Devices>, Error> {
    let mut found = Vec::new();
    for devices in given {
        take(call, left, devices.device_ids.len())?;
        let nodes = devices.topology.unwrap_or_default().nodes.into_iter();
        found.push(Devices {
            resource: devices.resource_name,
            ids: devices.device_ids,
            numa_nodes: nodes.map(|node| node.id).collect(),
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
