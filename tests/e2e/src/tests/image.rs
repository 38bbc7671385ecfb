//! A folder out of a container image, held against what a real containerd makes of the same layers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Instance, Options, Version};
use km_tests_e2e::km::Km;
use km_tests_e2e::proxy::{Fault, Proxy};
use km_tests_e2e::registry::{self, Registry};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::upload;
use tar::EntryType;

use super::node::{Class, DEMO, Node, walk};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_folder_is_what_containerd_makes_of_it",
        a_folder_is_what_containerd_makes_of_it,
    ),
    ("a_class_names_a_folder", a_class_names_a_folder),
    ("a_folder_without_a_network", a_folder_without_a_network),
    ("what_an_image_may_not_hold", what_an_image_may_not_hold),
];

/// Where Kata's own payload image keeps its files.
const FOLDER: &str = "opt/kata-artifacts/opt/kata";

const IMAGE: &str = "kata/payload";

/// A layer that is being made.
struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(mut self, path: &str, kind: EntryType, mode: u32, content: &[u8]) -> Result<Self> {
        let mut header = header(kind, mode)?;
        header.set_size(u64::try_from(content.len())?);
        self.0.append_data(&mut header, path, content)?;
        Ok(self)
    }

    fn file(self, path: &str, content: &[u8]) -> Result<Self> {
        self.add(path, EntryType::Regular, 0o644, content)
    }

    fn folder(self, path: &str) -> Result<Self> {
        self.add(&format!("{path}/"), EntryType::Directory, 0o755, b"")
    }

    fn link(mut self, path: &str, kind: EntryType, target: &str) -> Result<Self> {
        self.0
            .append_link(&mut header(kind, 0o777)?, path, target)?;
        Ok(self)
    }

    fn tar(self) -> Result<Vec<u8>> {
        Ok(self.0.into_inner()?)
    }
}

fn header(kind: EntryType, mode: u32) -> Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    Ok(header)
}

/// Three layers with everything that layers can do to each other.
fn layers() -> Result<Vec<Vec<u8>>> {
    let f = |path: &str| format!("{FOLDER}/{path}");
    let image = vec![7; 700_000];
    let base = Layer::new()
        .folder("run")?
        .add("run/pipe", EntryType::Fifo, 0o644, b"")?
        .add("bin/su", EntryType::Regular, 0o4755, b"su")?
        .folder(&f(""))?
        .file(&f("share/vmlinuz-1"), b"a kernel")?
        .file(&f("share/kata.img"), &image)?
        .link(&f("share/vmlinuz"), EntryType::Symlink, "vmlinuz-1")?
        .add(&f("bin/qemu"), EntryType::Regular, 0o755, b"a program")?
        .link(&f("bin/qemu-system"), EntryType::Link, &f("bin/qemu"))?
        .file(&f("gone/a"), b"gone")?
        .file(&f("emptied/a"), b"gone")?
        .file(&f("turned"), b"a file")?;
    let upper = Layer::new()
        .file(&f("share/vmlinuz-2"), b"another kernel")?
        .file(&f("share/.wh.vmlinuz-1"), b"")?
        .file(&f("share/.wh.vmlinuz"), b"")?
        .file(&f(".wh.gone"), b"")?
        .folder(&f("emptied"))?
        .file(&f("emptied/.wh..wh..opq"), b"")?
        .file(&f("emptied/b"), b"new")?
        .file(&f("bin/.wh.qemu"), b"")?
        .file(&f(".wh.turned"), b"")?;
    let top = Layer::new()
        .link(&f("share/vmlinuz"), EntryType::Symlink, "vmlinuz-2")?
        .folder(&f("turned"))?
        .file(&f("turned/into"), b"a folder")?
        .file("etc/motd", b"elsewhere")?;
    [base, upper, top].map(Layer::tar).into_iter().collect()
}

/// What a folder holds: the content of files and whether they are programs, the targets of links.
fn content(folder: &Path) -> Result<BTreeMap<String, (Vec<u8>, bool)>> {
    let mut found = BTreeMap::new();
    for path in walk(folder)? {
        let name = path.strip_prefix(folder)?.display().to_string();
        let meta = path.symlink_metadata()?;
        if name.starts_with(".store") || meta.is_dir() {
            continue;
        }
        let what = if meta.is_symlink() {
            (
                fs::read_link(&path)?.into_os_string().into_encoded_bytes(),
                false,
            )
        } else {
            (fs::read(&path)?, meta.permissions().mode() & 0o111 != 0)
        };
        found.insert(name, what);
    }
    Ok(found)
}

