//! The command line as people and scripts see it. All of it is in `tests/cli.rs`; this library is empty.
