//! The 4 KiB of PCI configuration space of one function: what reads as what, and which bits a write can change. Pure.
//!
//! Layout: PCI Local Bus Specification 3.0 section 6.1 (header), PCI Express Base Specification 5.0 sections 7.5.2 (power
//! management), 7.5.3 (PCI Express) and 7.7.2 (MSI-X). Offsets and bits are those of Linux's `pci_regs.h`.

use crate::model::NVIDIA;
use crate::registers::{MSIX_PENDING, MSIX_TABLE};
use crate::settings::Function;

/// Bytes of configuration space that a PCI Express function has.
pub const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;

/// Memory space, bus master, parity, SERR, and interrupt disable.
const COMMAND_WRITABLE: [u8; 2] = [0x46, 0x05];
const BUS_MASTER: u8 = 0x04;
/// Status: there is a list of capabilities.
const HAS_CAPABILITIES: u8 = 0x10;
const BAR_64BIT_PREFETCHABLE: u8 = 0x0c;

const POWER: usize = 0x60;
const EXPRESS: usize = 0x78;
const MSIX: usize = 0xc8;

/// The byte of device control (offset 8) that holds bit 15, "initiate function level reset".
const FLR_BYTE: usize = EXPRESS + 9;
const FLR_BIT: u8 = 0x80;

/// A link of 32 GT/s (code 5) and 16 lanes.
const LINK: u16 = 5 | 16 << 4;

/// What a write asks of the function beyond the bits that it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    None,
    /// A function level reset.
    FunctionLevelReset,
}

/// An access outside the space.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("configuration space has {SIZE} bytes; {length} at {offset:#x} are not in it")]
pub struct OutOfBounds {
    offset: u64,
    length: usize,
}

/// The configuration space of one function.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
    flr: bool,
}

impl ConfigSpace {
    /// The space as it is after power-on and after each reset.
    pub fn new(function: &Function) -> Self {
        let mut space = Self {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            flr: function.function_level_reset,
        };
        space.header(function);
        space.power_management();
        space.express(function.vectors() > 0);
        if function.vectors() > 0 {
            space.msix(function.vectors());
        }
        space
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// When some of them lie outside the space.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        let at = within(offset, data.len())?;
        data.copy_from_slice(&self.bytes[at..at + data.len()]);
        Ok(())
    }

