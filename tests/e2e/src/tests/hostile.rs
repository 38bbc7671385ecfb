//! Artifacts that want out of their folder, or more than files: refused before anything is activated.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::upload::{self, Layer};
use tar::{EntryType, Header};

use super::node::{DEMO, Node, SMALL};

pub(crate) const TESTS: &[Test] = &[("artifacts_are_refused", artifacts_are_refused)];

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// A case: its tag, the layer's media type and bytes, the layer's title if it has one, and what the error must mention.
struct Case {
    tag: &'static str,
    media_type: &'static str,
    layer: Vec<u8>,
    title: Option<&'static str>,
    mentions: &'static [&'static str],
}

impl Case {
    fn tar(tag: &'static str, layer: Vec<u8>, mentions: &'static [&'static str]) -> Self {
        Self {
            tag,
            media_type: TAR,
            layer,
            title: None,
            mentions,
        }
    }
}

fn cases() -> Result<Vec<Case>> {
    let evil = b"evil";
    let file = |name, mode| entry(name, EntryType::Regular, "", mode, evil);
    let link = |kind, target| entry("link", kind, target, 0o777, b"");
    let ended = |entries: Vec<Vec<u8>>| [entries.concat(), vec![0; 1024]].concat();
    let good = file("vmlinuz", 0o644);
    let mut cases = vec![
        Case::tar(
            "dotdot",
            ended(vec![good.clone(), file("../evil", 0o644)]),
            &["../evil", "'..'"],
        ),
        Case::tar(
            "inner-dotdot",
            ended(vec![file("a/../../evil", 0o644)]),
            &["a/../../evil"],
        ),
        Case::tar(
            "absolute",
            ended(vec![file("/run/km/evil", 0o644)]),
            &["/run/km/evil", "absolute"],
        ),
        Case::tar(
            "symlink",
            ended(vec![link(EntryType::Symlink, "../../../etc/passwd")]),
            &["link", "etc/passwd"],
        ),
        Case::tar(
            "absolute-symlink",
            ended(vec![link(EntryType::Symlink, "/etc/passwd")]),
            &["/etc/passwd"],
        ),
        Case::tar(
            "through-a-symlink",
            ended(vec![
                entry("out", EntryType::Symlink, "../..", 0o777, b""),
                file("out/evil", 0o644),
            ]),
            &["out"],
        ),
        Case::tar(
            "hard-link",
            ended(vec![link(EntryType::Link, "/etc/passwd")]),
            &["link"],
        ),
        Case::tar(
            "hard-link-up",
            ended(vec![link(EntryType::Link, "../../etc/passwd")]),
            &["link"],
        ),
        Case::tar(
            "device",
            ended(vec![entry("null", EntryType::Char, "", 0o666, b"")]),
            &["null", "device"],
        ),
        Case::tar(
            "block-device",
            ended(vec![entry("sda", EntryType::Block, "", 0o666, b"")]),
            &["sda", "device"],
        ),
        Case::tar(
            "fifo",
            ended(vec![entry("pipe", EntryType::Fifo, "", 0o666, b"")]),
            &["pipe"],
        ),
        Case::tar("setuid", ended(vec![file("su", 0o4755)]), &["su", "set"]),
        Case::tar("setgid", ended(vec![file("sg", 0o2755)]), &["sg", "set"]),
        Case::tar(
            "generation-file",
            ended(vec![file(".generation.json", 0o644)]),
            &[".generation.json"],
        ),
        Case::tar(
            "cut-off",
            good[..700.min(good.len() - 1)].to_vec(),
            &["sha256:"],
        ),
    ];
    cases.push(Case {
        media_type: TAR_GZIP,
        ..Case::tar("gzip-bomb", gzip_bomb()?, &["unpacks to more than"])
    });
    cases.push(Case {
        media_type: TAR_ZSTD,
        ..Case::tar("zstd-bomb", zstd_bomb(), &["unpacks to more than"])
    });
    for (tag, title) in [
        ("title-dotdot", "../evil"),
        ("title-absolute", "/run/km/evil"),
    ] {
        cases.push(Case {
            title: Some(title),
            media_type: "text/plain",
            ..Case::tar(tag, evil.to_vec(), &["evil"])
        });
    }
    Ok(cases)
}

/// One tar entry, with its name as it is: the library's own writer would refuse most of these.
fn entry(name: &str, kind: EntryType, target: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
    [header.as_bytes(), content, &padding].concat()
}

/// The header of a file of this many zeros.
fn zeros(size: u64) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..6].copy_from_slice(b"zeroes");
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn gzip_bomb() -> Result<Vec<u8>> {
    const MIB: usize = 160;
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&zeros((MIB << 20) as u64))?;
    for _ in 0..MIB {
        gzip.write_all(&vec![0; 1 << 20])?;
    }
    Ok(gzip.finish()?)
}

/// A zstd frame by hand (RFC 8878): the tar header as a raw block, then blocks of 128 KiB of one repeated byte, 4 bytes each.
fn zstd_bomb() -> Vec<u8> {
    const BLOCKS: u32 = 1600;
    const BLOCK: u32 = 128 << 10;
    // Magic number, a frame header without a content size, and a window of 128 KiB (exponent 7).
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 7 << 3];
    let header = zeros(u64::from(BLOCKS) * u64::from(BLOCK));
    let block = |kind: u32, size: u32, last: u32| {
        (size << 3 | kind << 1 | last).to_le_bytes()[..3].to_vec()
    };
    frame.extend(block(0, 512, 0));
    frame.extend(header);
    for n in 1..=BLOCKS {
        frame.extend(block(1, BLOCK, u32::from(n == BLOCKS)));
        frame.push(0);
    }
    frame
}

fn artifacts_are_refused(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let original = std::fs::read(node.containerd.config())?;
    let mut at = SMALL.to_owned();
    for case in cases()? {
        publish(&node, &case).with_context(|| format!("publish {}", case.tag))?;
        let next = format!("hostile/artifact:{}", case.tag);
        node.reconfigure(&at, &next)?;
        at = next;
        let refused = node
            .refuses(&["apply"], 6, case.mentions)
            .with_context(|| format!("an artifact with: {}", case.tag))?;
        ensure!(
            refused.took < Duration::from_secs(20),
            "{} took {:?}",
            case.tag,
            refused.took
        );
        nothing_escaped(&node, &case)?;
    }
    // The same node takes a good one.
    node.reconfigure(&at, SMALL)?;
    node.apply(&[DEMO])?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

fn nothing_escaped(node: &Node, case: &Case) -> Result<()> {
    node.store_is_whole()?;
    let mut found = super::node::walk(&node.artifacts)?;
    found.push("/run/km/evil".into());
    let evil = found
        .iter()
        .find(|path| path.ends_with("evil") && path.symlink_metadata().is_ok());
    ensure!(evil.is_none(), "{}: {evil:?} was made", case.tag);
    let store = node.artifacts.join(".store/generations").join(DEMO);
    let generations = super::node::walk(&store)?;
    ensure!(
        generations.len() <= 1,
        "{}: a generation was made: {generations:?}",
        case.tag
    );
    Ok(())
}

/// Pushes an artifact of one layer as it is.
fn publish(node: &Node, case: &Case) -> Result<()> {
    let layer = Layer {
        media_type: case.media_type,
        bytes: &case.layer,
        title: case.title,
    };
    upload::artifact(
        &node.registry.host(),
        "hostile/artifact",
        case.tag,
        &[layer],
    )?;
    Ok(())
}
