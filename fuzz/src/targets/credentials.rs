//! docker's config.json, the content of a Kubernetes secret, and what a credential helper prints.

use km_artifacts::registry::fuzzing;

pub(crate) fn run(bytes: &[u8]) {
    fuzzing::credentials(bytes);
}
