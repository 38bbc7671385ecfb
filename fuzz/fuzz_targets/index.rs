//! Indexes as registries send them.
#![no_main]

use km_artifacts::registry::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::index(bytes));
