//! A sandbox's config.json with its annotations: read, decided on without a kubelet, and written to.

use km_shim::bundle::{Bundle, Node};
use km_shim::decide::{self, Asked, Catalogue, Given};
use km_shim::table::{Case, Containerd};
use km_topology::{Flavor, Kata, Version};

pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let node = Node {
        path: "/dev/vfio/7".to_owned(),
        number: (243, 7),
    };
    let Ok(bundle) = Bundle::read(text) else {
        return;
    };
    let facts = &bundle.facts;
    if let Ok(edited) = bundle.with_nodes(&[node]) {
        let edited = edited.concat();
        let mut nodes = facts.nodes.clone();
        nodes.push("/dev/vfio/7".to_owned());
        let again = Bundle::read(&edited).map(|bundle| bundle.facts.nodes);
        assert_eq!(again.as_ref(), Ok(&nodes), "{edited}");
    }
    let names = facts.annotated.iter().cloned();
    let catalogue: Catalogue = names
        .map(|name| (name, vec!["/dev/vfio/7".to_owned()]))
        .collect();
    for flavor in [Flavor::Go, Flavor::Rust] {
        let case = Case {
            kata: Kata {
                flavor,
                version: Version::new(4, 1),
            },
            confidential: bytes.len() % 2 == 0,
            containerd: Containerd::V2,
        };
        for given in [
            Given::NoKubelet,
            Given::Pod {
                plugin: Vec::new(),
                claims: Vec::new(),
                serves_get: true,
            },
        ] {
            let kubelet = given != Given::NoKubelet;
            let asked = Asked {
                given,
                spec: facts.nodes.clone(),
                annotated: facts.annotated.clone(),
            };
            if let Ok(wanted) = decide::wanted(&asked, case, &catalogue) {
                // With a kubelet, an annotation gives nothing.
                assert!(!kubelet || wanted.len() <= facts.nodes.len());
            }
        }
    }
}
