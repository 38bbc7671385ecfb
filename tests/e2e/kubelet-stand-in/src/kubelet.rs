//! One life of a kubelet: its two sockets, and the plugins that it follows. Dropping it is what a kill is.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use futures_util::stream;
use km_plugin::api;
use km_plugin::api::registration_server::{Registration, RegistrationServer};
use km_podresources::wire::pod_resources_lister_server::PodResourcesListerServer;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tonic::transport::Server;
use tonic::{Request, Response, Status, async_trait};

use crate::plugin;
use crate::podresources::Lister;
use crate::state::{Resource, Shared};

/// The file that a kubelet keeps in the plugins' folder when it cleans it (`checkpointmanager`).
const CHECKPOINT: &str = "kubelet_internal_checkpoint";

/// The plugins that are followed, by resource.
type Followed = Arc<Mutex<HashMap<String, JoinHandle<()>>>>;

/// A running kubelet. Its servers and streams end when it is dropped; its sockets' files stay, as they do when a kubelet is killed.
#[derive(Debug)]
pub(crate) struct Kubelet {
    followed: Followed,
    _tasks: JoinSet<()>,
    _stop: watch::Sender<()>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        followed.drain().for_each(|(_, task)| task.abort());
    }
}

impl Kubelet {
    /// Starts: removes what plugins have left in their folder, makes its sockets, and waits for plugins. Must be called in a runtime.
    pub(crate) fn start(folder: &Path, shared: &Shared) -> Result<Kubelet> {
        shared.lock().resources.clear();
        let plugins = folder.join(api::FOLDER);
        clean(&plugins)?;
        let pods = folder.join("pod-resources");
        std::fs::create_dir_all(&pods).with_context(|| format!("make {}", pods.display()))?;
        let (stop, stopped) = watch::channel(());
        let mut tasks = JoinSet::new();
        let followed = Followed::default();
        let registrar = Registrar {
            shared: shared.clone(),
            folder: plugins.clone(),
            followed: Arc::clone(&followed),
        };
        let ended = |mut stopped: watch::Receiver<()>| async move {
            while stopped.changed().await.is_ok() {}
        };
        let lister = PodResourcesListerServer::new(Lister(shared.clone()));
        let pods = listen(&pods.join(api::KUBELET_SOCKET))?;
        let served = Server::builder().serve_with_incoming_shutdown(
            lister,
            connections(pods),
            ended(stopped.clone()),
        );
        tasks.spawn(async move { drop(served.await) });
        let listener = listen(&plugins.join(api::KUBELET_SOCKET))?;
        let served = Server::builder().serve_with_incoming_shutdown(
            RegistrationServer::new(registrar),
            connections(listener),
            ended(stopped),
        );
        tasks.spawn(async move { drop(served.await) });
        Ok(Kubelet {
            followed,
            _tasks: tasks,
            _stop: stop,
        })
    }
}

/// Removes everything in the plugins' folder but folders and the checkpoint (`pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go`).
fn clean(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry?;
        if entry.file_name() != CHECKPOINT && !entry.file_type()?.is_dir() {
            match std::fs::remove_file(entry.path()) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => {
                    removed.with_context(|| format!("remove {}", entry.path().display()))?;
                }
            }
        }
    }
    Ok(())
}

fn listen(socket: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", socket.display()));
        }
        _ => {}
    }
    UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))
}

fn connections(
    listener: UnixListener,
) -> impl futures_util::Stream<Item = std::io::Result<tokio::net::UnixStream>> {
    stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await.map(|(connection, _)| connection);
        Some((accepted, listener))
    })
}

/// The Registration service.
#[derive(Debug)]
struct Registrar {
    shared: Shared,
    folder: PathBuf,
    followed: Followed,
}

#[async_trait]
impl Registration for Registrar {
    async fn register(
        &self,
        request: Request<api::RegisterRequest>,
    ) -> Result<Response<api::Empty>, Status> {
        let request = request.into_inner();
        if request.version != api::VERSION {
            let message = format!("version {:?} is not served", request.version);
            return Err(Status::invalid_argument(message));
        }
        let name = request.resource_name;
        if !name.contains('/') || request.endpoint.contains('/') {
            return Err(Status::invalid_argument(format!(
                "{name} at {}",
                request.endpoint
            )));
        }
        let serial = {
            let mut state = self.shared.lock();
            state.serial += 1;
            let serial = state.serial;
            let before = state
                .resources
                .get(&name)
                .map_or(0, |one| one.registrations);
            let resource = Resource {
                endpoint: request.endpoint.clone(),
                serial,
                registrations: before + 1,
                ..Resource::default()
            };
            state.resources.insert(name.clone(), resource);
            serial
        };
        let socket = self.folder.join(&request.endpoint);
        let follow = plugin::follow(self.shared.clone(), name.clone(), serial, socket);
        let mut followed = self.followed.lock().map_err(|_| Status::internal("lock"))?;
        if let Some(older) = followed.insert(name, tokio::spawn(follow)) {
            older.abort();
        }
        Ok(Response::new(api::Empty {}))
    }
}
