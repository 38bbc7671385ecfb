//! kata-manager: puts Kata guest artifacts and GPU runtime handlers on a containerd node, and takes them off again.
//!
//! This package wires the crates together and owns no mechanism; see ARCHITECTURE.md.

mod additions;
mod cli;
mod collect;
mod config;
mod daemon;
mod draw;
mod execute;
mod failure;
mod flavor;
mod journal;
mod kata;
mod log;
mod neighbours;
mod node;
mod observe;
mod output;
mod plan;
mod programs;
mod progress;
mod remove;
mod sizing;
mod specs;
mod wanted;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments
        .get(1)
        .is_some_and(|word| word == km_host::command::ENTER_ROOT)
    {
        return enter_root(&arguments[2..]);
    }
    if arguments
        .get(1)
        .is_some_and(|word| word == km_host::attribute::WRITE_ATTRIBUTE)
    {
        return ExitCode::from(km_host::attribute::write_here(&arguments[2..]));
    }
    cli::run(arguments)
}

/// Host programs in another root are run by a copy of this program; see [`km_host::command::run`].
fn enter_root(words: &[OsString]) -> ExitCode {
    let Some((root, argv)) = words.split_first() else {
        return ExitCode::from(70);
    };
    let error = km_host::command::enter_root(Path::new(root), argv);
    output::to_stderr(&format!(
        "cannot run a program in {}: {error}",
        Path::new(root).display()
    ));
    ExitCode::from(127)
}
