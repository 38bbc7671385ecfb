//! Prepared roots with PCI devices: what sysfs shows of a machine, written from a short description.
//!
//! A [`Machine`] is a list of [`Device`]s; [`Machine::write`] makes the tree below a folder. [`shapes`] has the machines that
//! tests share. What a kernel does when a driver is bound is not here.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files plainly, and fail by panicking"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

pub mod shapes;

/// A PCI function. Begin with [`device`] and set what matters.
#[derive(Clone, Debug)]
pub struct Device {
    /// `0000:41:00.0`.
    pub address: String,
    /// The bridges above it, from the root port down.
    pub path: Vec<String>,
    /// The root bus: `pci0000:40`.
    pub root: String,
    /// Vendor and device number.
    pub id: (u16, u16),
    /// Class, 24 bits.
    pub class: u32,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its NUMA node; -1 where none is told.
    pub numa: i32,
    /// The number of its VFIO device.
    pub vfio: Option<u32>,
    /// Whether its configuration space answers all ones.
    pub dead: bool,
    /// More attributes: name and content.
    pub attributes: Vec<(String, String)>,
}

/// A function on `pci0000:00`, with no driver and no group.
pub fn device(address: &str, id: (u16, u16), class: u32) -> Device {
    Device {
        address: address.to_owned(),
        path: Vec::new(),
        root: "pci0000:00".to_owned(),
        id,
        class,
        driver: None,
        group: None,
        numa: -1,
        vfio: None,
        dead: false,
        attributes: Vec::new(),
    }
}

impl Device {
    /// Below these bridges of a root bus.
    #[must_use]
    pub fn under(mut self, root: &str, path: &[&str]) -> Device {
        self.root = root.to_owned();
        self.path = path.iter().map(|part| (*part).to_owned()).collect();
        self
    }

    /// In an IOMMU group.
    #[must_use]
    pub fn group(mut self, group: u32) -> Device {
        self.group = Some(group);
        self
    }

    /// On a NUMA node.
    #[must_use]
    pub fn numa(mut self, node: i32) -> Device {
        self.numa = node;
        self
    }

    /// Bound to a driver.
    #[must_use]
    pub fn driver(mut self, driver: &str) -> Device {
        self.driver = Some(driver.to_owned());
        self
    }

    /// Bound to vfio-pci, with this number of its VFIO device.
    #[must_use]
    pub fn vfio(mut self, number: u32) -> Device {
        self.vfio = Some(number);
        self.driver("vfio-pci")
    }

    /// With an attribute more, or another content for one.
    #[must_use]
    pub fn with(mut self, name: &str, content: &str) -> Device {
        self.attributes.push((name.to_owned(), content.to_owned()));
        self
    }

    fn dir(&self) -> PathBuf {
        let mut dir = Path::new("sys/devices").join(&self.root);
        dir.extend(&self.path);
        dir.join(&self.address)
    }

    fn modalias(&self) -> String {
        let (vendor, device) = self.id;
        let (base, sub, interface) = (self.class >> 16, self.class >> 8 & 0xff, self.class & 0xff);
        format!(
            "pci:v{vendor:08X}d{device:08X}sv{vendor:08X}sd00001626bc{base:02X}sc{sub:02X}i{interface:02X}"
        )
    }

    fn write(&self, root: &Path) {
        let dir = root.join(self.dir());
        fs::create_dir_all(dir.join("power")).unwrap();
        let gpu = self.class >> 16 == 3 || self.class >> 8 == 0x0680;
        let config = match self.dead {
            true => vec![0xff; 64],
            false => [self.id.0.to_le_bytes(), self.id.1.to_le_bytes()].concat(),
        };
        fs::write(dir.join("config"), config).unwrap();
        let mut attributes = vec![
            ("modalias", self.modalias()),
            ("vendor", format!("0x{:04x}", self.id.0)),
            ("device", format!("0x{:04x}", self.id.1)),
            ("class", format!("0x{:06x}", self.class)),
            ("numa_node", self.numa.to_string()),
            ("driver_override", "(null)".to_owned()),
            ("power_state", "D0".to_owned()),
            ("power/control", "auto".to_owned()),
            ("power/runtime_status", "active".to_owned()),
            ("resource", resource(gpu)),
        ];
        if gpu {
            attributes.extend([
                ("reset_method", "flr bus".to_owned()),
                ("current_link_speed", "32.0 GT/s PCIe".to_owned()),
                ("current_link_width", "16".to_owned()),
                ("max_link_speed", "32.0 GT/s PCIe".to_owned()),
                ("max_link_width", "16".to_owned()),
            ]);
        }
        for (name, content) in attributes {
            fs::write(dir.join(name), format!("{content}\n")).unwrap();
        }
        for (name, content) in &self.attributes {
            fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
            fs::write(dir.join(name), content).unwrap();
        }
        self.links(root, &dir);
    }

