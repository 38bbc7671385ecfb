//! Names of PCI devices: the system's `pci.ids`, and a few of NVIDIA's for hosts without one. Text in, names out.

use std::collections::{BTreeMap, BTreeSet};

use crate::sysfs::printable;

/// Where distributions keep `pci.ids`, first choice first: Debian and its kin, Fedora and its kin, others.
pub(crate) const PLACES: &[&str] = &[
    "/usr/share/misc/pci.ids",
    "/usr/share/hwdata/pci.ids",
    "/usr/share/pci.ids",
];

/// The most of `pci.ids` that is read, in bytes. The file of 2026 has 1.6 MiB.
pub(crate) const LIMIT: usize = 8 << 20;

/// The longest name that is kept, in characters.
const NAME: usize = 120;

/// A vendor and a device.
pub type Id = (u16, u16);

/// Names found for the wanted vendors and devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    vendors: BTreeMap<u16, String>,
    devices: BTreeMap<Id, String>,
}

/// NVIDIA's data-centre devices, as `pci.ids` calls them (<https://pci-ids.ucw.cz/read/PC/10de>), for hosts without the file
/// or with one that is older than the device.
const KNOWN: &[(u16, &str)] = &[
    (0x1af1, "GA100 [A100 NVSwitch]"),
    (0x1eb8, "TU104GL [Tesla T4]"),
    (0x20b0, "GA100 [A100 SXM4 40GB]"),
    (0x20b2, "GA100 [A100 SXM4 80GB]"),
    (0x20b5, "GA100 [A100 PCIe 80GB]"),
    (0x20b7, "GA100GL [A30 PCIe]"),
    (0x20f1, "GA100 [A100 PCIe 40GB]"),
    (0x2235, "GA102GL [A40]"),
    (0x2236, "GA102GL [A10]"),
    (0x22a3, "GH100 [H100 NVSwitch]"),
    (0x2321, "GH100 [H100L 94GB]"),
    (0x2322, "GH100 [H800 PCIe]"),
    (0x2324, "GH100 [H800]"),
    (0x2329, "GH100 [H20]"),
    (0x2330, "GH100 [H100 SXM5 80GB]"),
    (0x2331, "GH100 [H100 PCIe]"),
    (0x2335, "GH100 [H200 SXM 141GB]"),
    (0x233b, "GH100 [H200 NVL]"),
    (0x2342, "GH100 [GH200 120GB / 480GB]"),
    (0x2348, "GH100 [GH200 144G HBM3e]"),
    (0x26b5, "AD102GL [L40]"),
    (0x26b9, "AD102GL [L40S]"),
    (0x27b8, "AD104GL [L4]"),
    (0x2901, "GB100 [B200]"),
    (0x2941, "GB100 [HGX GB200]"),
];

impl Names {
    /// Reads the names of the wanted devices, and their vendors', from the text of a `pci.ids` file (its format is told at its
    /// top). Lines that make no sense are passed over.
    pub fn parse(text: &[u8], wanted: &BTreeSet<Id>) -> Names {
        let mut names = Names::default();
        let mut vendor = None;
        let mut start = 0;
        while start < text.len() {
            let end = memchr::memchr(b'\n', &text[start..]).map_or(text.len(), |at| start + at);
            let line = &text[start..end];
            start = end + 1;
            match line.first() {
                Some(b'\t') => {
                    if let Some(vendor) = vendor {
                        names.device(vendor, &line[1..], wanted);
                    }
                }
                // Vendors are over where the list of classes begins ("C 00  Unclassified device").
                Some(b'C') => break,
                Some(b'#') | None => {}
                Some(_) => vendor = names.vendor(line, wanted),
            }
        }
        names
    }

    fn vendor(&mut self, line: &[u8], wanted: &BTreeSet<Id>) -> Option<u16> {
        let (vendor, name) = entry(line)?;
        wanted.range((vendor, 0)..=(vendor, u16::MAX)).next()?;
        self.vendors.entry(vendor).or_insert_with(|| shown(name));
        Some(vendor)
    }

    fn device(&mut self, vendor: u16, line: &[u8], wanted: &BTreeSet<Id>) {
        if let Some((device, name)) = entry(line)
            && wanted.contains(&(vendor, device))
        {
            self.devices
                .entry((vendor, device))
                .or_insert_with(|| shown(name));
        }
    }

