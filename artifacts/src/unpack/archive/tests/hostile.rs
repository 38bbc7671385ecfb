//! What is refused, by which name and for which reason; and that nothing of strangers panics or leads out.

use proptest::prelude::*;

use super::*;

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
