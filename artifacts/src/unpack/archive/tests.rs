//! Archives, good and hostile, against an output in memory.

use std::convert::Infallible;
use std::io::Write;

use proptest::prelude::*;
use tar::{Builder, EntryType};

use super::*;
use crate::unpack::header;

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

#[test]
fn every_format_gives_the_same_files() {
    let tar = good();
    let (first, second) = tar.split_at(tar.len() / 2);
    let members = [gzip(first), gzip(second)].concat();
    let frames = [
        zstd::encode_all(first, 3).unwrap(),
        zstd::encode_all(second, 3).unwrap(),
    ]
    .concat();
    for (bytes, format) in [
        (tar.clone(), Format::Tar),
        (gzip(&tar), Format::TarGzip),
        (members, Format::TarGzip),
        (zstd::encode_all(&tar[..], 3).unwrap(), Format::TarZstd),
        (frames, Format::TarZstd),
    ] {
        let mut seen = Vec::new();
        let got = unpack(
            &bytes[..],
            format,
            &Limits::default(),
            &mut Memory::default(),
            &mut |piece| {
                seen.extend_from_slice(piece);
            },
        )
        .unwrap();
        assert_eq!(seen, tar, "{format:?}: the tap sees the whole tar");
        let kept = |bytes: &[u8], executable| Kept {
            bytes: bytes.to_vec(),
            executable,
        };
        assert_eq!(
            got.files,
            [
                ("share/vmlinuz".to_owned(), kept(b"kernel", false)),
                (
                    format!("share/{}tool", "deep/".repeat(30)),
                    kept(b"tool", true)
                ),
                ("hard".to_owned(), kept(b"kernel", false)),
            ]
        );
        assert_eq!(
            got.links,
            [("kernel".to_owned(), "share/vmlinuz".to_owned())]
        );
    }
}

#[test]
fn pax_names_and_sizes_count() {
    let long = "p/".repeat(100) + "file";
    let mut builder = Builder::new(Vec::new());
    builder
        .append_pax_extensions([("path", long.as_bytes()), ("size", b"3"), ("mtime", b"1.5")])
        .unwrap();
    let mut bytes = builder.into_inner().unwrap();
    bytes.truncate(bytes.len() - 2 * header::BLOCK);
    let got = plain(&archive(&[bytes.clone(), file("short", b"abc")])).unwrap();
    assert_eq!(got.files[0].0, long);
    assert_eq!(got.files[0].1.bytes, b"abc");
}

