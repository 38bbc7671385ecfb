//! Every case that the book's page about the store lists, and what becomes of it. Archives are made by GNU tar where it makes
//! such; the rest is written by hand. The page's table is compared with this one.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::*;

const PAGE: &str = include_str!("../../../../../docs/src/store.md");

/// What becomes of an archive.
enum Outcome {
    /// These are its files and links.
    Kept(&'static [&'static str]),
    /// An entry is refused for this reason, or one that begins so.
    Refused(&'static str),
    /// It cannot be read as what it is said to be.
    Damaged,
}

use Outcome::{Damaged, Kept, Refused};

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    format: Format,
    outcome: Outcome,
}

fn tar(name: &'static str, bytes: Vec<u8>, outcome: Outcome) -> Case {
    Case {
        name,
        bytes,
        format: Format::Tar,
        outcome,
    }
}

/// Entries written by hand.
fn hand(name: &'static str, entries: &[Vec<u8>], outcome: Outcome) -> Case {
    tar(name, archive(entries), outcome)
}

/// An archive by GNU tar of what `prepare` puts into a folder.
fn gnu(name: &'static str, prepare: impl FnOnce(&Path), words: &[&str], outcome: Outcome) -> Case {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let made = Command::new("tar")
        .args(["-C", dir.path().to_str().unwrap(), "--create", "--file=-"])
        .args(words)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "{name}: {said}");
    tar(name, made.stdout, outcome)
}

fn write(dir: &Path, name: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, name).unwrap();
}

fn holes(dir: &Path) {
    let file = fs::File::create(dir.join("image")).unwrap();
    file.set_len(1 << 20).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"end", (1 << 20) - 3).unwrap();
}

/// A PAX extended header before an entry.
fn pax(records: &[(&str, &[u8])], entry: Vec<u8>) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    builder
        .append_pax_extensions(records.iter().copied())
        .unwrap();
    let mut bytes = builder.into_inner().unwrap();
    bytes.truncate(bytes.len() - 2 * header::BLOCK);
    [bytes, entry].concat()
}

