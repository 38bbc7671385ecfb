//! Which Kata the inner shim is: the planner's terms.

pub use km_topology::{Flavor, Kata, Version};
