//! The memory of the virtual machine as the device sees it: the ranges that the IOMMU lets through, each a piece of a file.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Errno for an address that the IOMMU does not let through.
pub const EFAULT: u32 = 14;
/// Errno for a transfer in a direction that the mapping does not allow.
pub const EACCES: u32 = 13;
/// Errno where the kernel named none.
const EIO: u32 = 5;

/// Ranges that are kept at most; Linux's own limit for one VFIO container is 65535.
pub const MAX_RANGES: usize = 65_536;

/// One range that the device may reach.
#[derive(Debug)]
pub struct Range {
    /// First address, as the device names it.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// Where the range starts in `file`.
    pub offset: u64,
    /// Whether the device may read it.
    pub readable: bool,
    /// Whether the device may write it.
    pub writable: bool,
    /// The memory. None where the virtual machine's memory is not shared.
    pub file: Option<File>,
}

/// All that the device may reach.
#[derive(Debug, Default)]
pub struct Dma {
    ranges: Vec<Range>,
}

impl Dma {
    /// Lets the device reach a range. Says whether there was room for it and its end is an address.
    pub fn map(&mut self, range: Range) -> bool {
        let fits = self.ranges.len() < MAX_RANGES
            && range.address.checked_add(range.size).is_some()
            && range.offset.checked_add(range.size).is_some();
        if fits {
            self.ranges.push(range);
        }
        fits
    }

    /// Takes back all ranges that lie within these addresses.
    pub fn unmap(&mut self, address: u64, size: u64) {
        let end = address.saturating_add(size);
        self.ranges
            .retain(|range| range.address < address || range.address + range.size > end);
    }

    /// Takes back everything.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether the device can reach nothing.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Reads from the virtual machine's memory.
    ///
    /// # Errors
    /// An errno, when an address is not mapped or not readable; some of the data may have been read then.
    pub fn read(&self, mut address: u64, data: &mut [u8]) -> Result<(), u32> {
        let mut rest = data;
        while !rest.is_empty() {
            let (range, file, at, length) = self.find(address, rest.len())?;
            if !range.readable {
                return Err(EACCES);
            }
            let (now, later) = rest.split_at_mut(length);
            file.read_exact_at(now, at).map_err(|e| errno(&e))?;
            rest = later;
            address += length as u64;
        }
        Ok(())
    }

    /// Writes to the virtual machine's memory.
    ///
    /// # Errors
    /// An errno, when an address is not mapped or not writable; some of the data may have been written then.
    pub fn write(&self, mut address: u64, data: &[u8]) -> Result<(), u32> {
        let mut rest = data;
        while !rest.is_empty() {
            let (range, file, at, length) = self.find(address, rest.len())?;
            if !range.writable {
                return Err(EACCES);
            }
            let (now, later) = rest.split_at(length);
            file.write_all_at(now, at).map_err(|e| errno(&e))?;
            rest = later;
            address += length as u64;
        }
        Ok(())
    }

    /// The range that holds an address, its file, the place in the file, and how much of `length` the range holds.
    fn find(&self, address: u64, length: usize) -> Result<(&Range, &File, u64, usize), u32> {
        let holds = |range: &&Range| {
            address >= range.address && address - range.address < range.size && range.file.is_some()
        };
        let range = self.ranges.iter().find(holds).ok_or(EFAULT)?;
        let file = range.file.as_ref().ok_or(EFAULT)?;
        let inside = address - range.address;
        let left = usize::try_from(range.size - inside).unwrap_or(usize::MAX);
        Ok((range, file, range.offset + inside, left.min(length)))
    }
}

fn errno(error: &std::io::Error) -> u32 {
    error
        .raw_os_error()
        .and_then(|code| u32::try_from(code).ok())
        .unwrap_or(EIO)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn range(address: u64, bytes: &[u8], writable: bool) -> Range {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"..").unwrap();
        file.write_all(bytes).unwrap();
        Range {
            address,
            size: bytes.len() as u64,
            offset: 2,
            readable: true,
            writable,
            file: Some(file),
        }
    }

    #[test]
    fn transfers_cross_ranges_and_stop_at_what_is_not_mapped() {
        let mut dma = Dma::default();
        assert!(dma.map(range(100, b"abc", true)));
        assert!(dma.map(range(103, b"def", true)));
        let mut data = [0; 4];
        assert_eq!(dma.read(101, &mut data), Ok(()));
        assert_eq!(&data, b"bcde");
        assert_eq!(dma.write(102, b"XY"), Ok(()));
        assert_eq!(dma.read(101, &mut data), Ok(()));
        assert_eq!(&data, b"bXYe");
        assert_eq!(dma.read(104, &mut data), Err(EFAULT));
        dma.unmap(100, 3);
        assert_eq!(dma.read(101, &mut data), Err(EFAULT));
        assert_eq!(dma.len(), 1);
    }

    #[test]
    fn a_range_is_read_only_when_it_was_mapped_so() {
        let mut dma = Dma::default();
        assert!(dma.map(range(0, b"abc", false)));
        assert_eq!(dma.write(0, b"x"), Err(EACCES));
    }

    #[test]
    fn a_range_past_the_last_address_is_refused() {
        let mut dma = Dma::default();
        assert!(!dma.map(range(u64::MAX - 1, b"abc", true)));
        assert!(dma.is_empty());
    }
}
