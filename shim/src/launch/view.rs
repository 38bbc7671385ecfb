//! What a command line makes: devices with their buses, ports, expanders, iommufd objects and NUMA nodes. Data in, data out.

use std::collections::{BTreeMap, BTreeSet};

use km_vfio::Address;

use super::argv::{Argv, Keyed};

/// The most devices that are looked at. Kata's guests have tens.
const DEVICES: usize = 4096;

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Where its value stands among the arguments.
    pub at: usize,
    /// Its driver.
    pub driver: String,
    /// Its id.
    pub id: Option<String>,
    /// The bus that it is put on.
    pub bus: Option<String>,
    /// Everything that is said of it.
    pub keyed: Keyed,
}

/// Everything that concerns devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Devices in order.
    pub devices: Vec<Device>,
    /// `iommufd` objects: id, and where the value stands.
    pub iommufd: Vec<(String, usize)>,
    /// For each NUMA node of the guest that is bound: the host's nodes.
    pub nodes: BTreeMap<u16, BTreeSet<u16>>,
    /// Options that can change or hide devices, and values that cannot be read.
    pub unclear: Vec<String>,
}

/// What a device hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `pcie-root-port` and its kin.
    RootPort,
    /// A switch's upstream port.
    Upstream,
    /// A switch's downstream port.
    Downstream,
    /// `pxb-pcie`.
    Expander,
    /// A conventional bridge.
    Bridge,
    /// A device of the host.
    Vfio,
    /// Anything else.
    Other,
}

impl Device {
    /// What it hands out.
    pub fn role(&self) -> Role {
        match self.driver.as_str() {
            "pcie-root-port" | "ioh3420" => Role::RootPort,
            "x3130-upstream" => Role::Upstream,
            "xio3130-downstream" => Role::Downstream,
            "pxb-pcie" => Role::Expander,
            "pci-bridge" | "pcie-pci-bridge" | "i82801b11-bridge" | "pxb" => Role::Bridge,
            // vfio-pci, vfio-pci-nohotplug and variants.
            driver if driver.starts_with("vfio-") => Role::Vfio,
            _ => Role::Other,
        }
    }

    /// The host's function, by `host` or by `sysfsdev`.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn host(&self) -> Result<Address, String> {
        let name = self.name();
        for key in ["host", "sysfsdev", "fd"] {
            if self.keyed.doubled(key) {
                return Err(format!("{name} has {key} twice"));
            }
        }
        let named = match (self.keyed.get("host"), self.keyed.get("sysfsdev")) {
            (Some(host), None) => host,
            (None, Some(path)) => path
                .trim_end_matches('/')
                .rsplit('/')
                .next()
                .unwrap_or(path),
            (Some(_), Some(_)) => {
                return Err(format!("{name} names its function by host and sysfsdev"));
            }
            (None, None) => return Err(format!("{name} names no function of the host")),
        };
        named
            .to_ascii_lowercase()
            .parse()
            .map_err(|error| format!("{name}: {error}"))
    }

    /// What to call it in a message.
    pub fn name(&self) -> String {
        let shown = self.id.as_deref().or(self.keyed.get("host"));
        let shown: String = shown
            .unwrap_or("?")
            .chars()
            .filter(|char| !char.is_control())
            .take(64)
            .collect();
        format!(
            "{} {shown}",
            self.driver.chars().take(40).collect::<String>()
        )
    }

    /// Slot and function on its bus, `None` where it does not say. QEMU takes `slot[.function]`, both hexadecimal
    /// (hw/core/qdev-properties-system.c).
    ///
    /// # Errors
    /// An address that is none.
    pub fn slot(&self) -> Result<Option<(u8, u8)>, String> {
        let Some(text) = self.keyed.get("addr") else {
            return Ok(None);
        };
        let wrong = || {
            format!(
                "{} has the address {text:?}, which is none on a bus",
                self.name()
            )
        };
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let hex = |part: &str| {
            let digits = part.strip_prefix("0x").or(part.strip_prefix("0X"));
            u8::from_str_radix(digits.unwrap_or(part), 16).ok()
        };
        match (hex(slot), hex(function)) {
            (Some(slot), Some(function)) if slot < 32 && function < 8 => Ok(Some((slot, function))),
            _ => Err(wrong()),
        }
    }
}

