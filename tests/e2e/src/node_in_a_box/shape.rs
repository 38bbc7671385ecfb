//! Shapes: what a node has, by name. Reads and checks the files in `node-in-a-box/shapes`; starts nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use km_gpu_emulator::settings::{Device, Function, Settings, Size};
use serde::Deserialize;

/// Where the shapes lie.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/node-in-a-box/shapes");

/// The bus numbers of the first and each further NUMA node's own root bus: QEMU's `pxb-pcie` is told.
const NUMA_BUSES: [u8; 4] = [0x20, 0x50, 0x80, 0xb0];

/// The slot of the root bus in which the first port sits; those below hold the machine's own devices.
const FIRST_SLOT: u8 = 0x10;

/// A node's hardware.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Shape {
    /// Its name: that of its file.
    #[serde(skip)]
    pub name: String,
    /// Memory of the virtual machine, all NUMA nodes together.
    pub memory: Size,
    /// Processors.
    pub cpus: u8,
    /// The kernel that it runs.
    #[serde(default)]
    pub kernel: Kernel,
    /// Whether there is an IOMMU.
    #[serde(default = "yes")]
    pub iommu: bool,
    /// How many NUMA nodes there are; with one, the machine does not speak of NUMA at all.
    #[serde(default = "one")]
    pub numa_nodes: u8,
    /// PCI Express root ports.
    pub ports: Vec<Port>,
}

/// A node's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kernel {
    /// Debian's, with modules and without iommufd.
    #[default]
    Debian,
    /// The one of `hack/node-kernel-iommufd`, without modules.
    Iommufd,
}

/// A root port: either a device's functions or a PCI Express switch is behind it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Port {
    /// The NUMA node that it belongs to; for a machine with several.
    pub numa_node: Option<u8>,
    /// The device's functions, from number 0.
    #[serde(default)]
    pub functions: Vec<Named>,
    /// The switch's downstream ports.
    #[serde(default)]
    pub switch: Vec<Slot>,
}

/// A downstream port of a switch.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Slot {
    /// The device's functions, from number 0.
    pub functions: Vec<Named>,
}

/// An emulated function with its name.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Named {
    /// What tests, the journal and the control socket call it.
    pub name: String,
    /// What it is.
    pub function: Function,
}

fn yes() -> bool {
    true
}

fn one() -> u8 {
    1
}

/// Where a function is: what must be true of its folder in sysfs whatever numbers the firmware gives to buses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The number of the root bus.
    pub root: u8,
    /// `device.function` at each step down from the root bus, the function itself last.
    pub steps: Vec<String>,
}

/// A function, its place, and what the machine must say of it.
#[derive(Clone, Debug)]
pub struct Placed<'a> {
    /// The function.
    pub named: &'a Named,
    /// Where it is.
    pub place: Place,
    /// The NUMA node that the kernel reports: -1 where the machine does not speak of NUMA.
    pub numa: i32,
    /// Which device it belongs to: functions with an equal number share a slot, and so an IOMMU group.
    pub slot: usize,
}

impl Shape {
    /// Reads the shape called `name`.
    ///
    /// # Errors
    /// When there is none, or its file is wrong; says which shapes there are.
    pub fn named(name: &str) -> Result<Self> {
        let names = Self::names()?;
        if !names.iter().any(|known| known == name) {
            bail!(
                "there is no shape {name:?}; there are: {}",
                names.join(", ")
            );
        }
        Self::read(&Path::new(FOLDER).join(format!("{name}.yaml")))
    }

