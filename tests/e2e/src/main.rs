//! The end-to-end tests. `cargo run -p km-tests-e2e -- [FILTER]`; `--list` shows them.
//!
//! They need root. What a machine cannot run is reported as ignored, with the reason; set `KM_E2E_REQUIRE=1` where that must
//! count as a failure.

#![expect(
    clippy::disallowed_methods,
    reason = "tests prepare their files and start their programs plainly, outside any host root"
)]

mod tests;

use std::process::ExitCode;

use anyhow::{Result, bail};
use km_tests_e2e::sandbox::{self, Entered};
use km_tests_e2e::{parts, suite};
use libtest_mimic::{Arguments, Trial};

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    let sandbox = if arguments.list {
        Err("only listed".to_owned())
    } else {
        match sandbox::enter(parts::ALL)? {
            Entered::Left(code) => return Ok(code),
            Entered::Inside(sandbox) => Ok(sandbox),
            Entered::Unavailable(reason) if std::env::var_os("KM_E2E_REQUIRE").is_some() => {
                bail!("this machine cannot run the end-to-end tests: {reason}")
            }
            Entered::Unavailable(reason) => Err(reason),
        }
    };
    // Each test starts programs of its own; more at a time than this only makes all of them late.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    let subjects = [
        ("harness", tests::harness::TESTS),
        ("apply", tests::apply::TESTS),
        ("cdi", tests::cdi::TESTS),
        ("containerd", tests::containerd::TESTS),
        ("failures", tests::failures::TESTS),
        ("crash", tests::crash::TESTS),
        ("faults", tests::faults::TESTS),
        ("layout", tests::layout::TESTS),
        ("lifecycle", tests::lifecycle::TESTS),
        ("lock", tests::lock::TESTS),
        ("hostile", tests::hostile::TESTS),
        ("others", tests::others::TESTS),
        ("image", tests::image::TESTS),
        ("plugin", tests::plugin::TESTS),
        ("registries", tests::registries::TESTS),
        ("shim-devices", tests::shim_devices::TESTS),
        ("topology", tests::topology::TESTS),
        ("transfer", tests::transfer::TESTS),
        ("trust", tests::trust::TESTS),
    ];
    // These have what is one for the whole sandbox, such as /opt/kata-manager, which every uninstall cleans: they come after the others.
    let alone = [
        ("launcher", tests::launcher::TESTS),
        ("shim", tests::shim::TESTS),
    ];
    let run = |subjects: &[(&'static str, &[suite::Test])], arguments: &Arguments| {
        let tests = subjects
            .iter()
            .flat_map(|(subject, tests)| tests.iter().map(|test| (*subject, *test)));
        let trials: Vec<Trial> = tests
            .map(|(subject, test)| suite::trial(subject, test, &sandbox))
            .collect();
        libtest_mimic::run(arguments, trials)
    };
    let beside_each_other = run(&subjects, &arguments);
    if tests::faults::survived() > 0 {
        say_faults();
    }
    arguments.test_threads = Some(1);
    let one_by_one = run(&alone, &arguments);
    Ok(if beside_each_other.has_failed() {
        beside_each_other.exit_code()
    } else {
        one_by_one.exit_code()
    })
}

#[expect(
    clippy::print_stdout,
    reason = "a test that takes samples says how many"
)]
fn say_faults() {
    println!("faults survived in all: {}", tests::faults::survived());
}
