//! `verify`: the signatures that artifacts must have, of all classes or of one.

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Config;

/// The signatures that an artifact must have.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Verify {
    /// Whether a signature is demanded.
    pub(crate) policy: VerifyPolicy,
    /// Files with public keys (PEM): ECDSA P-256, Ed25519 or RSA. A signature by one of them is enough. A class that lists
    /// none has those of the top-level `verify`.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(crate) keys: Vec<HostPath>,
}

/// Whether a signature is demanded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum VerifyPolicy {
    /// No: the digest is verified, and nothing else.
    #[default]
    None,
    /// Yes: by one of the keys, as cosign makes it.
    Key,
}

impl Config {
    /// The keys one of which must have signed a class's artifact, and the setting that they are from; `None` when no
    /// signature is demanded.
    pub(crate) fn signing_keys<'a>(&'a self, own: Option<&'a Verify>) -> Option<&'a [HostPath]> {
        let verify = own.unwrap_or(&self.verify);
        match verify.policy {
            VerifyPolicy::None => None,
            VerifyPolicy::Key if verify.keys.is_empty() => Some(&self.verify.keys),
            VerifyPolicy::Key => Some(&verify.keys),
        }
    }
}
