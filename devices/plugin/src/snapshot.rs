//! What the kubelet is told: the devices of each class, where they are and how they are. Plain data and questions to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use km_cdi::names::Class;
use km_vfio::{Address, Function};

/// Where a device is in the machine, as far as it matters for which devices fit together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its NUMA node; `None` where the firmware tells none.
    pub numa: Option<u16>,
    /// The PCIe switch that it is behind, by its upstream port; without a switch, its root port; without that, nothing.
    pub switch: Option<Address>,
}

impl Place {
    /// Where a function is. Below the root port comes the upstream port of a switch, where there is one.
    pub fn of(function: &Function) -> Place {
        Place {
            numa: function.numa_node,
            switch: function.path.get(1).or(function.path.first()).copied(),
        }
    }
}

/// Why a device cannot be given out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A function of it is not on the bus any more.
    Gone(Address),
    /// A function of it has another driver than VFIO's, or none.
    Driver {
        /// The function.
        function: Address,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// A function's configuration space answers all ones: it has fallen off the bus.
    Dead(Address),
    /// A function has reported errors that it does not recover from by itself (PCI Express, Advanced Error Reporting).
    Fatal {
        /// The function.
        function: Address,
        /// How many since it was last known to be good.
        errors: u64,
    },
    /// The host does not have a node of it.
    Node(String),
    /// VFIO cannot give its group away.
    Group(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Gone(function) => write!(f, "{function} is not on the bus any more"),
            Cause::Driver {
                function,
                driver: Some(driver),
            } => write!(f, "{function} has the driver {driver}, not VFIO's"),
            Cause::Driver {
                function,
                driver: None,
            } => write!(f, "{function} has no driver, so not VFIO's"),
            Cause::Dead(function) => write!(
                f,
                "{function} answers all ones: it has fallen off the bus, and needs a reset or a power cycle"
            ),
            Cause::Fatal { function, errors } => write!(
                f,
                "{function} has reported {errors} fatal PCIe errors; it counts as good again when the kernel has recovered it, or when it is unbound and bound again"
            ),
            Cause::Node(node) => write!(f, "the host has no {node}"),
            Cause::Group(reason) => f.write_str(reason),
        }
    }
}

/// A device as the kubelet is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its ID, which is also its name in CDI.
    pub id: Address,
    /// Where it is.
    pub place: Place,
    /// The nodes that give it to a virtual machine, as the host sees them.
    pub nodes: Vec<String>,
    /// Why it cannot be given out; nothing when it can.
    pub causes: Vec<Cause>,
}

impl Listed {
    /// Whether it can be given out.
    pub fn healthy(&self) -> bool {
        self.causes.is_empty()
    }
}

/// All devices at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The devices of each class, by ID.
    pub classes: BTreeMap<Class, Vec<Listed>>,
    /// The classes whose CDI specs list what this lists.
    pub cdi: BTreeSet<Class>,
    /// The classes whose devices fit together in partitions: those of GPUs, on a machine that has NVSwitches.
    pub partitioned: BTreeSet<Class>,
}

impl Snapshot {
    /// The devices of a class; none when there is no such class.
    pub fn of(&self, class: &Class) -> &[Listed] {
        self.classes.get(class).map_or(&[], Vec::as_slice)
    }

    /// The device of a class with an ID.
    pub fn device(&self, class: &Class, id: Address) -> Option<&Listed> {
        let devices = self.of(class);
        let found = devices.binary_search_by_key(&id, |device| device.id);
        found.ok().map(|at| &devices[at])
    }
}
