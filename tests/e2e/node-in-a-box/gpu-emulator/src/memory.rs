//! The memory behind a BAR: zero until written, kept in pages, and bounded however large the BAR is.

use std::collections::BTreeMap;

const PAGE: u64 = 4096;

/// Pages that one BAR keeps at most: 16 MiB.
pub const MAX_PAGES: usize = 4096;

/// The memory behind one BAR.
#[derive(Debug, Default)]
pub struct Memory {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Memory {
    /// Reads bytes; those never written are zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in places(offset).zip(data) {
            let (page, within) = split(at);
            *byte = self.pages.get(&page).map_or(0, |bytes| bytes[within]);
        }
    }

    /// Writes bytes. What would need more than [`MAX_PAGES`] is dropped; says whether all was kept.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let mut kept = true;
        for (at, byte) in places(offset).zip(data) {
            let (page, within) = split(at);
            if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&page) {
                kept = false;
                continue;
            }
            let bytes = self
                .pages
                .entry(page)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            bytes[within] = *byte;
        }
        kept
    }

    /// Makes all of it zero.
    pub fn clear(&mut self) {
        self.pages.clear();
    }
}

/// The offsets from `offset` on; past the last one they wrap, as no BAR reaches that far.
fn places(offset: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |step| offset.wrapping_add(step))
}

fn split(offset: u64) -> (u64, usize) {
    // The remainder of a page is below 4096, so no bit is lost.
    (offset / PAGE, (offset % PAGE) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_across_pages() {
        let mut memory = Memory::default();
        assert!(memory.write(PAGE - 2, &[1, 2, 3, 4]));
        let mut data = [9; 6];
        memory.read(PAGE - 3, &mut data);
        assert_eq!(data, [0, 1, 2, 3, 4, 0]);
        memory.clear();
        memory.read(PAGE - 3, &mut data);
        assert_eq!(data, [0; 6]);
    }

    #[test]
    fn memory_is_bounded() {
        let mut memory = Memory::default();
        for page in 0..MAX_PAGES as u64 {
            assert!(memory.write(page * PAGE, &[1]));
        }
        assert!(!memory.write(MAX_PAGES as u64 * PAGE, &[1]));
        assert!(memory.write(5, &[7]), "a page that is there stays writable");
        assert!(!memory.write(u64::MAX, &[1, 2]));
    }
}
