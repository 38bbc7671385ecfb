//! Image manifests as registries send them.

use km_artifacts::registry::fuzzing;

pub(crate) fn run(bytes: &[u8]) {
    fuzzing::manifest(bytes);
}