/// A class that names a folder of an image: another folder is another generation, and signatures cannot be demanded.
fn a_class_names_a_folder(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    upload::image(&node.registry.host(), IMAGE, "v1", &layers()?)?;
    let reference = node.proxy.reference(&format!("{IMAGE}:v1"));
    node.configure(&[Class::runc(DEMO, reference.clone())])?;
    let url = format!("url: {reference}\n");
    let whole = format!("    imageFolder: /{FOLDER}\n");
    node.reconfigure(&url, &format!("{url}{whole}"))?;
    node.apply(&[DEMO])?;
    let live = node.artifacts.join(DEMO);
    ensure!(live.join("share/kata.img").is_file());
    node.proxy.take_requests();
    node.km.expect(&["apply"], 0)?;
    let asked = node.proxy.take_requests();
    ensure!(asked.len() == 1, "{asked:?}");

    let part = format!("    imageFolder: /{FOLDER}/share\n");
    node.reconfigure(&whole, &part)?;
    node.apply(&[DEMO])?;
    ensure!(live.join("kata.img").is_file() && !live.join("share").exists());
    node.km.expect(&["artifacts", "verify"], 0)?;
    node.km.expect(&["artifacts", "pull"], 0)?;
    node.km.expect(&["rollback", DEMO], 0)?;
    ensure!(live.join("share/kata.img").is_file());

    let signed = format!("{part}    verify: {{policy: key, keys: [/etc/key.pem]}}\n");
    node.reconfigure(&part, &signed)?;
    node.refuses(&["plan"], 4, &["imageFolder", "signatures"])?;
    Ok(())
}

/// A class's folder of an image travels as an artifact does, once its blob is kept.
fn a_folder_without_a_network(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    upload::image(&node.registry.host(), IMAGE, "v1", &layers()?)?;
    let reference = node.proxy.reference(&format!("{IMAGE}:v1"));
    let url = format!("url: {reference}\n");
    let configure = |more: &str| {
        node.configure_with(&[Class::runc(DEMO, reference.clone())], more)?;
        node.reconfigure(&url, &format!("{url}    imageFolder: /{FOLDER}\n"))
    };
    configure("")?;
    node.apply(&[DEMO])?;
    let live = node.artifacts.join(DEMO);
    let folder = || -> Result<_> {
        let mut found = content(&fs::canonicalize(&live)?)?;
        // It tells when the generation was made.
        found.remove(".generation.json");
        Ok(found)
    };
    let there = folder()?;
    let file = sandbox.folder("carried")?.join("guest.tar");
    let file = file.display().to_string();
    node.refuses(
        &["artifacts", "export", &file],
        3,
        &["keepBlobs: true and pull it again"],
    )?;
    configure("keepBlobs: true\n")?;
    node.km.expect(&["artifacts", "pull"], 0)?;
    node.km.expect(&["artifacts", "export", &file], 0)?;

    node.km.expect(&["uninstall"], 0)?;
    node.proxy.rule("/", Fault::Status(403), u32::MAX);
    node.refuses(&["apply"], 5, &[&reference])?;
    node.km.expect(&["artifacts", "import", &file], 0)?;
    let applied = node.apply(&[DEMO])?;
    ensure!(applied.stderr.contains("what is here"), "{applied}");
    ensure!(folder()? == there, "another folder came out");
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    node.store_is_whole()
}

fn a_folder_is_what_containerd_makes_of_it(sandbox: &Sandbox) -> Result<()> {
    let registry = Registry::start(sandbox, registry::Options::default())?;
    upload::image(&registry.host(), IMAGE, "v1", &layers()?)?;
    let proxy = Proxy::start(sandbox, registry.port())?;
    let reference = proxy.reference(&format!("{IMAGE}:v1"));
    let km = Km::find()?;
    let to = sandbox.folder("taken")?;
    let folder = format!("/{FOLDER}");
    let dir = to.display().to_string();
    let words = [
        "artifacts",
        "pull",
        "--image",
        &reference,
        "--path",
        &folder,
        "--to",
        &dir,
    ];
    km.expect(&words, 0)?;

    let containerd = Instance::start(sandbox, &Options::new(Version::V1_7))?;
    containerd.ctr(&["images", "pull", "--plain-http", &reference])?;
    let mounted = sandbox.folder("mounted")?;
    containerd.ctr(&[
        "images",
        "mount",
        &reference,
        &mounted.display().to_string(),
    ])?;
    let (ours, theirs) = (content(&to)?, content(&mounted.join(FOLDER))?);
    let names = |all: &BTreeMap<String, (Vec<u8>, bool)>| all.keys().cloned().collect::<Vec<_>>();
    ensure!(
        ours == theirs,
        "ours: {:?}; containerd's: {:?}",
        names(&ours),
        names(&theirs)
    );
    ensure!(ours.len() == 6, "{:?}", names(&ours));

    // The image's own layers are not kept, and not fetched again.
    let blobs = walk(&to.join(".store/oci/blobs"))?;
    for blob in blobs.iter().filter(|blob| blob.is_file()) {
        ensure!(blob.metadata()?.len() < 4096, "{} is left", blob.display());
    }
    proxy.take_requests();
    km.expect(&words, 0)?;
    let asked = proxy.take_requests();
    ensure!(
        asked
            .iter()
            .all(|request| request.path.contains("/manifests/")),
        "{asked:?}"
    );
    ensure!(content(&to)? == theirs);

    // A part of it, as an artifact of its own.
    let share = sandbox.folder("share")?;
    let (share_dir, path) = (share.display().to_string(), format!("{FOLDER}/share"));
    km.expect(
        &[
            "artifacts",
            "pull",
            "--image",
            &reference,
            "--path",
            &path,
            "--to",
            &share_dir,
        ],
        0,
    )?;
    ensure!(content(&share)? == content(&mounted.join(&path))?);
    let artifact = registry.reference("kata/guest:v1");
    km.expect(&["artifacts", "push", &share_dir, &artifact], 0)?;
    let guest = sandbox.folder("guest")?;
    let guest_dir = guest.display().to_string();
    km.expect(&["artifacts", "pull", &artifact, "--to", &guest_dir], 0)?;
    let (guest, share) = (content(&guest)?, content(&share)?);
    ensure!(names(&guest) == names(&share), "{:?}", names(&guest));
    Ok(())
}