    /// Writes the bits that can be written, and says what else the write asks for.
    ///
    /// # Errors
    /// When some of the bytes lie outside the space; nothing is written then.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<Effect, OutOfBounds> {
        let at = within(offset, data.len())?;
        let mut effect = Effect::None;
        for (place, value) in (at..).zip(data) {
            let mask = self.writable[place];
            self.bytes[place] = self.bytes[place] & !mask | value & mask;
            if self.flr && place == FLR_BYTE && value & FLR_BIT != 0 {
                effect = Effect::FunctionLevelReset;
            }
        }
        Ok(effect)
    }

    /// Whether the function may start transfers of its own.
    pub fn bus_master(&self) -> bool {
        self.bytes[COMMAND] & BUS_MASTER != 0
    }

    fn header(&mut self, function: &Function) {
        let facts = function.facts();
        self.fixed(0, &NVIDIA.to_le_bytes());
        self.fixed(2, &facts.device.to_le_bytes());
        self.allow(COMMAND, &COMMAND_WRITABLE);
        self.fixed(STATUS, &[HAS_CAPABILITIES]);
        let [interface, subclass, class, _] = facts.class.to_le_bytes();
        self.fixed(REVISION, &[0xa1, interface, subclass, class]);
        self.fixed(SUBSYSTEM, &NVIDIA.to_le_bytes());
        self.fixed(SUBSYSTEM + 2, &facts.subsystem.to_le_bytes());
        self.fixed(CAPABILITIES, &[low_byte(POWER)]);
        for bar in function.bars() {
            let at = BARS + 4 * usize::from(bar.index);
            let mask = (!(bar.size - 1)).to_le_bytes();
            if bar.wide {
                self.fixed(at, &[BAR_64BIT_PREFETCHABLE]);
                self.allow(at, &mask);
            } else {
                self.allow(at, &mask[..4]);
            }
        }
    }

    /// Power management version 3; the state survives a switch from D3hot to D0.
    fn power_management(&mut self) {
        self.fixed(POWER, &[0x01, low_byte(EXPRESS), 0x03, 0, 0x08]);
        self.allow(POWER + 4, &[0x03]);
    }

    /// A PCI Express endpoint, capability version 2.
    fn express(&mut self, more: bool) {
        let next = if more { low_byte(MSIX) } else { 0 };
        self.fixed(EXPRESS, &[0x10, next, 0x02, 0]);
        // 256-byte payloads, 8-bit tags, role-based error reporting.
        let capabilities = 0x8021 | u32::from(self.flr) << 28;
        self.fixed(EXPRESS + 0x04, &capabilities.to_le_bytes());
        // Relaxed ordering, no snoop, 512-byte read requests; bit 15 reads as zero.
        self.fixed(EXPRESS + 0x08, &[0x10, 0x29]);
        self.allow(EXPRESS + 0x08, &[0xff, 0x7f]);
        self.fixed(EXPRESS + 0x0c, &LINK.to_le_bytes());
        self.allow(EXPRESS + 0x10, &[0xc3, 0x0f]);
        self.fixed(EXPRESS + 0x12, &LINK.to_le_bytes());
        // Supported speeds: 2.5 to 32 GT/s.
        self.fixed(EXPRESS + 0x2c, &[0x3e]);
    }

    /// MSI-X with its table and its pending bits in BAR 0.
    fn msix(&mut self, vectors: u16) {
        self.fixed(MSIX, &[0x11, 0]);
        self.fixed(MSIX + 2, &(vectors - 1).to_le_bytes());
        self.allow(MSIX + 2, &[0, 0xc0]);
        self.fixed(MSIX + 4, &MSIX_TABLE.to_le_bytes());
        self.fixed(MSIX + 8, &MSIX_PENDING.to_le_bytes());
    }

    fn fixed(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

/// A capability's offset, which the first 256 bytes hold.
const fn low_byte(offset: usize) -> u8 {
    assert!(offset < 256);
    offset as u8
}

fn within(offset: u64, length: usize) -> Result<usize, OutOfBounds> {
    let outside = OutOfBounds { offset, length };
    match usize::try_from(offset) {
        Ok(at) if at.checked_add(length).is_some_and(|end| end <= SIZE) => Ok(at),
        _ => Err(outside),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::Model;
    use crate::settings::{MAX_VECTORS, Size};

    fn functions() -> impl Strategy<Value = Function> {
        let model = (0..Model::ALL.len()).prop_map(|index| Model::ALL[index]);
        (model, 24_u32..38, 0..=MAX_VECTORS, any::<bool>()).prop_map(
            |(model, shift, vectors, flr)| {
                let mut function = Function::new(model);
                function.function_level_reset = flr;
                if model != Model::Audio {
                    function.msix_vectors = Some(vectors);
                    let indices = function.facts().bars.iter().map(|bar| bar.index);
                    function.bars = indices.map(|index| (index, Size(1 << shift))).collect();
                }
                function
            },
        )
    }

    fn number(space: &ConfigSpace, at: usize, length: usize) -> u64 {
        let mut bytes = [0; 8];
        space
            .read(u64::try_from(at).unwrap(), &mut bytes[..length])
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Capability IDs with their offsets, found as an operating system finds them.
    fn capabilities(space: &ConfigSpace) -> BTreeMap<u64, usize> {
        let mut found = BTreeMap::new();
        let mut at = usize::try_from(number(space, CAPABILITIES, 1)).unwrap();
        while at != 0 {
            assert!(at >= 0x40 && at.is_multiple_of(4), "capability at {at:#x}");
            let twice = found.insert(number(space, at, 1), at);
            assert_eq!(twice, None, "the chain names a capability once");
            at = usize::try_from(number(space, at + 1, 1)).unwrap();
        }
        found
    }

    proptest! {
        #[test]
        fn the_capability_chain_is_valid(function in functions()) {
            function.check("it").unwrap();
            let found = capabilities(&ConfigSpace::new(&function));
            prop_assert!(found.contains_key(&0x01) && found.contains_key(&0x10));
            prop_assert_eq!(found.contains_key(&0x11), function.vectors() > 0);
        }

        #[test]
        fn a_bar_tells_its_size_and_keeps_its_kind(function in functions()) {
            let mut space = ConfigSpace::new(&function);
            for bar in function.bars() {
                let at = BARS + 4 * usize::from(bar.index);
                let length = if bar.wide { 8 } else { 4 };
                let kind = number(&space, at, 1) & 0xf;
                prop_assert_eq!(kind, if bar.wide { 0xc } else { 0 });
                space.write(u64::try_from(at).unwrap(), &[0xff; 8][..length]).unwrap();
                let mask = number(&space, at, length) & !0xf;
                let ones = if bar.wide { u64::MAX } else { u64::from(u32::MAX) };
                prop_assert_eq!((mask ^ ones) + 1, bar.size);
            }
        }

        #[test]
        fn the_msix_table_lies_in_bar_0_and_ends_before_its_pending_bits(function in functions()) {
            let space = ConfigSpace::new(&function);
            if let Some(&at) = capabilities(&space).get(&0x11) {
                let vectors = (number(&space, at + 2, 2) & 0x7ff) + 1;
                let (table, pending) = (number(&space, at + 4, 4), number(&space, at + 8, 4));
                prop_assert_eq!((table & 7, pending & 7), (0, 0), "both in BAR 0");
                prop_assert_eq!(vectors, u64::from(function.vectors()));
                prop_assert!(table + 16 * vectors <= pending);
                prop_assert!(pending + vectors.div_ceil(64) * 8 <= function.bars()[0].size);
            }
        }

        #[test]
        fn no_write_changes_what_the_function_is(
            function in functions(),
            writes in prop::collection::vec((0_u64..5000, prop::collection::vec(any::<u8>(), 0..16)), 0..200),
        ) {
            let mut space = ConfigSpace::new(&function);
            let before = capabilities(&space);
            for (offset, data) in writes {
                let result = space.write(offset, &data);
                prop_assert_eq!(result.is_ok(), offset + data.len() as u64 <= SIZE as u64);
            }
            prop_assert_eq!(number(&space, 0, 2), 0x10de);
            prop_assert_eq!(number(&space, 2, 2), u64::from(function.facts().device));
            prop_assert_eq!(number(&space, 9, 3), u64::from(function.facts().class));
            prop_assert_eq!(capabilities(&space), before);
        }
    }

    #[test]
    fn function_level_reset_is_asked_for_where_it_is_offered() {
        let mut function = Function::new(Model::H100Pcie);
        let control = u64::try_from(EXPRESS + 8).unwrap();
        let mut space = ConfigSpace::new(&function);
        assert_eq!(number(&space, EXPRESS + 4, 4) >> 28 & 1, 1);
        assert_eq!(
            space.write(control, &[0x10, 0xa9]),
            Ok(Effect::FunctionLevelReset)
        );
        assert_eq!(space.write(control, &[0x10, 0x29]), Ok(Effect::None));
        function.function_level_reset = false;
        let mut space = ConfigSpace::new(&function);
        assert_eq!(number(&space, EXPRESS + 4, 4) >> 28 & 1, 0);
        assert_eq!(space.write(control, &[0x10, 0xa9]), Ok(Effect::None));
    }

    #[test]
    fn an_access_past_the_end_is_refused() {
        let mut space = ConfigSpace::new(&Function::new(Model::B200));
        for offset in [4093, 4096, u64::MAX] {
            assert!(space.read(offset, &mut [0; 4]).is_err());
            assert!(space.write(offset, &[0; 4]).is_err());
        }
    }
}
