//! Sends one request: the HTTP clients, redirects, deadlines, and what a network error means.
//!
//! Redirects are followed here rather than by the HTTP library, so that credentials are seen to go to the registry alone and
//! TLS is never given up on the way.
//!
//! It must not know of tokens, manifests or blobs.

use std::error::Error as StdError;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Certificate, Method, Response, StatusCode, Url};

use super::dns::SystemResolver;
use super::options::{ClientOptions, Endpoint, authority, is_loopback};
use super::pace::Limiter;
use super::retry::Failure;
use super::{Error, Result};

/// Redirects followed for one request. Registries need one or two, to a storage service.
const REDIRECTS: usize = 5;

/// How often a running upload is looked at.
const TICK: Duration = Duration::from_millis(200);

/// A registry checks and moves a blob after its last byte, so the answer may take longer than a byte may.
const COMMIT_FACTOR: u32 = 4;

/// A request as it is sent, and sent again.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// A small body.
    pub(super) body: Option<Vec<u8>>,
    /// What it is for, as in "cannot reach r.example to ...".
    pub(super) action: &'a str,
    /// What is not there if the answer is 404.
    pub(super) what: &'a str,
}

impl<'a> Request<'a> {
    pub(super) fn new(method: Method, url: Url, action: &'a str, what: &'a str) -> Request<'a> {
        Request {
            method,
            url,
            headers: HeaderMap::new(),
            body: None,
            action,
            what,
        }
    }
}

/// An answer and where it came from.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// Host and port that gave it, behind all redirects.
    pub(super) host: String,
    /// Whether it came from the registry itself.
    pub(super) ours: bool,
}

impl Answer {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }
}

/// The HTTP clients, made when they are first needed.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) options: ClientOptions,
    /// Holds all blobs together to `options.rate_limit`.
    pub(super) limiter: Option<Limiter>,
    ca: Vec<Certificate>,
    /// Through the proxy that the environment names.
    proxied: OnceLock<reqwest::Client>,
    /// For registries on this machine, which no proxy can reach.
    direct: OnceLock<reqwest::Client>,
}

impl Transport {
    pub(super) fn new(options: ClientOptions) -> Result<Transport> {
        Ok(Transport {
            ca: certificates(options.ca_pem.as_deref())?,
            limiter: options.rate_limit.map(Limiter::new),
            options,
            proxied: OnceLock::new(),
            direct: OnceLock::new(),
        })
    }

    /// Sends a request and follows its redirects. `authorization` goes to `endpoint` only.
    pub(super) async fn send(
        &self,
        endpoint: &Endpoint,
        request: &Request<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, Failure> {
        let mut url = request.url.clone();
        let mut ours = true;
        for _ in 0..=REDIRECTS {
            // Once it has left the registry a request stays a stranger's, wherever it is sent.
            ours &= endpoint.owns(&url);
            let authorization = authorization.filter(|_| ours);
            let response = self.send_to(&url, request, authorization).await?;
            let Some(next) = self.next(endpoint, &url, request, &response)? else {
                let host = authority(&url);
                return Ok(Answer {
                    response,
                    host,
                    ours,
                });
            };
            url = next;
        }
        Err(Error::Redirect {
            host: authority(&request.url),
            action: request.action.to_owned(),
            problem: format!(
                "there are more than {REDIRECTS} redirects, the last to {}",
                authority(&url)
            ),
        }
        .into())
    }

    /// Where an answer leads, if it is a redirect that applies to the request.
    fn next(
        &self,
        endpoint: &Endpoint,
        from: &Url,
        request: &Request<'_>,
        response: &Response,
    ) -> Result<Option<Url>> {
        let moved = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
        if !moved || (request.method != Method::GET && request.method != Method::HEAD) {
            return Ok(None);
        }
        let refuse = |problem: String| Error::Redirect {
            host: authority(from),
            action: request.action.to_owned(),
            problem,
        };
        let location = response.headers().get(LOCATION);
        let location = location
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let next = endpoint
            .resolve(from, location)
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| refuse("its Location is not a URL of a web server".to_owned()))?;
        let host = authority(&next);
        if from.scheme() == "https" && next.scheme() == "http" && !self.options.is_plain(&host) {
            return Err(refuse(format!("{host} is asked without TLS")));
        }
        tracing::debug!(from = %authority(from), to = %host, "redirect");
        Ok(Some(next))
    }

    async fn send_to(
        &self,
        url: &Url,
        request: &Request<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let body = request.body.clone().map(Body::from);
        let sent = self.build(url, request, authorization, body)?;
        let limit = self.options.connect_timeout + self.options.read_timeout;
        match tokio::time::timeout(limit, sent).await {
            Ok(sent) => self.received(url, request, sent),
            Err(_) => Err(Failure::soon(timeout(url, request, limit))),
        }
    }

