//! Blobs as verified streams.
//!
//! OCI distribution specification, "Pulling blobs". A connection that breaks is taken up where it broke, by a range request;
//! the hash runs over everything handed on, so a range that does not fit shows in the end.
//!
//! It must not know where the bytes go.

use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};

use super::answer::BodyStream;
use super::authorize::{Access, Session, Target};
use super::retry::Failure;
use super::transport::{Answer, Request};
use super::{BlobSink, Error, Result};
use crate::digest::{Digest, Hasher};
use crate::reference::Reference;

/// New bytes after which a broken connection is no longer held against the registry.
const PROGRESS: u64 = 1 << 20;

/// One blob on its way.
struct Transfer<'a> {
    session: &'a Session,
    target: Target,
    digest: &'a Digest,
    size: u64,
    sink: &'a mut (dyn BlobSink + Send),
    hasher: Hasher,
    /// Bytes handed on.
    got: u64,
    /// Whether what was handed on comes from more than one answer.
    pieced: bool,
    action: String,
    what: String,
}

impl Session {
    pub(super) async fn fetch_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        sink: &mut (dyn BlobSink + Send),
    ) -> Result<()> {
        let target = Target::new(reference, Access::Pull, &self.transport.options)?;
        let what = format!("blob {digest} of {}", target.name());
        let mut transfer = Transfer {
            session: self,
            digest,
            size,
            sink,
            hasher: Hasher::like(digest),
            got: 0,
            pieced: false,
            action: format!("fetch {what}"),
            what,
            target,
        };
        let mut tries = self.tries();
        let mut furthest = 0;
        loop {
            match transfer.go_on().await {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    if transfer.got >= furthest + PROGRESS {
                        furthest = transfer.got;
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
        let target = Target::new(reference, access, &self.transport.options)?;
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

impl Transfer<'_> {
    /// Asks for what is missing, and hands it on as it comes.
    async fn go_on(&mut self) -> Result<(), Failure> {
        let (action, what) = (self.action.clone(), self.what.clone());
        let url = self.target.url(&format!("blobs/{}", self.digest));
        let mut request = Request::new(Method::GET, url, &action, &what);
        if self.got > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", self.got))
        {
            request.headers.insert(RANGE, range);
        }
        let answer = self.session.send(&self.target, &request).await?;
        if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE && self.got > 0 {
            self.restart()?;
            return Err(Failure::soon(self.truncated(&answer.host, 0, None)));
        }
        let answer = self.session.checked(&self.target, answer, &request).await?;
        self.begin(&answer)?;
        self.receive(answer).await?;
        self.finish()
    }

    /// Makes what was handed on fit to what will come.
    fn begin(&mut self, answer: &Answer) -> Result<(), Failure> {
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            if self.got == 0 || !continues(answer.response.headers(), self.got, self.size) {
                self.restart()?;
                return Err(Failure::soon(Error::Protocol {
                    host: answer.host.clone(),
                    action: self.action.clone(),
                    problem: "its Content-Range is not what was asked for".to_owned(),
                }));
            }
            self.pieced = true;
        } else if self.got > 0 {
            self.restart()?;
        }
        let missing = self.size - self.got;
        match answer.response.content_length() {
            Some(length) if length > missing => Err(self.too_large().into()),
            Some(length) if length < missing => {
                let got = self.got + length;
                Err(Failure::soon(self.truncated(&answer.host, got, None)))
            }
            _ => Ok(()),
        }
    }

    async fn receive(&mut self, answer: Answer) -> Result<(), Failure> {
        let host = answer.host;
        let wait = self.session.transport.options.read_timeout;
        let mut stream = BodyStream::new(answer.response, wait);
        loop {
            let chunk = match stream.next(&host, &self.action, &self.what).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(failure) => return Err(self.broken(failure)),
            };
            if chunk.len() as u64 > self.size - self.got {
                return Err(self.too_large().into());
            }
            self.hasher.update(&chunk);
            self.sink.write(&chunk).map_err(|e| self.sink_error(e))?;
            self.got += chunk.len() as u64;
        }
        if self.got < self.size {
            return Err(Failure::soon(self.truncated(&host, self.got, None)));
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Failure> {
        let got = std::mem::replace(&mut self.hasher, Hasher::like(self.digest)).finish();
        if got == *self.digest {
            return Ok(());
        }
        let mismatch = Error::DigestMismatch {
            what: self.what.clone(),
            expected: self.digest.clone(),
            got,
        };
        if !self.pieced {
            return Err(mismatch.into());
        }
        // The pieces may be of two different contents; one whole answer tells.
        self.restart()?;
        Err(Failure::soon(mismatch))
    }

    fn restart(&mut self) -> Result<(), Failure> {
        self.sink
            .restart()
            .map_err(|error| self.sink_error(error))?;
        self.hasher = Hasher::like(self.digest);
        self.got = 0;
        self.pieced = false;
        Ok(())
    }

    /// A connection that breaks within a blob is a blob that is too short.
    fn broken(&self, failure: Failure) -> Failure {
        match *failure.error {
            Error::Broken { host, source, .. } => {
                Failure::soon(self.truncated(&host, self.got, Some(source)))
            }
            error => Failure::new(error, failure.again),
        }
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

/// Whether `Content-Range` (RFC 9110, 14.4) says that the answer goes from `start` to the end of `size` bytes.
fn continues(headers: &HeaderMap, start: u64, size: u64) -> bool {
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
    parse() == Some((start, size.saturating_sub(1), size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_rest_of_the_same_blob_continues_it() {
        let fits = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, text.parse().unwrap());
            continues(&headers, 10, 100)
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
        assert!(!continues(&HeaderMap::new(), 10, 100));
    }
}
