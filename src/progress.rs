//! Progress of transfers: bars on a terminal, plain lines in a log.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use km_artifacts::{Item, Progress};

use crate::output;

/// Shows transfers on standard error.
pub(crate) struct Shown {
    bars: MultiProgress,
    items: Mutex<Vec<(String, u64, ProgressBar)>>,
    terminal: bool,
    verb: &'static str,
}

impl Shown {
    /// `verb` in the past tense is what is said of each item in a log: "fetched", "pushed".
    pub(crate) fn new(verb: &'static str) -> Shown {
        let terminal = std::io::stderr().is_terminal();
        Shown {
            bars: MultiProgress::new(),
            items: Mutex::default(),
            terminal,
            verb,
        }
    }

    fn with(&self, item: usize, act: impl FnOnce(&(String, u64, ProgressBar))) {
        let items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(item) = items.get(item) {
            act(item);
        }
    }
}

impl Progress for Shown {
    fn begin(&self, items: &[Item]) {
        let style = ProgressStyle::with_template(
            "  {msg:32!} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bars = items.iter().map(|item| {
            let bar = if self.terminal {
                self.bars.add(ProgressBar::new(item.bytes))
            } else {
                ProgressBar::hidden()
            };
            bar.set_style(style.clone());
            bar.set_message(item.name.clone());
            (item.name.clone(), item.bytes, bar)
        });
        *self.items.lock().unwrap_or_else(PoisonError::into_inner) = bars.collect();
    }

    fn advance(&self, item: usize, bytes: u64) {
        self.with(item, |(_, _, bar)| bar.inc(bytes));
    }

    fn restart(&self, item: usize) {
        self.with(item, |(_, _, bar)| bar.reset());
    }

    fn done(&self, item: usize) {
        self.with(item, |(name, bytes, bar)| {
            bar.finish();
            if !self.terminal {
                output::to_stderr(&format!(
                    "  {} {name} ({})",
                    self.verb,
                    output::bytes(*bytes)
                ));
            }
        });
    }
}
