//! The API's messages and calls as they are on the wire: generated from `proto/podresources.proto`. Public only with the feature
//! `server`, for a stand-in of the kubelet.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    reason = "generated code"
)]

include!("generated/v1.rs");
