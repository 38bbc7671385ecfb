//! Tar entries, one header at a time: ustar, GNU long names (`L`, `K`) and PAX extended headers (pax(1), "pax Extended
//! Header"), and GNU sparse files (`sparse`). The header's fields are read with the tar crate; the walk from header to header is ours, so that no hostile
//! size is trusted and no extension is read into memory without a bound.
//!
//! It must not judge names or links; `archive` does.

use std::io::{self, Read};

use super::Refusal;
use super::sparse::{Records, Sparse, SparseError, decimal};

/// One tar block in bytes (POSIX.1-2017 pax, "ustar Interchange Format").
pub(super) const BLOCK: usize = 512;

/// The most bytes of an extended header. GNU tar and Go write far less; the bound keeps hostile ones out of memory.
const EXTENSION_MAX: u64 = 1 << 20;

/// How many extended headers may precede one entry.
const EXTENSIONS_MAX: usize = 16;

/// A sparse file with a header of GNU tar's own (GNU tar manual, "Basic Tar Format").
const OLD_SPARSE: u8 = b'S';

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    HardLink,
    Symlink,
    /// What no artifact may hold, in words with their article.
    Other(&'static str),
}

/// One entry's header with its extensions applied.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) target: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    /// Bytes of content in the archive.
    pub(super) size: u64,
    /// Where they belong, if the file has holes.
    pub(super) sparse: Option<Sparse>,
}

/// Why a header was not read.
#[derive(Debug)]
pub(super) enum HeaderError {
    /// The stream failed or ended early.
    Io(io::Error),
    /// The header is malformed; with the name as far as known.
    Refused(Vec<u8>, Refusal),
}

impl From<io::Error> for HeaderError {
    fn from(error: io::Error) -> HeaderError {
        HeaderError::Io(error)
    }
}

#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: Records,
}

impl Extensions {
    /// Whether they say something that cannot be so of all entries.
    fn is_about_one(&self) -> bool {
        self.name.is_some() || self.target.is_some() || self.size.is_some() || self.sparse.any()
    }
}

/// Reads the next entry's header. `None` is the end: a zero block, or the stream's end where a header would start.
pub(super) fn next(input: &mut impl Read) -> Result<Option<Header>, HeaderError> {
    let mut extensions = Extensions::default();
    for _ in 0..=EXTENSIONS_MAX {
        let Some(block) = read_block(input)? else {
            return Ok(None);
        };
        let raw = tar::Header::from_byte_slice(&block);
        let name = raw.path_bytes().into_owned();
        let refuse = |reason| HeaderError::Refused(name.clone(), reason);
        check_sum(&block, raw).map_err(refuse)?;
        match raw.entry_type().as_byte() {
            b'L' => extensions.name = Some(long_name(input, raw).map_err(named(&name))?),
            b'K' => extensions.target = Some(long_name(input, raw).map_err(named(&name))?),
            b'x' => pax(input, raw, &mut extensions).map_err(named(&name))?,
            b'g' => {
                // Only a comment or the like is harmless for all entries at once.
                let mut global = Extensions::default();
                pax(input, raw, &mut global).map_err(named(&name))?;
                if global.is_about_one() {
                    return Err(refuse(Refusal::Header {
                        what: "a global header sets a name or a size",
                    }));
                }
            }
            _ => return finish(input, &block, extensions).map(Some),
        }
    }
    Err(HeaderError::Refused(
        Vec::new(),
        Refusal::Header {
            what: "too many extended headers in a row",
        },
    ))
}

/// Bytes of padding after `size` bytes of content.
pub(super) fn padding(size: u64) -> usize {
    let rest = (size % BLOCK as u64) as usize;
    if rest == 0 { 0 } else { BLOCK - rest }
}

fn finish(
    input: &mut impl Read,
    block: &[u8; BLOCK],
    mut extensions: Extensions,
) -> Result<Header, HeaderError> {
    let raw = tar::Header::from_byte_slice(block);
    // The other name is for programs that do not know of holes.
    let name = extensions.sparse.name.take().or(extensions.name);
    let name = name.unwrap_or_else(|| raw.path_bytes().into_owned());
    let refuse = |reason| HeaderError::Refused(name.clone(), reason);
    let kind = kind(raw, &name);
    // What an entry is goes before what is wrong with it.
    let malformed = |field| match kind {
        Kind::Other(what) => refuse(Refusal::Kind { what }),
        _ => refuse(Refusal::Header { what: field }),
    };
    let target = match extensions.target {
        Some(target) => target,
        None => raw
            .link_name_bytes()
            .map(|bytes| bytes.into_owned())
            .unwrap_or_default(),
    };
    let size = match extensions.size {
        Some(size) => size,
        None => size(raw).ok_or_else(|| malformed("its size"))?,
    };
    if !matches!(kind, Kind::File | Kind::Other(_)) && size != 0 {
        return Err(malformed("a folder or link with content"));
    }
    let mode = raw.mode().map_err(|_| malformed("its mode"))?;
    let sparse = match raw.entry_type().as_byte() {
        OLD_SPARSE if !extensions.sparse.any() => {
            Some(Sparse::old(block, number, size, input).map(|sparse| (sparse, size)))
        }
        b'0' | 0 | b'7' if extensions.sparse.any() && kind == Kind::File => {
            Some(extensions.sparse.finish(size, input))
        }
        _ if extensions.sparse.any() => return Err(malformed("holes where no file is")),
        _ => None,
    };
    let sparse = sparse.transpose().map_err(|error| match error {
        SparseError::Io(error) => HeaderError::Io(error),
        SparseError::Malformed(what) => malformed(what),
    })?;
    let (sparse, size) = match sparse {
        Some((sparse, left)) => (Some(sparse), left),
        None => (None, size),
    };
    Ok(Header {
        name,
        target,
        kind,
        mode: mode & 0o7777,
        size,
        sparse,
    })
}

