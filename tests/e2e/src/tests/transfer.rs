//! How blobs come: taken up after a kill or a break, begun again when the registry's answer does not fit, as any user, below a
//! rate, and not at all where there is no room.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::http::Request;
use km_tests_e2e::km::Km;
use km_tests_e2e::process::{self, Finished};
use km_tests_e2e::proxy::{Fault, Proxy};
use km_tests_e2e::registry::{Options, Registry};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::wait;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::node::{SOON, walk};

pub(crate) const TESTS: &[Test] = &[
    ("a_killed_pull_goes_on", a_killed_pull_goes_on),
    ("a_broken_connection_goes_on", a_broken_connection_goes_on),
    (
        "what_is_there_is_asked_for_once",
        what_is_there_is_asked_for_once,
    ),
    ("a_wrong_answer_begins_again", a_wrong_answer_begins_again),
    ("a_user_without_root", a_user_without_root),
    ("a_rate_limit_holds", a_rate_limit_holds),
    ("no_room_is_seen_before", no_room_is_seen_before),
];

const GUEST: &str = "kata/guest:v1";

/// A user and group that own nothing: nobody and nogroup (base-passwd).
const NOBODY: u32 = 65534;

/// A registry behind a proxy with one artifact: a small kernel and an image.
struct Site {
    _registry: Registry,
    proxy: Proxy,
    km: Km,
    folder: PathBuf,
    image: Vec<u8>,
}

impl Site {
    fn start(sandbox: &Sandbox, image: usize) -> Result<Self> {
        let registry = Registry::start(sandbox, Options::default())?;
        let proxy = Proxy::start(sandbox, registry.port())?;
        let km = Km::find()?;
        let guest = sandbox.folder("guest")?;
        let image = noise(image);
        fs::write(guest.join("vmlinuz"), noise(300_000))?;
        fs::write(guest.join("kata.img"), &image)?;
        let source = guest.display().to_string();
        km.expect(
            &["artifacts", "push", &source, &registry.reference(GUEST)],
            0,
        )?;
        // Tests remove it in between, and a name that is free is given to the next who asks.
        let folder = sandbox.folder("pulled")?.join("guest");
        fs::create_dir(&folder)?;
        Ok(Self {
            _registry: registry,
            proxy,
            km,
            folder,
            image,
        })
    }

    fn words(&self) -> Vec<String> {
        let reference = self.proxy.reference(GUEST);
        let folder = self.folder.display().to_string();
        ["artifacts", "pull", &reference, "--to", &folder]
            .map(str::to_owned)
            .to_vec()
    }

    fn pull(&self) -> Result<Finished> {
        self.km.expect(&self.words(), 0)
    }

    /// That the image is what was published, and nothing unfinished is left.
    fn is_whole(&self) -> Result<()> {
        let image = fs::read(self.folder.join("kata.img"))?;
        ensure!(image == self.image, "the image is not what was published");
        for folder in ["partial", "tmp"] {
            let folder = self.folder.join(".store").join(folder);
            let mut left = walk(&folder)?;
            left.retain(|path| path.is_file());
            ensure!(left.is_empty(), "unfinished files are left: {left:?}");
        }
        Ok(())
    }

    /// A fault that meets the image, whose blob is the largest.
    fn fault(&self, fault: Fault, times: u32) {
        let digest = km_tests_e2e::images::sha256(&self.image);
        self.proxy.rule(&digest, fault, times);
    }

    /// The requests for the image since the last call.
    fn requests(&self) -> Vec<Request> {
        let digest = km_tests_e2e::images::sha256(&self.image);
        let mut requests = self.proxy.take_requests();
        requests.retain(|request| request.path.contains(&digest));
        requests
    }

    /// Bytes of the image that were written, as the file system tells them.
    fn written(&self) -> Result<u64> {
        let digest = km_tests_e2e::images::sha256(&self.image).replace(':', "-");
        let path = self.folder.join(".store/partial").join(digest);
        let file = fs::File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let mut written = 0;
        let mut at = 0;
        loop {
            let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => return Ok(written),
                Err(errno) => return Err(io::Error::from(errno).into()),
            };
            at = rustix::fs::seek(&file, SeekFrom::Hole(data))?;
            written += at - data;
        }
    }
}

/// Bytes that are the same each time and in no two blocks alike, so that a piece in a wrong place shows.
fn noise(size: usize) -> Vec<u8> {
    // xorshift64* (Vigna 2016).
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ size as u64;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        bytes.extend_from_slice(&next());
    }
    bytes.truncate(size);
    bytes
}

fn range(request: &Request) -> Option<u64> {
    let range = request.header("Range")?.strip_prefix("bytes=")?;
    range.split('-').next()?.parse().ok()
}

