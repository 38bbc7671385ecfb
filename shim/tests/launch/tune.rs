//! Properties that devices get.

use km_shim::launch::argv::Argv;
use km_shim::launch::tune;
use km_shim::launch::view::View;
use km_topology::Flavor;

use crate::forms::{GO, MACHINE, NUMA, RUST, SWITCH, Sandbox, argv};

#[test]
fn one_iommufd_object_is_shared() {
    let sandbox = Sandbox::of(Flavor::Go, true);
    for form in [GO, NUMA] {
        let before = argv(&[MACHINE, form]);
        let words = tune::tune(&before, &View::of(&before), &sandbox.wanted(), None).unwrap();
        let after = Argv::parse(words);
        let view = View::of(&after);
        assert_eq!(view.iommufd.len(), 1);
        assert!(
            view.vfio()
                .all(|device| device.keyed.get("iommufd") == Some("iommufdvfio-a"))
        );
        assert_eq!(after.words.len(), before.words.len() - 2);
        assert_eq!(sandbox.problems(&after), Vec::<String>::new());
        let again = tune::tune(&after, &view, &sandbox.wanted(), None).unwrap();
        assert_eq!(again, after.words);
    }
    let rust = Sandbox::of(Flavor::Rust, true);
    let before = argv(&[MACHINE, RUST]);
    let after = tune::tune(&before, &View::of(&before), &rust.wanted(), Some(1)).unwrap();
    let after = Argv::parse(after);
    assert_eq!(
        rust.problems(&after),
        Vec::<String>::new(),
        "slots are as before"
    );
    assert!(
        !format!("{:?}", after.words).contains("clique"),
        "iommufd has none"
    );
}

#[test]
fn cliques_are_for_several_gpus_of_legacy_groups() {
    let mut sandbox = Sandbox::of(Flavor::Go, false);
    let before = argv(&[MACHINE, SWITCH]);
    let tuned = |sandbox: &Sandbox, clique| {
        tune::tune(&before, &View::of(&before), &sandbox.wanted(), clique)
    };
    let after = Argv::parse(tuned(&sandbox, Some(3)).unwrap());
    let cliques = View::of(&after);
    assert!(
        cliques
            .vfio()
            .all(|device| device.keyed.get("x-nv-gpudirect-clique") == Some("3"))
    );
    assert_eq!(sandbox.problems(&after), Vec::<String>::new());
    assert_eq!(tuned(&sandbox, None).unwrap(), before.words);
    assert!(
        tuned(&sandbox, Some(16))
            .unwrap_err()
            .to_string()
            .contains("0 to 15")
    );
    sandbox.confidential = true;
    assert!(
        tuned(&sandbox, Some(3))
            .unwrap_err()
            .to_string()
            .contains("confidential")
    );
}
