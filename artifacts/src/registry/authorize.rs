//! Who we are to a registry: basic authentication, and the bearer tokens that a token server gives out.
//!
//! The protocol is distribution/distribution, docs/content/spec/auth/token.md and oauth.md. Credentials for exactly this
//! registry are sent with the first request, so that a registry with basic authentication costs no second one; a token is
//! kept for its registry, repository and access as long as the process runs. A server that stands for a registry is one of
//! its own here: it gets the credentials that are known for its name. Nobody else ever gets credentials than the registry
//! and, over TLS unless the registry itself has none, the token server that the registry names.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::challenge::{self, Challenge};
use super::credentials::{Credential, Found, Secret};
use super::helper::Helpers;
use super::options::{ClientOptions, Endpoint, authority};
use super::pace::Limiter;
use super::retry::{Failure, Tries};
use super::transport::{Answer, Request, Transport, Via};
use super::{Error, Result};
use crate::reference::Reference;

/// The most bytes of a token server's answer.
const TOKEN_ANSWER_MAX: u64 = 1 << 20;

/// How long a token lasts that does not say (token.md, `expires_in`).
const TOKEN_LIFE: Duration = Duration::from_secs(60);

/// No token is used longer than this without asking again.
const TOKEN_LIFE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A token that is about to expire is not used.
const TOKEN_MARGIN: Duration = Duration::from_secs(5);

/// What we call ourselves to OAuth2 token servers (oauth.md, `client_id`).
const CLIENT_ID: &str = "kata-manager";

/// What is done to a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Access {
    Pull,
    Push,
}

impl Access {
    /// distribution/distribution, docs/content/spec/auth/scope.md.
    fn scope(self, repository: &str) -> String {
        let actions = match self {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        };
        format!("repository:{repository}:{actions}")
    }
}

/// A repository at a registry, and what is done there.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) endpoint: Endpoint,
    /// The registry that the reference names.
    registry: String,
    /// Whose credentials are sent: the same, unless another server stands for it.
    login: String,
    repository: String,
    access: Access,
}

impl Target {
    pub(super) fn url(&self, rest: &str) -> Url {
        self.endpoint.url(&self.repository, rest)
    }

    /// Registry and repository.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    fn key(&self) -> Key {
        (self.registry.clone(), self.repository.clone(), self.access)
    }
}

type Key = (String, String, Access);

struct Token {
    header: HeaderValue,
    until: Instant,
}

/// The tokens of this process.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<Key, Token>>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens(hidden)")
    }
}

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Token>> {
        // A map is whole between any two calls.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &Key) -> Option<HeaderValue> {
        let tokens = self.lock();
        let token = tokens.get(key)?;
        (token.until > Instant::now()).then(|| token.header.clone())
    }
}

/// token.md, "Token Response Fields".
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

/// Sends requests with whatever authorization the registry wants.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) transport: Transport,
    tokens: Tokens,
    helpers: Helpers,
}

impl Session {
    pub(super) fn new(options: ClientOptions) -> Result<Session> {
        let limiter = options.rate_limit.map(Limiter::new).map(Arc::new);
        Session::via(options, None, limiter)
    }

    /// By another way than the registry's own address.
    pub(super) fn via(
        options: ClientOptions,
        via: Option<Via>,
        limiter: Option<Arc<Limiter>>,
    ) -> Result<Session> {
        Ok(Session {
            transport: Transport::new(options, via, limiter)?,
            tokens: Tokens::default(),
            helpers: Helpers::default(),
        })
    }

    /// A reference's repository, and what is done there.
    pub(super) fn target(&self, reference: &Reference, access: Access) -> Result<Target> {
        let registry = reference.registry();
        let (endpoint, login) = match &self.transport.via {
            Some(via) => (Some(via.endpoint.clone()), via.endpoint.host()),
            None => {
                let own = Endpoint::of(registry, &self.transport.options);
                (own, registry.to_owned())
            }
        };
        let endpoint = endpoint.ok_or_else(|| Error::Protocol {
            host: registry.to_owned(),
            action: format!("reach {reference}"),
            problem: "its name is not usable in a URL".to_owned(),
        })?;
        Ok(Target {
            endpoint,
            registry: registry.to_owned(),
            login,
            repository: reference.repository().to_owned(),
            access,
        })
    }