    fn links(&self, root: &Path, dir: &Path) {
        let up = "../".repeat(self.dir().components().count() - 1);
        let by_address = root.join("sys/bus/pci/devices").join(&self.address);
        let real = self.dir();
        let inside = real.strip_prefix("sys").unwrap();
        symlink(Path::new("../../..").join(inside), by_address).unwrap();
        if let Some(driver) = &self.driver {
            fs::create_dir_all(root.join("sys/bus/pci/drivers").join(driver)).unwrap();
            symlink(format!("{up}bus/pci/drivers/{driver}"), dir.join("driver")).unwrap();
            let listed = root.join(format!("sys/bus/pci/drivers/{driver}/{}", self.address));
            symlink(Path::new("../../../..").join(inside), listed).unwrap();
        }
        if let Some(group) = self.group {
            let devices = root.join(format!("sys/kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&devices).unwrap();
            let target = Path::new("../../../..").join(inside);
            symlink(target, devices.join(&self.address)).unwrap();
            let target = format!("{up}kernel/iommu_groups/{group}");
            symlink(target, dir.join("iommu_group")).unwrap();
        }
        if let (Some(number), Some(group)) = (self.vfio, self.group) {
            let vfio = dir.join(format!("vfio-dev/vfio{number}"));
            fs::create_dir_all(&vfio).unwrap();
            fs::write(vfio.join("dev"), format!("511:{number}\n")).unwrap();
            let devices = root.join("sys/class/vfio-dev");
            fs::create_dir_all(&devices).unwrap();
            let name = format!("vfio{number}");
            let target = Path::new("../..").join(inside).join("vfio-dev").join(&name);
            symlink(target, devices.join(&name)).unwrap();
            let class = root.join(format!("sys/class/vfio/{group}"));
            fs::create_dir_all(&class).unwrap();
            fs::write(class.join("dev"), format!("243:{group}\n")).unwrap();
        }
    }
}

/// The BARs of an H100, or of a small function.
fn resource(gpu: bool) -> String {
    let bars: &[(u64, u64, u64)] = if gpu {
        &[
            (0x3800_0000_0000, 16 << 20, 0x14_220c),
            (0, 0, 0),
            (0x3000_0000_0000, 128 << 30, 0x14_220c),
            (0, 0, 0),
            (0x3800_1000_0000, 32 << 20, 0x14_220c),
        ]
    } else {
        &[(0xf000_0000, 16 << 10, 0x4_0200)]
    };
    let mut lines: Vec<String> = bars
        .iter()
        .map(|(start, size, flags)| {
            let end = if *size == 0 { 0 } else { start + size - 1 };
            format!("0x{start:016x} 0x{end:016x} 0x{flags:016x}")
        })
        .collect();
    lines.resize(13, format!("0x{0:016x} 0x{0:016x} 0x{0:016x}", 0));
    lines.join("\n")
}

/// A process with open files.
#[derive(Clone, Debug)]
struct Process {
    pid: u32,
    name: String,
    open: Vec<String>,
}

/// A machine.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Its PCI functions.
    pub devices: Vec<Device>,
    processes: Vec<Process>,
    files: Vec<(String, String)>,
}

impl Machine {
    /// A machine with these functions.
    pub fn new(devices: Vec<Device>) -> Machine {
        Machine {
            devices,
            ..Machine::default()
        }
    }

    /// With a process that has files open.
    #[must_use]
    pub fn process(mut self, pid: u32, name: &str, open: &[&str]) -> Machine {
        self.processes.push(Process {
            pid,
            name: name.to_owned(),
            open: open.iter().map(|file| (*file).to_owned()).collect(),
        });
        self
    }

    /// With a file.
    #[must_use]
    pub fn file(mut self, path: &str, content: &str) -> Machine {
        self.files.push((path.to_owned(), content.to_owned()));
        self
    }

    /// Writes plain files in the place of VFIO's nodes below a folder: for programs that look whether they are there, and open none.
    ///
    /// # Panics
    /// When one cannot be written.
    pub fn write_nodes(&self, root: &Path) {
        let nodes = root.join("dev/vfio");
        fs::create_dir_all(&nodes).unwrap();
        fs::write(nodes.join("vfio"), "").unwrap();
        let bound = self.devices.iter().filter(|device| device.vfio.is_some());
        for group in bound.filter_map(|device| device.group) {
            fs::write(nodes.join(group.to_string()), "").unwrap();
        }
    }

    /// Writes the machine below a folder.
    ///
    /// # Panics
    /// When something cannot be written.
    pub fn write(&self, root: &Path) {
        for dir in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers",
            "sys/kernel/iommu_groups",
            "proc",
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for device in &self.devices {
            device.write(root);
        }
        for process in &self.processes {
            let dir = root.join(format!("proc/{}", process.pid));
            fs::create_dir_all(dir.join("fd")).unwrap();
            fs::write(dir.join("comm"), format!("{}\n", process.name)).unwrap();
            for (number, file) in process.open.iter().enumerate() {
                symlink(file, dir.join(format!("fd/{number}"))).unwrap();
            }
        }
        for (path, content) in &self.files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
    }
}
