//! The PodResources service: what the stand-in gave to pods.

use std::collections::BTreeMap;

use km_podresources::wire;
use km_podresources::wire::pod_resources_lister_server::PodResourcesLister;
use tonic::{Request, Response, Status, async_trait};

use crate::state::{Claimed, Service, Shared, State};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct Lister(pub(crate) Shared);

impl Lister {
    /// Waits for good where the kubelet is to stall.
    async fn may_stall(&self) {
        let stalled = self.0.lock().service == Service::Stalled;
        if stalled {
            std::future::pending::<()>().await;
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<wire::ListPodResourcesRequest>,
    ) -> Answer<wire::ListPodResourcesResponse> {
        self.may_stall().await;
        let state = self.0.lock();
        Ok(Response::new(wire::ListPodResourcesResponse {
            pod_resources: pods(&state, |_, _| true),
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
        self.may_stall().await;
        let wanted = request.into_inner();
        let state = self.0.lock();
        if state.service == Service::WithoutGet {
            // The kubelet's own words (`pkg/kubelet/apis/podresources/server_v1.go`): its gRPC library makes the code of them.
            return Err(Status::unknown("PodResources API Get method disabled"));
        }
        let this = |namespace: &str, pod: &str| {
            pod == wanted.pod_name && namespace == wanted.pod_namespace
        };
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

/// Containers by name, of pods by namespace and name.
type Pods = BTreeMap<(String, String), BTreeMap<String, wire::ContainerResources>>;

fn container<'a>(
    pods: &'a mut Pods,
    namespace: &str,
    pod: &str,
    name: &str,
) -> &'a mut wire::ContainerResources {
    let pod = pods
        .entry((namespace.to_owned(), pod.to_owned()))
        .or_default();
    pod.entry(name.to_owned())
        .or_insert_with(|| wire::ContainerResources {
            name: name.to_owned(),
            ..wire::ContainerResources::default()
        })
}

/// A claim, as the kubelet tells of it: one device of a driver, with what the driver prepared.
fn claim_of(claimed: &Claimed) -> wire::DynamicResource {
    let devices = claimed
        .cdi
        .iter()
        .map(|name| wire::CdiDevice { name: name.clone() });
    wire::DynamicResource {
        claim_name: claimed.claim.clone(),
        claim_namespace: claimed.namespace.clone(),
        claim_resources: vec![wire::ClaimResource {
            cdi_devices: devices.collect(),
            ..wire::ClaimResource::default()
        }],
    }
}

fn pods(state: &State, which: impl Fn(&str, &str) -> bool) -> Vec<wire::PodResources> {
    let mut pods = Pods::new();
    for given in &state.given {
        if which(&given.namespace, &given.pod) {
            let container = container(&mut pods, &given.namespace, &given.pod, &given.container);
            // A pod that has nothing is known all the same.
            if !given.ids.is_empty() {
                let ids: Vec<String> = given.ids.iter().cloned().collect();
                container
                    .devices
                    .push(devices_of(state, &given.resource, &ids));
            }
        }
    }
    for claimed in &state.claimed {
        if which(&claimed.namespace, &claimed.pod) {
            container(
                &mut pods,
                &claimed.namespace,
                &claimed.pod,
                &claimed.container,
            )
            .dynamic_resources
            .push(claim_of(claimed));
        }
    }
    pods.into_iter()
        .map(|((namespace, name), containers)| wire::PodResources {
            name,
            namespace,
            containers: containers.into_values().collect(),
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
