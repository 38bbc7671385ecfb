//! The tree of sysfs: one GPU whose attributes and links are the input's.
//!
//! An input is records with a NUL between them; a record's first byte chooses what it replaces, the rest is its content.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use km_host::Root;
use km_vfio::plan::{self, Request, Targets};
use km_vfio::{Inventory, Users, apply};

const GPU: &str = "sys/devices/pci0000:00/0000:00:10.0/0000:01:00.0";

const FILES: &[&str] = &[
    "modalias",
    "resource",
    "numa_node",
    "driver_override",
    "power_state",
    "power/control",
    "power/runtime_status",
    "reset_method",
    "current_link_speed",
    "current_link_width",
    "max_link_speed",
    "max_link_width",
    "config",
    "boot_vga",
];

const LINKS: &[&str] = &["driver", "iommu_group"];

pub(crate) fn run(bytes: &[u8]) {
    let root = Tree::new();
    for record in bytes
        .split(|byte| *byte == 0)
        .take(FILES.len() + LINKS.len())
    {
        root.replace(record);
    }
    let Ok(host) = Root::new(&root.0) else { return };
    let Ok(inventory) = Inventory::observe(&host) else {
        return;
    };
    let _ = inventory.topology();
    let _ = inventory.by_primary();
    let Ok(users) = Users::observe(&host, &inventory) else {
        return;
    };
    let request = Request {
        targets: Targets::All,
        whole_group: false,
        console: false,
    };
    let choices = apply::choices(&host, &inventory);
    let _ = plan::bind(&inventory, &users, &choices, &request);
    let _ = plan::unbind(&inventory, &users, &request);
}

/// A prepared root, removed when it is dropped; in memory, where there is such a place.
struct Tree(PathBuf);

impl Tree {
    fn new() -> Tree {
        let memory = Path::new("/dev/shm");
        let parent = match memory.is_dir() {
            true => memory.to_owned(),
            false => std::env::temp_dir(),
        };
        let root = parent.join(format!("km-fuzz-sysfs-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        km_tests_sysfs::shapes::one_gpu().write(&root);
        fs::create_dir_all(root.join("proc")).expect("a folder in the prepared root");
        Tree(root)
    }

    fn replace(&self, record: &[u8]) {
        let Some((choice, content)) = record.split_first() else {
            return;
        };
        let choice = usize::from(*choice) % (FILES.len() + LINKS.len());
        match FILES.get(choice) {
            Some(name) => {
                let _ = fs::write(self.0.join(GPU).join(name), content);
            }
            None => {
                let path = self.0.join(GPU).join(LINKS[choice - FILES.len()]);
                let _ = fs::remove_file(&path);
                // An empty target is none.
                let _ = symlink(&*String::from_utf8_lossy(content), path);
            }
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
