//! Access Control Services of PCIe ports, out of configuration space. Bytes in, verdict out.
//!
//! Linux gives devices below a port groups of their own when the port validates sources, and redirects requests and completions
//! upstream (`REQ_ACS_FLAGS` in drivers/iommu/iommu.c of the kernel).

/// The identity of the ACS extended capability (PCI Express Base Specification, "ACS Extended Capability").
const ACS: u32 = 0x000d;

/// Where extended capabilities begin, and what configuration space of a PCIe function has, in bytes.
const BEGIN: usize = 0x100;

/// Configuration space of a PCIe function, in bytes.
pub(crate) const SPACE: usize = 4096;

/// Source validation, request redirect, completion redirect, upstream forwarding.
const NEEDED: u16 = 0x01 | 0x04 | 0x08 | 0x10;

/// What a port says of Access Control Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acs {
    /// It has them, and the kernel has switched on what it needs.
    On,
    /// It has them, and they are not on.
    Off,
    /// It has none.
    None,
}

impl Acs {
    /// The words for it.
    pub fn words(self) -> &'static str {
        match self {
            Acs::On => "ACS is on",
            Acs::Off => "has ACS, and it is off",
            Acs::None => "has no ACS",
        }
    }
}

/// Reads a port's configuration space; `None` when it is cut short, as it is for all but root, or answers nothing.
pub(crate) fn read(space: &[u8]) -> Option<Acs> {
    if space.len() < SPACE || space.starts_with(&[0xff; 4]) {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(space.get(at..at + 4)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_le_bytes(space.get(at..at + 2)?.try_into().ok()?));
    let mut at = BEGIN;
    // Capabilities are words, and a list that has more of them than fit goes in a circle.
    for _ in 0..(SPACE - BEGIN) / 4 {
        let header = word(at)?;
        if header == 0 || header == u32::MAX {
            break;
        }
        if header & 0xffff == ACS {
            let can = half(at + 4)? & NEEDED;
            let does = half(at + 6)?;
            return Some(match does & can == can && can & 0x01 != 0 {
                true => Acs::On,
                false => Acs::Off,
            });
        }
        at = (header >> 20) as usize & !3;
        if at < BEGIN {
            break;
        }
    }
    Some(Acs::None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space(parts: &[(usize, u32)]) -> Vec<u8> {
        let mut space = vec![0; SPACE];
        for (at, word) in parts {
            space[*at..*at + 4].copy_from_slice(&word.to_le_bytes());
        }
        space
    }

    #[test]
    fn capabilities_are_found_in_their_list() {
        let aer = (0x100, 0x1481_0001);
        let acs = (0x148, 0x0001_000d);
        assert_eq!(
            read(&space(&[aer, acs, (0x14c, 0x001d_001d)])),
            Some(Acs::On)
        );
        assert_eq!(
            read(&space(&[aer, acs, (0x14c, 0x0000_001d)])),
            Some(Acs::Off)
        );
        assert_eq!(read(&space(&[aer])), Some(Acs::None));
        // A list in a circle ends.
        assert_eq!(read(&space(&[(0x100, 0x1001_0001)])), Some(Acs::None));
        // What root alone may read.
        assert_eq!(read(&space(&[aer, acs])[..64]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let _ = read(&bytes);
        }
    }
}
