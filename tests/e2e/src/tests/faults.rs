//! Faults at random: kill -9, and system calls that fail or do half of what was asked, anywhere in what changes the store.
//!
//! After each: nothing stands under a final name that is not whole, the live generation was never away, and the same command
//! again ends exactly where it would have ended, with nothing left over.
//!
//! Faults are drawn from the calls of a run without one. The seed is printed; the same seed draws the same faults.

mod observer;
mod picture;
mod registry;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use flate2::Compression;
use flate2::write::GzEncoder;
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::tracer::{self, Call, Fault, Injection, Traced};
use km_tests_e2e::upload::{self, Layer};
use rustix::io::Errno;

use self::observer::Observer;
use self::picture::{Picture, copy};
use super::node::{Class, DEMO, Node};

pub(crate) const TESTS: &[Test] = &[
    ("pull", pull),
    ("switch", switch),
    ("rollback", rollback),
    ("gc", gc),
    ("import", import),
    ("registry", registry::registry),
];

/// How many kills there are over all commands.
const KILLS: &str = "KM_FAULT_KILLS";

/// Commands that are killed.
const COMMANDS: usize = 5;

/// Kills without [`KILLS`].
const KILLS_DEFAULT: usize = 30;

/// How many times each kind of call goes wrong in each way; without it, each kind once in one way.
const ROUNDS: &str = "KM_FAULT_ROUNDS";

/// The seed; it is printed.
const SEED: &str = "KM_FAULT_SEED";

/// Without [`SEED`]: whoever changes nothing meets the same faults. `make faults` draws another each time.
const SEED_DEFAULT: u64 = 3;

/// One fault alone, as a failure prints it: `pull:123:kill`, `switch:rename:2:EIO`.
const ONLY: &str = "KM_FAULT";

/// The tag that moves.
const MOVING: (&str, &str) = ("kata/moving", "v1");

/// Bytes of each version's kernel: more than is dropped of a broken transfer.
const KERNEL: usize = 3 << 20;

/// Files in each version's archive: more than are synced one by one.
const MODULES: usize = 40;

/// Ways in which calls go wrong.
const ERRORS: &[(&str, Errno)] = &[
    ("EIO", Errno::IO),
    ("ENOSPC", Errno::NOSPC),
    (LIE, Errno::NOENT),
];

/// An answer that also says something: that a file is not there.
const LIE: &str = "ENOENT";

static SURVIVED: AtomicUsize = AtomicUsize::new(0);

/// How many faults were survived so far, over all tests.
pub(crate) fn survived() -> usize {
    SURVIVED.load(Ordering::Relaxed)
}

fn number(name: &str) -> Result<Option<u64>> {
    let Some(text) = std::env::var_os(name) else {
        return Ok(None);
    };
    let text = text.to_string_lossy();
    let number = text.parse().with_context(|| format!("{name}={text}"))?;
    Ok(Some(number))
}

/// Publishes a version: a kernel and modules of its own, an image that all share. Gives its manifest's digest.
fn publish(node: &Node, version: u8) -> Result<String> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for module in 0..MODULES {
        let bytes = format!("module {module} of version {version}\n").repeat(50);
        let mut header = tar::Header::new_ustar();
        header.set_mode(if module % 8 == 0 { 0o755 } else { 0o644 });
        header.set_size(bytes.len() as u64);
        tar.append_data(
            &mut header,
            format!("modules/{module}.ko"),
            bytes.as_bytes(),
        )?;
    }
    let modules = tar.into_inner()?.finish()?;
    let kernel = vec![version; KERNEL];
    let raw = |title, bytes| Layer {
        media_type: "application/octet-stream",
        bytes,
        title: Some(title),
    };
    let layers = [
        raw("vmlinuz", &kernel),
        raw("kata.img", &[7; 200_000]),
        Layer {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
            bytes: &modules,
            title: None,
        },
    ];
    upload::artifact(&node.registry.host(), MOVING.0, MOVING.1, &layers)
}

fn reference(node: &Node) -> String {
    node.registry
        .reference(&format!("{}:{}", MOVING.0, MOVING.1))
}

/// A node with [`DEMO`] at a generation of each of `versions`.
fn with_versions(sandbox: &Sandbox, versions: u8) -> Result<Node> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    node.configure(&[Class::runc(DEMO, reference(&node))])?;
    for version in 1..=versions {
        publish(&node, version)?;
        node.apply(&[DEMO])?;
    }
    Ok(node)
}

fn pull(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 1)?;
    publish(&node, 2)?;
    let reference = reference(&node);
    endure(sandbox, &node, "pull", &["artifacts", "pull", &reference])
}

fn switch(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 2)?;
    publish(&node, 3)?;
    endure(sandbox, &node, "switch", &["apply"])
}

fn rollback(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 2)?;
    // Without a number a second one would go back further.
    endure(sandbox, &node, "rollback", &["rollback", DEMO, "--to", "1"])
}

