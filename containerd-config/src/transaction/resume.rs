//! The way back: restoring after a failure, and finishing what a killed process left.

use super::ready::{self, within};
use super::{
    Daemon, Journal, Owed, Progress, Reporter, Restart, RestoreError, TransactionError, files,
    finish,
};
use crate::digest::Digest;
use crate::live::LiveHandlers;

/// How an interrupted transaction was settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumed {
    /// The new file had been written; its handlers are live now, or it is not for us to restart.
    Finished,
    /// The new file had not been written, or not all of several: those that were are as before again, and containerd runs
    /// with the old ones.
    NotBegun,
    /// Someone else has changed a file since. It is left as it is; plan again from what it says now.
    ChangedByOthers,
}

/// Settles what a killed process left in the journal. Call it under the lock, before a new plan is made.
///
/// It goes by what is there, not by how far the other process came: a file with the new bytes is taken to the end
/// (restart, unless one had begun and the handlers are live; wait; else restore); a file with the old bytes needs a restart only if one had
/// begun; a file with other bytes is someone else's.
///
/// # Errors
/// As [`super::run`]. What is still owed then stays in the journal.
pub async fn resume<D: Daemon>(
    owed: &Owed,
    daemon: &D,
    journal: &mut dyn Journal,
    report: Reporter<'_>,
) -> Result<Resumed, TransactionError> {
    let mut owed = owed.clone();
    let resumed = found(&owed)?;
    if resumed == Resumed::NotBegun {
        // Of several files some may have been written.
        files::restore(&owed).map_err(|error| TransactionError::NotRestored(Box::new(error)))?;
    }
    let restart = owed.restart == Restart::IfNeeded;
    match resumed {
        Resumed::Finished if restart && !(owed.restarting && is_live(&owed, daemon).await) => {
            finish(&mut owed, daemon, journal, report).await?;
            return Ok(resumed);
        }
        Resumed::NotBegun if restart && owed.restarting => {
            report(Progress::Restoring);
            restore(&mut owed, daemon, journal)
                .await
                .map_err(|error| TransactionError::NotRestored(Box::new(error)))?;
            return Ok(resumed);
        }
        _ => {}
    }
    journal.settled().map_err(TransactionError::Journal)?;
    Ok(resumed)
}

/// How far the other process came, by what is there.
fn found(owed: &Owed) -> Result<Resumed, TransactionError> {
    let mut all_new = true;
    let mut all_known = true;
    let main = (&owed.path, &owed.before, &owed.after);
    let others = owed.others.iter();
    let others = others.map(|file| (&file.path, &file.before, &file.after));
    for (path, before, after) in std::iter::once(main).chain(others) {
        let found = files::read(path)?.as_deref().map(Digest::of);
        all_new &= found == *after;
        all_known &= found == *after || found == *before;
    }
    Ok(match (all_new, all_known) {
        (true, _) => Resumed::Finished,
        (false, true) => Resumed::NotBegun,
        (false, false) => Resumed::ChangedByOthers,
    })
}

async fn is_live<D: Daemon>(owed: &Owed, daemon: &D) -> bool {
    match within(owed.deadlines.answer, daemon.handlers()).await {
        Ok(live) => ready::problem(owed, &live).is_none(),
        // A containerd that does not answer is restarted.
        Err(_) => false,
    }
}

/// Puts the old file back, restarts, waits for the handlers from before, settles.
pub(super) async fn restore<D: Daemon>(
    owed: &mut Owed,
    daemon: &D,
    journal: &mut dyn Journal,
) -> Result<(), RestoreError> {
    files::restore(owed)?;
    ready::restart(daemon, &owed.deadlines)
        .await
        .map_err(RestoreError::Restart)?;
    let before = owed.live_before.clone().unwrap_or_default();
    let missing = |live: &LiveHandlers| {
        let names = live.names();
        let missing = before.iter().filter(|name| !names.contains(name));
        let missing: Vec<String> = missing.map(|name| format!("{name} is missing")).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    };
    ready::wait(daemon, &owed.deadlines, missing, |_| {})
        .await
        .map_err(|late| RestoreError::NotBack {
            problem: late.problem,
            waited: owed.deadlines.ready,
            source: late.source,
        })?;
    journal.settled().map_err(RestoreError::Journal)
}
