//! Blobs as verified streams.
//!
//! OCI distribution specification, "Pulling blobs". What lacks of a blob is asked for by range requests, of one stream or, where
//! that is faster (`pace`), of several. A stream that breaks is taken up where it broke. The digest of the whole decides, so
//! a range that does not fit shows in the end.
//!
//! It must not know where the bytes go.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Method, StatusCode};

use super::answer::BodyStream;
use super::authorize::{Access, Session, Target};
use super::pace::{self, Pace};
use super::parts::{BlobPart, BlobParts};
use super::retry::{Again, Failure};
use super::transport::{Answer, Request};
use super::{Error, Result};
use crate::digest::Digest;
use crate::reference::Reference;

/// New bytes after which a broken connection is no longer held against the registry.
const PROGRESS: u64 = 1 << 20;

/// How often the pace is looked at while it is not settled.
const TICK: Duration = Duration::from_millis(25);

/// A stream that brings less than this in the time that may pass without a byte has stalled, too.
const TRICKLE: u64 = 64 << 10;

/// What one stream is to fetch. Its end may come closer while it runs.
#[derive(Debug)]
struct Claim {
    start: AtomicU64,
    at: AtomicU64,
    end: AtomicU64,
}

impl Claim {
    fn new(range: &Range<u64>) -> Claim {
        Claim {
            start: range.start.into(),
            at: range.start.into(),
            end: range.end.into(),
        }
    }

    fn left(&self) -> u64 {
        self.end.load(Relaxed).saturating_sub(self.at.load(Relaxed))
    }
}

/// One blob on its way.
struct Transfer<'a> {
    session: &'a Session,
    target: Target,
    digest: &'a Digest,
    size: u64,
    parts: &'a (dyn BlobParts + 'a),
    /// Bytes that came.
    got: AtomicU64,
    /// Streams that run.
    running: AtomicUsize,
    /// Whether what is there comes from more than one answer.
    pieced: AtomicBool,
    /// What the registry calls the blob's bytes, if it calls them something that If-Range may name.
    etag: Mutex<Option<HeaderValue>>,
    action: String,
    what: String,
}

impl Session {
    pub(super) async fn fetch_parts(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        parts: &(dyn BlobParts + '_),
    ) -> Result<()> {
        let target = self.target(reference, Access::Pull)?;
        let what = format!("blob {digest} of {}", target.name());
        let transfer = Transfer {
            session: self,
            digest,
            size,
            parts,
            got: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            pieced: AtomicBool::new(false),
            etag: Mutex::new(None),
            action: format!("fetch {what}"),
            what,
            target,
        };
        // With a limit of our own one stream is as fast as any number.
        let most = match self.transport.limiter {
            Some(_) => 1,
            None => parts.streams().min(self.transport.options.streams),
        };
        let mut pace = Pace::new(Instant::now(), most);
        let mut tries = self.tries();
        let mut least = total(&parts.missing());
        loop {
            match transfer.go_on(&mut pace).await {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    let left = total(&parts.missing());
                    if left + PROGRESS <= least {
                        least = left;
                        tries.progressed();
                    }
                    tries.pause(failure).await?;
                }
            }
        }
    }