/// An entry with another size field; the checksum fits.
fn sized(field: &[u8; 12], content: &[u8]) -> Vec<u8> {
    let mut entry = file("f", content);
    entry[124..136].copy_from_slice(field);
    entry[148..156].fill(b' ');
    let sum: u32 = entry[..512].iter().map(|byte| u32::from(*byte)).sum();
    entry[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    entry
}

fn base_256(size: u64) -> [u8; 12] {
    let mut field = [0; 12];
    field[0] = 0x80;
    field[4..].copy_from_slice(&size.to_be_bytes());
    field
}

fn made_by_tar() -> Vec<Case> {
    const LONG: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/\
                        bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
    let long = |dir: &Path| {
        write(dir, LONG);
        symlink(LONG, dir.join("link")).unwrap();
    };
    let outside = Refused("it is a link that leads outside the artifact");
    vec![
        gnu(
            "GNU long names and link targets",
            long,
            &["--format=gnu", "."],
            Kept(&[LONG, "link"]),
        ),
        gnu(
            "PAX long names and link targets",
            long,
            &["--format=posix", "."],
            Kept(&[LONG, "link"]),
        ),
        gnu(
            "a name split over ustar's prefix",
            |dir| write(dir, LONG),
            &["--format=ustar", LONG],
            Kept(&[LONG]),
        ),
        gnu(
            "the format of Unix V7",
            |dir| write(dir, "a/b"),
            &["--format=v7", "."],
            Kept(&["a/b"]),
        ),
        gnu(
            "UTF-8 names",
            |dir| write(dir, "äöü"),
            &["."],
            Kept(&["äöü"]),
        ),
        gnu(
            "extended attributes, ACLs and times in PAX records (not kept)",
            |dir| write(dir, "f"),
            &[
                "--format=posix",
                "--xattrs",
                "--acls",
                "--pax-option=SCHILY.xattr.user.x:=y",
                "f",
            ],
            Kept(&["f"]),
        ),
        gnu(
            "GNU sparse, old",
            holes,
            &["--format=gnu", "--sparse", "image"],
            Kept(&["image"]),
        ),
        gnu(
            "GNU sparse 0.0 in PAX records",
            holes,
            &[
                "--format=posix",
                "--sparse",
                "--sparse-version=0.0",
                "image",
            ],
            Kept(&["image"]),
        ),
        gnu(
            "GNU sparse 0.1 in PAX records",
            holes,
            &[
                "--format=posix",
                "--sparse",
                "--sparse-version=0.1",
                "image",
            ],
            Kept(&["image"]),
        ),
        gnu(
            "GNU sparse 1.0 in PAX records",
            holes,
            &[
                "--format=posix",
                "--sparse",
                "--sparse-version=1.0",
                "image",
            ],
            Kept(&["image"]),
        ),
        gnu(
            "a file with holes, not as sparse",
            holes,
            &["image"],
            Kept(&["image"]),
        ),
        gnu(
            "a hard link to a file before it (one content)",
            |dir| {
                write(dir, "a");
                fs::hard_link(dir.join("a"), dir.join("b")).unwrap();
            },
            &["a", "b"],
            Kept(&["a", "b"]),
        ),
        gnu(
            "an absolute name",
            |dir| write(dir, "f"),
            &["--absolute-names", "--transform=s,^,/etc/,", "f"],
            Refused("its name is absolute"),
        ),
        gnu(
            "`..` in a name",
            |dir| write(dir, "f"),
            &["--absolute-names", "--transform=s,^,../,", "f"],
            Refused("its name has a '..' part"),
        ),
        gnu(
            "a symlink that stays inside",
            |dir| {
                write(dir, "a/f");
                symlink("a/f", dir.join("l")).unwrap();
            },
            &["a", "l"],
            Kept(&["a/f", "l"]),
        ),
        gnu(
            "a symlink to nothing, inside",
            |dir| symlink("later", dir.join("l")).unwrap(),
            &["l"],
            Kept(&["l"]),
        ),
        gnu(
            "an absolute symlink",
            |dir| symlink("/etc/passwd", dir.join("l")).unwrap(),
            &["l"],
            outside,
        ),
        gnu(
            "a symlink that climbs out",
            |dir| symlink("../../etc/passwd", dir.join("l")).unwrap(),
            &["l"],
            Refused("it is a link that leads outside the artifact"),
        ),
        gnu(
            "a fifo",
            |dir| {
                assert!(
                    Command::new("mkfifo")
                        .arg(dir.join("p"))
                        .status()
                        .unwrap()
                        .success()
                )
            },
            &["p"],
            Refused("it is a fifo"),
        ),
        gnu(
            "setuid",
            |dir| {
                write(dir, "su");
                fs::set_permissions(dir.join("su"), fs::Permissions::from_mode(0o4755)).unwrap();
            },
            &["su"],
            Refused("its mode 4755 has setuid, setgid or sticky bits"),
        ),
        gnu(
            "the same name twice",
            |dir| write(dir, "f"),
            &["--hard-dereference", "f", "./f"],
            Refused("the same path is there twice"),
        ),
        gnu(
            "names that differ by case alone",
            |dir| {
                ["kernel", "Kernel"]
                    .iter()
                    .for_each(|name| write(dir, name))
            },
            &["kernel", "Kernel"],
            Kept(&["Kernel", "kernel"]),
        ),
        gnu(
            "names that differ by a trailing dot alone",
            |dir| ["f", "f."].iter().for_each(|name| write(dir, name)),
            &["f", "f."],
            Kept(&["f", "f."]),
        ),
        gnu(
            "a newline in a name",
            |dir| write(dir, "a\nb"),
            &["a\nb"],
            Refused("its name or target holds a control character"),
        ),
        gnu(
            "a volume label",
            |dir| write(dir, "f"),
            &["--label=backup", "f"],
            Refused("it is of an unknown kind"),
        ),
        gnu(
            "an incremental archive",
            |dir| write(dir, "d/f"),
            &["--incremental", "d"],
            Refused("it is of an unknown kind"),
        ),
    ]
}

fn written_by_hand() -> Vec<Case> {
    let two = || raw(b'0', b"two", b"", 0o644, b"x");
    let mut broken = file("f", b"x");
    broken[0] = b'g';
    vec![
        hand(
            "an empty name",
            &[raw(b'0', b"", b"", 0o644, b"x")],
            Refused("its name is empty"),
        ),
        hand(
            "a name that is not UTF-8",
            &[raw(b'0', b"\xff", b"", 0o644, b"x")],
            Refused("its name is not UTF-8"),
        ),
        hand(
            "NUL in a ustar name (it ends there)",
            &[raw(b'0', b"a\0b", b"", 0o644, b"x")],
            Kept(&["a"]),
        ),
        hand(
            "NUL in a PAX name",
            &[pax(&[("path", b"a\0b")], two())],
            Refused("its name or target holds a control character"),
        ),
        hand(
            "a name over 1024 bytes",
            &[pax(&[("path", ("a/".repeat(600) + "f").as_bytes())], two())],
            Refused("its name is too long"),
        ),
        hand(
            "our own manifest's name",
            &[file(".generation.json", b"{}")],
            Refused("its name is reserved for kata-manager"),
        ),
        hand(
            "a path through a symlink",
            &[raw(b'2', b"l", b"d", 0o777, b""), file("l/f", b"x")],
            Refused("it lies under l, which is not a folder"),
        ),
        hand(
            "a symlink through another symlink",
            &[
                raw(b'2', b"a/up", b"..", 0o777, b""),
                raw(b'2', b"l", b"a/up/../x", 0o777, b""),
            ],
            Refused("it is a link whose way goes through another symlink"),
        ),
        hand(
            "a hard link out",
            &[raw(b'1', b"h", b"../x", 0o644, b"")],
            Refused("it is a link that leads outside the artifact"),
        ),
        hand(
            "a hard link to what comes later",
            &[raw(b'1', b"h", b"two", 0o644, b""), two()],
            Refused("it is a hard link to two, which is no regular file before it"),
        ),
        hand(
            "a character device",
            &[raw(b'3', b"null", b"", 0o666, b"")],
            Refused("it is a character device"),
        ),
        hand(
            "a block device",
            &[raw(b'4', b"sda", b"", 0o660, b"")],
            Refused("it is a block device"),
        ),
        hand(
            "setgid, sticky",
            &[raw(b'0', b"f", b"", 0o3755, b"x")],
            Refused("its mode 3755 has setuid, setgid or sticky bits"),
        ),
        hand(
            "a link with content",
            &[raw(b'2', b"l", b"x", 0o777, b"content")],
            Refused("its tar header is malformed: a folder or link with content"),
        ),
        hand(
            "a wrong header checksum",
            &[broken],
            Refused("its tar header is malformed: its checksum does not match"),
        ),
        hand(
            "a size in base 256",
            &[sized(&base_256(1), b"x")],
            Kept(&["f"]),
        ),
        hand(
            "a negative size in base 256",
            &[sized(&[0xff; 12], b"x")],
            Refused("its tar header is malformed: its size"),
        ),
        hand(
            "a size in base 256 over 64 bits",
            &[sized(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], b"x")],
            Refused("its tar header is malformed: its size"),
        ),
        hand(
            "a size that is no number",
            &[sized(b"12345x789ab\0", b"x")],
            Refused("its tar header is malformed: its size"),
        ),
        hand(
            "a size over the limit",
            &[sized(&base_256(1 << 60), b"x")],
            Refused("the layer unpacks to more than"),
        ),
        hand(
            "a size beyond the end",
            &[sized(b"00000077777\0", b"x")],
            Refused("the layer unpacks to more than"),
        ),
        hand(
            "a size that is too small",
            &[sized(b"00000000000\0", b"content")],
            Refused("its tar header is malformed: its checksum does not match"),
        ),
        hand(
            "a PAX size that is negative",
            &[pax(&[("size", b"-1")], two())],
            Refused("its tar header is malformed: a PAX size"),
        ),
        hand(
            "a global PAX header with a name",
            &[raw(b'g', b"g", b"", 0o644, b"11 path=up\n")],
            Refused("its tar header is malformed: a global header sets a name or a size"),
        ),
        tar("no end of archive", file("f", b"x"), Kept(&["f"])),
        tar(
            "trailing garbage after the end of a tar (the digest covers it)",
            [archive(&[file("f", b"x")]), b"garbage".repeat(99)].concat(),
            Kept(&["f"]),
        ),
        tar(
            "an archive that is cut",
            file("f", &[7; 300])[..700].to_vec(),
            Damaged,
        ),
        tar("an empty layer", Vec::new(), Kept(&[])),
    ]
}

