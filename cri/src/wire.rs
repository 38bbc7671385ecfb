//! The CRI's messages and calls as they are on the wire: generated from `proto/runtime.proto`, private to this crate.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    reason = "generated code"
)]

use std::fmt;

include!("generated/runtime.v1.rs");

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}
