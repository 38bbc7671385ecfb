//! docker's config.json.
#![no_main]

use km_artifacts::registry::Credentials;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(credentials) = Credentials::from_docker_config(bytes) {
        // Shown in logs: it must not panic, nor tell anything (a unit test looks at what it says).
        let _ = format!("{credentials:?}");
    }
});
