//! Sends one request: the HTTP clients, redirects, deadlines, and what a network error means.
//!
//! Redirects are followed here rather than by the HTTP library, so that credentials are seen to go to the registry alone and
//! TLS is never given up on the way.
//!
//! It must not know of tokens, manifests or blobs.

use std::env;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Method, Proxy, Response, StatusCode, Url};

use super::dns::SystemResolver;
use super::options::{ClientOptions, Endpoint, ProxyUrl, authority, is_loopback};
use super::pace::Limiter;
use super::retry::Failure;
use super::tls::{self, Tls, find};
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

/// Another way to a registry than its own address: what stands for it, and how that is talked to.
#[derive(Clone, Debug)]
pub(super) struct Via {
    pub(super) endpoint: Endpoint,
    /// Any certificate will do.
    pub(super) skip_verify: bool,
    /// In place of the proxies that the environment names.
    pub(super) proxy: Option<ProxyUrl>,
}

/// The HTTP clients, made when they are first needed.
pub(super) struct Transport {
    pub(super) options: ClientOptions,
    pub(super) via: Option<Via>,
    /// Holds all blobs together to `options.rate_limit`, whatever way they come.
    pub(super) limiter: Option<Arc<Limiter>>,
    tls: Tls,
    /// Whether the environment says that no proxy is for anyone.
    exempt: OnceLock<bool>,
    /// Through the proxy that the environment names.
    proxied: OnceLock<reqwest::Client>,
    /// For registries on this machine, which no proxy can reach, and for all when the environment exempts all.
    direct: OnceLock<reqwest::Client>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the HTTP clients: they show their proxies, and those may hold passwords.
        f.debug_struct("Transport")
            .field("options", &self.options)
            .field("via", &self.via)
            .finish_non_exhaustive()
    }
}

impl Transport {
    pub(super) fn new(
        options: ClientOptions,
        via: Option<Via>,
        limiter: Option<Arc<Limiter>>,
    ) -> Result<Transport> {
        Ok(Transport {
            tls: Tls::new(&options)?,
            limiter,
            options,
            via,
            exempt: OnceLock::new(),
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
            let known = ours.then_some((endpoint, authorization));
            let response = self.send_to(&url, request, known).await?;
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
        let gives_up = from.scheme() == "https" && next.scheme() == "http";
        if gives_up && !self.options.is_listed_plain(&host) {
            return Err(refuse(format!("{host} is asked without TLS")));
        }
        tracing::debug!(from = %authority(from), to = %host, "redirect");
        Ok(Some(next))
    }

    async fn send_to(
        &self,
        url: &Url,
        request: &Request<'_>,
        known: Option<(&Endpoint, Option<&HeaderValue>)>,
    ) -> Result<Response, Failure> {
        let body = request.body.clone().map(Body::from);
        let sent = self.build(url, request, known, body)?;
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
        let known = ours.then_some((endpoint, authorization));
        let sending = self.build(url, request, known, Some(body))?;
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

    /// `known` is whom the request goes to and what tells it who we are; none for strangers.
    fn build(
        &self,
        url: &Url,
        request: &Request<'_>,
        known: Option<(&Endpoint, Option<&HeaderValue>)>,
        body: Option<Body>,
    ) -> Result<impl Future<Output = reqwest::Result<Response>> + use<>> {
        let mut builder = self
            .client(url)?
            .request(request.method.clone(), url.clone())
            .headers(request.headers.clone())
            // A digest is of the bytes as they are stored.
            .header(ACCEPT_ENCODING, "identity");
        if let Some((endpoint, authorization)) = known {
            builder = builder.headers(endpoint.headers().clone());
            if let Some(value) = authorization {
                builder = builder.headers(HeaderMap::from_iter([(AUTHORIZATION, value.clone())]));
            }
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
            let hint = tls::hint(error);
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
        let fixed = self.via.as_ref().is_some_and(|via| via.proxy.is_some());
        let local = is_loopback(url.host_str().unwrap_or_default());
        let local = !fixed
            && (local
                || *self
                    .exempt
                    .get_or_init(|| exempts_all(|name| env::var(name).ok())));
        let place = if local { &self.direct } else { &self.proxied };
        if let Some(client) = place.get() {
            return Ok(client);
        }
        let client = self.make(local)?;
        Ok(place.get_or_init(|| client))
    }

    fn make(&self, direct: bool) -> Result<reqwest::Client> {
        let setup = |source| Error::Setup {
            problem: "one of its settings is not usable",
            source,
        };
        let via = self.via.as_ref();
        let proxy = via.and_then(|via| via.proxy.as_ref());
        let proxy = proxy.map(|proxy| Proxy::all(proxy.expose().clone()));
        let proxy = proxy.transpose().map_err(setup)?;
        let any_certificate = via.is_some_and(|via| via.skip_verify);
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
            .no_deflate()
            .tls_backend_preconfigured(self.tls.config(any_certificate)?);
        let builder = match (proxy, direct) {
            (Some(proxy), _) => builder.proxy(proxy),
            (None, true) => builder.no_proxy(),
            (None, false) => builder,
        };
        builder.build().map_err(setup)
    }
}

/// Whether `NO_PROXY` has an entry `*`. The HTTP library takes that for names alone, and not for addresses.
fn exempts_all(variable: impl Fn(&str) -> Option<String>) -> bool {
    let value = variable("NO_PROXY").or_else(|| variable("no_proxy"));
    value.is_some_and(|value| value.split(',').any(|entry| entry.trim() == "*"))
}

fn timeout(url: &Url, request: &Request<'_>, after: Duration) -> Error {
    Error::Timeout {
        host: authority(url),
        action: request.action.to_owned(),
        after,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_asterisk_exempts_all() {
        let with = |upper: Option<&str>, lower: Option<&str>| {
            exempts_all(|name| {
                let value = if name == "NO_PROXY" { upper } else { lower };
                value.map(str::to_owned)
            })
        };
        for all in ["*", "example.org, *"] {
            assert!(with(Some(all), None) && with(None, Some(all)));
        }
        for some in ["", "*.example.org", "192.0.2.1"] {
            assert!(!with(Some(some), Some("*")));
        }
        assert!(!with(None, None));
    }
}
