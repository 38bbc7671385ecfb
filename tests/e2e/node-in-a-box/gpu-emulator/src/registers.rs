//! What lies behind BAR 0: register blocks, each a [`RegisterModel`] of its own, tried in order; the rest is plain memory.
//!
//! Two blocks are here: the register that names the chip, and a test bench by which a program in the virtual machine can make
//! the device read and write memory and raise interrupts. A model of a GPU's confidential-computing registers is a third
//! block: implement the trait, and add it in [`blocks`].

use crate::journal::ResetKind;
use crate::settings::Function;

/// Where the MSI-X table lies in BAR 0. QEMU serves the table itself; the device only says where it is.
pub const MSIX_TABLE: u32 = 0x00b9_0000;
/// Where the MSI-X pending bits lie in BAR 0.
pub const MSIX_PENDING: u32 = 0x00ba_0000;

/// What a register can make the device do outside itself.
pub trait Bus {
    /// Reads the virtual machine's memory.
    ///
    /// # Errors
    /// An errno.
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), u32>;
    /// Writes the virtual machine's memory.
    ///
    /// # Errors
    /// An errno.
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), u32>;
    /// Raises an MSI-X vector.
    fn interrupt(&mut self, vector: u32);
}

/// A block of 32-bit registers.
///
/// Offsets are those in BAR 0, and multiples of four. An implementation must take any value at any offset.
pub trait RegisterModel: Send {
    /// What a register reads as; none when it is not of this block.
    fn read(&mut self, offset: u64) -> Option<u32>;
    /// Writes a register; says whether it is of this block.
    fn write(&mut self, offset: u64, value: u32, bus: &mut dyn Bus) -> bool;
    /// The function was reset.
    fn reset(&mut self, kind: ResetKind);
}

/// The register blocks of a function, in the order in which they are asked.
pub fn blocks(function: &Function) -> Vec<Box<dyn RegisterModel>> {
    match function.facts().boot0 {
        None => Vec::new(),
        Some(value) => vec![Box::new(Identity { value }), Box::<Bench>::default()],
    }
}

/// The register at offset 0 that names the chip, its revision and its stepping.
#[derive(Debug)]
struct Identity {
    value: u32,
}

impl RegisterModel for Identity {
    fn read(&mut self, offset: u64) -> Option<u32> {
        (offset == 0).then_some(self.value)
    }

    fn write(&mut self, offset: u64, _: u32, _: &mut dyn Bus) -> bool {
        offset == 0
    }

    fn reset(&mut self, _: ResetKind) {}
}

/// Registers of the test bench, by their offset in BAR 0. They are no registers of any real GPU.
pub mod bench {
    /// The first register.
    pub const START: u64 = 0x00fe_0000;
    /// Reads as [`MAGIC`].
    pub const IDENTITY: u64 = START;
    /// Resets of any kind since the virtual machine connected. Read only.
    pub const RESETS: u64 = START + 0x04;
    /// Address of the next transfer, low half.
    pub const ADDRESS_LOW: u64 = START + 0x08;
    /// Address of the next transfer, high half.
    pub const ADDRESS_HIGH: u64 = START + 0x0c;
    /// Bytes of the next transfer, at most [`MAX_LENGTH`].
    pub const LENGTH: u64 = START + 0x10;
    /// Starts a transfer: [`FILL`] or [`SUM`]. It has ended when the write is done.
    pub const COMMAND: u64 = START + 0x14;
    /// 0, or the errno with which the last transfer failed. Read only.
    pub const STATUS: u64 = START + 0x18;
    /// Sum of the bytes that the last transfer read. Read only.
    pub const CHECKSUM: u64 = START + 0x1c;
    /// Raises the MSI-X vector that is written.
    pub const DOORBELL: u64 = START + 0x20;
    /// The first offset after the bench.
    pub const END: u64 = START + 0x24;