#[test]
fn hostile_entries_are_refused_with_name_and_reason() {
    let outside = |target: &str| Refusal::LinkOutside {
        target: target.to_owned(),
    };
    let kind = |what| Refusal::Kind { what };
    let sym = |name: &[u8], target: &[u8]| raw(b'2', name, target, 0o777, b"");
    let hard = |name: &[u8], target: &[u8]| raw(b'1', name, target, 0o644, b"");
    let cases: Vec<(Vec<Vec<u8>>, &str, Refusal)> = vec![
        (
            vec![file("/etc/passwd", b"x")],
            "/etc/passwd",
            Refusal::AbsoluteName,
        ),
        (vec![file("../x", b"x")], "../x", Refusal::Climbs),
        (vec![file("a/../../x", b"x")], "a/../../x", Refusal::Climbs),
        (
            vec![raw(b'5', b"a/../..", b"", 0o755, b"")],
            "a/../..",
            Refusal::Climbs,
        ),
        (vec![sym(b"l", b"/etc")], "l", outside("/etc")),
        (vec![sym(b"a/l", b"../../x")], "a/l", outside("../../x")),
        (vec![sym(b"l", b"a/../../x")], "l", outside("a/../../x")),
        (vec![sym(b"l", b"")], "l", Refusal::BadTarget),
        (
            vec![hard(b"h", b"/etc/shadow")],
            "h",
            outside("/etc/shadow"),
        ),
        (vec![hard(b"h", b"../x")], "h", outside("../x")),
        (
            vec![hard(b"h", b"later"), file("later", b"x")],
            "h",
            Refusal::HardLinkTarget {
                target: "later".into(),
            },
        ),
        (
            vec![sym(b"l", b"x"), hard(b"h", b"l")],
            "h",
            Refusal::HardLinkTarget { target: "l".into() },
        ),
        (
            vec![sym(b"l", b"."), file("l/x", b"x")],
            "l/x",
            Refusal::UnderNonFolder { via: "l".into() },
        ),
        (
            vec![file("f", b""), file("f/x", b"x")],
            "f/x",
            Refusal::UnderNonFolder { via: "f".into() },
        ),
        (
            vec![sym(b"a/b/up", b"../.."), sym(b"out", b"a/b/up/../..")],
            "out",
            Refusal::LinkThroughLink {
                via: "a/b/up".into(),
            },
        ),
        (
            vec![file("f", b"1"), file("./f", b"2")],
            "./f",
            Refusal::Duplicate,
        ),
        (
            vec![raw(b'3', b"null", b"", 0o666, b"")],
            "null",
            kind("a character device"),
        ),
        (
            vec![raw(b'4', b"sda", b"", 0o666, b"")],
            "sda",
            kind("a block device"),
        ),
        (vec![raw(b'6', b"p", b"", 0o666, b"")], "p", kind("a fifo")),
        (
            vec![raw(b's', b"sock", b"", 0o666, b"")],
            "sock",
            kind("of an unknown kind"),
        ),
        (
            vec![raw(b'S', b"sparse", b"", 0o644, b"")],
            "sparse",
            Refusal::Header {
                what: "a number in the map of a sparse file",
            },
        ),
        (
            vec![raw(b'0', b"su", b"", 0o4755, b"x")],
            "su",
            Refusal::SpecialBits { mode: 0o4755 },
        ),
        (
            vec![raw(b'0', b"sg", b"", 0o2755, b"x")],
            "sg",
            Refusal::SpecialBits { mode: 0o2755 },
        ),
        (
            vec![raw(b'5', b"t/", b"", 0o1777, b"")],
            "t/",
            Refusal::SpecialBits { mode: 0o1777 },
        ),
        (
            vec![file("a\x1b[2Jb", b"x")],
            "a\u{1b}[2Jb",
            Refusal::ControlCharacter,
        ),
        (
            vec![raw(b'0', b"\xff", b"", 0o644, b"")],
            "\u{fffd}",
            Refusal::NotUtf8,
        ),
        (
            vec![file(".generation.json", b"{}")],
            ".generation.json",
            Refusal::Reserved,
        ),
        (vec![file("./", b"")], "./", Refusal::Header { what: "" }),
        (
            vec![raw(b'2', b"l", b"x", 0o777, b"content")],
            "l",
            Refusal::Header {
                what: "a folder or link with content",
            },
        ),
    ];
    for (entries, entry, want) in cases {
        if want == (Refusal::Header { what: "" }) {
            // The top folder as an old-style folder: nothing to refuse.
            assert!(plain(&archive(&entries)).unwrap().files.is_empty());
            continue;
        }
        let (at, why) = reason(plain(&archive(&entries)));
        assert_eq!((at.as_str(), &why), (entry, &want));
    }
}

