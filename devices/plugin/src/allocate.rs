//! Answers to the kubelet's questions about devices. Pure: a request and what is there in, an answer or a refusal out.

use std::collections::BTreeSet;

use km_cdi::names::Class;
use km_vfio::Address;

use crate::api;
use crate::preferred::{self, Choice, PreferenceError};
use crate::snapshot::{Listed, Snapshot};

/// What a container may do with the nodes: read and write them. Making nodes of its own is no part of it.
const PERMISSIONS: &str = "rw";

/// The most containers that one request may have; a pod has a handful.
const CONTAINERS: usize = 1000;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A device that is asked for is none of this resource.
    #[error(
        "{resource} has no device {id:?}: the kubelet's list is out of date, or asks the wrong plugin"
    )]
    Unknown {
        /// The resource.
        resource: String,
        /// What was asked for.
        id: String,
    },
    /// A device that is asked for cannot be given out now.
    #[error("{resource} device {id} cannot be given out: {reason}")]
    Unhealthy {
        /// The resource.
        resource: String,
        /// The device.
        id: Address,
        /// Why.
        reason: String,
    },
    /// One device is asked for twice.
    #[error("{resource} device {id} is asked for twice")]
    Twice {
        /// The resource.
        resource: String,
        /// The device.
        id: Address,
    },
    /// A request that no kubelet makes.
    #[error("the request has {0} containers, which is more than {CONTAINERS}")]
    TooLong(usize),
    /// There is no such choice.
    #[error("{resource}: {source}")]
    Preference {
        /// The resource.
        resource: String,
        /// Why.
        source: PreferenceError,
    },
}

/// Gives devices out: their nodes, for every kubelet, and their CDI names, for those from 1.28 on. A runtime that injects CDI devices
/// puts the same nodes in once. CDI names are left out where the specs could not be written, as a runtime refuses a name that it
/// cannot find.
///
/// # Errors
/// [`Refusal`]; then nothing is given out.
pub fn allocate(
    request: &api::AllocateRequest,
    class: &Class,
    snapshot: &Snapshot,
) -> Result<api::AllocateResponse, Refusal> {
    within(request.container_requests.len())?;
    let mut given = BTreeSet::new();
    let mut answer = api::AllocateResponse::default();
    for container in &request.container_requests {
        let mut devices = Vec::new();
        for id in &container.devices_ids {
            let device = healthy(id, class, snapshot)?;
            if !given.insert(device.id) {
                return Err(Refusal::Twice {
                    resource: class.kind(),
                    id: device.id,
                });
            }
            devices.push(device);
        }
        let response = for_container(&devices, class, snapshot.cdi.contains(class));
        answer.container_responses.push(response);
    }
    Ok(answer)
}

fn within(containers: usize) -> Result<(), Refusal> {
    match containers > CONTAINERS {
        true => Err(Refusal::TooLong(containers)),
        false => Ok(()),
    }
}

fn healthy<'a>(id: &str, class: &Class, snapshot: &'a Snapshot) -> Result<&'a Listed, Refusal> {
    let known = parse(id).and_then(|address| snapshot.device(class, address));
    let device = known.ok_or_else(|| Refusal::Unknown {
        resource: class.kind(),
        id: shortened(id),
    })?;
    match device.causes.first() {
        None => Ok(device),
        Some(cause) => Err(Refusal::Unhealthy {
            resource: class.kind(),
            id: device.id,
            reason: cause.to_string(),
        }),
    }
}

/// Reads an ID; only as it is written in full, so that one device has one ID.
fn parse(id: &str) -> Option<Address> {
    let address: Address = id.parse().ok()?;
    (address.to_string() == id).then_some(address)
}

fn shortened(id: &str) -> String {
    id.chars().take(60).collect()
}

fn for_container(devices: &[&Listed], class: &Class, cdi: bool) -> api::ContainerAllocateResponse {
    let nodes: BTreeSet<&str> = devices
        .iter()
        .flat_map(|device| device.nodes.iter().map(String::as_str))
        .collect();
    let node = |path: &str| api::DeviceSpec {
        container_path: path.to_owned(),
        host_path: path.to_owned(),
        permissions: PERMISSIONS.to_owned(),
    };
    let name = |device: &&Listed| api::CdiDevice {
        name: format!("{}={}", class.kind(), device.id),
    };
    api::ContainerAllocateResponse {
        devices: nodes.into_iter().map(node).collect(),
        cdi_devices: match cdi {
            true => devices.iter().map(name).collect(),
            false => Vec::new(),
        },
        ..api::ContainerAllocateResponse::default()
    }
}

