//! Measures kata-manager against other programs that do the same work, and against what the machine can do.
//! `hack/bench artifacts` and `hack/bench plugin` run it; see docs/src/performance.md.
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
mod site;
mod table;

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use km_tests_e2e::sandbox::{self, Entered};

/// The groups of parts that it needs.
const PARTS: &[&str] = &["containerd-1.7", "kernel", "oras", "skopeo", "tools"];

const USAGE: &str = "hack/bench artifacts [--full] [--runs N] [ROW...] | hack/bench plugin";

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

fn main() -> Result<ExitCode> {
    if std::env::args().nth(1).as_deref() == Some("plugin") {
        return plugin();
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

fn plugin() -> Result<ExitCode> {
    match sandbox::enter(&[])? {
        Entered::Left(code) => Ok(code),
        Entered::Unavailable(reason) => bail!("this machine cannot run the measurement: {reason}"),
        Entered::Inside(sandbox) => {
            plugin::measure(&sandbox)?.print();
            Ok(ExitCode::SUCCESS)
        }
    }
}