    /// What the bench is recognised by.
    pub const MAGIC: u32 = 0x4b4d_4742;
    /// Command: write the byte [`PATTERN`] to memory.
    pub const FILL: u32 = 1;
    /// Command: read memory and add its bytes up.
    pub const SUM: u32 = 2;
    /// What a fill writes.
    pub const PATTERN: u8 = 0x5a;
    /// Bytes that one transfer has at most.
    pub const MAX_LENGTH: u32 = 1 << 20;
    /// Status of a transfer with a wrong command or length: EINVAL.
    pub const INVALID: u32 = 22;

    /// Whether a register is the bench's.
    pub fn holds(offset: u64) -> bool {
        (START..END).contains(&offset)
    }
}

/// The test bench.
#[derive(Debug, Default)]
struct Bench {
    resets: u32,
    address: u64,
    length: u32,
    status: u32,
    checksum: u32,
}

impl Bench {
    fn transfer(&mut self, command: u32, bus: &mut dyn Bus) {
        self.checksum = 0;
        if self.length > bench::MAX_LENGTH {
            self.status = bench::INVALID;
            return;
        }
        let mut data = vec![bench::PATTERN; self.length as usize];
        let result = match command {
            bench::FILL => bus.write(self.address, &data),
            bench::SUM => bus.read(self.address, &mut data).map(|()| {
                self.checksum = data
                    .iter()
                    .fold(0, |sum, b| sum.wrapping_add(u32::from(*b)));
            }),
            _ => Err(bench::INVALID),
        };
        self.status = result.err().unwrap_or(0);
    }
}

impl RegisterModel for Bench {
    fn read(&mut self, offset: u64) -> Option<u32> {
        if !bench::holds(offset) {
            return None;
        }
        Some(match offset {
            bench::IDENTITY => bench::MAGIC,
            bench::RESETS => self.resets,
            bench::ADDRESS_LOW => self.address as u32,
            bench::ADDRESS_HIGH => (self.address >> 32) as u32,
            bench::LENGTH => self.length,
            bench::STATUS => self.status,
            bench::CHECKSUM => self.checksum,
            _ => 0,
        })
    }

    fn write(&mut self, offset: u64, value: u32, bus: &mut dyn Bus) -> bool {
        const LOW: u64 = 0xffff_ffff;
        match offset {
            bench::ADDRESS_LOW => self.address = self.address & !LOW | u64::from(value),
            bench::ADDRESS_HIGH => self.address = self.address & LOW | u64::from(value) << 32,
            bench::LENGTH => self.length = value,
            bench::COMMAND => self.transfer(value, bus),
            bench::DOORBELL => bus.interrupt(value),
            _ => {}
        }
        bench::holds(offset)
    }

    fn reset(&mut self, _: ResetKind) {
        *self = Self {
            resets: self.resets.wrapping_add(1),
            ..Self::default()
        };
    }
}