/// Says which free devices fit together best, container by container.
///
/// # Errors
/// [`Refusal`] when one of them cannot be met.
pub fn prefer(
    request: &api::PreferredAllocationRequest,
    class: &Class,
    snapshot: &Snapshot,
) -> Result<Vec<Choice>, Refusal> {
    within(request.container_requests.len())?;
    let refusal = |source| Refusal::Preference {
        resource: class.kind(),
        source,
    };
    let choose = |container: &api::ContainerPreferredAllocationRequest| {
        let must: Vec<Address> = container
            .must_include_device_i_ds
            .iter()
            .map(|id| parse(id).ok_or_else(|| PreferenceError::Unknown(shortened(id))))
            .collect::<Result<_, _>>()?;
        let available: Vec<Address> = container
            .available_device_i_ds
            .iter()
            .filter_map(|id| parse(id))
            .collect();
        let size = i64::from(container.allocation_size);
        let partitioned = snapshot.partitioned.contains(class);
        preferred::choose(snapshot.of(class), partitioned, &available, &must, size)
    };
    let containers = request.container_requests.iter();
    containers
        .map(|container| choose(container).map_err(refusal))
        .collect()
}

/// The list for the kubelet.
pub fn list(devices: &[Listed]) -> api::ListAndWatchResponse {
    let device = |device: &Listed| api::Device {
        id: device.id.to_string(),
        health: match device.healthy() {
            true => api::HEALTHY.to_owned(),
            false => api::UNHEALTHY.to_owned(),
        },
        topology: device.place.numa.map(|node| api::TopologyInfo {
            nodes: vec![api::NumaNode {
                id: i64::from(node),
            }],
        }),
    };
    api::ListAndWatchResponse {
        devices: devices.iter().map(device).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::snapshot::{Cause, Place};

    const FIRST: &str = "0000:01:00.0";
    const SECOND: &str = "0000:02:00.0";
    const DEAD: &str = "0000:03:00.0";

    fn class() -> Class {
        Class::new("pgpu").unwrap()
    }

    fn snapshot() -> Snapshot {
        let device = |id: &str, group: u32| Listed {
            id: id.parse().unwrap(),
            place: Place {
                numa: Some(1),
                switch: None,
            },
            nodes: vec![format!("/dev/vfio/{group}"), "/dev/vfio/vfio".to_owned()],
            causes: Vec::new(),
        };
        let mut dead = device(DEAD, 14);
        dead.causes = vec![Cause::Dead(dead.id)];
        let devices = vec![device(FIRST, 12), device(SECOND, 13), dead];
        Snapshot {
            classes: [(class(), devices)].into(),
            cdi: [class()].into(),
            partitioned: BTreeSet::new(),
        }
    }

    fn ask(containers: &[&[&str]]) -> api::AllocateRequest {
        let container = |ids: &&[&str]| api::ContainerAllocateRequest {
            devices_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        };
        api::AllocateRequest {
            container_requests: containers.iter().map(container).collect(),
        }
    }

    #[test]
    fn a_container_gets_nodes_and_names() {
        let answer = allocate(&ask(&[&[SECOND, FIRST], &[]]), &class(), &snapshot()).unwrap();
        let first = &answer.container_responses[0];
        let nodes: Vec<_> = first
            .devices
            .iter()
            .map(|node| (node.host_path.as_str(), node.permissions.as_str()))
            .collect();
        let expected = ["/dev/vfio/12", "/dev/vfio/13", "/dev/vfio/vfio"];
        assert_eq!(nodes, expected.map(|node| (node, "rw")));
        assert!(
            first
                .devices
                .iter()
                .all(|node| node.host_path == node.container_path)
        );
        let names: Vec<_> = first
            .cdi_devices
            .iter()
            .map(|cdi| cdi.name.as_str())
            .collect();
        assert_eq!(
            names,
            [
                "nvidia.com/pgpu=0000:02:00.0",
                "nvidia.com/pgpu=0000:01:00.0"
            ]
        );
        assert_eq!(
            answer.container_responses[1],
            api::ContainerAllocateResponse::default()
        );
        let mut without = snapshot();
        without.cdi.clear();
        let answer = allocate(&ask(&[&[FIRST]]), &class(), &without).unwrap();
        assert_eq!(answer.container_responses[0].cdi_devices, []);
    }

    #[test]
    fn what_cannot_be_given_out_is_refused_with_the_reason() {
        let refused = |containers: &[&[&str]]| {
            allocate(&ask(containers), &class(), &snapshot())
                .unwrap_err()
                .to_string()
        };
        assert!(refused(&[&[DEAD]]).contains("fallen off the bus"));
        assert!(refused(&[&[FIRST], &[FIRST]]).contains("twice"));
        for id in ["12", "", "01:00.0", "0000:09:00.0", "../../etc"] {
            assert!(refused(&[&[id]]).contains("has no device"), "{id}");
        }
        assert!(refused(&vec![&[][..]; 1001]).contains("1001"));
        let other = Class::new("other").unwrap();
        assert!(allocate(&ask(&[&[FIRST]]), &other, &snapshot()).is_err());
    }

    #[test]
    fn a_preference_is_chosen_among_devices() {
        let request = |available: &[&str], must: &[&str], size| api::PreferredAllocationRequest {
            container_requests: vec![api::ContainerPreferredAllocationRequest {
                available_device_i_ds: available.iter().map(|id| (*id).to_owned()).collect(),
                must_include_device_i_ds: must.iter().map(|id| (*id).to_owned()).collect(),
                allocation_size: size,
            }],
        };
        let choices = prefer(
            &request(&[SECOND, FIRST, "gone"], &[SECOND], 1),
            &class(),
            &snapshot(),
        );
        assert_eq!(choices.unwrap()[0].ids, [SECOND.parse().unwrap()]);
        assert!(prefer(&request(&[FIRST], &["x"], 1), &class(), &snapshot()).is_err());
        assert!(prefer(&request(&[FIRST], &[], i32::MIN), &class(), &snapshot()).is_err());
    }

    /// The bytes of messages as Kubernetes' own definition gives them, written out by hand from its field numbers.
    #[test]
    fn messages_are_as_on_the_wire() {
        let listed = list(&snapshot().of(&class())[..1]);
        let mut expected =
            b"\x0a\x1d\x0a\x0c0000:01:00.0\x12\x07Healthy\x1a\x04\x0a\x02\x08\x01".to_vec();
        assert_eq!(listed.encode_to_vec(), expected);
        let answer = allocate(&ask(&[&[FIRST]]), &class(), &snapshot()).unwrap();
        expected = b"\x0a\x64".to_vec();
        expected.extend_from_slice(b"\x1a\x20\x0a\x0c/dev/vfio/12\x12\x0c/dev/vfio/12\x1a\x02rw");
        expected
            .extend_from_slice(b"\x1a\x24\x0a\x0e/dev/vfio/vfio\x12\x0e/dev/vfio/vfio\x1a\x02rw");
        expected.extend_from_slice(b"\x2a\x1e\x0a\x1cnvidia.com/pgpu=0000:01:00.0");
        expected[1] = u8::try_from(expected.len() - 2).unwrap();
        assert_eq!(answer.encode_to_vec(), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_refused(bytes: Vec<u8>) {
            if let Ok(request) = api::AllocateRequest::decode(bytes.as_slice()) {
                let _ = allocate(&request, &class(), &snapshot());
            }
            if let Ok(request) = api::PreferredAllocationRequest::decode(bytes.as_slice()) {
                let _ = prefer(&request, &class(), &snapshot());
            }
        }

        #[test]
        fn nothing_unhealthy_is_ever_given_out(ids in prop::collection::vec(prop::sample::select(vec![FIRST, SECOND, DEAD]), 0..4)) {
            match allocate(&ask(&[&ids]), &class(), &snapshot()) {
                Ok(answer) => {
                    prop_assert!(!ids.contains(&DEAD));
                    prop_assert_eq!(answer.container_responses[0].cdi_devices.len(), ids.len());
                }
                Err(_) => {
                    let different: BTreeSet<_> = ids.iter().collect();
                    prop_assert!(ids.contains(&DEAD) || different.len() < ids.len());
                }
            }
        }
    }
}
