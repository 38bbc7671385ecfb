//! Guests planned for prepared machines.

use insta::assert_snapshot;

use crate::place::{GPU, Place};

#[test]
fn guests_of_prepared_machines_are_planned() {
    use km_tests_sysfs::shapes;
    let place = |machine: &km_tests_sysfs::Machine| {
        let place = Place::new(Some(GPU));
        machine.write(&place.path().join("root"));
        place
    };
    let eight = place(&shapes::eight_gpus());
    let before = eight.files();
    let plan = |words: &[&str]| eight.run(&[&["topology", "--plan"], words].concat());
    assert_snapshot!("topology_plan_all", plan(&["all"]));
    let numa = ["13:00.0,94:00.0", "--numa", "0,1", "--vcpus", "8"];
    assert_snapshot!("topology_plan_numa", plan(&numa));
    let arguments = plan(&[&numa[..], &["--arguments"]].concat());
    assert_snapshot!("topology_plan_arguments", arguments);
    let json = plan(&["13:00.0", "--kata-version", "4.1", "--output", "json"]);
    assert_snapshot!("topology_plan_as_json", json);
    let svg = plan(&["13:00.0,94:00.0", "--layout", "switch-port", "--svg", "-"]);
    assert_snapshot!("topology_plan_svg", svg);
    for (code, words) in [
        (3, &["all", "--numa", "0,2"][..]),
        (3, &["all", "--kata-version", "4.0"]),
        (3, &["all", "--kata-runtime", "rust"]),
        (3, &["13:00.0,13:00.0", "--layout", "numa"]),
        (4, &["nothing"]),
        (4, &["13:00.0", "--class", "runc"]),
        (8, &["default/pod"]),
        (9, &["01:00.0"]),
    ] {
        let said = plan(words);
        assert_eq!(said.code, code, "{words:?}: {said}");
        assert!(said.stdout.is_empty() && !said.stderr.is_empty(), "{said}");
    }
    let alone = eight.run(&["topology", "--arguments"]);
    assert_eq!(alone.code, 4, "{alone}");
    assert_eq!(eight.files(), before, "something was made");
    let shared = place(&shapes::shared_group());
    let said = shared.run(&["topology", "--plan", "01:00.0"]);
    assert_snapshot!("topology_plan_shared_group", said);
    let off = place(&shapes::no_iommu()).run(&["topology", "--plan", "all"]);
    assert_snapshot!("topology_plan_no_iommu", off);
}