fn gc(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 1)?;
    // Two generations stay for a time because somebody has them open; then they are garbage.
    let mut open = Vec::new();
    for version in 2..=5 {
        open.push(fs::File::open(node.artifacts.join(DEMO).join("vmlinuz"))?);
        publish(&node, version)?;
        node.apply(&[DEMO])?;
    }
    drop(open);
    // And something that never was in a generation.
    publish(&node, 9)?;
    node.km
        .expect(&["artifacts", "pull", &reference(&node)], 0)?;
    endure(sandbox, &node, "gc", &["artifacts", "gc"])
}

fn import(sandbox: &Sandbox) -> Result<()> {
    let node = with_versions(sandbox, 1)?;
    node.configure_with(&[Class::runc(DEMO, reference(&node))], "keepBlobs: true\n")?;
    let before = sandbox.folder("kept")?.join("store");
    copy(&node.artifacts, &before)?;
    publish(&node, 2)?;
    let reference = reference(&node);
    node.km.expect(&["artifacts", "pull", &reference], 0)?;
    let file = sandbox.folder("carried")?.join("guest.tar");
    let file = file.display().to_string();
    let export = ["artifacts", "export", &file, &reference];
    node.km.expect(&export, 0)?;
    node.configure(&[Class::runc(DEMO, reference)])?;
    fs::remove_dir_all(&node.artifacts)?;
    copy(&before, &node.artifacts)?;
    endure(sandbox, &node, "import", &["artifacts", "import", &file])
}

/// A fault to inject, and how to ask for it alone.
struct Case {
    injection: Injection,
    label: String,
}

impl Case {
    fn kill(what: &str, nth: usize) -> Case {
        Case {
            label: format!("{what}:{nth}:kill"),
            injection: Injection {
                call: None,
                nth,
                fault: Fault::Kill,
                lasting: false,
            },
        }
    }

    fn wrong(
        what: &str,
        call: &str,
        nth: usize,
        (way, fault): (&str, Fault),
        lasting: bool,
    ) -> Case {
        let from = if lasting { "+" } else { "" };
        Case {
            label: format!("{what}:{call}:{nth}{from}:{way}"),
            injection: Injection {
                call: Some(call.to_owned()),
                nth,
                fault,
                lasting,
            },
        }
    }

    /// The opposite of its label.
    fn parse(label: &str) -> Result<Case> {
        let parts: Vec<&str> = label.split(':').collect();
        match parts[..] {
            [what, nth, "kill"] => Ok(Case::kill(what, nth.parse()?)),
            [what, call, nth, way] => {
                let fault = ways(call).into_iter().find(|(known, _)| *known == way);
                let fault = fault.with_context(|| format!("{call} does not go wrong by {way}"))?;
                let (nth, lasting) = nth
                    .strip_suffix('+')
                    .map_or((nth, false), |nth| (nth, true));
                Ok(Case::wrong(what, call, nth.parse()?, fault, lasting))
            }
            _ => anyhow::bail!(
                "{ONLY}={label}: not of the form pull:123:kill or switch:rename:2:EIO"
            ),
        }
    }
}

/// How a call can go wrong.
fn ways(call: &str) -> Vec<(&'static str, Fault)> {
    let mut ways: Vec<_> = ERRORS
        .iter()
        .filter(|(name, _)| *name != LIE || tracer::names_something(call))
        .map(|(name, errno)| (*name, Fault::Error(*errno)))
        .collect();
    if tracer::moves_bytes(call) {
        ways.push(("short", Fault::Short));
    }
    ways
}

/// Draws faults from the calls of a whole run.
fn draw(what: &str, calls: &[Call], rng: &mut Rng) -> Result<Vec<Case>> {
    if let Some(only) = std::env::var_os(ONLY) {
        let only = only.to_string_lossy().into_owned();
        let mine = only.split(':').next() == Some(what);
        return mine.then(|| Case::parse(&only)).into_iter().collect();
    }
    let kills = number(KILLS)?.map_or(KILLS_DEFAULT, |kills| kills as usize);
    let kills = kills.div_ceil(COMMANDS);
    let mut cases: Vec<_> = (0..kills)
        .map(|_| Case::kill(what, rng.usize(1..=calls.len())))
        .collect();
    for (name, there) in picture::kinds(calls) {
        let ways = ways(name);
        let (chosen, rounds) = match number(ROUNDS)? {
            Some(rounds) => (ways, rounds),
            None => (vec![ways[rng.usize(..ways.len())]], 1),
        };
        for way in chosen {
            for _ in 0..rounds {
                let nth = rng.usize(1..=there);
                // A disk may fail from now on; a file that is there does not go on being absent.
                let lasting = rng.bool() && way.0 != LIE;
                cases.push(Case::wrong(what, name, nth, way, lasting));
            }
        }
    }
    Ok(cases)
}