/// The registers that an access touches, each with the bytes of the access that lie in it: `(register, first byte in the
/// register, range of the access)`. Any offset and any length give at most `length / 4 + 2` of them.
pub fn decode(
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= length {
            return None;
        }
        let at = offset.checked_add(done as u64)?;
        let within = (at % 4) as usize;
        let take = (4 - within).min(length - done);
        let range = done..done + take;
        done += take;
        Some((at - within as u64, within, range))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Model;

    #[derive(Default)]
    struct FakeBus {
        memory: Vec<u8>,
        raised: Vec<u32>,
    }

    impl Bus for FakeBus {
        fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), u32> {
            let at = usize::try_from(address).map_err(|_| 14_u32)?;
            let end = at.checked_add(data.len()).ok_or(14_u32)?;
            data.copy_from_slice(self.memory.get(at..end).ok_or(14_u32)?);
            Ok(())
        }

        fn write(&mut self, address: u64, data: &[u8]) -> Result<(), u32> {
            let at = usize::try_from(address).map_err(|_| 14_u32)?;
            let end = at.checked_add(data.len()).ok_or(14_u32)?;
            self.memory
                .get_mut(at..end)
                .ok_or(14_u32)?
                .copy_from_slice(data);
            Ok(())
        }

        fn interrupt(&mut self, vector: u32) {
            self.raised.push(vector);
        }
    }

    fn transfer(block: &mut Bench, bus: &mut FakeBus, address: u64, length: u32, command: u32) {
        for (offset, value) in [
            (bench::ADDRESS_LOW, address as u32),
            (bench::ADDRESS_HIGH, (address >> 32) as u32),
            (bench::LENGTH, length),
            (bench::COMMAND, command),
        ] {
            assert!(block.write(offset, value, bus));
        }
    }

    #[test]
    fn the_bench_moves_data_and_tells_failures() {
        let mut block = Bench::default();
        let mut bus = FakeBus {
            memory: vec![1; 100],
            ..FakeBus::default()
        };
        transfer(&mut block, &mut bus, 10, 50, bench::SUM);
        assert_eq!(block.read(bench::CHECKSUM), Some(50));
        transfer(&mut block, &mut bus, 0, 10, bench::FILL);
        assert_eq!(&bus.memory[8..12], &[bench::PATTERN, bench::PATTERN, 1, 1]);
        assert_eq!(block.read(bench::STATUS), Some(0));
        for (address, length, command, status) in [
            (60, 50, bench::SUM, 14),
            (1 << 40, 1, bench::FILL, 14),
            (0, bench::MAX_LENGTH + 1, bench::FILL, bench::INVALID),
            (0, 1, 3, bench::INVALID),
        ] {
            transfer(&mut block, &mut bus, address, length, command);
            assert_eq!(block.read(bench::STATUS), Some(status));
        }
        assert!(block.write(bench::DOORBELL, 3, &mut bus));
        assert_eq!(bus.raised, [3]);
    }

    #[test]
    fn a_reset_clears_the_bench_and_is_counted() {
        let mut block = Bench::default();
        block.write(bench::LENGTH, 7, &mut FakeBus::default());
        block.reset(ResetKind::Bus);
        assert_eq!(block.read(bench::LENGTH), Some(0));
        assert_eq!(block.read(bench::RESETS), Some(1));
    }

    #[test]
    fn a_gpu_names_its_chip_and_its_audio_function_has_no_registers() {
        let mut of_gpu = blocks(&Function::new(Model::H100Pcie));
        assert_eq!(of_gpu[0].read(0), Some(0x1800_00a1));
        assert!(blocks(&Function::new(Model::Audio)).is_empty());
    }

    proptest! {
        #[test]
        fn decoding_covers_each_byte_once(offset: u64, length in 0_usize..64) {
            let mut next = 0;
            for (register, within, range) in decode(offset, length) {
                prop_assert!(register.is_multiple_of(4) && within < 4);
                prop_assert_eq!(range.start, next);
                prop_assert!(!range.is_empty() && within + range.len() <= 4);
                prop_assert_eq!(register + within as u64, offset + next as u64);
                next = range.end;
            }
            let all = offset.checked_add(length as u64).is_some();
            prop_assert!(next == length || !all);
        }

        #[test]
        fn no_access_makes_a_block_panic(
            accesses in prop::collection::vec((bench::START - 8..bench::END + 8, any::<u32>(), any::<bool>()), 0..100),
        ) {
            let mut block = Bench::default();
            let mut bus = FakeBus { memory: vec![0; 4096], ..FakeBus::default() };
            for (offset, value, write) in accesses {
                let offset = offset & !3;
                let inside = bench::holds(offset);
                if write {
                    prop_assert_eq!(block.write(offset, value, &mut bus), inside);
                } else {
                    prop_assert_eq!(block.read(offset).is_some(), inside);
                }
            }
        }
    }
}