impl View {
    /// Looks at a command line.
    pub fn of(argv: &Argv) -> View {
        let mut view = View::default();
        view.devices(argv);
        let backends = view.objects(argv);
        view.numa(argv, &backends);
        view.hidden(argv);
        view
    }

    /// The device with an id; ids are names of buses, too.
    pub fn by_id(&self, id: &str) -> Option<&Device> {
        let mut found = self.devices.iter();
        found.find(|device| device.id.as_deref() == Some(id))
    }

    /// Devices of the host.
    pub fn vfio(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(|d| d.role() == Role::Vfio)
    }

    fn devices(&mut self, argv: &Argv) {
        for (at, value) in argv.values("device") {
            if self.devices.len() >= DEVICES {
                self.unclear
                    .push(format!("there are more than {DEVICES} devices"));
                return;
            }
            let keyed = match value {
                Some(value) => Keyed::parse(value, "driver"),
                None => Err("it is no UTF-8".to_owned()),
            };
            match keyed {
                Ok(keyed) => {
                    let text = |key: &str| keyed.get(key).map(str::to_owned);
                    let device = Device {
                        at,
                        driver: text("driver").unwrap_or_default(),
                        id: text("id"),
                        bus: text("bus"),
                        keyed,
                    };
                    self.devices.push(device);
                }
                Err(why) => self.unclear.push(format!(
                    "-device number {} cannot be read: {why}",
                    self.devices.len() + 1
                )),
            }
        }
    }

    /// Notes iommufd objects, and gives the host's nodes of memory backends by id.
    fn objects(&mut self, argv: &Argv) -> BTreeMap<String, BTreeSet<u16>> {
        let mut backends = BTreeMap::new();
        for (at, value) in argv.values("object") {
            let keyed = match value.map(|value| Keyed::parse(value, "qom-type")) {
                Some(Ok(keyed)) => keyed,
                Some(Err(why)) => {
                    self.unclear
                        .push(format!("an -object cannot be read: {why}"));
                    continue;
                }
                None => {
                    self.unclear.push("an -object is no UTF-8".to_owned());
                    continue;
                }
            };
            let Some(id) = keyed.get("id") else { continue };
            match keyed.get("qom-type") {
                Some("iommufd") => self.iommufd.push((id.to_owned(), at)),
                Some(kind) if kind.starts_with("memory-backend-") => {
                    let nodes = keyed.get("host-nodes").map(node_list);
                    backends.extend(nodes.map(|nodes| (id.to_owned(), nodes)));
                }
                _ => {}
            }
        }
        backends
    }

    fn numa(&mut self, argv: &Argv, backends: &BTreeMap<String, BTreeSet<u16>>) {
        let mut next = 0_u16;
        for (_, value) in argv.values("numa") {
            let Some(Ok(keyed)) = value.map(|value| Keyed::parse(value, "type")) else {
                self.unclear.push("a -numa cannot be read".to_owned());
                continue;
            };
            if keyed.get("type") != Some("node") {
                continue;
            }
            let node = keyed.get("nodeid").and_then(|id| id.parse().ok());
            let node = node.unwrap_or(next);
            next = node.saturating_add(1);
            let hosts = keyed.get("memdev").and_then(|id| backends.get(id));
            self.nodes.insert(node, hosts.cloned().unwrap_or_default());
        }
    }

    /// Options by which a device can be other than its arguments say.
    fn hidden(&mut self, argv: &Argv) {
        for option in &argv.options {
            let value = option.value.and_then(|at| argv.words.get(at));
            let value = value.map(|value| value.to_string_lossy());
            let value = value.as_deref().unwrap_or_default();
            let vfio = |text: &str| {
                text.contains("vfio") || text.contains("pcie-root-port") || text.contains("pxb")
            };
            let hides = match option.name.as_str() {
                "readconfig" => true,
                "set" => value.starts_with("device."),
                "global" => vfio(value),
                _ => false,
            };
            if hides {
                let shown: String = value.chars().filter(|c| !c.is_control()).take(80).collect();
                self.unclear.push(format!(
                    "-{} {shown:?} changes devices behind their arguments",
                    option.name
                ));
            }
        }
    }
}

/// `0-2,5` and JSON's `[0,1]`, as far as they are numbers.
fn node_list(text: &str) -> BTreeSet<u16> {
    let mut nodes = BTreeSet::new();
    for part in text.trim_matches(['[', ']']).split([',', ':']) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
            nodes.extend((first..=last).take(1024));
        }
    }
    nodes
}
