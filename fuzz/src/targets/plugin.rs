//! Requests to the device plugin, which whoever reaches its socket may send, and events about devices.

use km_cdi::names::Class;
use km_plugin::api::{AllocateRequest, PreferredAllocationRequest};
use km_plugin::snapshot::{Cause, Listed, Place, Snapshot};
use km_plugin::{allocate, uevent};
use km_vfio::Address;
use prost::Message as _;

pub(crate) fn run(bytes: &[u8]) {
    uevent::parse(bytes);
    let Ok(class) = Class::new("pgpu") else {
        return;
    };
    let snapshot = machine(&class);
    if let Ok(request) = AllocateRequest::decode(bytes) {
        match allocate::allocate(&request, &class, &snapshot) {
            Ok(answer) => {
                assert_eq!(answer.container_responses.len(), request.container_requests.len());
                let asked = request.container_requests.iter().map(|one| &one.devices_ids);
                for (asked, given) in asked.zip(&answer.container_responses) {
                    assert_eq!(asked.len(), given.cdi_devices.len());
                    assert!(!asked.iter().any(|id| id.starts_with("0000:03")), "a dead one");
                }
            }
            Err(refusal) => assert!(refusal.to_string().chars().count() < 800, "{refusal}"),
        }
    }
    if let Ok(request) = PreferredAllocationRequest::decode(bytes)
        && let Ok(choices) = allocate::prefer(&request, &class, &snapshot)
    {
        for (container, choice) in request.container_requests.iter().zip(choices) {
            assert_eq!(usize::try_from(container.allocation_size), Ok(choice.ids.len()));
        }
    }
}

/// Six devices on two nodes, one of them dead.
fn machine(class: &Class) -> Snapshot {
    let device = |bus: u8| {
        let id = Address {
            domain: 0,
            bus,
            device: 0,
            function: 0,
        };
        Listed {
            id,
            place: Place {
                numa: Some(u16::from(bus / 4)),
                switch: None,
            },
            nodes: vec![format!("/dev/vfio/{bus}"), "/dev/vfio/vfio".to_owned()],
            causes: if bus == 3 { vec![Cause::Dead(id)] } else { Vec::new() },
        }
    };
    Snapshot {
        classes: [(class.clone(), (1..7).map(device).collect())].into(),
        cdi: [class.clone()].into(),
        partitioned: [class.clone()].into(),
    }
}
