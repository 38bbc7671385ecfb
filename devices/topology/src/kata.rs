//! What each Kata makes of devices: facts by flavour and version. Sources are files of kata-containers 4.1.0 unless said otherwise.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most ports that the Go runtime makes (`maxPCIeRootPort`, `maxPCIeSwitchPort`: src/runtime/pkg/katautils/config.go).
pub const GO_PORTS: usize = 16;

/// The slot of the first root port of runtime-rs on `pcie.0`
/// (src/runtime-rs/crates/hypervisor/src/qemu/inner.rs has the guest's path `09+n/00`).
pub const RUST_FIRST_SLOT: u8 = 9;

/// The last slot of `pcie.0` that is free on a q35 machine: slot 31 has its LPC bridge (QEMU, hw/i386/pc_q35.c).
pub const LAST_SLOT: u8 = 30;

/// Bridges that Kata puts on `pcie.0` by itself and that take a bus number each (`default_bridges = 1` in each of its GPU
/// configurations). It is in slot 2, and slot 1 is the console's, so every port comes after it.
pub const BRIDGES: u8 = 1;

/// Bus numbers between two expanders of the Go runtime: `bus_nr` is `uint8(0x20*(node+1))` (src/runtime/virtcontainers/qemu.go).
pub const EXPANDER_BUSES: u16 = 0x20;

/// The chassis of the ports below the first expander (same place). Those of the others are not compared with anything.
pub const EXPANDER_CHASSIS: u8 = 10;

/// The bus numbers of a PCI segment (PCI Express Base Specification, section 2.2.6: 8 bits).
pub const BUSES: u16 = 256;

/// Which of Kata's two runtimes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flavor {
    /// `src/runtime`, in Go.
    Go,
    /// `src/runtime-rs`, in Rust.
    Rust,
}

impl fmt::Display for Flavor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Flavor::Go => "Go",
            Flavor::Rust => "runtime-rs",
        })
    }
}

/// A version of Kata. Patch levels and suffixes make no difference to anything here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    /// The major number.
    pub major: u16,
    /// The minor number.
    pub minor: u16,
}

impl Version {
    /// A version.
    pub const fn new(major: u16, minor: u16) -> Version {
        Version { major, minor }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A text that is no version of Kata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no version of Kata: write it as 4.1 or 4.1.0")]
pub struct VersionError(String);

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Version, VersionError> {
        let parse = || {
            let mut parts = text.trim().trim_start_matches('v').split(['.', '-', '+']);
            let major = parts.next()?.parse().ok()?;
            let minor = parts.next()?.parse().ok()?;
            Some(Version { major, minor })
        };
        parse().ok_or_else(|| VersionError(text.chars().take(40).collect()))
    }
}

impl TryFrom<String> for Version {
    type Error = VersionError;

    fn try_from(text: String) -> Result<Version, VersionError> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.to_string()
    }
}

/// A Kata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kata {
    /// Which runtime.
    pub flavor: Flavor,
    /// Which version.
    pub version: Version,
}

impl fmt::Display for Kata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kata {} ({})", self.version, self.flavor)
    }
}

impl Kata {
    /// The first version that asks kubelet which devices a pod has and puts them behind ports before the guest starts: 3.24 in Go;
    /// for runtime-rs the first release whose GPU configurations it ships, 4.0.
    pub fn first_with_cold_plug(flavor: Flavor) -> Version {
        match flavor {
            Flavor::Go => Version::new(3, 24),
            Flavor::Rust => Version::new(4, 0),
        }
    }

    /// Whether it finds and cold-plugs a pod's devices by itself.
    pub fn cold_plugs(self) -> bool {
        self.version >= Kata::first_with_cold_plug(self.flavor)
    }

    /// Whether it knows `enable_numa`, and emits an expander for each NUMA node of the guest.
    pub fn emits_numa(self) -> bool {
        self.flavor == Flavor::Go && self.version >= Version::new(4, 1)
    }

    /// Whether it emits a switch for `cold_plug_vfio = "switch-port"`. runtime-rs takes `root-port` alone
    /// (src/runtime-rs/crates/runtimes/virt_container/src/sandbox.rs).
    pub fn emits_switch(self) -> bool {
        self.flavor == Flavor::Go
    }

    /// Whether each device goes through an iommufd object whatever the class (runtime-rs), so that legacy groups do not do.
    pub fn always_iommufd(self) -> bool {
        self.flavor == Flavor::Rust
    }

    /// Why it leaves out a function of a class (24 bits), if it does: host bridges and PCI bridges always, audio in
    /// runtime-rs, and before 4.1 everything that calls itself a bridge, so NVSwitches (0680) too.
    pub fn skips(self, class: u32) -> Option<&'static str> {
        match (class >> 8, self.flavor) {
            (0x0600 | 0x0604, _) => Some("bridges stay with the host"),
            (0x0403, Flavor::Rust) => Some("runtime-rs gives no audio functions"),
            (base, _) if base >> 8 == 0x06 && self.version < Version::new(4, 1) => {
                Some("Kata before 4.1 takes it for a bridge")
            }
            _ => None,
        }
    }

    /// The most ports on `pcie.0`.
    pub fn ports(self) -> usize {
        match self.flavor {
            Flavor::Go => GO_PORTS,
            Flavor::Rust => usize::from(LAST_SLOT - RUST_FIRST_SLOT) + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_by_numbers() {
        let read = |text: &str| text.parse::<Version>();
        assert_eq!(read("4.1.0-23\n"), Ok(Version::new(4, 1)));
        assert_eq!(read("v3.24"), Ok(Version::new(3, 24)));
        assert!(read("3.9").unwrap() < read("3.24").unwrap());
        for wrong in ["", "4", "four.one", "4.", "99999999.1"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_left_out_differs_by_flavor_and_version() {
        let kata = |flavor, major, minor| Kata {
            flavor,
            version: Version::new(major, minor),
        };
        let audio = 0x04_0300;
        let nvswitch = 0x06_8000;
        assert_eq!(kata(Flavor::Go, 4, 1).skips(audio), None);
        assert!(kata(Flavor::Rust, 4, 1).skips(audio).is_some());
        assert_eq!(kata(Flavor::Go, 4, 1).skips(nvswitch), None);
        assert!(kata(Flavor::Go, 4, 0).skips(nvswitch).is_some());
        assert!(kata(Flavor::Go, 4, 1).skips(0x06_0400).is_some());
        assert_eq!(kata(Flavor::Rust, 4, 1).ports(), 22);
    }
}
