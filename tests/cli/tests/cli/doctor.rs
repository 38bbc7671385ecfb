//! What `doctor` says of prepared machines, and its readiness files.

use insta::assert_snapshot;

use crate::place::{GPU, machine};

#[test]
fn doctor_on_prepared_machines() {
    use km_tests_sysfs::shapes;
    for (name, shape) in [
        ("one_gpu", shapes::one_gpu()),
        ("two_models", shapes::two_models()),
        ("shared_group", shapes::shared_group()),
        ("no_iommu", shapes::no_iommu()),
    ] {
        let place = machine(&shape.file("/proc/cmdline", "quiet\n"));
        let before = place.files();
        assert_snapshot!(format!("doctor_{name}"), place.run(&["doctor"]));
        assert_eq!(place.files(), before, "something was made");
    }
    let place = machine(&shapes::two_models());
    let json = place.run(&["doctor", "--output", "json", "01:00.0"]);
    assert_snapshot!("doctor_as_json", json);
    let said: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(said["kind"], "Doctor");
    assert_eq!(place.run(&["doctor", "nonsense"]).code, 4);
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    let confidential = place.run(&["doctor"]);
    assert!(
        confidential.stdout.contains("kvm_amd.sev_snp=1"),
        "{confidential}"
    );
}

#[test]
fn readiness_is_told_and_taken_back() {
    use km_tests_sysfs::shapes;
    let place = machine(&shapes::two_models());
    let folder = place.path().join("root/run/nvidia/validations");
    let said = place.run(&["doctor", "--write-ready"]);
    assert!(
        said.stdout.contains("0000:81:00.0 is with nvidia"),
        "{said}"
    );
    assert!(!folder.join("vfio-pci-ready").exists(), "{said}");
    std::fs::write(folder.join("vfio-pci-ready"), "").unwrap();
    let said = place.run(&["doctor", "--write-ready"]);
    assert!(!folder.join("vfio-pci-ready").exists(), "{said}");
    let place = machine(&shapes::eight_gpus());
    let said = place.run(&["doctor", "--write-ready"]);
    assert!(
        said.stdout.contains("told that this node is ready.\n"),
        "{said}"
    );
    let folder = place.path().join("root/run/nvidia/validations");
    let kind = std::fs::read_to_string(folder.join("workload-type")).unwrap();
    assert_eq!(kind, "vm-passthrough\n");
    assert!(folder.join("vfio-pci-ready").is_file());
    // Others' files stay; after us nobody would keep ours true.
    std::fs::write(folder.join("driver-ready"), "").unwrap();
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    let said = place.run(&["uninstall"]);
    assert!(
        said.stdout
            .contains("Readiness files removed: /run/nvidia/validations/workload-type, "),
        "{said}"
    );
    let left = std::fs::read_dir(&folder).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["driver-ready"]);
}
