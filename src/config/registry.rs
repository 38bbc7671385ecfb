//! `registry`: how registries are reached.

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The least `registry.rateLimit`: below it a blob takes days, and a stall cannot be told from it.
pub(crate) const RATE_LIMIT_MIN: u64 = 64 << 10;

/// How registries are reached.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Registry {
    /// Certificates (PEM) that are trusted besides the system's.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) ca_file: Option<HostPath>,
    /// Our own certificate (PEM), for registries that ask for one.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) client_certificate_file: Option<HostPath>,
    /// The key of our own certificate (PEM, unencrypted).
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) client_key_file: Option<HostPath>,
    /// containerd's folder of `hosts.toml` files, which name mirrors. When left out, `/etc/containerd/certs.d` if it exists.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) config_path: Option<HostPath>,
    /// Credentials in the form of docker's `config.json`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) credentials_file: Option<HostPath>,
    /// Registries without TLS, as `host` or `host:port`. Those on this machine need not be listed.
    #[serde(default)]
    pub(crate) plain_http: Vec<String>,
    /// Registries on this machine that do speak TLS.
    #[serde(default)]
    pub(crate) https: Vec<String>,
    /// The most bytes a second that are received of blobs, at least 65536. No limit when left out.
    #[serde(default)]
    #[schemars(range(min = 65536))]
    pub(crate) rate_limit: Option<u64>,
}
