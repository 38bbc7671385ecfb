//! The PodResources service: what the stand-in gave to pods.

use std::collections::BTreeMap;

use km_podresources::wire;
use km_podresources::wire::pod_resources_lister_server::PodResourcesLister;
use tonic::{Request, Response, Status, async_trait};

use crate::state::{Given, Shared, State};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct Lister(pub(crate) Shared);

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<wire::ListPodResourcesRequest>,
    ) -> Answer<wire::ListPodResourcesResponse> {
        let state = self.0.lock();
        Ok(Response::new(wire::ListPodResourcesResponse {
            pod_resources: pods(&state, |_| true),
        }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<wire::AllocatableResourcesRequest>,
    ) -> Answer<wire::AllocatableResourcesResponse> {
        let state = self.0.lock();
        let healthy = |(name, resource): (&String, &crate::state::Resource)| {
            let devices = resource.devices.iter().filter(|device| device.healthy);
            devices
                .map(|device| devices_of(&state, name, std::slice::from_ref(&device.id)))
                .collect::<Vec<_>>()
        };
        Ok(Response::new(wire::AllocatableResourcesResponse {
            devices: state.resources.iter().flat_map(healthy).collect(),
        }))
    }

    async fn get(
        &self,
        request: Request<wire::GetPodResourcesRequest>,
    ) -> Answer<wire::GetPodResourcesResponse> {
        let wanted = request.into_inner();
        let state = self.0.lock();
        let this =
            |given: &Given| given.pod == wanted.pod_name && given.namespace == wanted.pod_namespace;
        match pods(&state, this).pop() {
            Some(pod) => Ok(Response::new(wire::GetPodResourcesResponse {
                pod_resources: Some(pod),
            })),
            // The kubelet's own words and code (`pkg/kubelet/apis/podresources/server_v1.go`).
            None => Err(Status::unknown(format!(
                "pod {} in namespace {} not found",
                wanted.pod_name, wanted.pod_namespace
            ))),
        }
    }
}

fn pods(state: &State, which: impl Fn(&Given) -> bool) -> Vec<wire::PodResources> {
    type Containers = BTreeMap<String, Vec<wire::ContainerDevices>>;
    let mut pods: BTreeMap<(String, String), Containers> = BTreeMap::new();
    for given in state.given.iter().filter(|given| which(given)) {
        let pod = pods
            .entry((given.namespace.clone(), given.pod.clone()))
            .or_default();
        let ids: Vec<String> = given.ids.iter().cloned().collect();
        pod.entry(given.container.clone())
            .or_default()
            .push(devices_of(state, &given.resource, &ids));
    }
    let container = |(name, devices)| wire::ContainerResources {
        name,
        devices,
        ..wire::ContainerResources::default()
    };
    pods.into_iter()
        .map(|((namespace, name), containers)| wire::PodResources {
            name,
            namespace,
            containers: containers.into_iter().map(container).collect(),
        })
        .collect()
}

fn devices_of(state: &State, resource: &str, ids: &[String]) -> wire::ContainerDevices {
    let devices = state
        .resources
        .get(resource)
        .map(|one| one.devices.as_slice());
    let mut nodes: Vec<i64> = devices
        .unwrap_or_default()
        .iter()
        .filter(|device| ids.contains(&device.id))
        .flat_map(|device| device.numa.clone())
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    wire::ContainerDevices {
        resource_name: resource.to_owned(),
        device_ids: ids.to_vec(),
        topology: Some(wire::TopologyInfo {
            nodes: nodes.into_iter().map(|id| wire::NumaNode { id }).collect(),
        }),
    }
}
