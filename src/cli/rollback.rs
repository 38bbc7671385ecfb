//! `rollback`: a class goes back to an earlier generation and stays there.

use anyhow::{Context as _, Result};
use km_artifacts::Generation;
use serde_json::json;

use super::Global;
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::output;

/// Point a class at an earlier generation, and hold it there.
///
/// One rename: nothing restarts, no registry is asked, and running pods keep what they started with. "apply" leaves a held
/// class alone until it is released.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The class.
    class: String,
    /// The generation to go to; the one before the live one when left out. "artifacts list" shows them.
    #[arg(long, value_name = "N")]
    to: Option<u64>,
    /// Let "apply" move the class again; it stays where it is until then.
    #[arg(long, conflicts_with = "to")]
    release: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let node = global.node()?;
    let class = &arguments.class;
    km_artifacts::check_class(class)
        .map_err(|error| Failure::because(Kind::Configuration, "no such class", error))?;
    if node.store.generations(class)?.is_empty() {
        let known = node.store.classes()?.join(", ");
        return Err(Failure::refused(format!(
            "{class} has no generation; classes that have some: {}",
            if known.is_empty() { "none" } else { &known }
        ))
        .into());
    }
    if arguments.release {
        release(global, &node, class)
    } else {
        go(global, &node, class, arguments.to)
    }
}

fn go(global: &Global, node: &Node, class: &str, to: Option<u64>) -> Result<()> {
    let (_lock, mut journal) = node.lock()?;
    let live = node.store.live_number(class)?;
    let target = target(class, &node.store.generations(class)?, live, to)?;
    let number = target.number();
    let damages = node.store.check(&target, true)?;
    if !damages.is_empty() {
        let damages: Vec<_> = damages.iter().map(ToString::to_string).collect();
        return Err(Failure::new(
            Kind::Verification,
            format!(
                "generation {number} of {class} is damaged, and {class} stays where it is:\n  {}\nname another one with --to",
                damages.join("\n  ")
            ),
        )
        .into());
    }
    crate::programs::refuse_unlaunchable(&node.config, &target)?;
    node.store
        .signers(&target, node.policy(class))
        .with_context(|| format!("{class} takes only signed artifacts, and stays where it is"))?;
    // First what holds it, so that an apply after a kill between the two finishes the rollback.
    journal.update(|record| {
        record.held.insert(class.to_owned(), number);
    })?;
    node.store.activate(class, number)?;
    node.store.end_session()?;
    let manifest = &target.manifest;
    let body = json!({ "class": class, "from": live, "to": number, "reference": manifest.reference, "manifest": manifest.manifest });
    let moved = match live {
        Some(live) if live == number => format!("{class} is at generation {number} already"),
        Some(live) => format!("{class}: generation {live} -> {number}"),
        None => format!("{class} -> generation {number}"),
    };
    let text = format!(
        "{moved}, {} ({})\nHeld there: \"kata-manager rollback {class} --release\" lets apply move it again.\n",
        manifest.reference, manifest.manifest
    );
    output::result(global.output, "RolledBack", body, &text)
}

fn target(
    class: &str,
    generations: &[Generation],
    live: Option<u64>,
    to: Option<u64>,
) -> Result<Generation> {
    let found = match to {
        Some(number) => generations.iter().find(|one| one.number() == number),
        None => generations
            .iter()
            .rfind(|one| live.is_none_or(|live| one.number() < live)),
    };
    if let Some(found) = found {
        return Ok(found.clone());
    }
    let wanted = to.map_or("no earlier generation".to_owned(), |number| {
        format!("no generation {number}")
    });
    let numbers: Vec<_> = generations
        .iter()
        .map(|one| {
            let live = if live == Some(one.number()) {
                " (live)"
            } else {
                ""
            };
            format!("{}{live}", one.number())
        })
        .collect();
    Err(Failure::refused(format!(
        "{class} has {wanted}; it has: {}",
        numbers.join(", ")
    ))
    .into())
}

fn release(global: &Global, node: &Node, class: &str) -> Result<()> {
    let (_lock, mut journal) = node.lock()?;
    let held = journal.record().held.get(class).copied();
    journal.update(|record| {
        record.held.remove(class);
    })?;
    let text = match held {
        Some(number) => format!(
            "{class} is held at generation {number} no more; \"kata-manager apply\" moves it to what the configuration names.\n"
        ),
        None => format!("{class} was not held.\n"),
    };
    let body = json!({ "class": class, "held": held });
    output::result(global.output, "Released", body, &text)
}