    pub(super) fn tries(&self) -> Tries {
        Tries::new(self.transport.options.tries)
    }

    /// Sends a request once, or twice when the registry first wants to know who asks. The answer may be of any status.
    pub(super) async fn send(
        &self,
        target: &Target,
        request: &Request<'_>,
    ) -> Result<Answer, Failure> {
        let first = self.authorization(target).await?;
        let answer = self
            .transport
            .send(&target.endpoint, request, first.as_ref())
            .await?;
        // A challenge from anyone else could name a token server of its own.
        if answer.status() != StatusCode::UNAUTHORIZED || !answer.ours {
            return Ok(answer);
        }
        match self.answer_to(target, &answer, request, first).await? {
            Some(second) => {
                let sent = self
                    .transport
                    .send(&target.endpoint, request, Some(&second));
                sent.await
            }
            None => Ok(answer),
        }
    }

    /// Sends a request until it succeeds, is refused for good, or tries are used up.
    pub(super) async fn request(&self, target: &Target, request: &Request<'_>) -> Result<Answer> {
        let mut tries = self.tries();
        loop {
            match self.send_once(target, request).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => tries.pause(failure).await?,
            }
        }
    }

    /// As [`Session::send`]; every answer that is no success is an error.
    pub(super) async fn send_once(
        &self,
        target: &Target,
        request: &Request<'_>,
    ) -> Result<Answer, Failure> {
        let answer = self.send(target, request).await?;
        self.checked(target, answer, request).await
    }

    pub(super) async fn checked(
        &self,
        target: &Target,
        answer: Answer,
        request: &Request<'_>,
    ) -> Result<Answer, Failure> {
        let hint = || self.hint(target);
        let checked = self
            .transport
            .success(answer, request.action, request.what, hint);
        checked.await
    }

    fn hint(&self, target: &Target) -> String {
        let credentials = &self.transport.options.credentials;
        credentials.hint(&target.login, &target.repository)
    }

    /// What is sent without being asked: a token that we have, or name and password.
    pub(super) async fn authorization(&self, target: &Target) -> Result<Option<HeaderValue>> {
        match self.tokens.get(&target.key()) {
            Some(token) => Ok(Some(token)),
            None => Ok(self.credential(target).await?.as_ref().and_then(basic)),
        }
    }

    async fn credential(&self, target: &Target) -> Result<Option<Credential>> {
        let options = &self.transport.options;
        match options.credentials.find(&target.login, &target.repository) {
            Found::Credential(_, credential) => Ok(Some(credential.clone())),
            Found::Helper { name, server } => {
                self.helpers.get(options.root.as_ref(), name, &server).await
            }
            Found::Nothing => Ok(None),
        }
    }

    /// What a 401 asks for, unless that is what was sent already or we do not have it.
    async fn answer_to(
        &self,
        target: &Target,
        answer: &Answer,
        request: &Request<'_>,
        sent: Option<HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let headers = answer.response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<_> = headers
            .iter()
            .flat_map(|value| challenge::parse(&String::from_utf8_lossy(value.as_bytes())))
            .collect();
        let bearer = challenges
            .iter()
            .find(|c| c.scheme == "bearer" && c.param("realm").is_some());
        if let Some(challenge) = bearer {
            let token = self.token(target, &answer.host, challenge, request).await?;
            return Ok(Some(token));
        }
        let wants_basic = challenges.iter().any(|c| c.scheme == "basic");
        let basic = self.credential(target).await?.as_ref().and_then(basic);
        Ok(basic.filter(|basic| wants_basic && Some(basic) != sent.as_ref()))
    }

    /// A new token for a challenge; kept for later requests.
    async fn token(
        &self,
        target: &Target,
        host: &str,
        challenge: &Challenge,
        request: &Request<'_>,
    ) -> Result<HeaderValue, Failure> {
        let refuse = |host: &str, problem: &str| Error::Protocol {
            host: host.to_owned(),
            action: request.action.to_owned(),
            problem: problem.to_owned(),
        };
        let realm = realm(challenge, target).map_err(|problem| refuse(host, problem))?;
        let token_host = authority(&realm);
        let action = format!("get a token for {}", target.name());
        let credential = self.credential(target).await?;
        let ask = token_request(target, challenge, &realm, &action, credential.as_ref());
        // Its own endpoint: no redirect takes the credentials elsewhere.
        let endpoint = Endpoint::at(&realm);
        let sent = self
            .transport
            .send(&endpoint, &ask.0, ask.1.as_ref())
            .await?;
        let hint = || self.hint(target);
        let answer = self
            .transport
            .success(sent, &action, "its token server", hint)
            .await?;
        let what = "the token server's answer";
        let body = self
            .transport
            .read_all(answer, TOKEN_ANSWER_MAX, &action, what)
            .await?;
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| {
            refuse(
                &token_host,
                "the token server's answer is not the JSON of a token",
            )
        })?;
        let token = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|t| !t.is_empty());
        let header = token
            .and_then(|token| sensitive(&format!("Bearer {token}")))
            .ok_or_else(|| {
                refuse(
                    &token_host,
                    "the token server's answer has no usable token in it",
                )
            })?;
        let life = answer.expires_in.map_or(TOKEN_LIFE, Duration::from_secs);
        // A token of less than the default life is from before that default (token.md); all must last that long.
        let life = life.clamp(TOKEN_LIFE, TOKEN_LIFE_MAX) - TOKEN_MARGIN;
        let token = Token {
            header: header.clone(),
            until: Instant::now() + life,
        };
        self.tokens.lock().insert(target.key(), token);
        Ok(header)
    }
}

