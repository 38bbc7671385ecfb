//! Asking containerd, and waiting for it.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{
    BoxError, Cause, Change, Daemon, Deadlines, Owed, Progress, Reporter, Restart, TransactionError,
};
use crate::live::LiveHandlers;

/// The handlers before the change; `None` if containerd does not answer and need not.
pub(super) type Previous = Option<LiveHandlers>;

/// Time between two questions, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// A step of the caller's that did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("no end of it within {} s", .0.as_secs_f32())]
pub(super) struct TooLate(Duration);

pub(super) async fn within<T>(
    limit: Duration,
    step: impl Future<Output = Result<T, BoxError>>,
) -> Result<T, BoxError> {
    timeout(limit, step)
        .await
        .unwrap_or_else(|_| Err(TooLate(limit).into()))
}

/// What is live before anything is changed. A containerd that must be restarted must answer first, unless the change may
/// be what brings it back.
pub(super) async fn previous<D: Daemon>(
    daemon: &D,
    change: &Change,
) -> Result<Previous, TransactionError> {
    match within(change.deadlines.answer, daemon.handlers()).await {
        Ok(live) => Ok(Some(live)),
        Err(_) if change.restart == Restart::Never || change.restart_owed => Ok(None),
        Err(source) => Err(TransactionError::NotRunning { source }),
    }
}

pub(super) async fn restart<D: Daemon>(daemon: &D, deadlines: &Deadlines) -> Result<(), BoxError> {
    within(deadlines.restart, daemon.restart()).await
}

/// Asks until the wanted handlers are live and the unwanted ones gone.
pub(super) async fn wait_live<D: Daemon>(
    owed: &Owed,
    daemon: &D,
    report: Reporter<'_>,
) -> Result<(), Cause> {
    let mut told = None;
    let problem_of = |live: &LiveHandlers| problem(owed, live);
    let on_problem = |problem: &str| {
        if told.as_deref() != Some(problem) {
            told = Some(problem.to_owned());
            report(Progress::Waiting(problem.to_owned()));
        }
    };
    wait(daemon, &owed.deadlines, problem_of, on_problem)
        .await
        .map_err(|late| Cause::NotLive {
            problem: late.problem,
            waited: owed.deadlines.ready,
            source: late.source,
        })
}

/// What keeps the live handlers from being as wanted; `None` if they are.
pub(super) fn problem(owed: &Owed, live: &LiveHandlers) -> Option<String> {
    let missing = live.not_live(&owed.want_live);
    let missing = missing.iter().map(|handler| handler.to_string());
    let names = live.names();
    let still = owed.want_gone.iter().filter(|name| names.contains(name));
    let still = still.map(|name| format!("{name} is still there"));
    let back = owed.given_back.iter().filter(|name| !names.contains(name));
    let back = back.map(|name| format!("{name} is not back"));
    let problems: Vec<String> = missing.chain(still).chain(back).collect();
    (!problems.is_empty()).then(|| problems.join(", "))
}

/// The last answer before the deadline.
pub(super) struct Late {
    pub(super) problem: String,
    pub(super) source: Option<BoxError>,
}

/// Asks containerd until `problem` finds none in its answer, or the deadline for being ready has passed.
pub(super) async fn wait<D: Daemon>(
    daemon: &D,
    deadlines: &Deadlines,
    problem: impl Fn(&LiveHandlers) -> Option<String>,
    mut on_problem: impl FnMut(&str),
) -> Result<(), Late> {
    let end = Instant::now() + deadlines.ready;
    let mut pause = PAUSE.0;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let limit = deadlines.answer.min(left.max(PAUSE.0));
        let late = match within(limit, daemon.handlers()).await {
            Ok(live) => match problem(&live) {
                None => return Ok(()),
                Some(problem) => Late {
                    problem,
                    source: None,
                },
            },
            Err(error) => Late {
                problem: "it does not answer".to_owned(),
                source: Some(error),
            },
        };
        on_problem(&late.problem);
        if Instant::now() + pause >= end {
            return Err(late);
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}