/// Lets a command suffer faults, each from the same beginning.
#[expect(
    clippy::print_stdout,
    reason = "a test that takes samples says how many"
)]
fn endure(sandbox: &Sandbox, node: &Node, what: &str, args: &[&str]) -> Result<()> {
    let began = Instant::now();
    let seed = number(SEED)?.unwrap_or(SEED_DEFAULT);
    // Another sequence for each command.
    let mut rng = Rng::with_seed(
        what.bytes()
            .fold(seed, |seed, byte| seed.rotate_left(7) ^ u64::from(byte)),
    );
    let before = sandbox.folder("before")?.join("store");
    copy(&node.artifacts, &before)?;
    let whole = node.km.injected(args, &node.artifacts, None)?;
    ensure!(
        whole.finished.status.success(),
        "without a fault it {}",
        whole.finished
    );
    let after = Picture::take(&node.artifacts)?;
    let kinds = picture::kinds(&whole.calls).len();
    let mut cases: VecDeque<Case> = draw(what, &whole.calls, &mut rng)?.into();
    let drawn = cases.len();
    let endured = Endured {
        node,
        args,
        before,
        after,
    };
    let (mut kills, mut wrong, mut harmless, mut late) = (0, 0, 0, 0);
    let mut failures = String::new();
    while let Some(case) = cases.pop_front() {
        match endured.one(&case) {
            Ok(Suffered::Killed) => kills += 1,
            Ok(Suffered::Failed) => wrong += 1,
            Ok(Suffered::Shrugged) => harmless += 1,
            Ok(Suffered::Missed) => {
                late += 1;
                ensure!(
                    late <= drawn / 4 + 1,
                    "{late} of {drawn} faults came after the end"
                );
                if case.injection.fault == Fault::Kill {
                    cases.push_back(Case::kill(what, rng.usize(1..=whole.calls.len())));
                }
            }
            Err(error) => writeln!(failures, "{ONLY}={}: {error:#}\n", case.label)?,
        }
    }
    println!(
        "{what} survived {kills} kills and {} faults at {kinds} kinds of calls, {harmless} of them without failing; \
         {late} came after its end; {SEED}={seed}; {} calls; {:.0} s",
        wrong + harmless,
        whole.calls.len(),
        began.elapsed().as_secs_f32()
    );
    SURVIVED.fetch_add(kills + wrong + harmless, Ordering::Relaxed);
    ensure!(failures.is_empty(), "{SEED}={seed}\n{failures}");
    Ok(())
}

/// What became of a command.
enum Suffered {
    Killed,
    /// It failed, and said why.
    Failed,
    /// It did its work all the same.
    Shrugged,
    /// It made fewer calls this time.
    Missed,
}

/// A command and the two states between which it leads.
struct Endured<'a> {
    node: &'a Node,
    args: &'a [&'a str],
    before: PathBuf,
    after: Picture,
}

impl Endured<'_> {
    fn one(&self, case: &Case) -> Result<Suffered> {
        let node = self.node;
        fs::remove_dir_all(&node.artifacts)?;
        copy(&self.before, &node.artifacts)?;
        let observer = Observer::start(&node.artifacts.join(DEMO));
        let traced = node
            .km
            .injected(self.args, &node.artifacts, Some(&case.injection))?;
        node.store_is_whole()
            .with_context(|| format!("right after it, when it {}", traced.finished))?;
        let suffered = judge(case, &traced)?;
        let again = node.km.expect(self.args, 0);
        let again =
            again.with_context(|| format!("the same again, after it {}", traced.finished))?;
        node.store_is_whole()?;
        let now = Picture::take(&node.artifacts)?;
        observer
            .end()
            .with_context(|| format!("the command {}", traced.finished))?;
        let differences = self.after.differences(&now);
        // Who is told that something is gone rightly believes it, and may make another or leave it: whole, but elsewhere.
        ensure!(
            differences.is_empty() || case.label.ends_with(LIE),
            "the same again ended elsewhere:\n{}\nfirst it {}\nthen it {again}",
            differences.join("\n"),
            traced.finished
        );
        Ok(suffered)
    }
}

/// How the command took the fault: killed, or done, or failed with an error that says what and where.
fn judge(case: &Case, traced: &Traced) -> Result<Suffered> {
    let finished = &traced.finished;
    let Some(hit) = &traced.hit else {
        ensure!(finished.status.success(), "without a fault it {finished}");
        return Ok(Suffered::Missed);
    };
    match (case.injection.fault, finished.code()) {
        (Fault::Kill, None) => return Ok(Suffered::Killed),
        (Fault::Short, Some(0)) | (Fault::Error(_), Some(0)) => return Ok(Suffered::Shrugged),
        (Fault::Error(_), Some(3..=9)) => {}
        _ => anyhow::bail!("at {hit} it {finished}"),
    }
    let said = &finished.stderr;
    ensure!(
        said.starts_with("error: ") || said.contains("\nerror: "),
        "at {hit}, no line begins with `error: `: it {finished}"
    );
    Ok(Suffered::Failed)
}