    /// A device's name, such as `GH100 [H100 PCIe]`.
    pub fn name(&self, id: Id) -> Option<&str> {
        let known = || {
            let found = KNOWN.binary_search_by_key(&id.1, |known| known.0).ok()?;
            (id.0 == crate::NVIDIA).then_some(KNOWN[found].1)
        };
        self.devices.get(&id).map(String::as_str).or_else(known)
    }

    /// A vendor's name.
    pub fn vendor_name(&self, vendor: u16) -> Option<&str> {
        let known = || (vendor == crate::NVIDIA).then_some("NVIDIA Corporation");
        self.vendors.get(&vendor).map(String::as_str).or_else(known)
    }
}

/// Four hexadecimal digits, white space, a name.
fn entry(line: &[u8]) -> Option<(u16, &[u8])> {
    let (digits, rest) = line.split_at_checked(4)?;
    let name = rest.trim_ascii();
    if !digits.iter().all(u8::is_ascii_hexdigit) || name.is_empty() || !rest.starts_with(b" ") {
        return None;
    }
    let id = u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    Some((id, name))
}

fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(&name[..name.len().min(4 * NAME)]);
    printable(&text).chars().take(NAME).collect()
}

/// What people call a device: the part in brackets of its name where there is one (`GH100 [H100 PCIe]` is an H100 PCIe).
pub fn model(name: &str) -> &str {
    let bracketed = || {
        let (_, rest) = name.split_once('[')?;
        let (inside, _) = rest.rsplit_once(']')?;
        let inside = inside.trim();
        (!inside.is_empty()).then_some(inside)
    };
    bracketed().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "# a comment\n\
        10b5  PLX Technology, Inc.\n\
        \t8747  PEX 8747 48-Lane Switch\n\
        10de  NVIDIA Corporation\n\
        \t2330  GH100[H100 SXM5 80GB]\n\
        \t\t10de 16c0  a subsystem, whose name is not the device's\n\
        \t2331  GH100 [H100 PCIe]\n\
        C 03  Display controller\n\
        \t2331  not a device\n";

    #[test]
    fn names_are_those_of_the_file_then_those_known() {
        let wanted = [(0x10de, 0x2331), (0x10de, 0x22a3), (0x10b5, 0x8747)];
        let names = Names::parse(FILE.as_bytes(), &BTreeSet::from(wanted));
        assert_eq!(names.name((0x10de, 0x2331)), Some("GH100 [H100 PCIe]"));
        assert_eq!(names.name((0x10de, 0x22a3)), Some("GH100 [H100 NVSwitch]"));
        assert_eq!(
            names.name((0x10b5, 0x8747)),
            Some("PEX 8747 48-Lane Switch")
        );
        assert_eq!(names.name((0x8086, 0x22a3)), None);
        assert_eq!(names.vendor_name(0x10b5), Some("PLX Technology, Inc."));
        assert_eq!(names.devices.len(), 2);
    }

    #[test]
    fn the_known_names_are_sorted() {
        assert!(KNOWN.is_sorted_by_key(|known| known.0));
    }

    #[test]
    fn models_are_what_stands_in_brackets() {
        assert_eq!(model("GH100 [H100 PCIe]"), "H100 PCIe");
        assert_eq!(model("GH100[H100 SXM5 80GB]"), "H100 SXM5 80GB");
        assert_eq!(model("GH100"), "GH100");
        assert_eq!(model("x []"), "x []");
        assert_eq!(model("] a ["), "] a [");
    }

    #[test]
    fn hostile_names_are_cut_and_made_printable() {
        let mut file = b"10de  NVIDIA\n\t2331  \x1b[2J\xff\n\t2330  ".to_vec();
        file.extend(std::iter::repeat_n(b'x', 100_000));
        let wanted = BTreeSet::from([(0x10de, 0x2331), (0x10de, 0x2330)]);
        let names = Names::parse(&file, &wanted);
        assert_eq!(names.name((0x10de, 0x2331)), Some("\u{fffd}[2J\u{fffd}"));
        assert_eq!(names.name((0x10de, 0x2330)).unwrap().len(), NAME);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(text: Vec<u8>, lines in proptest::collection::vec("(\t|\t\t)?[0-9a-f]{3,5} {0,3}.{0,9}\n", 0..20)) {
            let wanted = BTreeSet::from([(0x10de, 0x2331)]);
            Names::parse(&text, &wanted);
            Names::parse(lines.concat().as_bytes(), &wanted);
        }
    }
}
