//! `artifacts`: guest artifacts between registries and the store. One file a subcommand.

mod export;
mod gc;
mod import;
mod list;
mod pull;
mod push;
mod verify;

use std::path::PathBuf;

use anyhow::Result;
use km_artifacts::reference::Reference;

use super::{Global, on_one_thread, on_threads};
use crate::failure::{Failure, Kind};

#[derive(Debug, clap::Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Publish a folder as a guest artifact: each file becomes a layer.
    Push {
        /// The folder.
        dir: PathBuf,
        /// Where to: registry/repository:tag.
        reference: String,
    },
    /// Fetch and verify artifacts into the store, and switch nothing.
    Pull(pull::Arguments),
    /// Hash what is live again, and check its signatures where they are demanded.
    Verify {
        /// The classes; all that are live when left out.
        classes: Vec<String>,
    },
    /// List the generations in the store.
    List,
    /// Remove generations that nothing needs.
    Gc(gc::Arguments),
    /// Write artifacts of the store into one file.
    Export(export::Arguments),
    /// Bring the artifacts of a file into the store.
    Import(import::Arguments),
}

pub(super) fn run(global: &Global, command: &Command) -> Result<()> {
    // A workstation or a build publishes and fetches, too.
    let elsewhere = match command {
        Command::Push { .. } => true,
        Command::Pull(arguments) => arguments.is_elsewhere(),
        _ => false,
    };
    let node = if elsewhere {
        global.elsewhere()?
    } else {
        global.node()?
    };
    match command {
        Command::Push { dir, reference } => on_threads(push::run(global, &node, dir, reference)),
        Command::Pull(arguments) => pull::run(global, &node, arguments),
        Command::Verify { classes } => verify::run(global, &node, classes),
        Command::List => list::run(global, &node),
        Command::Export(arguments) => export::run(global, &node, arguments),
        Command::Import(arguments) => on_threads(import::run(global, &node, arguments)),
        Command::Gc(arguments) => gc::run(global, &node, arguments),
    }
}

fn parse(text: &str) -> Result<Reference> {
    text.parse().map_err(|error| {
        Failure::because(
            Kind::Configuration,
            format!("{text:?} is no reference to an artifact"),
            error,
        )
        .into()
    })
}
