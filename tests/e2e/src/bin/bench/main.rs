//! Measures kata-manager against other programs that do the same work, and against what the machine can do.
//! `hack/bench artifacts`, `hack/bench plugin` and `hack/bench shim` run it; see docs/src/performance.md.
//!
//! It needs root; everything happens in namespaces and a work folder that are gone afterwards.

#![expect(
    clippy::disallowed_methods,
    reason = "it prepares its files and starts its programs plainly, outside any host root"
)]

mod limits;
mod measure;
mod mix;
mod plugin;
mod relay;
mod rows;
mod shim;
mod site;
mod table;

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use km_tests_e2e::sandbox::{self, Entered, Sandbox};

/// The groups of parts that it needs.
const PARTS: &[&str] = &["containerd-1.7", "kernel", "oras", "skopeo", "tools"];

const USAGE: &str = "hack/bench artifacts [--full] [--runs N] [ROW...] | hack/bench plugin | hack/bench shim [RUNS]";

/// What is to be measured.
#[derive(Clone, Debug)]
pub(crate) struct Arguments {
    /// With the large artifact.
    pub(crate) full: bool,
    /// How often each contender runs.
    pub(crate) runs: usize,
    /// The rows; all when there are none.
    pub(crate) rows: Vec<String>,
}

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Result<Self> {
        let mut arguments = Self {
            full: false,
            runs: 5,
            rows: Vec::new(),
        };
        let mut words = words.peekable();
        ensure!(words.next().as_deref() == Some("artifacts"), "{USAGE}");
        while let Some(word) = words.next() {
            match &*word {
                "--full" => arguments.full = true,
                "--runs" => {
                    let runs = words.next().with_context(|| format!("--runs N: {USAGE}"))?;
                    arguments.runs = runs.parse().with_context(|| format!("--runs {runs}"))?;
                    ensure!(arguments.runs > 0, "--runs 0 measures nothing");
                }
                row if rows::NAMES.contains(&row) => arguments.rows.push(word),
                other => bail!("{other}: {USAGE}\nrows: {}", rows::NAMES.join(" ")),
            }
        }
        Ok(arguments)
    }

    /// Whether a row is asked for.
    pub(crate) fn wants(&self, row: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|wanted| wanted == row)
    }
}

/// How often the shim is run, unless told otherwise.
const STARTS: usize = 1000;

fn main() -> Result<ExitCode> {
    match std::env::args().nth(1).as_deref() {
        Some("plugin") => return alone(plugin::measure),
        Some("shim") => {
            let runs = match std::env::args().nth(2) {
                Some(runs) => runs.parse().with_context(|| format!("{runs}: {USAGE}"))?,
                None => STARTS,
            };
            return alone(|sandbox| shim::measure(sandbox, runs));
        }
        _ => {}
    }
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    match sandbox::enter(PARTS)? {
        Entered::Left(code) => Ok(code),
        Entered::Unavailable(reason) => bail!("this machine cannot run the measurement: {reason}"),
        Entered::Inside(sandbox) => {
            let site = site::Site::start(&sandbox, &arguments)?;
            let table = rows::measure(&sandbox, &site, &arguments)?;
            table.print();
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A measurement that needs no programs of others.
fn alone(measure: impl FnOnce(&Sandbox) -> Result<table::Table>) -> Result<ExitCode> {
    match sandbox::enter(&[])? {
        Entered::Left(code) => Ok(code),
        Entered::Unavailable(reason) => bail!("this machine cannot run the measurement: {reason}"),
        Entered::Inside(sandbox) => {
            measure(&sandbox)?.print();
            Ok(ExitCode::SUCCESS)
        }
    }
}