/// The size field.
fn size(raw: &tar::Header) -> Option<u64> {
    number(&raw.as_old().size)
}

/// A field of twelve bytes: octal digits, or a number in base 256 behind a byte of 0x80 (GNU tar).
fn number(field: &[u8]) -> Option<u64> {
    if field.first()? & 0x80 != 0 {
        let (high, low) = field.split_last_chunk::<8>()?;
        return (high == [0x80, 0, 0, 0]).then(|| u64::from_be_bytes(*low));
    }
    let end = field.iter().position(|byte| *byte == 0);
    let digits = std::str::from_utf8(&field[..end.unwrap_or(field.len())]).ok()?;
    u64::from_str_radix(digits.trim_matches(' '), 8).ok()
}

fn kind(raw: &tar::Header, name: &[u8]) -> Kind {
    match raw.entry_type().as_byte() {
        // Before ustar a folder was a file whose name ends with a slash.
        b'0' | 0 | b'7' if name.ends_with(b"/") => Kind::Folder,
        b'0' | 0 | b'7' | OLD_SPARSE => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'5' => Kind::Folder,
        b'3' => Kind::Other("a character device"),
        b'4' => Kind::Other("a block device"),
        b'6' => Kind::Other("a fifo"),
        _ => Kind::Other("of an unknown kind"),
    }
}

fn check_sum(block: &[u8; BLOCK], raw: &tar::Header) -> Result<(), Refusal> {
    // The checksum field itself counts as eight spaces (ustar).
    let (before, rest) = block.split_at(148);
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let want = sum(before) + 8 * 32 + sum(&rest[8..]);
    match raw.cksum() {
        Ok(got) if got == want => Ok(()),
        _ => Err(Refusal::Header {
            what: "its checksum does not match; is this a tar archive?",
        }),
    }
}

/// A block, or `None` at the stream's end or when it is all zeros.
fn read_block(input: &mut impl Read) -> io::Result<Option<[u8; BLOCK]>> {
    let mut block = [0; BLOCK];
    let mut filled = 0;
    while filled < BLOCK {
        match input.read(&mut block[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => filled += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((block != [0; BLOCK]).then_some(block))
}

enum ExtensionError {
    Io(io::Error),
    Malformed(&'static str),
}

impl From<io::Error> for ExtensionError {
    fn from(error: io::Error) -> ExtensionError {
        ExtensionError::Io(error)
    }
}

fn named(name: &[u8]) -> impl Fn(ExtensionError) -> HeaderError + '_ {
    |error| match error {
        ExtensionError::Io(error) => HeaderError::Io(error),
        ExtensionError::Malformed(what) => {
            HeaderError::Refused(name.to_owned(), Refusal::Header { what })
        }
    }
}

fn extension(input: &mut impl Read, raw: &tar::Header) -> Result<Vec<u8>, ExtensionError> {
    let size = size(raw).ok_or(ExtensionError::Malformed("the size of an extended header"))?;
    if size > EXTENSION_MAX {
        return Err(ExtensionError::Malformed("an extended header over 1 MiB"));
    }
    let mut content = vec![0; size as usize];
    input.read_exact(&mut content)?;
    let mut rest = [0; BLOCK];
    input.read_exact(&mut rest[..padding(size)])?;
    Ok(content)
}

fn long_name(input: &mut impl Read, raw: &tar::Header) -> Result<Vec<u8>, ExtensionError> {
    let mut name = extension(input, raw)?;
    // GNU tar ends it with one NUL; any other is for the name's check to refuse.
    if name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

fn pax(
    input: &mut impl Read,
    raw: &tar::Header,
    into: &mut Extensions,
) -> Result<(), ExtensionError> {
    let content = extension(input, raw)?;
    let mut rest = &content[..];
    while !rest.is_empty() {
        let (key, value, tail) =
            pax_record(rest).ok_or(ExtensionError::Malformed("a PAX record"))?;
        rest = tail;
        match key {
            b"path" => into.name = Some(value.to_owned()),
            b"linkpath" => into.target = Some(value.to_owned()),
            b"size" => {
                let size = decimal(value).ok_or(ExtensionError::Malformed("a PAX size"))?;
                into.size = Some(size);
            }
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    let taken = into.sparse.take(key, value);
                    taken.map_err(ExtensionError::Malformed)?;
                }
            }
        }
    }
    Ok(())
}

/// `<length> <key>=<value>\n`, where the length counts the whole record in bytes.
fn pax_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?;
    let (last, record) = record.split_last()?;
    if *last != b'\n' {
        return None;
    }
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[length..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pax_records_are_taken_by_their_length() {
        let bytes = b"16 path=a=b\nc=d\n9 x=yyyy\n";
        let (key, value, rest) = pax_record(bytes).unwrap();
        assert_eq!((key, value), (&b"path"[..], &b"a=b\nc=d"[..]));
        let (key, value, rest) = pax_record(rest).unwrap();
        assert_eq!((key, value, rest), (&b"x"[..], &b"yyyy"[..], &b""[..]));
        assert!(pax_record(rest).is_none());
    }

    #[test]
    fn bad_pax_records_are_none() {
        for bytes in [
            &b"99 path=a\n"[..],
            b"0 path=a\n",
            b"2 path=a\n",
            b"-1 a=b\n",
            b"path=a\n",
            b"9 path=ab\n",
            b"18446744073709551615 a=b\n",
            b"",
        ] {
            assert!(pax_record(bytes).is_none(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1600)) {
            let mut input = &bytes[..];
            while let Ok(Some(_)) = next(&mut input) {}
            let _ = pax_record(&bytes);
        }
    }
}
