//! CDI's own library for Rust (`container-device-interface`) as the judge of our specs: of every shape that tests share, of devices as
//! they come, and of specs of others, of which we take none that it refuses.

#![cfg(test)]

mod ours;
mod theirs;
