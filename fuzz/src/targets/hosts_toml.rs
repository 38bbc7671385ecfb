//! containerd's hosts.toml.

use km_artifacts::registry::fuzzing;

pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    fuzzing::hosts_toml(text);
}