    pub(super) async fn has_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        access: Access,
    ) -> Result<bool> {
        let target = self.target(reference, access)?;
        let what = format!("blob {digest} of {}", target.name());
        let action = format!("look for {what}");
        let url = target.url(&format!("blobs/{digest}"));
        let request = Request::new(Method::HEAD, url, &action, &what);
        match self.request(&target, &request).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Bytes in ranges.
fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// What is left of ranges when claims are taken out of them.
fn without(mut ranges: Vec<Range<u64>>, claims: &[Arc<Claim>]) -> Vec<Range<u64>> {
    for claim in claims {
        let (start, end) = (claim.start.load(Relaxed), claim.end.load(Relaxed));
        let around = |range: Range<u64>| {
            let before = range.start..range.end.min(start);
            let behind = range.start.max(end)..range.end;
            [before, behind]
        };
        let cut = ranges.into_iter().flat_map(around);
        ranges = cut.filter(|range| !range.is_empty()).collect();
    }
    ranges
}

impl Transfer<'_> {
    /// Asks for what lacks, hands it on as it comes, and verifies the whole.
    async fn go_on(&self, pace: &mut Pace) -> Result<(), Failure> {
        let missing = self.parts.missing();
        if total(&missing) < self.size {
            self.pieced.store(true, Relaxed);
        }
        if !missing.is_empty() {
            self.receive_all(pace).await?;
        }
        self.finish().await
    }

    /// Runs as many streams as the pace says until nothing lacks.
    async fn receive_all(&self, pace: &mut Pace) -> Result<(), Failure> {
        let mut streams = FuturesUnordered::new();
        let mut claims: Vec<Arc<Claim>> = Vec::new();
        let mut tick = tokio::time::interval(TICK);
        loop {
            while claims.len() < pace.streams()
                && let Some(range) = self.next_range(&claims, pace.streams())
            {
                let claim = Arc::new(Claim::new(&range));
                claims.push(Arc::clone(&claim));
                streams.push(async move {
                    let ended = self.stream(&claim).await;
                    (claim, ended)
                });
            }
            self.running.store(claims.len(), Relaxed);
            let (claim, ended) = tokio::select! {
                next = streams.next() => match next {
                    Some(next) => next,
                    None => return Ok(()),
                },
                _ = tick.tick(), if !pace.is_settled() => {
                    let left = total(&self.parts.missing());
                    pace.observe(Instant::now(), self.got.load(Relaxed), left);
                    continue;
                }
            };
            claims.retain(|other| !Arc::ptr_eq(other, &claim));
            self.running.store(claims.len(), Relaxed);
            if let Err(failure) = ended {
                if claims.is_empty() || failure.again == Again::Never {
                    return Err(failure);
                }
                // The registry may not want so many; the others fetch what this one did not.
                tracing::debug!(error = %failure.error, "going on with fewer streams");
                pace.settle(claims.len());
            }
        }
    }

    /// What the next stream is to fetch.
    fn next_range(&self, claims: &[Arc<Claim>], streams: usize) -> Option<Range<u64>> {
        let mut open = without(self.parts.missing(), claims);
        if open.is_empty() && streams > 1 {
            open.extend(Self::split(claims, streams));
        }
        let first = open.first()?;
        if streams == 1 {
            return Some(first.clone());
        }
        let end = first.start + pace::part(total(&open), streams);
        Some(first.start..end.min(first.end))
    }

    /// Takes from the stream with the most before it what is better shared.
    fn split(claims: &[Arc<Claim>], streams: usize) -> Option<Range<u64>> {
        let claim = claims.iter().max_by_key(|claim| claim.left())?;
        let (at, end) = (claim.at.load(Relaxed), claim.end.load(Relaxed));
        let part = pace::part(claim.left(), streams);
        let middle = (at + part).next_multiple_of(1 << 20);
        if middle + part > end {
            return None;
        }
        claim.end.store(middle, Relaxed);
        // Not more than a part: an answer that comes to its end leaves a connection that can be used again.
        Some(middle..end.min(middle + part))
    }

    /// One request and its answer.
    async fn stream(&self, claim: &Claim) -> Result<(), Failure> {
        let mut asked = claim.start.load(Relaxed)..claim.end.load(Relaxed);
        let url = self.target.url(&format!("blobs/{}", self.digest));
        let mut request = Request::new(Method::GET, url, &self.action, &self.what);
        let ranged = asked != (0..self.size);
        if ranged {
            self.ask_for(&asked, &mut request.headers);
        }
        let answer = self.session.send(&self.target, &request).await?;
        if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE && ranged {
            self.restart_alone(claim)?;
            return Err(Failure::soon(self.truncated(&answer.host, 0, None)));
        }
        let answer = self.session.checked(&self.target, answer, &request).await?;
        self.begin(&answer, claim, &mut asked)?;
        let mut part = self.parts.part(asked.start);
        let received = self.receive(answer, claim, &asked, &mut *part).await;
        let ended = part.end().map_err(|error| self.sink_error(error));
        received?;
        Ok(ended?)
    }

    fn ask_for(&self, range: &Range<u64>, headers: &mut HeaderMap) {
        let text = if range.end == self.size {
            format!("bytes={}-", range.start)
        } else {
            format!("bytes={}-{}", range.start, range.end - 1)
        };
        // Digits always make a header.
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(RANGE, value);
        }
        let etag = self.etag.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(etag) = etag.as_ref() {
            headers.insert(IF_RANGE, etag.clone());
        }
    }

    /// Makes what is there fit to what will come.
    fn begin(&self, answer: &Answer, claim: &Claim, asked: &mut Range<u64>) -> Result<(), Failure> {
        let whole = 0..self.size;
        let headers = answer.response.headers();
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            if *asked == whole || !continues(headers, asked, self.size) {
                self.restart_alone(claim)?;
                return Err(self.odd(answer, "its Content-Range is not what was asked for"));
            }
            if asked.start > 0 {
                self.pieced.store(true, Relaxed);
            }
        } else if *asked != whole {
            if !self.restart_alone(claim)? {
                return Err(self.odd(answer, "it sends the whole where a part was asked for"));
            }
            *asked = whole;
        }
        if let Some(etag) = headers.get(ETAG).filter(|etag| is_strong(etag)) {
            let mut known = self.etag.lock().unwrap_or_else(PoisonError::into_inner);
            *known = Some(etag.clone());
        }
        let missing = asked.end - asked.start;
        match answer.response.content_length() {
            Some(length) if length > missing => Err(self.too_large().into()),
            Some(length) if length < missing => {
                let got = asked.start + length;
                Err(Failure::soon(self.truncated(&answer.host, got, None)))
            }
            _ => Ok(()),
        }
    }

    async fn receive(
        &self,
        answer: Answer,
        claim: &Claim,
        asked: &Range<u64>,
        part: &mut (dyn BlobPart + Send + '_),
    ) -> Result<(), Failure> {
        let host = answer.host;
        let wait = self.session.transport.options.read_timeout;
        let mut stream = BodyStream::new(answer.response, wait);
        let mut slow = Slow::new(wait);
        loop {
            let chunk = match stream.next(&host, &self.action, &self.what).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(failure) => return Err(self.broken(failure, claim)),
            };
            let room = claim.left();
            let shortened = claim.end.load(Relaxed) < asked.end;
            if chunk.len() as u64 > room && !shortened {
                return Err(self.too_large().into());
            }
            let taken = usize::try_from(room).map_or(chunk.len(), |room| room.min(chunk.len()));
            part.write(&chunk[..taken])
                .map_err(|error| self.sink_error(error))?;
            claim.at.fetch_add(taken as u64, Relaxed);
            self.got.fetch_add(taken as u64, Relaxed);
            if shortened && claim.left() == 0 {
                return Ok(());
            }
            match &self.session.transport.limiter {
                Some(limiter) => {
                    let until = limiter.take(Instant::now(), taken as u64);
                    tokio::time::sleep_until(until.into()).await;
                }
                None if slow.has_stalled(taken) => return Err(self.stalled(host, wait)),
                None => {}
            }
        }
        if claim.left() > 0 {
            return Err(Failure::soon(self.truncated(
                &host,
                claim.at.load(Relaxed),
                None,
            )));
        }
        Ok(())
    }

    async fn finish(&self) -> Result<(), Failure> {
        let got = self.parts.digest().await;
        let got = got.map_err(|error| self.sink_error(error))?;
        if got == *self.digest {
            return Ok(());
        }
        let mismatch = Error::DigestMismatch {
            what: self.what.clone(),
            expected: self.digest.clone(),
            got,
        };
        if !self.pieced.load(Relaxed) {
            return Err(mismatch.into());
        }
        // The pieces may be of two different contents; one whole answer tells.
        self.restart()?;
        Err(Failure::soon(mismatch))
    }

    fn restart(&self) -> Result<(), Failure> {
        let restarted = self.parts.restart();
        restarted.map_err(|error| self.sink_error(error))?;
        self.pieced.store(false, Relaxed);
        Ok(())
    }

    /// Begins again, if no other stream would be in the way; the claim is the whole then.
    fn restart_alone(&self, claim: &Claim) -> Result<bool, Failure> {
        if self.running.load(Relaxed) > 1 {
            return Ok(false);
        }
        self.restart()?;
        claim.start.store(0, Relaxed);
        claim.at.store(0, Relaxed);
        claim.end.store(self.size, Relaxed);
        Ok(true)
    }

    /// A connection that breaks within a blob is a blob that is too short.
    fn broken(&self, failure: Failure, claim: &Claim) -> Failure {
        match *failure.error {
            Error::Broken { host, source, .. } => {
                let got = claim.at.load(Relaxed);
                Failure::soon(self.truncated(&host, got, Some(source)))
            }
            error => Failure::new(error, failure.again),
        }
    }

    fn stalled(&self, host: String, after: Duration) -> Failure {
        Failure::soon(Error::Timeout {
            host,
            action: self.action.clone(),
            after,
        })
    }

    fn odd(&self, answer: &Answer, problem: &str) -> Failure {
        Failure::soon(Error::Protocol {
            host: answer.host.clone(),
            action: self.action.clone(),
            problem: problem.to_owned(),
        })
    }

    fn truncated(&self, host: &str, got: u64, source: Option<reqwest::Error>) -> Error {
        Error::Truncated {
            host: host.to_owned(),
            what: self.what.clone(),
            expected: self.size,
            got,
            source,
        }
    }

    fn too_large(&self) -> Error {
        Error::TooLarge {
            what: self.what.clone(),
            limit: self.size,
        }
    }

    fn sink_error(&self, source: std::io::Error) -> Error {
        Error::Sink {
            what: self.what.clone(),
            source,
        }
    }
}

