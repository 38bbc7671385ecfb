//! The connection, the deadline of every call, and the two calls about containerd itself.

use std::error::Error as _;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};

use crate::error::Error;
use crate::status::Status;
use crate::wire;
use crate::wire::image_service_client::ImageServiceClient;
use crate::wire::runtime_service_client::RuntimeServiceClient;

/// Largest answer that is accepted, in bytes. The kubelet's own limit: `maxMsgSize` in
/// `pkg/cri-client/pkg/remote_runtime.go` of Kubernetes. gRPC's usual 4 MiB is too little for a node full of pods.
const MAX_ANSWER: usize = 16 << 20;

/// Pause between two attempts to reach a containerd that is starting. It comes up in 0.1 to 0.7 seconds.
const POLL: Duration = Duration::from_millis(50);

/// A connection to containerd's CRI. Cheap to clone; it connects anew by itself when containerd was restarted.
#[derive(Clone, Debug)]
pub struct Client {
    socket: Arc<Path>,
    timeout: Duration,
    channel: Channel,
}

/// What runs behind the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// `containerd`.
    pub runtime_name: String,
    /// As the runtime spells it, for example `1.7.24~ds1` or `v2.1.4`.
    pub runtime_version: String,
}

impl Client {
    /// Connects to the CRI on a unix socket. `timeout` is the deadline of connecting, and of every call made later
    /// (calls that wait for something by their nature add what they wait for).
    ///
    /// # Errors
    /// [`Error::NotRunning`] when nothing accepts the connection, [`Error::Timeout`].
    pub async fn connect(socket: &Path, timeout: Duration) -> Result<Client, Error> {
        let path: Arc<Path> = Arc::from(socket);
        let connector = {
            let path = Arc::clone(&path);
            tower::service_fn(move |_| {
                let path = Arc::clone(&path);
                async move { UnixStream::connect(&path).await.map(TokioIo::new) }
            })
        };
        // The address is never resolved: it is only what HTTP/2 calls the authority.
        let endpoint = Endpoint::from_static("http://localhost");
        match tokio::time::timeout(timeout, endpoint.connect_with_connector(connector)).await {
            Ok(Ok(channel)) => Ok(Client {
                socket: path,
                timeout,
                channel,
            }),
            Ok(Err(error)) => Err(Error::not_running(socket, io_cause(&error))),
            Err(_) => Err(Error::timeout("connect", socket, timeout)),
        }
    }

    /// Connects and asks for the status again and again until containerd gives one. For use after a restart.
    /// `timeout` is the deadline of each call, `within` that of the whole.
    ///
    /// # Errors
    /// At once what is not [transient](Error::is_transient); otherwise, when the time is up, the last error.
    pub async fn wait_for_status(
        socket: &Path,
        timeout: Duration,
        within: Duration,
    ) -> Result<Status, Error> {
        let start = Instant::now();
        loop {
            let left = within.saturating_sub(start.elapsed());
            let error = match status_once(socket, timeout.min(left)).await {
                Ok(status) => return Ok(status),
                Err(error) => error,
            };
            if !error.is_transient() || start.elapsed().saturating_add(POLL) >= within {
                return Err(error);
            }
            sleep(POLL).await;
        }
    }

    /// The same connection with another deadline for its calls.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Client {
        Client {
            timeout,
            ..self.clone()
        }
    }

    /// The socket that this client speaks to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What runs behind the socket.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn version(&self) -> Result<Version, Error> {
        let answer = self
            .call(
                "Version",
                self.runtime().version(wire::VersionRequest::default()),
            )
            .await?;
        Ok(Version {
            runtime_name: answer.runtime_name,
            runtime_version: answer.runtime_version,
        })
    }

    /// Whether containerd is ready, and its runtime handlers as it uses them now.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Malformed`] also when the runtime is not containerd and shows no configuration.
    pub async fn status(&self) -> Result<Status, Error> {
        let request = wire::StatusRequest { verbose: true };
        let answer = self.call("Status", self.runtime().status(request)).await?;
        Status::from_wire(answer)
    }

    pub(crate) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn image_service(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Makes a call under this client's deadline.
    pub(crate) async fn call<T>(
        &self,
        name: &'static str,
        answer: impl Answer<T>,
    ) -> Result<T, Error> {
        self.call_for(name, Duration::ZERO, answer).await
    }

    /// Makes a call that waits for `work` by its nature. Dropping the answer at the deadline resets the stream, which
    /// cancels the call's context inside containerd.
    pub(crate) async fn call_for<T>(
        &self,
        name: &'static str,
        work: Duration,
        answer: impl Answer<T>,
    ) -> Result<T, Error> {
        let limit = self.timeout.saturating_add(work);
        match timeout(limit, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(Error::from_status(name, &self.socket, status)),
            Err(_) => Err(Error::timeout(name, &self.socket, limit)),
        }
    }
}

/// What a generated call returns.
pub(crate) trait Answer<T>:
    Future<Output = Result<tonic::Response<T>, tonic::Status>>
{
}
impl<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>> Answer<T> for F {}

async fn status_once(socket: &Path, timeout: Duration) -> Result<Status, Error> {
    Client::connect(socket, timeout).await?.status().await
}

/// The operating system's error inside a transport error.
fn io_cause(error: &tonic::transport::Error) -> io::Error {
    let mut next = error.source();
    while let Some(cause) = next {
        if let Some(cause) = cause.downcast_ref::<io::Error>() {
            return match cause.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(cause.kind(), cause.to_string()),
            };
        }
        next = cause.source();
    }
    io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests;
