//! What the crate says of prepared roots.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files plainly, and fail by panicking"
)]

mod findings;
mod garbage;
mod page;
mod ready;
mod support;
