//! A small client of containerd's CRI: status with runtime handlers, and pod sandboxes.
