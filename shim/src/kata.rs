//! Which Kata the inner shim is.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which of Kata's two runtimes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flavor {
    /// `src/runtime`, in Go.
    Go,
    /// `src/runtime-rs`, in Rust.
    Rust,
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

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Version, String> {
        let parse = || {
            let mut parts = text.trim().trim_start_matches('v').split(['.', '-', '+']);
            let major = parts.next()?.parse().ok()?;
            let minor = parts.next()?.parse().ok()?;
            Some(Version { major, minor })
        };
        parse().ok_or_else(|| format!("{text:?} is no version of Kata: write it as 4.1 or 4.1.0"))
    }
}

impl TryFrom<String> for Version {
    type Error = String;

    fn try_from(text: String) -> Result<Version, String> {
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

impl Kata {
    /// Whether it asks the kubelet which devices a pod has, and attaches them before the guest starts: from 3.24 in Go, and in the
    /// first runtime-rs whose GPU configurations are shipped, 4.0.
    pub fn cold_plugs(self) -> bool {
        let first = match self.flavor {
            Flavor::Go => (3, 24),
            Flavor::Rust => (4, 0),
        };
        (self.version.major, self.version.minor) >= first
    }
}
