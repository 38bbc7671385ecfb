//! Fetches OCI artifacts, verifies them, stores them by content and activates them by one rename.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

pub mod digest;
pub mod reference;
pub mod registry;
pub mod unpack;
