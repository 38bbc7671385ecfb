//! Kill -9 at the state changes of `apply` and `uninstall`: what is left is whole, and the next command converges.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;

use super::node::{DEMO, Node, names};

pub(crate) const TESTS: &[Test] = &[
    ("apply_is_killed", apply_is_killed),
    ("uninstall_is_killed", uninstall_is_killed),
    ("taking_over_is_killed", taking_over_is_killed),
];

/// Set to kill after every single state change, however long that takes; else only some of those are met that concern no
/// link, journal or configuration, and the whole ends in about [`BUDGET`].
const EVERY: &str = "KM_E2E_EVERY_KILL";

/// How long kills that are not the important ones go on for each command.
const BUDGET: Duration = Duration::from_secs(40);

/// What tells from a traced state change that it is one of those that recovery is about.
const IMPORTANT: &[&str] = &["journal", "config.toml", "containerd-config", "/demo\""];

/// The numbers of the state changes after which to kill: the important ones, then the others from far apart to near.
fn moments(changes: &[String]) -> (Vec<usize>, Vec<usize>) {
    let (important, others): (Vec<usize>, Vec<usize>) = (1..=changes.len())
        .partition(|&n| IMPORTANT.iter().any(|word| changes[n - 1].contains(word)));
    let mut spread = Vec::new();
    let mut stride = others.len().next_power_of_two();
    while stride > 0 {
        spread.extend(others.iter().step_by(stride));
        stride /= 2;
    }
    let mut seen = BTreeSet::new();
    spread.retain(|n| seen.insert(*n));
    (important, spread)
}

/// Calls `kill` with each moment, and says how many there were. `kill` gives false when the command ended by itself before.
#[expect(
    clippy::print_stdout,
    reason = "a test that takes samples says how many"
)]
fn at_each(
    what: &str,
    changes: &[String],
    mut kill: impl FnMut(usize) -> Result<bool>,
) -> Result<()> {
    let started = Instant::now();
    let mut kill = |n: usize| {
        kill(n).with_context(|| format!("{what} killed after change {n}, about {}", changes[n - 1]))
    };
    // Changes of several threads at once may stop the program once only, so that the last number is not known beforehand.
    let mut last = changes.len();
    while !kill(last)? {
        last -= 1;
        ensure!(
            last > changes.len() / 2,
            "{what} cannot be killed late: {changes:?}"
        );
    }
    let lost = changes.len() - last;
    let (important, others) = moments(changes);
    let important: BTreeSet<usize> = important
        .iter()
        .flat_map(|n| n.saturating_sub(lost).max(1)..=*n)
        .filter(|n| *n < last)
        .collect();
    let every = std::env::var_os(EVERY).is_some();
    let mut kills = 1;
    for n in &important {
        kills += usize::from(kill(*n)?);
    }
    ensure!(
        kills > important.len() / 2,
        "{what} was killed {kills} times only"
    );
    for n in others
        .iter()
        .filter(|n| **n < last && !important.contains(n))
    {
        if !every && started.elapsed() > BUDGET {
            break;
        }
        kills += usize::from(kill(*n)?);
    }
    println!(
        "{what} survived {kills} kills at its {} state changes, {} of them important; {:.0} s",
        changes.len(),
        important.len() + 1,
        started.elapsed().as_secs_f32()
    );
    Ok(())
}

/// containerd's configuration is one of two, whole, and so is everything under a final name.
fn whole(node: &Node, one: &[u8], other: &[u8]) -> Result<()> {
    let now = fs::read(node.containerd.config())?;
    ensure!(
        now == one || now == other,
        "containerd's configuration is neither the old nor the new one:\n{}",
        String::from_utf8_lossy(&now)
    );
    node.store_is_whole()?;
    node.containerd.wait_up()
}

/// The configuration before and after, and the changes that each command makes.
struct Known {
    before: Vec<u8>,
    after: Vec<u8>,
    apply: Vec<String>,
    uninstall: Vec<String>,
}

fn rehearse(sandbox: &Sandbox, node: &Node) -> Result<Known> {
    let before = fs::read(node.containerd.config())?;
    let (applied, apply) = node.km.traced(sandbox, &["apply"])?;
    applied.success()?;
    let after = fs::read(node.containerd.config())?;
    let (removed, uninstall) = node.km.traced(sandbox, &["uninstall"])?;
    removed.success()?;
    node.is_clean(&before)?;
    Ok(Known {
        before,
        after,
        apply,
        uninstall,
    })
}

fn apply_is_killed(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let known = rehearse(sandbox, &node)?;
    at_each("apply", &known.apply, |n| {
        let killed = node.km.killed_after(sandbox, &["apply"], n)?;
        whole(&node, &known.before, &known.after)?;
        let finished = node.apply(&[DEMO])?;
        ensure!(
            fs::read(node.containerd.config())? == known.after,
            "the next apply ended elsewhere: {finished}"
        );
        node.store_is_whole()?;
        let again = node.km.expect(&["apply"], 0)?;
        ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
        node.uninstall_after_a_kill(&known.before)?;
        Ok(killed)
    })
}

fn uninstall_is_killed(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    let known = rehearse(sandbox, &node)?;
    at_each("uninstall", &known.uninstall, |n| {
        node.apply(&[DEMO])?;
        let killed = node.km.killed_after(sandbox, &["uninstall"], n)?;
        whole(&node, &known.before, &known.after)?;
        if n % 2 == 0 {
            // Who changes their mind gets a working node too.
            node.apply(&[DEMO])?;
        }
        node.uninstall_after_a_kill(&known.before)?;
        Ok(killed)
    })
}

/// A foreign handler and a folder under the class's name: both must come back, whatever was killed between.
fn taking_over_is_killed(sandbox: &Sandbox) -> Result<()> {
    let options = Options::new(Version::V1_7).handler(DEMO, "io.containerd.runc.v2");
    let node = Node::start(sandbox, &options)?;
    let original = fs::read(node.containerd.config())?;
    let file = node.artifacts.join(DEMO).join("theirs");
    fs::create_dir_all(node.artifacts.join(DEMO))?;
    fs::write(&file, "theirs")?;
    let given_back = || -> Result<()> {
        let removed = node.km.expect(&["uninstall"], 0)?;
        ensure!(
            fs::read(&file).is_ok_and(|text| text == b"theirs"),
            "the folder is not back: {removed}"
        );
        ensure!(
            names(&node.artifacts)? == [DEMO],
            "more is left than the folder: {removed}"
        );
        let now = fs::read(node.containerd.config())?;
        ensure!(
            now == original,
            "not the original:\n{}\n{removed}",
            String::from_utf8_lossy(&now)
        );
        ensure!(node.containerd.cri().handlers()? == [DEMO, "runc"]);
        Ok(())
    };
    let (applied, changes) = node.km.traced(sandbox, &["apply", "--adopt"])?;
    applied.success()?;
    let adopted = fs::read(node.containerd.config())?;
    given_back()?;
    at_each("apply --adopt", &changes, |n| {
        let killed = node.km.killed_after(sandbox, &["apply", "--adopt"], n)?;
        let now = fs::read(node.containerd.config())?;
        ensure!(
            now == original || now == adopted,
            "neither old nor new:\n{}",
            String::from_utf8_lossy(&now)
        );
        node.store_is_whole()?;
        node.containerd.wait_up()?;
        if n % 3 != 0 {
            node.km.expect(&["apply", "--adopt"], 0)?;
            ensure!(fs::read(node.containerd.config())? == adopted);
            ensure!(node.artifacts.join(DEMO).is_symlink());
        }
        given_back()?;
        Ok(killed)
    })
}