/// The request to the token server, and its authorization.
fn token_request<'a>(
    target: &Target,
    challenge: &Challenge,
    realm: &Url,
    action: &'a str,
    credential: Option<&Credential>,
) -> (Request<'a>, Option<HeaderValue>) {
    let own = target.access.scope(&target.repository);
    // The registry's word counts where it knows the repository by another name, as proxies in front of others do.
    let same = format!("repository:{}:", target.repository);
    let scope = challenge
        .param("scope")
        .filter(|scope| !scope.is_empty() && !scope.starts_with(&same))
        .unwrap_or(&own);
    let mut fields = vec![("scope", scope)];
    if let Some(service) = challenge.param("service") {
        fields.push(("service", service));
    }
    let mut url = realm.clone();
    let what = "its token server";
    if let Some(Credential::Identity(token)) = credential {
        fields.extend(identity(token));
        let mut request = Request::new(Method::POST, url, action, what);
        request.body = Some(form(&fields));
        let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
        request.headers.insert(CONTENT_TYPE, kind);
        return (request, None);
    }
    url.query_pairs_mut().extend_pairs(fields);
    let mut request = Request::new(Method::GET, url, action, what);
    let json = HeaderValue::from_static("application/json");
    request.headers.insert(ACCEPT, json);
    (request, credential.and_then(basic))
}

/// oauth.md, "Refresh token".
fn identity(token: &Secret) -> [(&'static str, &str); 3] {
    [
        ("grant_type", "refresh_token"),
        ("client_id", CLIENT_ID),
        ("refresh_token", token.expose()),
    ]
}

/// `application/x-www-form-urlencoded` (WHATWG URL, section 5).
fn form(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut carrier = Url::parse("form:").ok();
    if let Some(url) = &mut carrier {
        url.query_pairs_mut().extend_pairs(fields);
    }
    let query = carrier.as_ref().and_then(Url::query).unwrap_or_default();
    query.as_bytes().to_vec()
}

fn realm(challenge: &Challenge, target: &Target) -> Result<Url, &'static str> {
    let text = challenge.param("realm").unwrap_or_default();
    let url = Url::parse(text).map_err(|_| "the realm in its WWW-Authenticate is not a URL")?;
    match url.scheme() {
        "https" => {}
        "http" if target.endpoint.is_plain() => {}
        "http" => return Err("it names a token server without TLS, while it has TLS itself"),
        _ => return Err("the realm in its WWW-Authenticate is not the URL of a web server"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("the realm in its WWW-Authenticate has a user name in it");
    }
    Ok(url)
}

fn basic(credential: &Credential) -> Option<HeaderValue> {
    credential.basic().as_deref().and_then(sensitive)
}

/// A header value that is never shown or cached in clear.
fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
