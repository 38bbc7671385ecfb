//! Archives, good and hostile, against an output in memory.

use std::convert::Infallible;
use std::io::Write;

use tar::{Builder, EntryType};

use super::*;
use crate::unpack::header;

mod bounds;
mod formats;
mod hostile;
mod table;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    bytes: Vec<u8>,
    executable: bool,
}

#[derive(Default)]
struct Memory {
    total: u64,
}

impl Output for Memory {
    type Open = Kept;
    type File = Kept;
    type Error = Infallible;
    fn begin(&mut self, file: &NewFile) -> Result<Kept, Infallible> {
        Ok(Kept {
            bytes: Vec::new(),
            executable: file.executable,
        })
    }
    fn write(&mut self, open: &mut Kept, bytes: &[u8]) -> Result<(), Infallible> {
        self.total += bytes.len() as u64;
        open.bytes.extend_from_slice(bytes);
        Ok(())
    }
    fn hole(&mut self, open: &mut Kept, bytes: u64) -> Result<(), Infallible> {
        open.bytes.resize(open.bytes.len() + bytes as usize, 0);
        Ok(())
    }
    fn end(&mut self, open: Kept) -> Result<Kept, Infallible> {
        Ok(open)
    }
}

fn run(
    bytes: &[u8],
    format: Format,
    limits: &Limits,
) -> Result<Unpacked<Kept>, UnpackError<Infallible>> {
    unpack(bytes, format, limits, &mut Memory::default(), &mut |_| {})
}

fn plain(bytes: &[u8]) -> Result<Unpacked<Kept>, UnpackError<Infallible>> {
    run(bytes, Format::Tar, &Limits::default())
}

fn reason(result: Result<Unpacked<Kept>, UnpackError<Infallible>>) -> (String, Refusal) {
    match result {
        Err(UnpackError::Refused(refused)) => (refused.entry, refused.reason),
        other => panic!("not refused: {other:?}"),
    }
}

/// One entry with its name and target written raw into the header, past the tar crate's own checks.
fn raw(kind: u8, name: &[u8], target: &[u8], mode: u32, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..name.len()].copy_from_slice(name);
    gnu.linkname[..target.len()].copy_from_slice(target);
    header.set_entry_type(EntryType::new(kind));
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len() + header::padding(content.len() as u64), 0);
    bytes
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend_from_slice(&[0; 2 * header::BLOCK]);
    bytes
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    raw(b'0', name.as_bytes(), b"", 0o644, content)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn good() -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    builder
        .append_data(&mut header.clone(), "./", &b""[..])
        .unwrap();
    builder
        .append_data(&mut header, "./share/", &b""[..])
        .unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o600);
    header.set_size(6);
    builder
        .append_data(&mut header.clone(), "share/vmlinuz", &b"kernel"[..])
        .unwrap();
    header.set_mode(0o755);
    header.set_size(4);
    let long = format!("share/{}/tool", "deep/".repeat(30));
    builder
        .append_data(&mut header, long, &b"tool"[..])
        .unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    header.set_mode(0o777);
    builder
        .append_link(&mut header.clone(), "kernel", "share/vmlinuz")
        .unwrap();
    header.set_entry_type(EntryType::Link);
    builder
        .append_link(&mut header, "hard", "./share/vmlinuz")
        .unwrap();
    builder.into_inner().unwrap()
}
