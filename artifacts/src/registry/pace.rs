//! How many streams one blob is worth, and how fast they may be. Pure but for the clock that its callers hand in.
//!
//! More streams help where each is held back on its own: by a registry or a storage service that caps connections, or by a
//! long way on which a lost packet halves a stream. On a fast link they only cost. So there is one stream; when it turns out
//! slow and much is left there are four, and then eight, for as long as that brings a good deal more; and the number goes back
//! where it did not.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a rate is measured. The beginning, when connections find their speed, does not count.
const WINDOW: Duration = Duration::from_millis(200);

/// Time at the start of each measurement that does not count.
const WARM_UP: Duration = Duration::from_millis(100);

/// One stream of so many bytes a second is not slow: it is 1.6 Gb/s. A busy machine is not faster with more.
const FAST: f64 = 200e6;

/// What would be done so soon anyway is left alone, in seconds.
const SOON: f64 = 1.0;

/// Streams after the first look.
const SEVERAL: usize = 4;

/// What more streams must bring to be worth it. Parts of a full link bring nothing.
const GAIN: f64 = 1.25;

/// A part that a stream asks for when there are several: large enough that asking costs little...
const PART_MIN: u64 = 4 << 20;

/// ...and small enough that what is written stays close to what is hashed.
const PART_MAX: u64 = 32 << 20;

/// Decides on the number of streams.
#[derive(Debug)]
pub(super) struct Pace {
    most: usize,
    streams: usize,
    /// The streams before there were more of them, and their rate.
    before: Option<(usize, f64)>,
    settled: bool,
    since: Instant,
    counted: Option<(Instant, u64)>,
}

impl Pace {
    /// `most` streams at the most.
    pub(super) fn new(now: Instant, most: usize) -> Pace {
        Pace {
            most,
            streams: 1,
            before: None,
            settled: most <= 1,
            since: now,
            counted: None,
        }
    }

    /// How many there should be.
    pub(super) fn streams(&self) -> usize {
        self.streams
    }

    /// Whether there is nothing more to find out.
    pub(super) fn is_settled(&self) -> bool {
        self.settled
    }

    /// No more streams than these: the registry does not want more.
    pub(super) fn settle(&mut self, streams: usize) {
        self.streams = streams.max(1);
        self.settled = true;
    }

    /// Told now and then how many bytes have come in all, and how many lack.
    pub(super) fn observe(&mut self, now: Instant, got: u64, left: u64) {
        if self.settled || now < self.since + WARM_UP {
            return;
        }
        let Some((from, counted)) = self.counted else {
            self.counted = Some((now, got));
            return;
        };
        let took = now.saturating_duration_since(from);
        if took < WINDOW {
            return;
        }
        let rate = got.saturating_sub(counted) as f64 / took.as_secs_f64();
        self.decide(rate, left as f64);
        self.since = now;
        self.counted = None;
    }

    fn decide(&mut self, rate: f64, left: f64) {
        if let Some((fewer, before)) = self.before
            && rate <= before * GAIN
        {
            tracing::debug!(streams = self.streams, rate, "more streams are not faster");
            return self.settle(fewer);
        }
        if rate >= FAST && self.before.is_none() || left < rate * SOON || self.streams >= self.most
        {
            return self.settle(self.streams);
        }
        tracing::debug!(streams = self.streams, rate, "slow; trying more streams");
        self.before = Some((self.streams, rate));
        self.streams = (self.streams * 2).max(SEVERAL).min(self.most);
    }
}

/// Bytes that one of several streams asks for, when so many are not asked for yet. A multiple of 1 MiB.
pub(super) fn part(left: u64, streams: usize) -> u64 {
    let share = left / (2 * streams.max(1) as u64);
    share.clamp(PART_MIN, PART_MAX) >> 20 << 20
}

/// Keeps all streams together below a number of bytes a second.
#[derive(Debug)]
pub(super) struct Limiter {
    bytes_per_second: f64,
    /// When what was taken so far is paid for.
    paid: Mutex<Option<Instant>>,
}

impl Limiter {
    pub(super) fn new(bytes_per_second: u64) -> Limiter {
        Limiter {
            bytes_per_second: bytes_per_second.max(1) as f64,
            paid: Mutex::new(None),
        }
    }

    /// Takes so many bytes, and says until when to wait.
    pub(super) fn take(&self, now: Instant, bytes: u64) -> Instant {
        let mut paid = self
            .paid
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let from = paid.map_or(now, |at| at.max(now));
        let until = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        *paid = Some(until);
        until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a transfer where one stream brings `each` bytes a second and all together at most `link`. Returns the most
    /// streams, and those at the end.
    fn simulate(each: f64, link: f64, size: f64) -> (usize, usize) {
        let mut now = Instant::now();
        let (mut pace, mut got, mut most) = (Pace::new(now, 8), 0.0, 1);
        while got < size {
            let step = Duration::from_millis(50);
            now += step;
            got += (each * pace.streams() as f64).min(link) * step.as_secs_f64();
            pace.observe(now, got as u64, (size - got).max(0.0) as u64);
            most = most.max(pace.streams());
        }
        (most, pace.streams())
    }

    #[test]
    fn a_capped_stream_gets_company() {
        assert_eq!(simulate(100e6, 10e9, 640e6).1, 8);
        assert_eq!(simulate(100e6, 10e9, 300e6).1, 4);
        assert_eq!(simulate(20e6, 10e9, 640e6).1, 8);
        assert_eq!(simulate(20e6, 80e6, 2e9), (8, 4));
    }

    #[test]
    fn a_fast_stream_stays_alone() {
        assert_eq!(simulate(700e6, 700e6, 2e9), (1, 1));
        // Small, and soon done.
        assert_eq!(simulate(100e6, 10e9, 100e6), (1, 1));
    }

    #[test]
    fn a_full_link_is_left_alone_after_one_look() {
        assert_eq!(simulate(117e6, 117e6, 2e9), (4, 1));
    }

    #[test]
    fn parts_are_whole_and_shrink_to_the_end() {
        assert_eq!(part(2 << 30, 4), PART_MAX);
        assert_eq!(part(100 << 20, 4), 12 << 20);
        assert_eq!(part(0, 8), PART_MIN);
        assert!((0..3000u64).all(|n| part(n << 18, 4).is_multiple_of(1 << 20)));
    }

    #[test]
    fn a_limit_holds_over_all() {
        let (limiter, now) = (Limiter::new(1_000_000), Instant::now());
        for n in 1..=10u32 {
            let until = limiter.take(now, 100_000);
            let wait = until.duration_since(now).as_secs_f64();
            assert!((wait - 0.1 * f64::from(n)).abs() < 0.001, "{wait}");
        }
        // Time that nobody used is not saved up.
        let later = now + Duration::from_secs(60);
        let wait = limiter.take(later, 100_000).duration_since(later);
        assert!(wait < Duration::from_millis(101));
    }
}