fn a_killed_pull_goes_on(sandbox: &Sandbox) -> Result<()> {
    const SIZE: usize = 64 << 20;
    let half = SIZE as u64 / 2;
    let site = Site::start(sandbox, SIZE)?;
    site.fault(Fault::Stall(half, Duration::from_secs(60)), 1);
    let mut first = site
        .km
        .command(&site.words())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let reached = wait::until("half of the image to be written", SOON, || {
        let written = site.written()?;
        ensure!(written + (1 << 20) > half, "{written} bytes are");
        Ok(())
    });
    first.kill()?;
    first.wait()?;
    reached?;
    ensure!(
        !site.folder.join("kata.img").exists(),
        "half an image under its final name"
    );
    site.proxy.take_requests();
    site.proxy.take_bytes();

    site.pull()?;
    let again = site.proxy.take_bytes();
    let most = SIZE as u64 * 52 / 100;
    ensure!(again <= most, "{again} bytes were fetched again");
    let starts: Vec<_> = site.requests().iter().map(range).collect();
    let ranged = !starts.is_empty() && starts.iter().all(|start| start.is_some_and(|at| at > 0));
    ensure!(ranged, "the image was asked for from {starts:?} on");
    site.is_whole()
}

fn what_is_there_is_asked_for_once(sandbox: &Sandbox) -> Result<()> {
    let site = Site::start(sandbox, 3_000_000)?;
    site.pull()?;
    let digest = first_word(&site.pull()?.stdout);
    let inode = fs::metadata(site.folder.join("kata.img"))?.ino();
    site.proxy.take_requests();
    site.proxy.take_bytes();
    site.pull()?;
    let asked = site.proxy.take_requests();
    let bytes = site.proxy.take_bytes();
    ensure!(
        asked.len() == 1 && asked[0].header("If-None-Match") == Some(&format!("\"{digest}\"")),
        "{asked:?}"
    );
    ensure!(bytes == 0, "{bytes} bytes came");
    ensure!(fs::metadata(site.folder.join("kata.img"))?.ino() == inode);

    let pinned = format!("{}@{digest}", site.proxy.reference("kata/guest"));
    let folder = site.folder.display().to_string();
    let words = ["artifacts", "pull", &pinned, "--to", &folder];
    site.km.expect(&words, 0)?;
    site.proxy.take_requests();
    site.km.expect(&words, 0)?;
    let asked = site.proxy.take_requests();
    ensure!(asked.is_empty(), "for a digest that is there: {asked:?}");

    // What is damaged is no answer to the question.
    fs::remove_dir_all(site.folder.join(".store/files"))?;
    site.pull()?;
    site.is_whole()
}

