//! CDI specs of prepared machines, ours and those of others.

use insta::assert_snapshot;

use crate::place::{GPU, Place, machine};

#[test]
fn cdi_specs_of_prepared_machines() {
    use km_tests_sysfs::shapes;
    let generate = |place: &Place| place.run(&["cdi", "generate"]);
    let specs = |place: &Place| {
        let dir = place.path().join("root/var/run/cdi");
        let entries = std::fs::read_dir(dir).map_or(Vec::new(), Iterator::collect);
        let mut names: Vec<String> = entries
            .into_iter()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    for (name, shape) in [
        ("two_models", shapes::two_models()),
        ("shared_group", shapes::shared_group()),
        ("no_iommu", shapes::no_iommu()),
    ] {
        let place = machine(&shape);
        let before = place.files();
        let dry = place.run(&["cdi", "generate", "--dry-run"]);
        assert_eq!(place.files(), before, "something was made");
        assert_snapshot!(format!("cdi_generate_{name}"), dry);
    }
    let place = machine(&shapes::eight_gpus());
    assert_eq!(generate(&place).code, 0);
    let both = ["nvidia.com-nvswitch.yaml", "nvidia.com-pgpu.yaml"];
    assert_eq!(specs(&place), both);
    assert!(generate(&place).stdout.starts_with("Nothing to do"));
    // Only where containerd listens is taken from it.
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    assert_snapshot!("cdi_list", place.run(&["cdi", "list"]));
    let valid = place.run(&["cdi", "validate"]);
    assert_snapshot!("cdi_validate", valid);
    let models = place.run(&[
        "cdi",
        "generate",
        "--gpu-alias",
        "",
        "--nvswitch-alias",
        "sw",
    ]);
    assert_snapshot!("cdi_generate_with_models", models);
    let named = ["nvidia.com-GH100_H100_SXM5_80GB.yaml", "nvidia.com-sw.yaml"];
    assert_eq!(specs(&place), named);
    assert_snapshot!("uninstall_of_cdi_specs", place.run(&["uninstall"]));
    assert_eq!(specs(&place), [""; 0]);
    let bad = place.run(&["cdi", "generate", "--gpu-alias", "9.x"]);
    assert_snapshot!("cdi_generate_with_a_bad_alias", bad);
}

#[test]
fn cdi_specs_of_others() {
    use km_tests_sysfs::shapes;
    let foreign = "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n- {name: \"3\", containerEdits: {deviceNodes: [{path: \"/dev/\\e[2J\"}]}}\n";
    let shape = shapes::eight_gpus()
        .file("/var/run/cdi/nvidia.com-pgpu.yaml", foreign)
        .file("/etc/cdi/old.json", "{\"cdiVersion\": \"0.2.0\"}");
    let place = machine(&shape);
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    let before = place.files();
    let refused = place.run(&["cdi", "generate"]);
    assert_snapshot!("cdi_generate_beside_another", refused);
    assert_snapshot!("cdi_list_of_others", place.run(&["cdi", "list"]));
    let invalid = place.run(&["cdi", "validate", "--output", "json"]);
    assert_snapshot!("cdi_validate_as_json", invalid);
    assert_eq!(place.files(), before, "something was made");
    let one = place.path().join("root/var/run/cdi/nvidia.com-pgpu.yaml");
    let one = place.run(&["cdi", "validate", one.to_str().unwrap()]);
    assert_eq!(one.code, 0, "{one}");
    assert_eq!(place.run(&["cdi", "validate", "/nowhere"]).code, 7);
}

#[test]
fn cdi_specs_by_configuration_and_variables() {
    use std::os::unix::ffi::OsStrExt as _;
    let place = machine(&km_tests_sysfs::shapes::eight_gpus());
    let config = "devices:\n  gpuAlias: \"\"\n  nvswitchAlias: sw\n  cdiDir: /etc/specs\n";
    std::fs::write(place.path().join("config.yaml"), config).unwrap();
    let specs = || -> Vec<String> {
        let files = place.files().into_iter();
        let files = files.filter(|file| file.extension().is_some_and(|end| end == "yaml"));
        let names = files.map(|file| file.display().to_string());
        names.filter(|name| name.contains("nvidia")).collect()
    };
    // Everything is with VFIO already: nothing moves, and the specs follow all the same.
    assert_snapshot!(
        "devices_bind_writes_specs",
        place.run(&["devices", "bind", "--all"])
    );
    let by_model = "root/etc/specs/nvidia.com-GH100_H100_SXM5_80GB.yaml";
    assert_eq!(specs(), [by_model, "root/etc/specs/nvidia.com-sw.yaml"]);
    let again = place.run(&["devices", "bind", "--all"]);
    assert!(!again.stdout.contains("write"), "{again}");
    // A variable comes before the configuration, an option before both.
    let variables = [("P_GPU_ALIAS", "gpus"), ("NVSWITCH_ALIAS", "")];
    let said = place.run_with(
        &variables,
        &["cdi", "generate", "--nvswitch-alias", "switch"],
    );
    assert_eq!(said.code, 0, "{said}");
    let named = [
        "root/etc/specs/nvidia.com-gpus.yaml",
        "root/etc/specs/nvidia.com-switch.yaml",
    ];
    assert_eq!(specs(), named);
    assert_eq!(place.run(&["uninstall"]).code, 0);
    assert_eq!(specs(), [""; 0]);
    // Nodes of iommufd alone are demanded, and there are none.
    let strict = place.run(&["cdi", "generate", "--backend", "iommufd"]);
    assert!(
        strict.stdout.contains("CONFIG_VFIO_DEVICE_CDEV"),
        "{strict}"
    );
    assert_eq!(place.run(&["cdi", "generate", "--backend", "both"]).code, 4);
    std::fs::write(
        place.path().join("config.yaml"),
        "devices: {gpuAlias: 9.x}\n",
    )
    .unwrap();
    assert_snapshot!("config_with_a_bad_alias", place.run(&["config", "check"]));

    let odd = place.path().join(std::ffi::OsStr::from_bytes(b"\xff.yaml"));
    std::fs::write(&odd, "").unwrap();
    let said = place.run_with(&[], &["cdi".as_ref(), "validate".as_ref(), odd.as_os_str()]);
    assert_eq!(said.code, 4, "{said}");
}