fn compressed() -> Vec<Case> {
    let one = archive(&[file("f", b"x")]);
    let (first, second) = one.split_at(700);
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    let case = |name, format, bytes, outcome| Case {
        name,
        bytes,
        format,
        outcome,
    };
    let zeros = archive(&[file("zeros", &vec![0; 80 << 20])]);
    let mut flipped = gzip(&one);
    let at = flipped.len() - 6;
    flipped[at] ^= 1;
    // A skippable frame (RFC 8878, 3.1.2).
    let skipped = [
        &[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..],
        b"any",
        &zstd(&one),
    ]
    .concat();
    vec![
        case(
            "gzip members one after the other",
            Format::TarGzip,
            [gzip(first), gzip(second)].concat(),
            Kept(&["f"]),
        ),
        case(
            "zstd frames one after the other",
            Format::TarZstd,
            [zstd(first), zstd(second)].concat(),
            Kept(&["f"]),
        ),
        case(
            "a skippable zstd frame",
            Format::TarZstd,
            skipped,
            Kept(&["f"]),
        ),
        case(
            "trailing garbage after gzip",
            Format::TarGzip,
            [gzip(&one), b"garbage".to_vec()].concat(),
            Damaged,
        ),
        case(
            "trailing garbage after zstd",
            Format::TarZstd,
            [zstd(&one), b"garbage".to_vec()].concat(),
            Damaged,
        ),
        case(
            "a gzip checksum that does not match",
            Format::TarGzip,
            flipped,
            Damaged,
        ),
        case(
            "gzip that is cut",
            Format::TarGzip,
            gzip(&one)[..60].to_vec(),
            Damaged,
        ),
        case("gzip called zstd", Format::TarZstd, gzip(&one), Damaged),
        case(
            "a gzip bomb",
            Format::TarGzip,
            gzip(&zeros),
            Refused("the layer unpacks to more than"),
        ),
        case(
            "a zstd bomb",
            Format::TarZstd,
            zstd(&zeros),
            Refused("the layer unpacks to more than"),
        ),
    ]
}

