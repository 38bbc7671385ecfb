//! Limits of count, size and memory.

use super::*;

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
