//! Turns functions that need a [`Sandbox`] into tests that report as passed, failed, or ignored with a reason.

use anyhow::Result;
use libtest_mimic::{Completion, Failed, Trial};

use crate::sandbox::Sandbox;

/// A test: what it is called, and what it does.
pub type Test = (&'static str, fn(&Sandbox) -> Result<()>);

/// The error by which a test says that this machine cannot run it. See [`cannot_run`].
#[derive(Debug)]
struct CannotRun(String);

impl std::fmt::Display for CannotRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CannotRun {}

/// The error to return from a test that this machine cannot run, and why: it is counted as ignored, never as passed.
pub fn cannot_run(reason: impl Into<String>) -> anyhow::Error {
    CannotRun(reason.into()).into()
}

/// Makes a trial named `subject::name`. `sandbox` is why there is none, on a machine that cannot give one.
pub fn trial(
    subject: &str,
    (name, test): (&str, impl Fn(&Sandbox) -> Result<()> + Send + 'static),
    sandbox: &std::result::Result<Sandbox, String>,
) -> Trial {
    let sandbox = sandbox.clone();
    Trial::ignorable_test(format!("{subject}::{name}"), move || match &sandbox {
        Err(reason) => Ok(Completion::ignored_with(reason)),
        Ok(sandbox) => match test(sandbox) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => match error.downcast_ref::<CannotRun>() {
                Some(CannotRun(reason)) if !required() => Ok(Completion::ignored_with(reason)),
                _ => Err(Failed::from(chain(&error))),
            },
        },
    })
}

/// Whether a test that cannot run counts as failed.
fn required() -> bool {
    std::env::var_os("KM_E2E_REQUIRE").is_some()
}

/// An error and its causes, a line each; a backtrace would show the harness alone.
fn chain(error: &anyhow::Error) -> String {
    let lines: Vec<String> = error.chain().map(ToString::to_string).collect();
    lines.join("\nbecause: ")
}
