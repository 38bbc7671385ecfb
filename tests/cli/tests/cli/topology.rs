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

#[test]
fn a_plan_without_the_numa_nodes_that_a_class_has_says_so() {
    let class = "kata-qemu-nvidia-gpu";
    let place = Place::new(Some(GPU));
    let root = place.path().join("root");
    eight_gpus_with_iommufd(&root);
    let artifacts = root.join("opt/artifacts");
    let generation = artifacts.join(".store/generations").join(class).join("7");
    let added = generation.join("config.d");
    std::fs::create_dir_all(&added).unwrap();
    std::os::unix::fs::symlink(
        format!(".store/generations/{class}/7"),
        artifacts.join(class),
    )
    .unwrap();
    let write = |name: &str, on: bool| {
        let text = format!("[hypervisor.qemu]\nenable_numa = {on}\n");
        std::fs::write(added.join(name), text).unwrap();
    };
    let noted = |words: &[&str]| {
        let said = place.run(&[&["topology", "--plan", "13:00.0,94:00.0"], words].concat());
        assert_eq!(said.code, 0, "{said}");
        said.stdout.contains("planned without expanders")
    };
    assert!(!noted(&[]));
    write("60-kata-manager.toml", false);
    assert!(!noted(&[]));
    // Kata reads every file, whatever its name ends with.
    write("70-user-numa", true);
    assert!(noted(&[]));
    assert!(noted(&["--numa", "0,1", "--layout", "root-port"]));
    assert!(!noted(&["--numa", "0,1"]));
    assert!(!noted(&["--kata-version", "4.0"]));
    assert!(!noted(&["--kata-runtime", "rust"]));
    // What is no text of a configuration says nothing.
    std::fs::create_dir(added.join("80-folder.toml")).unwrap();
    std::os::unix::fs::symlink("70-user-numa", added.join("81-link.toml")).unwrap();
    std::fs::write(added.join("82-bytes.toml"), [0xff; 8]).unwrap();
    assert!(noted(&[]));
    write("90-off.toml", false);
    assert!(!noted(&[]));
}

fn eight_gpus_with_iommufd(root: &std::path::Path) {
    km_tests_sysfs::shapes::eight_gpus().write(root);
    let nodes = root.join("dev/vfio/devices");
    std::fs::create_dir_all(&nodes).unwrap();
    for number in 0..12 {
        std::fs::write(nodes.join(format!("vfio{number}")), "").unwrap();
    }
}

/// The guest that the book draws, and the pages that do.
const DRAWN: [&str; 7] = [
    "topology",
    "--plan",
    "13:00.0,94:00.0",
    "--numa",
    "0,1",
    "--vcpus",
    "8",
];

#[test]
fn the_book_shows_what_the_program_prints() {
    let place = Place::new(Some(GPU));
    eight_gpus_with_iommufd(&place.path().join("root"));
    let book = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src");
    let page = std::fs::read_to_string(book.join("topology.md")).unwrap();
    let prompt = format!("# kata-manager {}\n", DRAWN.join(" "));
    let (_, block) = page.split_once(&prompt).expect("the command is shown");
    let (shown, _) = block.split_once("  ...\n").expect("the rest is left out");
    let said = place.run(&DRAWN);
    assert!(
        said.stdout.starts_with(shown),
        "the page shows\n{shown}\nand it is\n{said}"
    );
    let drawing = book.join("planned-guest.svg");
    let said = place.run(&[&DRAWN[..], &["--svg", "-"]].concat());
    if std::env::var_os("INSTA_UPDATE").is_some_and(|how| how == "always") {
        std::fs::write(&drawing, &said.stdout).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&drawing).unwrap(), said.stdout);
}
