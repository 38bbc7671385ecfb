//! Bindings that come back after a reboot: a udev rule for each function (udev(7)).
//!
//! The rule sets `driver_override` when the function appears, before udev loads the module that its `modalias` names, and has the
//! VFIO module loaded. A module that is there already has been offered the function before that, so it is offered again. The rule
//! holds vendor and device number too, so it does nothing to another card in the same place.

use std::collections::BTreeMap;

use km_host::{HostPath, Root, atomic};

use crate::plan::Choice;
use crate::sysfs::Sysfs;
use crate::{Address, Function};

/// The rules. udev takes files in the order of their names, and loads modules in `80-drivers.rules`.
pub const RULES: &str = "/etc/udev/rules.d/70-kata-manager-vfio.rules";

const HEADER: &str = "# Written by \"kata-manager devices bind --persist\"; \"devices unbind\" takes lines out again.\n";

/// The most of the file that is read, in bytes.
const LIMIT: usize = 1 << 20;

/// The rule that gives a function to its VFIO driver.
pub fn rule(function: &Function, choice: &Choice) -> String {
    format!(
        "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{}\", ATTR{{vendor}}==\"0x{:04x}\", ATTR{{device}}==\"0x{:04x}\", \
         ATTR{{driver_override}}=\"{}\", RUN{{builtin}}+=\"kmod load {}\", \
         RUN{{program}}+=\"/bin/sh -c 'echo $kernel >/sys/bus/pci/drivers_probe'\"",
        function.address, function.vendor, function.device, choice.driver, choice.module
    )
}

/// The file with these rules in the place of the functions' old ones; `None` for a rule takes it out. Nothing is left of a file
/// without rules.
fn edited(before: &str, rules: &BTreeMap<Address, Option<String>>) -> Option<String> {
    let theirs = |line: &&str| {
        let about = |address: &Address| line.contains(&format!("KERNEL==\"{address}\""));
        line.starts_with("ACTION==") && !rules.keys().any(about)
    };
    let kept = before.lines().filter(theirs).map(str::to_owned);
    let mut lines: Vec<String> = kept.chain(rules.values().flatten().cloned()).collect();
    lines.sort();
    (!lines.is_empty()).then(|| format!("{HEADER}{}\n", lines.join("\n")))
}

/// Writes or takes out the rules of functions. Says whether the file has changed.
///
/// # Errors
/// When the file cannot be written or removed.
pub fn update(
    root: &Root,
    rules: &BTreeMap<Address, Option<String>>,
) -> Result<bool, km_host::Error> {
    let bytes = Sysfs::new(root).bytes(RULES, LIMIT);
    let before = bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let after = edited(before.as_deref().unwrap_or_default(), rules);
    if before == after {
        return Ok(false);
    }
    let path = root.resolve(&name()?)?;
    match &after {
        Some(text) => {
            if let Some(folder) = path.parent() {
                atomic::create_dir_all(folder, 0o755)?;
            }
            atomic::write(&path, text.as_bytes(), 0o644)?;
        }
        None => atomic::remove_file(&path)?,
    }
    Ok(true)
}

/// Removes the file with all rules, when it is one of ours. Says whether there was one.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(root: &Root) -> Result<bool, km_host::Error> {
    let bytes = Sysfs::new(root).bytes(RULES, LIMIT).unwrap_or_default();
    if !bytes.starts_with(HEADER.as_bytes()) {
        return Ok(false);
    }
    atomic::remove_file(&root.resolve(&name()?)?)?;
    Ok(true)
}

/// [`RULES`] below the host's root.
fn name() -> Result<HostPath, km_host::Error> {
    HostPath::new(RULES).map_err(|error| {
        let invalid = std::io::Error::new(std::io::ErrorKind::InvalidInput, error);
        km_host::Error::io("name", RULES)(invalid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_replaced_and_taken_out_and_the_file_goes_with_the_last() {
        let (one, two): (Address, Address) =
            ("01:00.0".parse().unwrap(), "02:00.0".parse().unwrap());
        let line = |address: Address, driver: &str| {
            format!("ACTION==\"add\", KERNEL==\"{address}\", {driver}")
        };
        let set = |address, driver| BTreeMap::from([(address, Some(line(address, driver)))]);
        let first = edited("", &set(two, "a")).unwrap();
        let both = edited(&first, &set(one, "b")).unwrap();
        assert_eq!(
            both,
            format!("{HEADER}{}\n{}\n", line(one, "b"), line(two, "a"))
        );
        assert_eq!(edited(&both, &set(one, "b")).as_deref(), Some(&*both));
        let out = edited(&both, &BTreeMap::from([(one, None)])).unwrap();
        assert_eq!(out, first);
        assert_eq!(edited(&out, &BTreeMap::from([(two, None)])), None);

        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        assert!(update(&root, &set(one, "b")).unwrap());
        assert!(!update(&root, &set(one, "b")).unwrap());
        assert!(update(&root, &BTreeMap::from([(one, None)])).unwrap());
        assert!(!dir.path().join(&RULES[1..]).exists());
        assert!(!update(&root, &BTreeMap::from([(one, None)])).unwrap());

        assert!(!remove(&root).unwrap());
        assert!(update(&root, &set(two, "a")).unwrap());
        assert!(remove(&root).unwrap() && !remove(&root).unwrap());
        // Somebody else's file by that name stays.
        std::fs::write(dir.path().join(&RULES[1..]), "# mine\n").unwrap();
        assert!(!remove(&root).unwrap());
    }
}
