//! Emulated NVIDIA PCI functions, served over vfio-user: QEMU 10.1 and later put them in a virtual machine, whose Linux sees
//! real PCI devices (`-device vfio-user-pci`). Nothing here knows kata-manager, QEMU's command line or the virtual machine.
//!
//! - [`settings`]: the file that says which devices to serve, and where.
//! - [`model`]: what is fixed for each kind of device: IDs, class, BARs.
//! - [`config_space`]: 4 KiB of PCI configuration space.
//! - [`registers`]: what lies behind BAR 0, one [`registers::RegisterModel`] a register block.
//! - [`memory`]: the rest of the BARs, sparse and bounded.
//! - [`dma`]: the memory of the virtual machine, as its IOMMU lets a device see it.
//! - [`device`]: all of these put together behind one vfio-user socket.
//! - [`journal`]: what happened to each device, a JSON object a line: a test's second witness.
//! - [`control`]: a socket that kills and revives devices while they run.

pub mod config_space;
pub mod control;
pub mod device;
pub mod dma;
pub mod journal;
pub mod memory;
pub mod model;
pub mod registers;
pub mod settings;
