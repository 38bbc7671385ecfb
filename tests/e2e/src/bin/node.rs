//! `node SHAPE`: a root shell in a node in a box, on this terminal. `node SHAPE COMMAND` runs a shell command in one instead, and
//! ends as it does. `make node SHAPE=one-gpu` and `make node SHAPE=one-gpu RUN='lspci -nn'` run it.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use km_tests_e2e::node_in_a_box::image::{Image, Payload};
use km_tests_e2e::node_in_a_box::shape::Shape;
use km_tests_e2e::node_in_a_box::{Node, PARTS};
use km_tests_e2e::sandbox::{self, Entered};

/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(600);

fn main() -> Result<ExitCode> {
    let mut words = std::env::args().skip(1);
    let name = words.next();
    let script: Vec<String> = words.collect();
    let shape =
        Shape::named(name.as_deref().unwrap_or_default()).context("usage: node SHAPE [COMMAND]")?;
    if !sandbox::is_inside() {
        Image::make()?;
    }
    let sandbox = match sandbox::enter(PARTS)? {
        Entered::Left(code) => return Ok(code),
        Entered::Unavailable(reason) => bail!("this machine cannot run a node: {reason}"),
        Entered::Inside(sandbox) => sandbox,
    };
    let mut payload = Payload::new()?;
    payload.kata_manager()?;
    let folder = sandbox.folder("node")?;
    if !script.is_empty() {
        let mut node = Node::boot(sandbox.parts(), &shape, &payload, &folder)?;
        let argv = ["/usr/bin/bash", "-c", &script.join(" ")];
        let finished = node.run_for(&argv, COMMAND)?;
        std::io::stdout().write_all(finished.stdout.as_bytes())?;
        std::io::stderr().write_all(finished.stderr.as_bytes())?;
        let code = finished.code().and_then(|code| u8::try_from(code).ok());
        return Ok(ExitCode::from(code.unwrap_or(1)));
    }
    say(&shape.name);
    Node::interactive(sandbox.parts(), &shape, &payload, &folder)?;
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::print_stderr, reason = "a word to the person at the terminal")]
fn say(shape: &str) {
    eprintln!(
        "Booting {shape}: half a minute to the shell. kata-manager is in /usr/local/bin.\n\
         `poweroff` ends it, and so does Ctrl-A X. Nothing in it is kept."
    );
}