    /// Sends a large body once, without redirects. `sent` counts its bytes as they leave; `progress` is told of them.
    pub(super) async fn upload(
        &self,
        endpoint: &Endpoint,
        request: &Request<'_>,
        authorization: Option<&HeaderValue>,
        body: Body,
        (size, sent): (u64, &AtomicU64),
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Answer, Failure> {
        let url = &request.url;
        let ours = endpoint.owns(url);
        let sending = self.build(url, request, authorization.filter(|_| ours), Some(body))?;
        tokio::pin!(sending);
        let mut tick = tokio::time::interval(TICK);
        let (mut last, mut moved) = (0, Instant::now());
        loop {
            tokio::select! {
                result = &mut sending => {
                    let response = self.received(url, request, result)?;
                    progress(sent.load(Ordering::Relaxed));
                    return Ok(Answer { response, host: authority(url), ours });
                }
                _ = tick.tick() => {}
            }
            let now = sent.load(Ordering::Relaxed);
            if now != last {
                progress(now);
                (last, moved) = (now, Instant::now());
            }
            let factor = if now < size { 1 } else { COMMIT_FACTOR };
            let limit = (self.options.connect_timeout + self.options.read_timeout) * factor;
            if moved.elapsed() > limit {
                return Err(Failure::soon(timeout(url, request, limit)));
            }
        }
    }

    fn build(
        &self,
        url: &Url,
        request: &Request<'_>,
        authorization: Option<&HeaderValue>,
        body: Option<Body>,
    ) -> Result<impl Future<Output = reqwest::Result<Response>> + use<>> {
        let mut builder = self
            .client(url)?
            .request(request.method.clone(), url.clone())
            .headers(request.headers.clone())
            // A digest is of the bytes as they are stored.
            .header(ACCEPT_ENCODING, "identity");
        if let Some(value) = authorization {
            builder = builder.header(AUTHORIZATION, value);
        }
        if let Some(body) = body {
            builder = builder.body(body);
        }
        Ok(builder.send())
    }

    fn received(
        &self,
        url: &Url,
        request: &Request<'_>,
        result: reqwest::Result<Response>,
    ) -> Result<Response, Failure> {
        match result {
            Ok(response) => {
                let status = response.status().as_u16();
                tracing::debug!(method = %request.method, host = %authority(url), path = url.path(), status, "request");
                Ok(response)
            }
            Err(error) => Err(self.network_error(url, request.action, error)),
        }
    }

    /// What a network error means to a person.
    pub(super) fn network_error(&self, url: &Url, action: &str, error: reqwest::Error) -> Failure {
        // URLs of storage services hold signatures in their query.
        let source = error.without_url();
        let host = authority(url);
        let action = action.to_owned();
        if let Some(error) = find::<rustls::Error>(&source) {
            let hint = tls_hint(error);
            return Error::Tls { host, hint, source }.into();
        }
        if source.is_timeout() {
            let after = self.options.connect_timeout;
            return Failure::soon(Error::Timeout {
                host,
                action,
                after,
            });
        }
        let unreachable = Error::Unreachable {
            host,
            action,
            source,
        };
        Failure::soon(unreachable)
    }

    fn client(&self, url: &Url) -> Result<&reqwest::Client> {
        let local = is_loopback(url.host_str().unwrap_or_default());
        let place = if local { &self.direct } else { &self.proxied };
        if let Some(client) = place.get() {
            return Ok(client);
        }
        let client = self.make(local)?;
        Ok(place.get_or_init(|| client))
    }

    fn make(&self, direct: bool) -> Result<reqwest::Client> {
        let settings = || {
            let builder = reqwest::Client::builder()
                .http1_only()
                .connect_timeout(self.options.connect_timeout)
                .user_agent(&self.options.user_agent)
                .redirect(reqwest::redirect::Policy::none())
                .retry(reqwest::retry::never())
                .referer(false)
                .dns_resolver(Arc::new(SystemResolver::default()))
                .no_gzip()
                .no_brotli()
                .no_zstd()
                .no_deflate();
            if direct { builder.no_proxy() } else { builder }
        };
        let made = settings().tls_certs_merge(self.ca.iter().cloned()).build();
        // A system without any certificates must not keep us from registries that need none.
        let made = match made {
            Err(error) if find::<rustls::Error>(&error).is_some() => {
                tracing::debug!(%error, "no system certificates");
                settings().tls_certs_only(self.ca.iter().cloned()).build()
            }
            other => other,
        };
        made.map_err(|source| Error::Setup {
            problem: "one of its settings is not usable",
            source,
        })
    }
}

fn certificates(pem: Option<&[u8]>) -> Result<Vec<Certificate>> {
    let Some(pem) = pem else {
        return Ok(Vec::new());
    };
    let wrong = |problem: &str, source| Error::Ca {
        problem: problem.to_owned(),
        source,
    };
    let all = Certificate::from_pem_bundle(pem)
        .map_err(|source| wrong("it cannot be read", Some(source)))?;
    if all.is_empty() {
        return Err(wrong("there is no certificate in it", None));
    }
    // The content of each certificate is looked at only by a client that trusts it.
    reqwest::Client::builder()
        .tls_certs_only(all.iter().cloned())
        .build()
        .map_err(|source| wrong("a certificate in it is damaged", Some(source)))?;
    Ok(all)
}

fn timeout(url: &Url, request: &Request<'_>, after: Duration) -> Error {
    Error::Timeout {
        host: authority(url),
        action: request.action.to_owned(),
        after,
    }
}

fn tls_hint(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(_) => {
            "if its certificate is from a private authority, give that authority's certificate as the registry CA"
        }
        rustls::Error::InvalidMessage(_) => {
            "it does not seem to speak TLS; if that is intended, list it as a plain HTTP registry"
        }
        _ => "check its TLS settings",
    }
}

/// The first error of type `T` among an error and its causes. An `io::Error` hides the error that it was made from.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
