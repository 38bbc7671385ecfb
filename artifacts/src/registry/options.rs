//! How to talk to registries, and where each of them is.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use km_host::{HostPath, Root};
use reqwest::Url;
use reqwest::header::HeaderMap;

use super::credentials::Credentials;

/// Docker Hub's name in references, and the host that answers for it (docker CLI, registry/config.go, `DefaultV2Registry`).
const DOCKER_HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// A registry serves others as well, and each stream has a buffer.
const STREAMS: usize = 8;

/// How to talk to registries.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Certificates in PEM that are trusted besides the system's.
    pub ca_pem: Option<Vec<u8>>,
    /// What we show to registries that ask for a certificate.
    pub client_certificate: Option<ClientCertificate>,
    /// The host's root: credential helpers run in it, and files that a `hosts.toml` names are looked up in it. Without it
    /// neither is used.
    pub root: Option<Arc<Root>>,
    /// The `hosts.toml` files, which say what stands for a registry.
    pub hosts_dir: Option<HostsDir>,
    /// Who we are to which registry.
    pub credentials: Credentials,
    /// Registries without TLS, `host` (any port) or `host:port`. Those on this machine (`localhost`, 127.0.0.0/8, `::1`)
    /// need not be listed.
    pub plain_http: Vec<String>,
    /// Registries on this machine that do speak TLS, written in the same way.
    pub https: Vec<String>,
    /// How long a connection may take, TLS handshake included.
    pub connect_timeout: Duration,
    /// How long nothing may come (or go) on a connection.
    pub read_timeout: Duration,
    /// What we call ourselves.
    pub user_agent: String,
    /// How often a request is tried when the network or the registry fails for the moment; at least once.
    pub tries: u32,
    /// The most bytes a second that are received of blobs, over all of them.
    pub rate_limit: Option<u64>,
    /// Streams that fetch one blob at the same time, at the most.
    pub streams: usize,
}

/// containerd's folder of `hosts.toml` files (its `config_path`).
#[derive(Clone, Debug)]
pub struct HostsDir {
    /// The folder.
    pub path: HostPath,
    /// Whether what is in it must be usable. Else trouble is a warning, and the registry itself is asked, as containerd does.
    pub strict: bool,
}

/// A certificate of ours and its key, in PEM.
#[derive(Clone)]
pub struct ClientCertificate {
    /// The certificate, and those that lead from it to its authority.
    pub certificate: Vec<u8>,
    /// The certificate's private key, unencrypted.
    pub key: Vec<u8>,
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCertificate(hidden)")
    }
}

/// Where a proxy is. It may hold a user name and a password, which are never shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ProxyUrl(Url);

impl ProxyUrl {
    pub(super) fn new(url: Url) -> ProxyUrl {
        ProxyUrl(url)
    }

    pub(super) fn expose(&self) -> &Url {
        &self.0
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&authority(&self.0))
    }
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            ca_pem: None,
            client_certificate: None,
            root: None,
            hosts_dir: None,
            credentials: Credentials::anonymous(),
            plain_http: Vec::new(),
            https: Vec::new(),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            user_agent: concat!("kata-manager/", env!("CARGO_PKG_VERSION")).to_owned(),
            tries: 3,
            rate_limit: None,
            streams: STREAMS,
        }
    }
}

impl ClientOptions {
    /// Whether the user lists `host` or `host:port` as without TLS.
    pub(super) fn is_listed_plain(&self, authority: &str) -> bool {
        lists(&self.plain_http, authority)
    }

    /// Whether `host` or `host:port` is asked without TLS. The rule for this machine is containerd's (docs/hosts.md).
    pub(super) fn is_plain(&self, authority: &str) -> bool {
        if lists(&self.https, authority) {
            return false;
        }
        lists(&self.plain_http, authority) || is_loopback(host_of(authority))
    }
}

fn lists(list: &[String], authority: &str) -> bool {
    let host = host_of(authority);
    list.iter().any(|entry| {
        entry.eq_ignore_ascii_case(authority)
            || (host_of(entry) == entry && entry.eq_ignore_ascii_case(host))
    })
}

/// The part in front of the port; IPv6 addresses keep their brackets.
fn host_of(authority: &str) -> &str {
    let behind_brackets = authority.rfind(']').map_or(0, |at| at + 1);
    match authority[behind_brackets..].find(':') {
        Some(colon) => &authority[..behind_brackets + colon],
        None => authority,
    }
}

/// Whether a host, without port, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// `host:port` of a URL as a person knows it: without the port where the scheme says it.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Where a registry is.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// Scheme, host, port, and the path of the API.
    api: Url,
    /// The registry that it stands for, if that is another one.
    namespace: Option<String>,
    /// Sent along with every request to it.
    headers: HeaderMap,
}

impl Endpoint {
    /// Of a registry as references name it. None only when the name is no host, which a reference never has.
    pub(super) fn of(registry: &str, options: &ClientOptions) -> Option<Endpoint> {
        let host = if registry == DOCKER_HUB.0 {
            DOCKER_HUB.1
        } else {
            registry
        };
        let scheme = if options.is_plain(host) {
            "http"
        } else {
            "https"
        };
        let api = Url::parse(&format!("{scheme}://{host}/v2")).ok()?;
        Some(Endpoint {
            api,
            namespace: None,
            headers: HeaderMap::new(),
        })
    }