/// Sees a stream that goes on and gets nowhere.
struct Slow {
    wait: Duration,
    since: Instant,
    got: u64,
}

impl Slow {
    fn new(wait: Duration) -> Slow {
        Slow {
            wait,
            since: Instant::now(),
            got: 0,
        }
    }

    /// Told of each piece.
    fn has_stalled(&mut self, bytes: usize) -> bool {
        self.got += bytes as u64;
        if self.got >= TRICKLE {
            (self.since, self.got) = (Instant::now(), 0);
        }
        self.since.elapsed() > self.wait
    }
}

/// Whether If-Range may name it (RFC 9110, 8.8.1 and 13.1.5).
fn is_strong(etag: &HeaderValue) -> bool {
    etag.as_bytes().starts_with(b"\"")
}

/// Whether `Content-Range` (RFC 9110, 14.4) says that the answer is `range` of `size` bytes.
fn continues(headers: &HeaderMap, range: &Range<u64>, size: u64) -> bool {
    let parse = || {
        let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
        let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let total = match total {
            "*" => size,
            total => total.parse().ok()?,
        };
        Some((first.parse().ok()?, last.parse().ok()?, total))
    };
    parse() == Some((range.start, range.end.saturating_sub(1), size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_rest_of_the_same_blob_continues_it() {
        let fits = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, text.parse().unwrap());
            continues(&headers, &(10..100), 100)
        };
        assert!(fits("bytes 10-99/100"));
        assert!(fits(" bytes 10-99/*"));
        for other in [
            "bytes 0-99/100",
            "bytes 11-99/100",
            "bytes 10-98/100",
            "bytes 10-99/101",
            "bytes */100",
            "items 10-99/100",
            "bytes -99/100",
            "bytes 10-99999999999999999999/100",
            "",
        ] {
            assert!(!fits(other), "{other}");
        }
        assert!(!continues(&HeaderMap::new(), &(10..100), 100));
    }
}
