//! The harness of the end-to-end tests and of the demo: real programs, each started privately, stopped and cleaned up.
//!
//! - [`parts`]: the programs, got from Debian by `hack/parts`.
//! - [`sandbox`]: namespaces and a work folder, so that nothing of a run survives it.
//! - [`process`], [`wait`]: programs with deadlines, and conditions that come true in time.
//! - [`containerd`], [`cri`], [`images`]: a real containerd, 1.6, 1.7 or 2.x, and pods on it.
//! - [`registry`], [`proxy`], [`http`]: a real registry (plain, TLS, basic auth, bearer tokens), and a network in front of it
//!   that fails to order.
//! - [`forward`]: a forward proxy, for `HTTPS_PROXY` and its like.
//! - [`upload`]: an artifact in a registry, of whatever layers, without the product's own pushing.
//! - [`guest`], [`cpio`], [`provider`], [`qemu`]: a small real guest, a Kata prefix to run it with, and its boot.
//! - [`suite`]: tests that pass, fail, or say why this machine cannot run them.
//! - [`kubelet`]: a stand-in for the kubelet, as a process.
//! - [`node_in_a_box`]: a virtual machine with emulated GPUs, for what needs a whole node of its own.
//! - [`km`], [`tracer`]: the kata-manager binary under test, also killed at a state change of our choice, or with a system call
//!   that goes wrong.
//!
//! The harness knows the product by its command line and its files alone, so that it cannot agree with a mistake.

#![expect(
    clippy::disallowed_methods,
    reason = "a harness prepares its files and starts its programs plainly, outside any host root"
)]

pub mod containerd;
pub mod cpio;
pub mod cri;
pub mod forward;
pub mod guest;
pub mod http;
pub mod images;
pub mod km;
pub mod kubelet;
pub mod node_in_a_box;
pub mod parts;
pub mod process;
pub mod provider;
pub mod proxy;
pub mod qemu;
mod referrers;
pub mod registry;
pub mod sandbox;
pub mod suite;
mod tls;
mod token;
pub mod tracer;
pub mod upload;
pub mod wait;
