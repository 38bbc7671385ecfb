//! References: what is read is written so that it is read as the same.
#![no_main]

use km_artifacts::reference::Reference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        let written = reference.to_string();
        assert_eq!(
            written.parse::<Reference>().expect("our own spelling"),
            reference
        );
    }
});
