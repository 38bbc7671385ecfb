//! What is read: every format and extension gives the same files, and what cannot be decoded is damaged.

use super::*;

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