fn what_an_image_may_not_hold(sandbox: &Sandbox) -> Result<()> {
    let registry = Registry::start(sandbox, registry::Options::default())?;
    let km = Km::find()?;
    let good = Layer::new().file("k/a", b"content")?.tar()?;
    let link = |target: &str| {
        let layer = Layer::new().link("k/out", EntryType::Symlink, target)?;
        layer.tar()
    };
    let through = Layer::new().file("k/dir/x", b"x")?.tar()?;
    let cases = [
        ("escape", link("../../etc/passwd")?, 6, "outside"),
        ("absolute", link("/etc/passwd")?, 6, "/etc/passwd"),
        (
            "pipe",
            Layer::new()
                .add("k/pipe", EntryType::Fifo, 0o644, b"")?
                .tar()?,
            6,
            "a fifo",
        ),
        (
            "setuid",
            Layer::new()
                .add("k/su", EntryType::Regular, 0o4755, b"su")?
                .tar()?,
            6,
            "setuid",
        ),
        (
            "hard",
            Layer::new()
                .link("k/hard", EntryType::Link, "etc/shadow")?
                .tar()?,
            6,
            "hard link",
        ),
        (
            "whiteout",
            Layer::new().file("k/.wh...", b"")?.tar()?,
            6,
            "whiteout",
        ),
        ("no-tar", vec![9; 4096], 6, "tar archive"),
        (
            "hidden",
            Layer::new().file(".wh.k", b"")?.tar()?,
            4,
            "no file in the folder /k",
        ),
    ];
    for (tag, layer, code, mention) in cases {
        upload::image(&registry.host(), IMAGE, tag, &[good.clone(), layer])?;
        let to = sandbox.folder(tag)?;
        let reference = registry.reference(&format!("{IMAGE}:{tag}"));
        let dir = to.display().to_string();
        let failed = km.expect(
            &[
                "artifacts",
                "pull",
                "--image",
                &reference,
                "--path",
                "/k",
                "--to",
                &dir,
            ],
            code,
        )?;
        ensure!(failed.stderr.contains(mention), "no {mention:?}: {failed}");
        ensure!(content(&to)?.is_empty(), "something of {tag} is there");
    }
    let dir = Layer::new().link("k/dir", EntryType::Symlink, "a")?.tar()?;
    upload::image(&registry.host(), IMAGE, "through", &[good, dir, through])?;
    let to = sandbox.folder("through")?.display().to_string();
    let reference = registry.reference(&format!("{IMAGE}:through"));
    let words = [
        "artifacts",
        "pull",
        "--image",
        &reference,
        "--path",
        "/k",
        "--to",
        &to,
    ];
    let failed = km.expect(&words, 6)?;
    let mention = failed.stderr.contains("k/dir") || failed.stderr.contains("under dir");
    ensure!(mention, "{failed}");
    // An artifact is no image.
    let folder = sandbox.folder("artifact")?;
    fs::write(folder.join("a"), "x")?;
    let artifact = registry.reference("kata/artifact:v1");
    km.expect(
        &[
            "artifacts",
            "push",
            &folder.display().to_string(),
            &artifact,
        ],
        0,
    )?;
    let failed = km.expect(&["artifacts", "pull", "--image", &artifact, "--to", &to], 4)?;
    ensure!(failed.stderr.contains("pull it as one"), "{failed}");
    let usage = km.expect(&["artifacts", "pull", "--image", &artifact], 4)?;
    usage
        .stderr
        .contains("--to")
        .then_some(())
        .context("no word of --to")
}