    /// The names of all shapes, sorted.
    ///
    /// # Errors
    /// When their folder cannot be listed.
    pub fn names() -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(FOLDER).with_context(|| format!("list {FOLDER}"))? {
            let path = entry?.path();
            let name = path.file_stem().context("a file has a name")?;
            names.push(name.to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Reads a shape from a file.
    ///
    /// # Errors
    /// When the file cannot be read, or describes no machine.
    pub fn read(path: &Path) -> Result<Self> {
        let what = || format!("shape {}", path.display());
        let text = fs::read_to_string(path).with_context(what)?;
        let mut shape: Self = serde_saphyr::from_str(&text).with_context(what)?;
        let name = path.file_stem().context("a file has a name")?;
        shape.name = name.to_string_lossy().into_owned();
        shape.check().with_context(what)?;
        Ok(shape)
    }

    fn check(&self) -> Result<()> {
        ensure!(self.cpus >= 1, "it has no processor");
        let nodes = usize::from(self.numa_nodes);
        ensure!(
            (1..=NUMA_BUSES.len()).contains(&nodes),
            "{nodes} NUMA nodes; 1 to {} are possible",
            NUMA_BUSES.len()
        );
        ensure!(
            self.numa_nodes <= self.cpus,
            "each NUMA node needs a processor"
        );
        ensure!(self.ports.len() <= 14, "more than 14 ports do not fit");
        for (number, port) in self.ports.iter().enumerate() {
            ensure!(
                port.functions.is_empty() != port.switch.is_empty(),
                "port {number} must have either functions or a switch"
            );
            match port.numa_node {
                None => ensure!(nodes == 1, "port {number} must name its NUMA node"),
                Some(node) => ensure!(
                    nodes > 1 && node < self.numa_nodes,
                    "port {number} names NUMA node {node}, which does not exist"
                ),
            }
            for functions in slots(port) {
                ensure!(
                    (1..=8).contains(&functions.len()),
                    "port {number}: a device has 1 to 8 functions"
                );
            }
        }
        // The emulator's own checks: names, sizes, vectors.
        let settings = serde_saphyr::to_string(&self.settings(Path::new("/")))?;
        km_gpu_emulator::settings::parse(&settings)?;
        Ok(())
    }

    /// The number of the root bus that a port sits on, and its slot there.
    pub fn root(&self, port: usize) -> (u8, u8) {
        let slot = u8::try_from(port).unwrap_or(u8::MAX);
        match self.ports[port].numa_node {
            None => (0, FIRST_SLOT + slot),
            Some(node) => (NUMA_BUSES[usize::from(node)], slot),
        }
    }

    /// The bus number of each NUMA node; none when the machine does not speak of NUMA.
    pub fn numa_buses(&self) -> &'static [u8] {
        match self.numa_nodes {
            1 => &[],
            nodes => &NUMA_BUSES[..usize::from(nodes)],
        }
    }

    /// Every emulated function, in the order of the file.
    pub fn placed(&self) -> Vec<Placed<'_>> {
        let mut all = Vec::new();
        let mut slot = 0;
        for (number, port) in self.ports.iter().enumerate() {
            let (root, device) = self.root(number);
            for (downstream, functions) in slots(port).into_iter().enumerate() {
                for (index, named) in functions.iter().enumerate() {
                    let mut steps = vec![format!("{device:02x}.0")];
                    if !port.switch.is_empty() {
                        steps.extend(["00.0".to_owned(), format!("{downstream:02x}.0")]);
                    }
                    steps.push(format!("00.{index}"));
                    all.push(Placed {
                        named,
                        place: Place { root, steps },
                        numa: port.numa_node.map_or(-1, i32::from),
                        slot,
                    });
                }
                slot += 1;
            }
        }
        all
    }

    /// The emulator's settings, with its sockets in `folder`.
    pub fn settings(&self, folder: &Path) -> Settings {
        let device = |placed: Placed<'_>| Device {
            name: placed.named.name.clone(),
            socket: socket(folder, &placed.named.name),
            function: placed.named.function.clone(),
        };
        Settings {
            control: Some(folder.join("control.sock")),
            devices: self.placed().into_iter().map(device).collect(),
        }
    }
}

/// Where a function's vfio-user socket lies.
pub fn socket(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.sock"))
}

/// The devices behind a port, each as its functions.
pub fn slots(port: &Port) -> Vec<&[Named]> {
    if port.switch.is_empty() {
        return vec![&port.functions];
    }
    port.switch
        .iter()
        .map(|slot| slot.functions.as_slice())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_in_the_folder_is_a_machine() {
        let names = Shape::names().unwrap();
        for name in [
            "one-gpu",
            "two-models",
            "eight-gpus",
            "shared-group",
            "no-iommu",
        ] {
            assert!(names.iter().any(|known| known == name), "{name}");
        }
        for name in names {
            Shape::named(&name).unwrap();
        }
    }

    #[test]
    fn functions_are_placed_below_their_ports() {
        let shape = Shape::named("eight-gpus").unwrap();
        let placed = shape.placed();
        assert_eq!(placed.len(), 12);
        let gpu5 = placed.iter().find(|p| p.named.name == "gpu5").unwrap();
        assert_eq!((gpu5.place.root, gpu5.numa), (0x50, 1));
        assert_eq!(gpu5.place.steps, ["02.0", "00.0", "01.0", "00.0"]);
        let shape = Shape::named("shared-group").unwrap();
        let slots: Vec<usize> = shape.placed().iter().map(|placed| placed.slot).collect();
        assert_eq!(slots, [0, 0, 1]);
    }

    #[test]
    fn a_wrong_shape_says_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let good = fs::read_to_string(Path::new(FOLDER).join("eight-gpus.yaml")).unwrap();
        for (from, to, says) in [
            ("numaNode: 1", "numaNode: 2", "does not exist"),
            ("numaNodes: 2", "numaNodes: 1", "does not exist"),
            ("cpus: 2", "cpus: 1", "needs a processor"),
            ("cpus: 2", "cpus: 2\ngpus: 8", "gpus"),
            ("name: gpu0", "name: gpu1", "already"),
        ] {
            let path = folder.path().join("wrong.yaml");
            fs::write(&path, good.replacen(from, to, 1)).unwrap();
            let error = format!("{:#}", Shape::read(&path).unwrap_err());
            assert!(error.contains(says), "{to}: {error}");
        }
        assert!(Shape::named("two-gpus").is_err());
    }
}
