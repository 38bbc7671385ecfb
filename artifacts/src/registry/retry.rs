//! When and how soon a failed request is tried again.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use super::Error;

/// The pause after the first failure; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// The longest pause that we choose ourselves.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The longest pause that a server may ask for. Whoever waits for a command wants to know rather than to wait longer.
const LONGEST_ASKED: Duration = Duration::from_secs(30);

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// It cannot.
    Never,
    /// It can; we choose when.
    Soon,
    /// It can, after the pause that the server asked for.
    After(Duration),
}

/// An error, and whether trying again can help.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Box<Error>,
    pub(super) again: Again,
}

impl Failure {
    pub(super) fn new(error: Error, again: Again) -> Failure {
        Failure {
            error: Box::new(error),
            again,
        }
    }

    pub(super) fn soon(error: Error) -> Failure {
        Failure::new(error, Again::Soon)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::new(error, Again::Never)
    }
}

/// What a status says about trying again.
pub(super) fn of_status(status: StatusCode, headers: &HeaderMap) -> Again {
    let passing = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT;
    match (passing, retry_after(headers)) {
        (false, _) => Again::Never,
        (true, Some(pause)) => Again::After(pause),
        (true, None) => Again::Soon,
    }
}

/// `Retry-After` in seconds (RFC 9110, 10.2.3). Its other form, a date, is left to our own pauses.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// Counts tries.
#[derive(Debug)]
pub(super) struct Tries {
    allowed: u32,
    failed: u32,
}

impl Tries {
    pub(super) fn new(allowed: u32) -> Tries {
        Tries {
            allowed: allowed.max(1),
            failed: 0,
        }
    }

    /// Starts the count over: what was tried has come nearer to its end.
    pub(super) fn progressed(&mut self) {
        self.failed = 0;
    }

    /// Waits until it is time to try again.
    ///
    /// # Errors
    /// The failure's own error when it is final or tries are used up; [`Error::Busy`] when the server wants a longer pause
    /// than we make.
    pub(super) async fn pause(&mut self, failure: Failure) -> Result<(), Error> {
        self.failed += 1;
        let pause = match failure.again {
            _ if self.failed >= self.allowed => return Err(*failure.error),
            Again::Never => return Err(*failure.error),
            Again::After(asked) if asked > LONGEST_ASKED => {
                return Err(busy(*failure.error, asked));
            }
            // Never sooner than asked, and not all clients of a registry at once.
            Again::After(asked) => asked + jittered(FIRST_PAUSE),
            Again::Soon => jittered(longest(self.failed)),
        };
        tracing::debug!(error = %failure.error, ?pause, "trying again");
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

fn busy(error: Error, after: Duration) -> Error {
    match error {
        Error::Status { host, action, .. } => Error::Busy {
            host,
            action,
            after,
        },
        other => other,
    }
}

/// The pause after so many failures, before chance shortens it.
fn longest(failed: u32) -> Duration {
    let doublings = failed.saturating_sub(1).min(16);
    FIRST_PAUSE
        .saturating_mul(1 << doublings)
        .min(LONGEST_PAUSE)
}

/// Between half of a pause and all of it, so that a fleet does not come back in one wave.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0; 2];
    // Without randomness the pause is only less well spread.
    let share = match aws_lc_rs::rand::fill(&mut random) {
        Ok(()) => f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX),
        Err(_) => 1.0,
    };
    pause.mul_f64(0.5 + share / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16, retry_after: Option<&str>) -> Again {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(RETRY_AFTER, value.parse().unwrap());
        }
        of_status(StatusCode::from_u16(status).unwrap(), &headers)
    }

    fn failure(again: Again) -> Failure {
        let error = Error::Status {
            host: "r.example".into(),
            action: "read".into(),
            status: 429,
            reason: String::new(),
            hint: String::new(),
        };
        Failure::new(error, again)
    }

    #[test]
    fn passing_statuses_are_worth_another_try() {
        for code in [408, 429, 500, 502, 503, 504] {
            assert_eq!(status(code, None), Again::Soon, "{code}");
        }
        for code in [200, 301, 400, 401, 403, 404, 416, 501] {
            assert_eq!(status(code, Some("1")), Again::Never, "{code}");
        }
        assert_eq!(
            status(503, Some(" 7 ")),
            Again::After(Duration::from_secs(7))
        );
        for odd in [
            "-1",
            "soon",
            "Wed, 21 Oct 2015 07:28:00 GMT",
            "99999999999999999999999",
        ] {
            assert_eq!(status(503, Some(odd)), Again::Soon, "{odd}");
        }
    }

    #[test]
    fn pauses_grow_within_bounds_and_vary() {
        for failed in 0..40 {
            let all = longest(failed);
            assert!(all >= FIRST_PAUSE && all <= LONGEST_PAUSE);
            let pause = jittered(all);
            assert!(pause >= all / 2 && pause <= all, "{pause:?}");
        }
        assert_eq!(longest(40), LONGEST_PAUSE);
        let some: std::collections::BTreeSet<_> = (0..20).map(|_| jittered(FIRST_PAUSE)).collect();
        assert!(some.len() > 1);
    }

    #[tokio::test]
    async fn too_many_and_final_failures_end_it() {
        tokio::time::pause();
        let mut tries = Tries::new(3);
        assert!(tries.pause(failure(Again::Soon)).await.is_ok());
        assert!(
            tries
                .pause(failure(Again::After(Duration::from_secs(30))))
                .await
                .is_ok()
        );
        assert!(tries.pause(failure(Again::Soon)).await.is_err());
        assert!(Tries::new(3).pause(failure(Again::Never)).await.is_err());
        assert!(Tries::new(0).pause(failure(Again::Soon)).await.is_err());
    }

    #[tokio::test]
    async fn a_pause_that_is_too_long_is_told_at_once() {
        let asked = Duration::from_secs(86_400);
        let error = Tries::new(3)
            .pause(failure(Again::After(asked)))
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::Busy { after, .. } if after == asked),
            "{error}"
        );
    }
}
