//! containerd's hosts.toml.
#![no_main]

use km_artifacts::registry::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| fuzzing::hosts_toml(text));
