//! The readiness files: what NVIDIA's validator would write, and gone when it is true no more.

use std::fs;

use crate::support::{Place, gpu, port};
use km_doctor::{Host, ready};
use km_host::Root;
use km_tests_sysfs::{device, shapes};

/// Brings the files up to date, twice; gives the names that are there then.
fn bring(place: &Place) -> Vec<String> {
    let root = Root::new(place.root()).unwrap();
    let judge = || {
        let host = Host::observe(&root);
        ready::judge(&root, &host.inventory, &place.wants)
    };
    let steps = ready::plan(&root, &judge()).unwrap();
    ready::apply(&root, &steps).unwrap();
    assert_eq!(ready::plan(&root, &judge()).unwrap(), [], "a second time");
    let entries = fs::read_dir(place.path(ready::DIR)).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn plain(mut place: Place) -> Place {
    place.wants.snp.clear();
    place.wants.tdx.clear();
    place
}

#[test]
fn all_of_them_on_a_node_that_is_ready() {
    let place = plain(Place::good());
    let all = ["cc-manager-ready", "vfio-pci-ready", "workload-type"];
    assert_eq!(bring(&place), all);
    let read = |name: &str| fs::read_to_string(place.path(ready::DIR).join(name)).unwrap();
    assert_eq!(read("workload-type"), "vm-passthrough\n");
    assert_eq!(read("vfio-pci-ready"), "");
}

#[test]
fn they_go_when_they_are_true_no_more() {
    let place = plain(Place::good());
    bring(&place);
    let link = format!("{}/driver", place.sys(crate::support::GPU));
    place.remove(&link);
    assert_eq!(bring(&place), ["cc-manager-ready", "workload-type"]);
}

#[test]
fn every_gpu_counts_and_no_switch_does() {
    let other = device("0000:81:00.0", shapes::L40, shapes::GPU).group(20);
    let place = plain(Place::with(vec![
        port(),
        gpu().vfio(0),
        other.clone().driver("nvidia"),
    ]));
    assert!(!bring(&place).contains(&"vfio-pci-ready".to_owned()));
    let place = plain(Place::with(vec![
        port(),
        gpu().vfio(0),
        other.driver("nvgrace_gpu_vfio_pci"),
    ]));
    assert!(bring(&place).contains(&"vfio-pci-ready".to_owned()));
    let switch = device("0000:05:00.0", shapes::NVSWITCH, 0x06_8000).group(30);
    let place = plain(Place::with(vec![port(), gpu().vfio(0), switch]));
    assert!(bring(&place).contains(&"vfio-pci-ready".to_owned()));
    let place = plain(Place::with(vec![port()]));
    assert!(!bring(&place).contains(&"vfio-pci-ready".to_owned()));
}

#[test]
fn confidential_classes_wait_for_their_manager() {
    let place = Place::good();
    assert_eq!(bring(&place), ["vfio-pci-ready", "workload-type"]);
    place.file(&format!("{}/.cc-manager-ctr-ready", ready::DIR), "");
    let all = [
        ".cc-manager-ctr-ready",
        "cc-manager-ready",
        "vfio-pci-ready",
        "workload-type",
    ];
    assert_eq!(bring(&place), all);
}

#[test]
fn files_of_others_in_the_folder_stay() {
    let place = plain(Place::with(vec![port(), gpu()]));
    for name in ["driver-ready", "vfio-pci-ready", "plugin-ready"] {
        place.file(&format!("{}/{name}", ready::DIR), "");
    }
    let left = [
        "cc-manager-ready",
        "driver-ready",
        "plugin-ready",
        "workload-type",
    ];
    assert_eq!(bring(&place), left);
}

#[test]
fn an_uninstall_takes_ours_and_nothing_else() {
    let place = plain(Place::good());
    let root = Root::new(place.root()).unwrap();
    assert_eq!(ready::remove_ours(&root).unwrap(), [], "nothing is there");
    bring(&place);
    let removed = ready::remove_ours(&root).unwrap();
    let removed: Vec<String> = removed.iter().map(ToString::to_string).collect();
    let all = ["workload-type", "vfio-pci-ready", "cc-manager-ready"];
    assert_eq!(removed, all.map(|name| format!("{}/{name}", ready::DIR)));
    let left = fs::read_dir(place.path(ready::DIR)).unwrap();
    assert_eq!(left.count(), 0, "the operator's pods mount the folder");
    assert!(!place.path("/run/kata-manager/validations").exists());
    assert_eq!(ready::remove_ours(&root).unwrap(), [], "a second time");
}

#[test]
fn an_uninstall_leaves_what_the_validator_wrote() {
    let place = plain(Place::good());
    let root = Root::new(place.root()).unwrap();
    // One was there before us, with the same bytes; one is made anew after us, one written over.
    place.file(&format!("{}/vfio-pci-ready", ready::DIR), "");
    bring(&place);
    let cc = place.path(ready::DIR).join("cc-manager-ready");
    let again = place.path(ready::DIR).join("again");
    fs::write(&again, "").unwrap();
    fs::rename(&again, &cc).unwrap();
    place.file(&format!("{}/workload-type", ready::DIR), "container\n");
    assert_eq!(ready::remove_ours(&root).unwrap(), []);
    let all = ["cc-manager-ready", "vfio-pci-ready", "workload-type"];
    for name in all {
        assert!(place.path(ready::DIR).join(name).exists(), "{name}");
    }
    // A record that says what it must not is no danger.
    place.file(
        "/run/kata-manager/validations",
        "../../../etc/passwd 1\nno number\n\nworkload-type -1\n",
    );
    assert_eq!(ready::remove_ours(&root).unwrap(), []);
}
