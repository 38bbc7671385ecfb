//! The gRPC service of one resource. It answers from the last snapshot, and never looks at a device itself.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, stream};
use km_cdi::names::Class;
use tokio::sync::{mpsc, watch};
use tonic::{Code, Request, Response, Status};

use crate::allocate::{self, Refusal};
use crate::api;
use crate::api::device_plugin_server::DevicePlugin;
use crate::snapshot::{Listed, Snapshot};

/// A stream of lists has begun or ended: how the server knows whether the kubelet is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listening {
    Began,
    Ended,
}

/// Tells what happens to the streams of which class.
pub(crate) type Listeners = mpsc::UnboundedSender<(Class, Listening)>;

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) class: Class,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    /// True when it is time to end.
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) listeners: Listeners,
}

type Answer<T> = Result<Response<T>, Status>;

/// The options that the kubelet is told, at registration and when it asks.
pub(crate) fn options() -> api::DevicePluginOptions {
    api::DevicePluginOptions {
        pre_start_required: false,
        get_preferred_allocation_available: true,
    }
}

/// Tells of a stream's end, however it ends.
#[derive(Debug)]
struct Guard(Class, Listeners);

impl Guard {
    fn new(class: Class, listeners: Listeners) -> Guard {
        // Without a receiver the server is about to end.
        let _ = listeners.send((class.clone(), Listening::Began));
        Guard(class, listeners)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.1.send((self.0.clone(), Listening::Ended));
    }
}

struct Lists {
    service: Service,
    last: Option<Vec<Listed>>,
    _guard: Guard,
}

impl Lists {
    /// The next list that is another than the last one; `None` when it is time to end.
    async fn next(&mut self) -> Option<api::ListAndWatchResponse> {
        loop {
            let now = self.service.snapshots.borrow_and_update().clone();
            let devices = now.of(&self.service.class);
            if self.last.as_deref() != Some(devices) {
                self.last = Some(devices.to_vec());
                return Some(allocate::list(devices));
            }
            tokio::select! {
                changed = self.service.snapshots.changed() => changed.ok()?,
                _ = self.service.stop.wait_for(|stop| *stop) => return None,
            }
        }
    }
}

#[tonic::async_trait]
impl DevicePlugin for Service {
    type ListAndWatchStream =
        Pin<Box<dyn Stream<Item = Result<api::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<api::Empty>,
    ) -> Answer<api::DevicePluginOptions> {
        Ok(Response::new(options()))
    }

    async fn list_and_watch(&self, _: Request<api::Empty>) -> Answer<Self::ListAndWatchStream> {
        let lists = Lists {
            service: self.clone(),
            last: None,
            _guard: Guard::new(self.class.clone(), self.listeners.clone()),
        };
        let lists = stream::unfold(lists, async |mut lists| {
            let list = lists.next().await?;
            Some((Ok(list), lists))
        });
        Ok(Response::new(Box::pin(lists)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<api::PreferredAllocationRequest>,
    ) -> Answer<api::PreferredAllocationResponse> {
        let snapshot = self.snapshots.borrow().clone();
        let choices = allocate::prefer(request.get_ref(), &self.class, &snapshot);
        let choices =
            choices.map_err(|refusal| self.refused("GetPreferredAllocation", &refusal))?;
        let mut answer = api::PreferredAllocationResponse::default();
        for choice in choices {
            tracing::info!("{}: preferred {choice}", self.class.kind());
            let ids = choice.ids.iter().map(ToString::to_string);
            let ids = api::ContainerPreferredAllocationResponse {
                device_i_ds: ids.collect(),
            };
            answer.container_responses.push(ids);
        }
        Ok(Response::new(answer))
    }

    async fn allocate(
        &self,
        request: Request<api::AllocateRequest>,
    ) -> Answer<api::AllocateResponse> {
        let snapshot = self.snapshots.borrow().clone();
        let answer = allocate::allocate(request.get_ref(), &self.class, &snapshot);
        let answer = answer.map_err(|refusal| self.refused("Allocate", &refusal))?;
        for container in &request.get_ref().container_requests {
            let ids = container.devices_ids.join(" ");
            tracing::info!("{}: allocated {ids}", self.class.kind());
        }
        Ok(Response::new(answer))
    }

    async fn pre_start_container(
        &self,
        _: Request<api::PreStartContainerRequest>,
    ) -> Answer<api::PreStartContainerResponse> {
        Ok(Response::new(api::PreStartContainerResponse {}))
    }
}

impl Service {
    fn refused(&self, call: &str, refusal: &Refusal) -> Status {
        tracing::warn!("{}: {call} refused: {refusal}", self.class.kind());
        let code = match refusal {
            Refusal::Unhealthy { .. } => Code::FailedPrecondition,
            Refusal::Unknown { .. } => Code::NotFound,
            _ => Code::InvalidArgument,
        };
        Status::new(code, refusal.to_string())
    }
}
