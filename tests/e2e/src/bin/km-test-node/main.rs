//! The tests that need a GPU node: one boot a shape, each in steps with their times. `cargo run -p km-tests-e2e --bin km-test-node
//! -- [FILTER]`.
//!
//! With `KM_NODE_IOMMUFD` set it is the one test that needs a kernel with iommufd, which is then built.
//!
//! They need root. What a machine cannot run is reported as ignored, with the reason; set `KM_E2E_REQUIRE=1` where that must
//! count as a failure.

mod container;
mod containerd;
mod devices;
mod doctor;
mod hardware;
mod inside;
mod iommufd;
mod nested;
mod plugin;
mod pods;
mod shown;
mod specs;
mod verity;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use km_tests_e2e::node_in_a_box::PARTS;
use km_tests_e2e::node_in_a_box::image::Image;
use km_tests_e2e::sandbox::{self, Entered, Sandbox};
use km_tests_e2e::suite;
use libtest_mimic::{Arguments, Trial};

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    let iommufd = std::env::var_os("KM_NODE_IOMMUFD").is_some();
    let entered = match arguments.list {
        true => Entered::Unavailable("only listed".to_owned()),
        false => enter(iommufd)?,
    };
    let sandbox = match entered {
        Entered::Left(code) => return Ok(code),
        Entered::Inside(sandbox) => Ok(sandbox),
        Entered::Unavailable(reason) => {
            let required = std::env::var_os("KM_E2E_REQUIRE").is_some() && !arguments.list;
            ensure!(
                !required,
                "this machine cannot run the node tests: {reason}"
            );
            Err(reason)
        }
    };
    // A node has two processors, and keeps one of ours busy: two at a time are quicker than one after the other.
    arguments.test_threads.get_or_insert(2);
    let subjects: &[(&str, &[suite::Test])] = match iommufd {
        true => &[("shapes", iommufd::TESTS)],
        false => &[("shapes", hardware::TESTS), ("node", containerd::TESTS)],
    };
    let all = subjects
        .iter()
        .flat_map(|(subject, tests)| tests.iter().map(move |test| (*subject, *test)));
    let trials: Vec<Trial> = all
        .map(|(subject, (name, test))| {
            let test = move |sandbox: &Sandbox| unless_it_falls(name, test, sandbox);
            suite::trial(subject, (name, test), &sandbox)
        })
        .collect();
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}

/// What the console of a node has whose kernel fell over, or found its file system, which was new at its start, to be broken.
const FALLEN: [&str; 2] = ["Kernel panic - not syncing", "Corrupt filesystem"];

/// Does a test; once more when the node's own kernel fell over, which its console says. A software processor with two threads now and
/// then runs old code where the kernel has just written new (`int3` without anybody who wants it, a lock that is none). The output says so.
fn unless_it_falls(name: &str, test: fn(&Sandbox) -> Result<()>, sandbox: &Sandbox) -> Result<()> {
    let Err(error) = test(sandbox) else {
        return Ok(());
    };
    let said = format!("{error:#}");
    if !FALLEN.iter().any(|words| said.contains(words)) {
        return Err(error);
    }
    // Nobody to tell is no failure.
    let _ = writeln!(
        std::io::stderr(),
        "{name:>12}            the node's kernel fell over, once more: {said}"
    );
    test(sandbox)
}

/// Makes what a node boots from, where this machine can, and enters the sandbox.
fn enter(iommufd: bool) -> Result<Entered> {
    // Without root nothing can be made, and the sandbox says so.
    if !sandbox::is_inside() && rustix::process::geteuid().is_root() {
        let kernel = || match iommufd {
            true => Image::make_iommufd_kernel(),
            false => Ok(()),
        };
        if let Err(reason) = Image::make().and_then(|()| kernel()) {
            return Ok(Entered::Unavailable(format!("{reason:#}")));
        }
    }
    sandbox::enter(PARTS)
}
