//! One resource's socket: bound, served, removed.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;

use crate::api::device_plugin_server::DevicePluginServer;
use crate::folder::{Folder, Identity};
use crate::service::Service;

/// The largest request that is read, in bytes: 10,000 IDs fit in it.
const LARGEST: usize = 256 << 10;

/// The most calls of one connection at a time. The kubelet makes a handful.
const CALLS: u32 = 64;

/// The pause after a connection could not be accepted, as when descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that is served.
#[derive(Debug)]
pub(crate) struct Served {
    name: String,
    identity: Option<Identity>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Served {
    /// Takes the place of what lies under the name, which nobody serves. `service` gets its `stop` from here.
    pub(crate) fn start(folder: &Folder, name: &str, service: Service) -> io::Result<Served> {
        folder.remove(name)?;
        let listener = UnixListener::bind(folder.at(name))?;
        let (stop, stopped) = watch::channel(false);
        let service = Service {
            stop: stopped.clone(),
            ..service
        };
        let service = DevicePluginServer::new(service).max_decoding_message_size(LARGEST);
        let ended = async move {
            let mut stopped = stopped;
            // An error means that the sender is gone, which is the end too.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let server = Server::builder().max_concurrent_streams(CALLS);
        let served = server.serve_with_incoming_shutdown(service, connections(listener), ended);
        let task = tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::error!("a server has ended: {error}");
            }
        });
        Ok(Served {
            name: name.to_owned(),
            identity: folder.identity(name),
            stop,
            task,
        })
    }

    /// Whether the socket is still in its place, and served.
    pub(crate) fn in_place(&self, folder: &Folder) -> bool {
        self.identity.is_some()
            && folder.identity(&self.name) == self.identity
            && !self.task.is_finished()
    }

    /// Stops to serve; removes the socket when it is still ours. Connections have as long as `patience` to end.
    pub(crate) async fn stop(self, folder: &Folder, patience: Duration) {
        if self.identity.is_some()
            && folder.identity(&self.name) == self.identity
            && let Err(error) = folder.remove(&self.name)
        {
            tracing::warn!("cannot remove {}: {error}", folder.shown(&self.name));
        }
        self.stop.send_replace(true);
        let abort = self.task.abort_handle();
        if tokio::time::timeout(patience, self.task).await.is_err() {
            abort.abort();
        }
    }
}

fn connections(listener: UnixListener) -> impl Stream<Item = Result<UnixStream, Infallible>> {
    stream::unfold(listener, async |listener| {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => return Some((Ok(connection), listener)),
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    })
}
