//! docker's config.json, the content of a Kubernetes secret, and what a credential helper prints.
#![no_main]

use km_artifacts::registry::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::credentials(bytes);
});
