//! Waiting for a condition with a deadline, instead of sleeping and hoping.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Time between two looks: short beside what is waited for, long enough to leave the processors alone.
const INTERVAL: Duration = Duration::from_millis(20);

/// How often something may come late before that is a failure: a busy machine keeps everybody waiting, but not each time.
const TRIES: usize = 3;

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

/// Does something that must take less than `limit`; again, up to three times in all, when it was late. It tells how long it took,
/// and brings its own deadline for never ending.
///
/// # Errors
/// When it fails, or is late each time.
pub fn in_time(
    what: &str,
    limit: Duration,
    mut once: impl FnMut() -> Result<Duration>,
) -> Result<()> {
    let mut late = Vec::new();
    for _ in 0..TRIES {
        let took = once().with_context(|| what.to_owned())?;
        if took < limit {
            return Ok(());
        }
        late.push(took);
    }
    bail!("{what} must take less than {limit:?}; it took {late:?}")
}