#[test]
fn hostile_pax_is_refused() {
    for (records, want) in [
        (vec![("path", &b"../../etc/x"[..])], Refusal::Climbs),
        (vec![("path", b"a\0b")], Refusal::ControlCharacter),
        (
            vec![("GNU.sparse.map", b"0,1")],
            Refusal::Header {
                what: "a sparse file without its size",
            },
        ),
        (
            vec![
                ("GNU.sparse.size", b"1152921504606846976"),
                ("GNU.sparse.map", b"0,3"),
            ],
            Refusal::TooLarge { limit: 16 << 30 },
        ),
        (
            vec![("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"8,3")],
            Refusal::Header {
                what: "the map of a sparse file does not fit the file",
            },
        ),
        (
            vec![("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,9")],
            Refusal::Header {
                what: "the map of a sparse file has other bytes than the archive",
            },
        ),
        (
            vec![("GNU.sparse.major", b"2"), ("GNU.sparse.size", b"9")],
            Refusal::Header {
                what: "a version of sparse files that is not known",
            },
        ),
        (
            vec![("size", b"-1")],
            Refusal::Header { what: "a PAX size" },
        ),
        (
            vec![("size", b"99999999999999")],
            Refusal::TooLarge {
                limit: Limits::default().unpacked_bytes,
            },
        ),
    ] {
        let mut builder = Builder::new(Vec::new());
        builder.append_pax_extensions(records).unwrap();
        let mut bytes = builder.into_inner().unwrap();
        bytes.truncate(bytes.len() - 2 * header::BLOCK);
        assert_eq!(reason(plain(&archive(&[bytes, file("f", b"abc")]))).1, want);
    }
    let global = raw(b'g', b"g", b"", 0o644, b"14 path=../up\n");
    assert!(matches!(
        reason(plain(&archive(&[global]))).1,
        Refusal::Header { .. }
    ));
    let comment = raw(b'g', b"g", b"", 0o644, b"13 comment=x\n");
    assert_eq!(
        plain(&archive(&[comment, file("f", b"x")]))
            .unwrap()
            .files
            .len(),
        1
    );
}

#[test]
fn an_extension_cannot_eat_the_memory() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(8 << 30);
    header.set_cksum();
    let error = reason(plain(header.as_bytes())).1;
    assert_eq!(
        error,
        Refusal::Header {
            what: "an extended header over 1 MiB"
        }
    );
    let chain: Vec<_> = (0..40)
        .map(|_| raw(b'L', b"l", b"", 0o644, b"name\0"))
        .collect();
    assert_eq!(
        reason(plain(&archive(&chain))).1,
        Refusal::Header {
            what: "too many extended headers in a row"
        }
    );
}

#[test]
fn limits_hold() {
    let few = Limits {
        entries: 2,
        ..Limits::default()
    };
    let three = archive(&[file("a", b""), file("b", b""), file("c", b"")]);
    assert_eq!(
        reason(run(&three, Format::Tar, &few)),
        ("c".into(), Refusal::TooManyEntries { limit: 2 })
    );
    let folder = || raw(b'5', b"d/", b"", 0o755, b"");
    let folders = archive(&[folder(), folder(), folder()]);
    assert_eq!(
        reason(run(&folders, Format::Tar, &few)).1,
        Refusal::TooManyEntries { limit: 2 }
    );

    let small = Limits {
        unpacked_bytes: 4096,
        ..Limits::default()
    };
    let big = archive(&[file("a", &[1; 3000]), file("b", &[2; 3000])]);
    assert_eq!(
        reason(run(&gzip(&big), Format::TarGzip, &small)).1,
        Refusal::TooLarge { limit: 4096 }
    );
    let huge = archive(&[file("a", &[1; 5000])]);
    assert_eq!(
        reason(run(&huge, Format::Tar, &small)).1,
        Refusal::TooLarge { limit: 4096 }
    );
}

#[test]
fn a_bomb_is_stopped_while_it_streams() {
    let limits = Limits {
        ratio: 100,
        ratio_free_bytes: 1 << 20,
        ..Limits::default()
    };
    let zeros = vec![0; 16 << 20];
    let bomb = archive(&[file("zeros", &zeros)]);
    for (bytes, format) in [
        (gzip(&bomb), Format::TarGzip),
        (zstd::encode_all(&bomb[..], 3).unwrap(), Format::TarZstd),
    ] {
        let mut memory = Memory::default();
        let result = unpack(&bytes[..], format, &limits, &mut memory, &mut |_| {});
        assert_eq!(reason(result).1, Refusal::Ratio { limit: 100 });
        assert!(
            memory.total < 8 << 20,
            "stopped early, after {}",
            memory.total
        );
    }
    // Behind the archive's end it is stopped too.
    let tail = [archive(&[file("f", b"x")]), zeros].concat();
    assert_eq!(
        reason(run(&gzip(&tail), Format::TarGzip, &limits)).1,
        Refusal::Ratio { limit: 100 }
    );
    // Real content of that size is fine.
    assert!(run(&bomb, Format::Tar, &limits).is_ok());
}

#[test]
fn damaged_streams_are_told_apart_from_hostile_ones() {
    let tar = good();
    let mut flipped = gzip(&tar);
    let at = flipped.len() - 6;
    flipped[at] ^= 1;
    let mut trailing = gzip(&tar);
    trailing.extend_from_slice(b"garbage after the last member");
    for (bytes, format) in [
        (gzip(&tar)[..100].to_vec(), Format::TarGzip),
        (flipped, Format::TarGzip),
        (trailing, Format::TarGzip),
        (tar[..700].to_vec(), Format::Tar),
        (
            archive(&[file("f", &[7; 2000])])[..1000].to_vec(),
            Format::Tar,
        ),
        (b"not compressed at all".to_vec(), Format::TarZstd),
    ] {
        let result = run(&bytes, format, &Limits::default());
        assert!(
            matches!(result, Err(UnpackError::Damaged { .. })),
            "{result:?}"
        );
    }
    assert!(matches!(
        reason(plain(&[b'x'; 1024])).1,
        Refusal::Header { .. }
    ));
    // Bytes after the end of the archive are the tar's padding, whatever they are.
    let padded = [tar, b"padding".repeat(100)].concat();
    assert_eq!(plain(&padded).unwrap().files.len(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..4096),
        format in prop_oneof![Just(Format::Tar), Just(Format::TarGzip), Just(Format::TarZstd)],
    ) {
        let _ = run(&bytes, format, &Limits::default());
    }

    #[test]
    fn a_mangled_archive_yields_only_inner_paths(
        flips in prop::collection::vec((0usize..6000, any::<u8>()), 0..12),
        names in prop::collection::vec("[./a-c]{1,8}", 1..6),
        targets in prop::collection::vec("[./a-c]{1,8}", 1..6),
        kinds in prop::collection::vec(prop::sample::select(&b"01257"[..]), 1..6),
    ) {
        let entries: Vec<_> = names.iter().zip(&targets).zip(&kinds).map(|((name, target), kind)| {
            let content: &[u8] = if *kind == b'0' { b"content" } else { b"" };
            raw(*kind, name.as_bytes(), target.as_bytes(), 0o644, content)
        }).collect();
        let mut bytes = archive(&entries);
        for (at, value) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(found) = plain(&bytes) {
            let dir = tempfile::tempdir().unwrap();
            let top = dir.path().join("top");
            std::fs::create_dir(&top).unwrap();
            for (path, target) in &found.links {
                let at = top.join(path);
                std::fs::create_dir_all(at.parent().unwrap()).unwrap();
                std::os::unix::fs::symlink(target, at).unwrap();
            }
            for (path, _) in &found.files {
                let at = top.join(path);
                std::fs::create_dir_all(at.parent().unwrap()).unwrap();
                std::fs::File::create_new(at).unwrap();
            }
            // The kernel agrees that no link leads out.
            for (path, _) in &found.links {
                if let Ok(real) = top.join(path).canonicalize() {
                    prop_assert!(real.starts_with(top.canonicalize().unwrap()), "{path} -> {real:?}");
                }
            }
        }
    }
}

/// More parts than fit into a header of old, and into the block behind it.
#[test]
fn sparse_files_come_back_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = vec![0; 64 * (64 << 10) + 12_345];
    let file = std::fs::File::create(dir.path().join("image")).unwrap();
    file.set_len(image.len() as u64).unwrap();
    for part in 0..40_usize {
        let at = part * (64 << 10) + 4096;
        image[at..][..5000].fill(part as u8 + 1);
        std::os::unix::fs::FileExt::write_all_at(&file, &image[at..][..5000], at as u64).unwrap();
    }
    std::fs::write(dir.path().join("vmlinuz"), "kernel").unwrap();
    let formats = [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ];
    for format in formats {
        let made = std::process::Command::new("tar")
            .args(["-C", dir.path().to_str().unwrap(), "--create", "--file=-"])
            .arg("--sparse")
            .args(format)
            .args(["image", "vmlinuz"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(made.status.success(), "{format:?}: {said}");
        assert!(made.stdout.len() < 600_000, "tar left out no holes");
        let files = plain(&made.stdout).unwrap().files;
        assert_eq!(files.len(), 2, "{format:?}");
        assert_eq!(files[0].0, "image");
        assert!(files[0].1.bytes == image, "{format:?}");
        assert_eq!(files[1].1.bytes, b"kernel", "{format:?}");
        // However it is cut, it is no file.
        for cut in [512, 100_000] {
            assert!(plain(&made.stdout[..cut]).is_err(), "{format:?}, {cut}");
        }
    }
}
