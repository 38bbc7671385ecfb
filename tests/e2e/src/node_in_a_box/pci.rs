//! The node's PCI functions as its kernel's sysfs tells them, and whether that is what the shape says.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::shape::{Place, Placed, Shape};

/// Prints a line for each function: folder, vendor, device, class, NUMA node, IOMMU group, driver, resources.
/// Format: the kernel's Documentation/ABI/testing/sysfs-bus-pci.
const LIST: &str = r#"
cd /sys/bus/pci/devices || exit
for name in *; do
  cd "$name" || continue
  folder=$(pwd -P) group=- driver=-
  [ -e iommu_group ] && { group=$(readlink iommu_group); group=${group##*/}; }
  [ -e driver ] && { driver=$(readlink driver); driver=${driver##*/}; }
  read -r vendor <vendor; read -r device <device; read -r class <class; read -r numa <numa_node
  resources=
  n=0
  while read -r start end flags && [ "$((n += 1))" -le 6 ]; do resources="$resources $start-$end"; done <resource
  echo "$folder $vendor $device $class $numa $group $driver$resources"
  cd ..
  cd /sys/bus/pci/devices
done
"#;

/// A PCI function of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Domain, bus, device and function: `0000:01:00.0`.
    pub address: String,
    /// Where it is.
    pub place: Place,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// NUMA node; -1 where the machine does not speak of NUMA.
    pub numa: i32,
    /// IOMMU group.
    pub group: Option<String>,
    /// Driver.
    pub driver: Option<String>,
    /// Bytes of each of the six BARs; 0 for one that is not there, or was given no addresses.
    pub bars: [u64; 6],
}

/// The command that lists functions: its output is for [`parse`].
pub fn command() -> [&'static str; 3] {
    ["/usr/bin/bash", "-c", LIST]
}

/// Reads the list.
///
/// # Errors
/// When a line is not of its form.
pub fn parse(text: &str) -> Result<Vec<Function>> {
    text.lines()
        .map(|line| function(line).with_context(|| format!("in the list of functions: {line}")))
        .collect()
}

fn function(line: &str) -> Result<Function> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    ensure!(fields.len() == 13, "{} fields", fields.len());
    let hex = |text: &str| -> Result<u64> {
        let digits = text.strip_prefix("0x").context("no hexadecimal number")?;
        Ok(u64::from_str_radix(digits, 16)?)
    };
    let some = |text: &str| (text != "-").then(|| text.to_owned());
    let mut bars = [0; 6];
    for (bar, range) in bars.iter_mut().zip(&fields[7..]) {
        let (start, end) = range.split_once('-').context("no range")?;
        let (start, end) = (hex(start)?, hex(end)?);
        // The kernel writes zeros for what is not there.
        *bar = if end > start { end - start + 1 } else { 0 };
    }
    let (place, address) = place(fields[0])?;
    Ok(Function {
        address,
        place,
        vendor: u16::try_from(hex(fields[1])?)?,
        device: u16::try_from(hex(fields[2])?)?,
        class: u32::try_from(hex(fields[3])?)?,
        numa: fields[4].parse()?,
        group: some(fields[5]),
        driver: some(fields[6]),
        bars,
    })
}

/// Takes `/sys/devices/pci0000:00/0000:00:10.0/0000:01:00.0` apart.
fn place(folder: &str) -> Result<(Place, String)> {
    let path = folder
        .strip_prefix("/sys/devices/pci0000:")
        .context("not below a PCI root")?;
    let mut parts = path.split('/');
    let root = u8::from_str_radix(parts.next().unwrap_or_default(), 16)?;
    let addresses: Vec<&str> = parts.collect();
    let last = addresses.last().context("a root has functions below it")?;
    let steps = addresses
        .iter()
        .map(|address| address.rsplit(':').next().unwrap_or_default().to_owned());
    let place = Place {
        root,
        steps: steps.collect(),
    };
    Ok((place, (*last).to_owned()))
}

/// Finds the function of the node that is where an emulated one was put.
///
/// # Errors
/// When there is none.
pub fn at<'a>(functions: &'a [Function], place: &Place) -> Result<&'a Function> {
    functions
        .iter()
        .find(|function| function.place == *place)
        .with_context(|| format!("the node has no function at {place:?}"))
}

/// Holds the node's NVIDIA functions against its shape: all of them and no others, each with the shape's IDs, class, BAR sizes and
/// NUMA node, and IOMMU groups that those in one slot share, and no others.
///
/// # Errors
/// When anything differs.
pub fn check(functions: &[Function], shape: &Shape) -> Result<()> {
    let placed = shape.placed();
    let nvidia = functions
        .iter()
        .filter(|function| function.vendor == km_gpu_emulator::model::NVIDIA)
        .count();
    ensure!(
        nvidia == placed.len(),
        "the node has {nvidia} NVIDIA functions, the shape {}",
        placed.len()
    );
    let mut groups: BTreeMap<&str, usize> = BTreeMap::new();
    for wanted in &placed {
        let name = &wanted.named.name;
        let found = at(functions, &wanted.place).with_context(|| name.clone())?;
        same(found, wanted).with_context(|| format!("{name}: the node has {found:?}"))?;
        ensure!(
            found.group.is_some() == shape.iommu,
            "{name}: IOMMU group {:?}",
            found.group
        );
        if let Some(group) = &found.group {
            let slot = *groups.entry(group).or_insert(wanted.slot);
            ensure!(
                slot == wanted.slot,
                "{name} shares group {group} with another slot"
            );
        }
    }
    if shape.iommu {
        let slots = placed
            .iter()
            .map(|placed| placed.slot + 1)
            .max()
            .unwrap_or(0);
        ensure!(
            groups.len() == slots,
            "{} groups for {slots} slots",
            groups.len()
        );
    }
    Ok(())
}

fn same(found: &Function, wanted: &Placed<'_>) -> Result<()> {
    let facts = wanted.named.function.facts();
    ensure!(
        found.device == facts.device,
        "device ID {:#x} is wanted",
        facts.device
    );
    ensure!(
        found.class == facts.class,
        "class {:#x} is wanted",
        facts.class
    );
    ensure!(
        found.numa == wanted.numa,
        "NUMA node {} is wanted",
        wanted.numa
    );
    let mut bars = [0; 6];
    for bar in wanted.named.function.bars() {
        bars[usize::from(bar.index)] = bar.size;
    }
    ensure!(found.bars == bars, "BARs of {bars:#x?} bytes are wanted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "/sys/devices/pci0000:00/0000:00:10.0/0000:01:00.0 0x10de 0x2331 0x030200 -1 4 vfio-pci \
        0x0000386000000000-0x0000386000ffffff 0x0000000000000000-0x0000000000000000 0x0000384000000000-0x000038403fffffff \
        0x0-0x0 0x0-0x0 0x0-0x0";

    #[test]
    fn a_line_is_a_function() {
        let function = &parse(LINE).unwrap()[0];
        assert_eq!(function.address, "0000:01:00.0");
        assert_eq!(
            (function.place.root, function.place.steps.join(" ")),
            (0, "10.0 00.0".to_owned())
        );
        assert_eq!(
            (function.device, function.class, function.numa),
            (0x2331, 0x03_0200, -1)
        );
        assert_eq!(function.bars, [16 << 20, 0, 1 << 30, 0, 0, 0]);
        assert_eq!(function.driver.as_deref(), Some("vfio-pci"));
        assert!(parse("nonsense").is_err());
    }
}
