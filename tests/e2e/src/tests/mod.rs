//! The tests, one file a subject.

pub(crate) mod apply;
pub(crate) mod failures;
pub(crate) mod harness;
mod node;
