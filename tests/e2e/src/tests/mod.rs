//! The tests, one file a subject.

pub(crate) mod harness;
