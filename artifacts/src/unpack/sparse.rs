//! Sparse files in tar archives: which bytes are there, in the four ways in which GNU tar says so (GNU tar manual, "Storing
//! Sparse Files"): its own header of old, and PAX records of the versions 0.0, 0.1 and 1.0.
//!
//! A map is taken as it is or refused: it must ascend, end within the file, and name as many bytes as the archive has. It
//! must not judge how large a file may be.

use std::io::{self, Read};

use super::header::BLOCK;

/// The most parts of one file. GNU tar makes one for each piece of data between two holes.
const PARTS_MAX: usize = 1 << 16;

/// A number of GNU tar's header of old, after which comes its map (GNU tar manual, "Basic Tar Format", `oldgnu_header`).
const OLD_MAP: usize = 386;
const OLD_EXTENDED: usize = 482;
const OLD_SIZE: usize = 483;
/// Where a block that continues the map says whether there is another (`sparse_header`).
const NEXT_EXTENDED: usize = 504;
/// Bytes of a number there.
const FIELD: usize = 12;

/// Where the bytes of a sparse file belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sparse {
    /// Bytes of the whole file, holes included.
    pub(super) size: u64,
    /// Where each part begins, and its length; ascending and apart.
    pub(super) parts: Vec<(u64, u64)>,
}

/// Why it is no map.
#[derive(Debug)]
pub(super) enum SparseError {
    Io(io::Error),
    Malformed(&'static str),
}

impl From<io::Error> for SparseError {
    fn from(error: io::Error) -> SparseError {
        SparseError::Io(error)
    }
}

type Result<T, E = SparseError> = std::result::Result<T, E>;

fn malformed<T>(what: &'static str) -> Result<T> {
    Err(SparseError::Malformed(what))
}

impl Sparse {
    /// `numbers` are offsets and lengths in turns, `archived` is how many bytes the archive has of the file.
    fn new(size: u64, numbers: &[u64], archived: u64) -> Result<Sparse> {
        let (pairs, []) = numbers.as_chunks::<2>() else {
            return malformed("the map of a sparse file ends early");
        };
        let (mut end, mut data, mut parts) = (0, 0_u64, Vec::new());
        for &[offset, length] in pairs {
            let next = offset.checked_add(length);
            let Some(next) = next.filter(|next| offset >= end && *next <= size) else {
                return malformed("the map of a sparse file does not fit the file");
            };
            (end, data) = (next, data + length);
            // The last one says with no bytes where the file ends.
            if length > 0 {
                parts.push((offset, length));
            }
        }
        if data != archived {
            return malformed("the map of a sparse file has other bytes than the archive");
        }
        Ok(Sparse { size, parts })
    }

    /// GNU tar's own way of old. `size` is the header's; more of the map may follow the header.
    pub(super) fn old(
        block: &[u8; BLOCK],
        size: fn(&[u8]) -> Option<u64>,
        archived: u64,
        input: &mut impl Read,
    ) -> Result<Sparse> {
        let number = |field: &[u8]| {
            size(field).ok_or(SparseError::Malformed(
                "a number in the map of a sparse file",
            ))
        };
        let whole = number(&block[OLD_SIZE..OLD_SIZE + FIELD])?;
        let mut numbers = Vec::new();
        let mut add = |fields: &[u8]| {
            for pair in fields.chunks_exact(2 * FIELD) {
                let (offset, length) = pair.split_at(FIELD);
                if length[0] == 0 {
                    break;
                }
                numbers.extend([number(offset)?, number(length)?]);
            }
            match numbers.len() > 2 * PARTS_MAX {
                true => malformed("a sparse file of too many parts"),
                false => Ok(()),
            }
        };
        add(&block[OLD_MAP..OLD_EXTENDED])?;
        let mut more = block[OLD_EXTENDED] == 1;
        while more {
            let mut block = [0; BLOCK];
            input.read_exact(&mut block)?;
            add(&block[..NEXT_EXTENDED])?;
            more = block[NEXT_EXTENDED] == 1;
        }
        Sparse::new(whole, &numbers, archived)
    }
}

/// What PAX records say of a sparse file.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    major: u64,
    minor: u64,
    numbers: Vec<u64>,
    any: bool,
}

impl Records {
    /// Whether there were any.
    pub(super) fn any(&self) -> bool {
        self.any
    }