fn first_word(text: &str) -> String {
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn a_broken_connection_goes_on(sandbox: &Sandbox) -> Result<()> {
    const SIZE: usize = 8 << 20;
    const CUT: u64 = 3_000_000;
    let site = Site::start(sandbox, SIZE)?;
    for (nth, fault) in [Fault::Reset(CUT), Fault::Truncate(CUT)]
        .into_iter()
        .enumerate()
    {
        fs::remove_dir_all(&site.folder)?;
        site.proxy.clear();
        site.fault(fault, 1);
        site.proxy.take_requests();
        site.proxy.take_bytes();
        site.pull()?;
        site.is_whole()?;
        let requests = site.requests();
        let starts: Vec<_> = requests.iter().map(range).collect();
        ensure!(
            starts.len() == 2 && starts[0].is_none(),
            "fault {nth}: the image was asked for from {starts:?} on"
        );
        // A reset drops what the program has not read yet (tcp(7)): how much it could keep is a matter of luck.
        let luck = matches!(fault, Fault::Reset(_));
        ensure!(
            luck || starts[1].is_some_and(|at| at > 0),
            "fault {nth}: the image was asked for from {starts:?} on"
        );
        let same = requests[1].header("If-Range").is_some();
        ensure!(
            same == starts[1].is_some(),
            "it asked for the rest of whatever is there"
        );
        let bytes = site.proxy.take_bytes();
        let again = if luck { CUT } else { 0 };
        let most = SIZE as u64 + again + (1 << 20);
        ensure!(bytes < most, "fault {nth}: {bytes} bytes came in all");
    }
    Ok(())
}

/// The second answer is not the rest of the first, in each way that can be.
fn a_wrong_answer_begins_again(sandbox: &Sandbox) -> Result<()> {
    const SIZE: usize = 4 << 20;
    let site = Site::start(sandbox, SIZE)?;
    let image = km_tests_e2e::images::sha256(&site.image);
    let broken_once = |what: &str| -> Result<()> {
        site.fault(Fault::Truncate(2_000_000), 1);
        site.pull().with_context(|| format!("with {what}"))?;
        site.is_whole().with_context(|| format!("with {what}"))?;
        site.proxy.clear();
        fs::remove_dir_all(&site.folder)?;
        Ok(())
    };
    for range in ["bytes 1-4194303/4194304", "bytes 0-4194303/9999999", "none"] {
        // The first answer, which is whole, has none; two more are wrong.
        site.proxy.header(&image, "Content-Range", range, 2);
        broken_once(range)?;
    }
    // What the registry called the bytes at first is not what it calls them now: it sends all of them.
    site.proxy.header(&image, "ETag", "\"of another time\"", 1);
    site.proxy.take_requests();
    broken_once("another ETag")?;
    let named = site
        .requests()
        .iter()
        .any(|request| request.header("If-Range") == Some("\"of another time\""));
    ensure!(named, "it did not say what it has");
    // The rest is of something else: the digest tells, and the whole is fetched once more.
    site.fault(Fault::Reset(2_000_000), 1);
    site.fault(Fault::Corrupt(1_000_000), 1);
    site.pull()?;
    site.is_whole()
}

/// Runs a command as nobody, without any group or capability.
fn as_nobody(command: &Command, deadline: Duration) -> Result<Finished> {
    let id = NOBODY.to_string();
    let mut setpriv = Command::new("setpriv");
    setpriv
        .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
        .args(["--bounding-set", "-all", "--no-new-privs", "--"])
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear()
        .env("HOME", "/nonexistent")
        .env("PATH", "/usr/bin:/bin");
    process::run(&mut setpriv, deadline)
}

fn a_user_without_root(sandbox: &Sandbox) -> Result<()> {
    let mut site = Site::start(sandbox, 6 << 20)?;
    // The way to the user's folder, and a program that everybody can run.
    fs::set_permissions(sandbox.work(), fs::Permissions::from_mode(0o711))?;
    let program = sandbox.folder("bin")?.join("kata-manager");
    fs::copy(site.km.binary(), &program)?;
    site.km = Km::at(&program);
    fs::set_permissions(&site.folder, fs::Permissions::from_mode(0o700))?;
    chown(&site.folder, Some(NOBODY), Some(NOBODY))?;
    let pull = || as_nobody(&site.km.command(&site.words()), Duration::from_secs(60));

    pull()?.success()?;
    site.is_whole()?;
    for path in walk(&site.folder)? {
        let owner = path.symlink_metadata()?.uid();
        ensure!(owner == NOBODY, "{} is {owner}'s", path.display());
    }
    site.proxy.take_requests();
    pull()?.success()?;
    let asked = site.requests();
    ensure!(asked.is_empty(), "what is here was asked for: {asked:?}");

    // A folder that is not the user's: what, where, why.
    site.folder = sandbox.folder("roots")?;
    let failed = as_nobody(&site.km.command(&site.words()), Duration::from_secs(60))?;
    let named = site.folder.display().to_string();
    ensure!(
        failed.code() == Some(7)
            && failed.stderr.contains(&named)
            && failed.stderr.contains("ermission denied"),
        "{failed}"
    );
    Ok(())
}

fn a_rate_limit_holds(sandbox: &Sandbox) -> Result<()> {
    const SIZE: usize = 4 << 20;
    let site = Site::start(sandbox, SIZE)?;
    let mut words = site.words();
    words.extend(["--rate-limit", "4000000"].map(str::to_owned));
    let finished = site.km.expect(&words, 0)?;
    site.is_whole()?;
    // The first piece is not waited for.
    let least = Duration::from_millis(900);
    ensure!(finished.took >= least, "it took {:?}", finished.took);
    Ok(())
}

fn no_room_is_seen_before(sandbox: &Sandbox) -> Result<()> {
    let mut site = Site::start(sandbox, 12 << 20)?;
    let disk = sandbox.small_disk("disk", 8)?;
    site.folder = disk.join("pulled");
    let failed = site.km.expect(&site.words(), 7)?;
    for word in [&*site.folder.display().to_string(), "bytes are needed"] {
        ensure!(
            failed.stderr.contains(word),
            "not a word of {word}: {failed}"
        );
    }
    let asked = site.requests();
    ensure!(asked.is_empty(), "the image was asked for: {asked:?}");
    let files = walk(&site.folder)?
        .iter()
        .filter_map(|path| size(path))
        .sum::<u64>();
    ensure!(
        files < 1 << 20,
        "{files} bytes are left on a disk that is full"
    );
    Ok(())
}

fn size(path: &Path) -> Option<u64> {
    let meta = path.symlink_metadata().ok()?;
    meta.is_file().then_some(meta.len())
}
