//! The tests that need a GPU node: one boot a shape, each in steps with their times. `cargo run -p km-tests-e2e --bin km-test-node
//! -- [FILTER]`.
//!
//! They need root. What a machine cannot run is reported as ignored, with the reason; set `KM_E2E_REQUIRE=1` where that must
//! count as a failure.

mod container;
mod containerd;
mod devices;
mod doctor;
mod hardware;
mod nested;
mod shown;
mod specs;
mod verity;

use std::process::ExitCode;

use anyhow::{Result, bail};
use km_tests_e2e::node_in_a_box::PARTS;
use km_tests_e2e::node_in_a_box::image::Image;
use km_tests_e2e::sandbox::{self, Entered};
use km_tests_e2e::suite;
use libtest_mimic::{Arguments, Trial};

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    let sandbox = if arguments.list {
        Err("only listed".to_owned())
    } else {
        // Without root nothing can be made, and the sandbox says so.
        if !sandbox::is_inside() && rustix::process::geteuid().is_root() {
            Image::make()?;
        }
        match sandbox::enter(PARTS)? {
            Entered::Left(code) => return Ok(code),
            Entered::Inside(sandbox) => Ok(sandbox),
            Entered::Unavailable(reason) if std::env::var_os("KM_E2E_REQUIRE").is_some() => {
                bail!("this machine cannot run the node tests: {reason}")
            }
            Entered::Unavailable(reason) => Err(reason),
        }
    };
    // A node keeps two processors busy by itself.
    arguments.test_threads = Some(1);
    let trial = |subject| move |test: &suite::Test| (subject, *test);
    let tests = hardware::TESTS.iter().map(trial("shapes"));
    let tests = tests.chain(containerd::TESTS.iter().map(trial("node")));
    let trials: Vec<Trial> = tests
        .map(|(subject, test)| suite::trial(subject, test, &sandbox))
        .collect();
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}
