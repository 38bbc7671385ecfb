//! A small client of containerd's Container Runtime Interface (CRI, `runtime.v1`) on its unix socket: which runtime
//! handlers are live, which pod sandboxes exist, and enough of the rest to run a pod.
//!
//! Every call has a deadline. What comes back is plain data; this crate decides nothing and changes nothing by itself.
//! It must not know our configuration file, containerd's configuration file, or Kubernetes.

mod client;
mod error;
#[cfg(test)]
mod fake;
pub mod images;
pub mod pods;
mod sandbox;
mod status;
mod wire;

pub use client::{Client, Version};
pub use error::Error;
pub use sandbox::{Sandbox, SandboxFilter, SandboxState};
pub use status::{Condition, LiveHandler, Status};
/// The status code of a failed call, as gRPC numbers them.
pub use tonic::Code;
