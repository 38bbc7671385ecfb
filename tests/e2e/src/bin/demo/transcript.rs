//! Prints what the demo does so that it can be pasted into a page: why (`#`), the command (`$`), and what it said.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::process::{self, Finished};

/// The longest that one command of the demo may take.
const DEADLINE: Duration = Duration::from_secs(180);

/// The transcript, on standard output.
#[derive(Debug, Default)]
pub(crate) struct Transcript;

impl Transcript {
    /// Says why the next command is run.
    ///
    /// # Errors
    /// When standard output is gone.
    pub(crate) fn why(&mut self, text: &str) -> Result<()> {
        self.line("")?;
        for line in text.lines() {
            self.line(&format!("# {line}"))?;
        }
        Ok(())
    }

    /// Shows a command that the harness has started, or a question that it asks containerd itself.
    ///
    /// # Errors
    /// When standard output is gone.
    pub(crate) fn shown(&mut self, command: &str) -> Result<()> {
        self.line(&format!("$ {command}"))
    }

    /// Shows what was said, without an end of line too many.
    ///
    /// # Errors
    /// When standard output is gone.
    pub(crate) fn output(&mut self, text: &str) -> Result<()> {
        for line in text.trim_end().lines() {
            self.line(line.trim_end_matches('\r'))?;
        }
        Ok(())
    }

    /// Runs a command, shows it and what it said (standard error, where progress goes, first). It must exit with 0.
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn run(&mut self, command: &mut Command) -> Result<Finished> {
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| quoted(&word.to_string_lossy()))
            .collect();
        let name = Path::new(&words[0])
            .file_name()
            .map_or(words[0].clone(), |name| name.to_string_lossy().into_owned());
        self.shown(&format!("{name} {}", words[1..].join(" ")))?;
        let finished = process::run(command, DEADLINE)?;
        self.output(&finished.stderr)?;
        self.output(&finished.stdout)?;
        ensure!(
            finished.status.success(),
            "{name} ended with {}",
            finished.status
        );
        Ok(finished)
    }

    fn line(&mut self, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")
            .and_then(|()| out.flush())
            .context("print the transcript")
    }
}

/// A word as a shell would need it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
