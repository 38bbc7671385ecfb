//! Waiting for a condition with a deadline, instead of sleeping and hoping.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Time between two looks: short beside what is waited for, long enough to leave the processors alone.
const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `probe` until it succeeds.
///
/// # Errors
/// When `deadline` passes: says `what` was waited for and why the last look failed.
pub fn until<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        let failure = match probe() {
            Ok(value) => return Ok(value),
            Err(failure) => failure,
        };
        if started.elapsed() >= deadline {
            return Err(failure)
                .with_context(|| format!("waited {deadline:?} for {what}, in vain"));
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Waits until `condition` holds.
///
/// # Errors
/// When `deadline` passes first.
pub fn until_true(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<()> {
    until(what, deadline, || {
        anyhow::ensure!(condition(), "not yet");
        Ok(())
    })
}