    /// Of a server that stands for a registry. It is told for which one unless it is that registry (containerd,
    /// docs/hosts.md, "Registry Host Namespace").
    pub(super) fn standing_for(registry: &str, api: Url) -> Endpoint {
        let host = authority(&api);
        let itself = host == registry || (registry == DOCKER_HUB.0 && host == DOCKER_HUB.1);
        Endpoint {
            api,
            namespace: (!itself).then(|| registry.to_owned()),
            headers: HeaderMap::new(),
        }
    }

    pub(super) fn with_headers(self, headers: HeaderMap) -> Endpoint {
        Endpoint { headers, ..self }
    }

    /// Of the server that a URL leads to.
    pub(super) fn at(url: &Url) -> Endpoint {
        Endpoint {
            api: url.clone(),
            namespace: None,
            headers: HeaderMap::new(),
        }
    }

    /// `/v2/<repository>/<rest>` (OCI distribution specification, "Endpoints"); both are of characters that need no escaping.
    pub(super) fn url(&self, repository: &str, rest: &str) -> Url {
        let mut url = self.api.clone();
        let path = self.api.path().trim_end_matches('/');
        url.set_path(&format!("{path}/{repository}/{rest}"));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    /// Host and port.
    pub(super) fn host(&self) -> String {
        authority(&self.api)
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Whether a URL leads to this registry itself, so that it may have our credentials.
    pub(super) fn owns(&self, url: &Url) -> bool {
        self.api.origin() == url.origin()
    }

    pub(super) fn is_plain(&self) -> bool {
        self.api.scheme() == "http"
    }

    /// Resolves a `Location`. One that names this host with the wrong scheme (a registry behind a proxy that ends TLS) is
    /// brought back to ours.
    pub(super) fn resolve(&self, from: &Url, location: &str) -> Option<Url> {
        let url = from.join(location).ok()?;
        if self.is_plain() || url.scheme() != "http" || url.host_str() != self.api.host_str() {
            return Some(url);
        }
        let mut ours = url.clone();
        ours.set_scheme("https").ok()?;
        if url.port().is_none() {
            ours.set_port(self.api.port()).ok()?;
        }
        Some(if self.owns(&ours) { ours } else { url })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(plain: &[&str], https: &[&str]) -> ClientOptions {
        ClientOptions {
            plain_http: plain.iter().map(|s| (*s).to_owned()).collect(),
            https: https.iter().map(|s| (*s).to_owned()).collect(),
            ..ClientOptions::default()
        }
    }

    #[test]
    fn tls_everywhere_but_on_this_machine_and_where_listed() {
        let none = options(&[], &[]);
        for plain in [
            "localhost",
            "LocalHost:5000",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:5000",
            "[::1]",
        ] {
            assert!(none.is_plain(plain), "{plain}");
        }
        for tls in [
            "registry.example",
            "localhost.example:5000",
            "10.0.0.1:5000",
            "[::2]:5000",
            "127.0.0.1.example",
        ] {
            assert!(!none.is_plain(tls), "{tls}");
        }
        let some = options(
            &["a.example", "b.example:5000", "[fd00::1]"],
            &["localhost:5443", "127.0.0.1"],
        );
        for plain in [
            "a.example",
            "A.example:80",
            "b.example:5000",
            "localhost:5000",
            "[fd00::1]:5000",
        ] {
            assert!(some.is_plain(plain), "{plain}");
        }
        for tls in [
            "b.example",
            "b.example:5001",
            "localhost:5443",
            "127.0.0.1:5000",
            "x.a.example",
        ] {
            assert!(!some.is_plain(tls), "{tls}");
        }
    }

    #[test]
    fn urls_of_registries() {
        let cases = [
            (
                "docker.io",
                "https://registry-1.docker.io/v2/a/b/manifests/x",
            ),
            ("r.example:443", "https://r.example/v2/a/b/manifests/x"),
            (
                "r.example:5000",
                "https://r.example:5000/v2/a/b/manifests/x",
            ),
            ("[::1]:5000", "http://[::1]:5000/v2/a/b/manifests/x"),
        ];
        for (registry, expected) in cases {
            let endpoint = Endpoint::of(registry, &options(&[], &[])).unwrap();
            assert_eq!(endpoint.url("a/b", "manifests/x").as_str(), expected);
        }
    }

    #[test]
    fn locations_stay_with_the_registry_when_they_name_it() {
        let endpoint = Endpoint::of("r.example:5000", &options(&[], &[])).unwrap();
        let from = endpoint.url("a", "blobs/uploads/");
        let cases = [
            ("/v2/a/u?x=1", "https://r.example:5000/v2/a/u?x=1", true),
            ("https://r.example:5000/u", "https://r.example:5000/u", true),
            ("http://r.example:5000/u", "https://r.example:5000/u", true),
            ("http://r.example/u", "https://r.example:5000/u", true),
            ("https://r.example/u", "https://r.example/u", false),
            ("http://r.example:81/u", "http://r.example:81/u", false),
            ("//evil.example/u", "https://evil.example/u", false),
        ];
        for (location, expected, ours) in cases {
            let url = endpoint.resolve(&from, location).unwrap();
            assert_eq!(url.as_str(), expected);
            assert_eq!(endpoint.owns(&url), ours, "{location}");
        }
    }
}
