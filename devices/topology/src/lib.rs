//! The PCIe topology of a guest that is given devices: which ports there are, behind which of them each device stands, and what
//! Kata must be told so that it makes them.
//!
//! [`Request`] goes in, [`plan()`] gives a [`Plan`] or a [`Refusal`]. Both are plain data: nothing here reads a file, starts a
//! program or knows where devices come from.
//!
//! - [`kata`]: what each Kata emits, by flavour and version; every number with its source.
//! - [`mod@request`], [`mod@plan`]: data in, data out.
//! - [`arguments`]: a plan as arguments of QEMU.
//! - [`timeouts`]: how long a guest may take to start.
//!
//! Terms are QEMU's (docs/pcie.txt): a *port* is a `pcie-root-port` or a switch's downstream port, and has one device behind it;
//! an *expander* is a `pxb-pcie`, a second root bus that belongs to a NUMA node of the guest.

pub mod arguments;
pub mod kata;
mod make;
pub mod plan;
mod refusal;
pub mod request;
pub mod timeouts;

pub use kata::{Flavor, GO_PORTS, Kata, Version};
pub use make::plan;
pub use plan::{Expander, IommuFd, Placed, Plan, Port, PortKind, Skipped, Switch, Told};
pub use refusal::Refusal;
pub use request::{Class, Device, Guest, Layout, Request, Taken, Writer};
