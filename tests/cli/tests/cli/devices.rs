//! Devices of prepared machines, listed, bound and drawn.

use insta::assert_snapshot;

use crate::place::machine;

#[test]
fn devices_of_prepared_machines() {
    use km_tests_sysfs::shapes;
    let shapes = [
        ("one_gpu", shapes::one_gpu()),
        ("two_models", shapes::two_models()),
        ("eight_gpus", shapes::eight_gpus()),
        ("shared_group", shapes::shared_group()),
        ("no_iommu", shapes::no_iommu()),
    ];
    for (name, shape) in shapes {
        let place = machine(&shape);
        let before = place.files();
        assert_snapshot!(
            format!("devices_list_{name}"),
            place.run(&["devices", "list"])
        );
        assert_snapshot!(format!("topology_{name}"), place.run(&["topology"]));
        let dry = place.run(&["devices", "bind", "--all", "--dry-run"]);
        assert_snapshot!(format!("devices_bind_{name}"), dry);
        let svg = place.run(&["topology", "--svg", "-"]);
        assert!(svg.code == 0 && svg.stdout.ends_with("</svg>\n"), "{svg}");
        assert_eq!(place.files(), before, "something was made");
    }
    let place = machine(&shapes::two_models());
    assert_snapshot!(
        "devices_list_as_json",
        place.run(&["devices", "list", "--output", "json"])
    );
    assert_snapshot!(
        "devices_unbind_held",
        place.run(&["devices", "unbind", "01:00.0"])
    );
    assert_eq!(place.run(&["devices", "bind", "05:00.0"]).code, 9);
    assert_eq!(place.run(&["devices", "bind", "nonsense"]).code, 4);
    assert_eq!(place.run(&["devices", "bind"]).code, 4);
    assert_eq!(place.run(&["devices", "bind", "--all", "81:00.0"]).code, 4);
}

#[test]
fn another_specs_owner_does_not_keep_devices_from_moving() {
    let foreign = "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices: []\n";
    let shape = km_tests_sysfs::shapes::eight_gpus();
    let place = machine(&shape.file("/var/run/cdi/nvidia.com-pgpu.yaml", foreign));
    let before = place.files();
    let said = place.run(&["devices", "bind", "--all"]);
    assert_snapshot!("devices_bind_beside_another_spec", said);
    assert_eq!(place.files(), before, "something was made");
}

#[test]
fn names_that_are_markup_stay_text() {
    use km_tests_sysfs::shapes;
    let evil = "</text><script>alert('x')</script>\u{1b}[2J";
    let hostile = shapes::one_gpu()
        .file(
            "/usr/share/misc/pci.ids",
            &format!("10de  x\n\t2331  {evil}\n"),
        )
        .process(7, "<b>\u{1b}[31m", &["/dev/vfio/12"]);
    let place = machine(&hostile);
    let svg = place.run(&["topology", "--svg", "-"]);
    assert!(
        !svg.stdout.contains("<script") && svg.stdout.contains("&lt;"),
        "{svg}"
    );
    for words in [&["topology"][..], &["devices", "list"]] {
        let said = place.run(words);
        assert!(said.code == 0 && !said.stdout.contains('\u{1b}'), "{said}");
    }
}