    /// Takes the record `GNU.sparse.<key>`.
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        self.any = true;
        let number = || decimal(value).ok_or("a number in the map of a sparse file");
        match key {
            b"name" => self.name = Some(value.to_owned()),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"major" => self.major = number()?,
            b"minor" => self.minor = number()?,
            // The map is counted as it is read.
            b"numblocks" => {}
            b"offset" if self.numbers.len().is_multiple_of(2) => self.numbers.push(number()?),
            b"numbytes" if !self.numbers.len().is_multiple_of(2) => self.numbers.push(number()?),
            b"map" => {
                let parts = value.split(|byte| *byte == b',').map(decimal);
                let numbers: Option<Vec<_>> = parts.collect();
                self.numbers = numbers.ok_or("a number in the map of a sparse file")?;
            }
            _ => return Err("a record of a sparse file that is not known"),
        }
        Ok(())
    }

    /// The map, and how many bytes follow it. Since 1.0 the map is the first of the `archived` bytes.
    pub(super) fn finish(self, archived: u64, input: &mut impl Read) -> Result<(Sparse, u64)> {
        let Some(size) = self.size else {
            return malformed("a sparse file without its size");
        };
        let (numbers, archived) = match (self.major, self.minor) {
            (0, 0 | 1) => (self.numbers, archived),
            (1, 0) => read_map(archived, input)?,
            _ => return malformed("a version of sparse files that is not known"),
        };
        if numbers.len() > 2 * PARTS_MAX {
            return malformed("a sparse file of too many parts");
        }
        Ok((Sparse::new(size, &numbers, archived)?, archived))
    }
}

/// How many parts, and their offsets and lengths, each number on a line, in whole blocks. Gives the bytes that are left.
fn read_map(mut archived: u64, input: &mut impl Read) -> Result<(Vec<u64>, u64)> {
    let mut numbers = Vec::new();
    let mut wanted = None;
    let mut line = Vec::new();
    loop {
        let mut block = [0; BLOCK];
        let Some(left) = archived.checked_sub(BLOCK as u64) else {
            return malformed("the map of a sparse file ends early");
        };
        input.read_exact(&mut block)?;
        archived = left;
        for byte in block {
            if wanted == Some(numbers.len()) {
                break;
            }
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let Some(number) = decimal(&line) else {
                return malformed("a number in the map of a sparse file");
            };
            line.clear();
            match wanted {
                Some(_) => numbers.push(number),
                None if number <= PARTS_MAX as u64 => wanted = Some(2 * number as usize),
                None => return malformed("a sparse file of too many parts"),
            }
        }
        if wanted == Some(numbers.len()) {
            return Ok((numbers, archived));
        }
        // No number has so many digits.
        if line.len() > BLOCK {
            return malformed("a number in the map of a sparse file");
        }
    }
}

/// Digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(text).ok()?;
    let all = digits.bytes().all(|byte| byte.is_ascii_digit());
    all.then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_map_ascends_ends_in_the_file_and_has_the_archive_s_bytes() {
        let parts = |numbers: &[u64]| Sparse::new(100, numbers, 30).map(|sparse| sparse.parts);
        assert_eq!(parts(&[0, 10, 50, 20]).unwrap(), [(0, 10), (50, 20)]);
        assert_eq!(parts(&[0, 30, 100, 0]).unwrap(), [(0, 30)]);
        for wrong in [
            &[0, 10, 50][..],
            &[50, 20, 0, 10],
            &[0, 20, 19, 10],
            &[0, 10, 90, 20],
            &[u64::MAX, 30],
            &[0, 29],
        ] {
            parts(wrong).unwrap_err();
        }
        assert!(Sparse::new(100, &[], 0).unwrap().parts.is_empty());
    }

    #[test]
    fn a_map_before_the_content_is_bounded_by_it() {
        let map = |text: &str, archived| {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
            read_map(archived, &mut &bytes[..])
        };
        assert_eq!(map("1\n0\n7\n", 519).unwrap(), (vec![0, 7], 7));
        assert_eq!(map("0\n", 512).unwrap(), (vec![], 0));
        for wrong in [
            "1\n0\n",
            "x\n",
            "-1\n",
            "\n",
            "70000\n",
            "1\n0\n99999999999999999999\n",
        ] {
            map(wrong, 1024).unwrap_err();
        }
        map("1\n0\n7\n", 511).unwrap_err();
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048), archived in 0..4096_u64) {
            let _ = read_map(archived, &mut &bytes[..]);
            if let Some(block) = bytes.first_chunk() {
                let _ = Sparse::old(block, decimal, archived, &mut &bytes[BLOCK..]);
            }
        }
    }
}