fn told(outcome: &Outcome) -> String {
    match outcome {
        Kept(_) => "kept".to_owned(),
        Refused(reason) => format!("refused: {reason}"),
        Damaged => "damaged".to_owned(),
    }
}

/// What is wrong with how a case ended.
fn problem(case: &Case) -> Option<String> {
    let limits = Limits {
        ratio: 100,
        ..Limits::default()
    };
    let limits = limits.of_layer(case.format, case.bytes.len() as u64);
    match (&case.outcome, run(&case.bytes, case.format, &limits)) {
        (Kept(names), Ok(found)) => {
            let files = found.files.into_iter().map(|(path, _)| path);
            let links = found.links.into_iter().map(|(path, _)| path);
            let mut paths: Vec<_> = files.chain(links).collect();
            paths.sort();
            (paths != *names).then(|| format!("kept {paths:?}"))
        }
        (Refused(reason), Err(UnpackError::Refused(refused))) => {
            let got = refused.reason.to_string();
            (!got.starts_with(reason)).then_some(got)
        }
        (Damaged, Err(UnpackError::Damaged { .. })) => None,
        (_, Ok(found)) => Some(format!("kept {} files", found.files.len())),
        (_, Err(error)) => Some(error.to_string()),
    }
}

#[test]
fn each_case_of_the_book_ends_as_it_says() {
    let cases: Vec<_> = made_by_tar()
        .into_iter()
        .chain(written_by_hand())
        .chain(compressed())
        .collect();
    let wrong: Vec<_> = cases
        .iter()
        .filter_map(|case| Some(format!("{}: {}", case.name, problem(case)?)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let rows = cases
        .iter()
        .map(|case| format!("| {} | {} |\n", case.name, told(&case.outcome)));
    let (_, listed) = PAGE
        .split_once("| an archive with | is |\n|---|---|\n")
        .unwrap();
    let (listed, _) = listed.split_once("\n\n").unwrap();
    assert_eq!(
        format!("{listed}\n"),
        rows.collect::<String>(),
        "docs/src/store.md"
    );
}
