//! A function's place on the PCI bus. Text in, text out.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of a PCI function: `domain:bus:device.function`, as sysfs writes it.
///
/// Domains have 32 bits: those of Intel VMD begin at 0x10000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    /// The PCI segment.
    pub domain: u32,
    /// The bus number.
    pub bus: u8,
    /// The device number, below 32.
    pub device: u8,
    /// The function number, below 8.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no PCI address: write it as 0000:41:00.0 or 41:00.0")]
pub struct AddressError(String);

impl Address {
    /// Whether both are functions of one device.
    pub fn same_slot(&self, other: &Address) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }

    /// The address without a domain of zero, for people.
    pub fn short(&self) -> String {
        let Address {
            domain,
            bus,
            device,
            function,
        } = self;
        if *domain == 0 {
            format!("{bus:02x}:{device:02x}.{function}")
        } else {
            self.to_string()
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        parse(text).ok_or_else(|| AddressError(text.chars().take(40).collect()))
    }
}

fn parse(text: &str) -> Option<Address> {
    let mut parts = text.rsplitn(3, ':');
    let (slot, bus) = (parts.next()?, parts.next()?);
    let (device, function) = slot.split_once('.')?;
    let domain = match parts.next() {
        Some(domain) => hex(domain, 4..=8)?,
        None => 0,
    };
    let device = u8::try_from(hex(device, 2..=2)?).ok()?;
    let function = u8::try_from(hex(function, 1..=1)?).ok()?;
    (device < 32 && function < 8).then_some(Address {
        domain,
        bus: u8::try_from(hex(bus, 2..=2)?).ok()?,
        device,
        function,
    })
}

/// Hexadecimal digits and nothing else: `from_str_radix` alone would take a sign.
fn hex(digits: &str, length: std::ops::RangeInclusive<usize>) -> Option<u32> {
    (length.contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .then(|| u32::from_str_radix(digits, 16).ok())?
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Address, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_read_as_people_and_sysfs_write_them() {
        let address: Address = "0000:41:1f.7".parse().unwrap();
        assert_eq!(address.to_string(), "0000:41:1f.7");
        assert_eq!("41:1f.7".parse(), Ok(address));
        assert_eq!(address.short(), "41:1f.7");
        let vmd: Address = "10000:e1:00.0".parse().unwrap();
        assert_eq!(vmd.short(), "10000:e1:00.0");
        for wrong in [
            "",
            "41:00",
            "41:00.8",
            "41:20.0",
            "+1:00.0",
            "0000:0041:00.0",
            "../0000:41:00.0",
            "000:41:00.0",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(text in "\\PC*") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
            }
        }

        #[test]
        fn addresses_come_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = Address { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
        }
    }
}
