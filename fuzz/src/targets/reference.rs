//! References: what is read is written so that it is read as the same.

use km_artifacts::reference::Reference;

pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(reference) = text.parse::<Reference>() {
        let written = reference.to_string();
        assert_eq!(
            written.parse::<Reference>().expect("our own spelling"),
            reference
        );
    }
}
