//! The plan: a pure function from what is there and what is wanted to an ordered list of steps.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use km_artifacts::digest::Digest;
use km_containerd_config::edit::{self, Edited, SetOptions};
use serde::{Deserialize, Serialize};
use similar::TextDiff;

use crate::config::{Config, RestartMode};
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::observe::{Observation, SeenArtifact, SeenClass, SeenContainerd};
use crate::output;

/// One change of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "step",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub(crate) enum Step {
    /// Fetch an artifact's blobs into the store.
    Fetch {
        reference: String,
        manifest: String,
        layers: usize,
        bytes: u64,
    },
    /// Make an immutable generation of a class.
    Generation {
        class: String,
        number: u64,
        manifest: String,
    },
    /// Point a class at a generation.
    Activate {
        class: String,
        from: Option<u64>,
        to: u64,
        displaces: Option<String>,
    },
    /// Change containerd's configuration.
    Containerd {
        path: String,
        added: Vec<String>,
        changed: Vec<String>,
        removed: Vec<String>,
        adopted: Vec<String>,
        drifted: Vec<String>,
        diff: String,
    },
    /// Restart containerd and wait until the handlers are live.
    Restart { how: String },
    /// Remove a class that is configured no more.
    Remove { class: String },
}

/// A plan as it is shown, saved and compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Plan {
    /// In the order in which they are carried out.
    pub(crate) steps: Vec<Step>,
    /// What a person should know.
    pub(crate) warnings: Vec<String>,
    /// Digests of what it was made from.
    pub(crate) inputs: Inputs,
}

/// Digests of what a plan was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Inputs {
    /// Of kata-manager's configuration file.
    pub(crate) configuration: String,
    /// Of containerd's; `None` if there was none.
    pub(crate) containerd: Option<String>,
}

/// A plan, and what carrying it out needs besides.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    /// For each configured class in order: what to do.
    pub(crate) classes: Vec<ClassWork>,
    pub(crate) edited: Edited,
    /// containerd is to be restarted although its file may be right.
    pub(crate) restart_owed: bool,
}

/// What to do for a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClassWork {
    /// Nothing.
    Keep,
    /// Make this generation and point the class at it.
    Make(u64),
    /// Point the class at this generation, which is there.
    Reuse(u64),
}

/// Makes the plan.
///
/// # Errors
/// Refusals: something that is needed is missing, a handler is somebody else's, a handler in use would go away.
pub(crate) fn make(
    config: &Config,
    config_bytes: &[u8],
    seen: &Observation,
    adopt: bool,
) -> Result<Prepared> {
    if !seen.missing.is_empty() {
        return Err(Failure::refused(seen.missing.join("\n")).into());
    }
    let mut steps = Vec::new();
    let mut warnings = seen.warnings.clone();
    let mut classes = Vec::new();
    for class in &seen.classes {
        classes.push(plan_class(class, &mut steps));
    }
    let edited = edit_containerd(config, &seen.containerd, adopt)?;
    refuse_in_use(&seen.containerd, &edited)?;
    let restart_owed =
        plan_containerd(config, &seen.containerd, &edited, &mut steps, &mut warnings);
    steps.extend(seen.surplus.iter().map(|class| Step::Remove {
        class: class.clone(),
    }));
    let inputs = Inputs {
        configuration: Digest::of(config_bytes).to_string(),
        containerd: seen
            .containerd
            .before
            .as_deref()
            .map(|bytes| Digest::of(bytes).to_string()),
    };
    Ok(Prepared {
        plan: Plan {
            steps,
            warnings,
            inputs,
        },
        classes,
        edited,
        restart_owed,
    })
}

fn plan_class(seen: &SeenClass, steps: &mut Vec<Step>) -> ClassWork {
    let SeenArtifact::Wanted {
        reference,
        resolved,
        stored,
    } = &seen.artifact
    else {
        return ClassWork::Keep;
    };
    let class = seen.class.name.clone();
    let manifest = resolved.manifest.digest.to_string();
    let fetched =
        |step: &Step| matches!(step, Step::Fetch { manifest: other, .. } if *other == manifest);
    if !stored && !steps.iter().any(fetched) {
        let layers = resolved.manifest.parsed.layers();
        let step = Step::Fetch {
            reference: reference.to_string(),
            manifest: manifest.clone(),
            layers: layers.len(),
            bytes: layers.iter().map(|layer| layer.size()).sum(),
        };
        steps.push(step);
    }
    let same = |generation: &&km_artifacts::Generation| {
        *stored
            && generation.manifest.manifest == resolved.manifest.digest
            && generation.manifest.source == resolved.digest
            && generation.manifest.inputs == seen.inputs
    };
    let work = match seen.others.iter().rev().find(same) {
        Some(generation) => ClassWork::Reuse(generation.number()),
        None => ClassWork::Make(seen.next),
    };
    if let ClassWork::Make(number) = work {
        steps.push(Step::Generation {
            class: class.clone(),
            number,
            manifest,
        });
    }
    if let ClassWork::Make(to) | ClassWork::Reuse(to) = work {
        let displaces = seen
            .displaces
            .as_ref()
            .map(|path| path.display().to_string());
        steps.push(Step::Activate {
            class,
            from: seen.live.as_ref().map(km_artifacts::Generation::number),
            to,
            displaces,
        });
    }
    work
}

fn edit_containerd(config: &Config, seen: &SeenContainerd, adopt: bool) -> Result<Edited> {
    let text = text(seen)?;
    let adopt: Vec<String> = if adopt {
        seen.wanted
            .iter()
            .map(|handler| handler.name.clone())
            .collect()
    } else {
        Vec::new()
    };
    let options = SetOptions {
        adopt: &adopt,
        assume_version: seen.version.config_version(),
        absent: seen.before.is_none(),
        recorded: &seen.recorded,
    };
    edit::set_handlers(text, &seen.wanted, &options).with_context(|| {
        format!(
            "cannot register the handlers in {}",
            config.containerd.config
        )
    })
}

/// containerd's configuration as text.
pub(crate) fn text(seen: &SeenContainerd) -> Result<&str> {
    std::str::from_utf8(seen.before.as_deref().unwrap_or_default()).with_context(|| {
        Failure::new(
            crate::failure::Kind::Containerd,
            format!("{} is not UTF-8 text", seen.path.display()),
        )
    })
}

fn refuse_in_use(seen: &SeenContainerd, edited: &Edited) -> Result<(), Failure> {
    let gone = edited.gone();
    let used = users(seen, &gone);
    if used.is_empty() {
        return Ok(());
    }
    Err(Failure::refused(format!(
        "handlers that would be removed are in use; delete these pods first:\n{}",
        used.join("\n")
    )))
}

/// The sandboxes that use one of these handlers, one a line.
pub(crate) fn users(seen: &SeenContainerd, handlers: &[String]) -> Vec<String> {
    seen.sandboxes
        .iter()
        .filter(|sandbox| handlers.contains(&sandbox.handler))
        .map(|sandbox| {
            format!(
                "  {}/{} (sandbox {}) uses {}",
                sandbox.namespace, sandbox.name, sandbox.id, sandbox.handler
            )
        })
        .collect()
}

fn plan_containerd(
    config: &Config,
    seen: &SeenContainerd,
    edited: &Edited,
    steps: &mut Vec<Step>,
    warnings: &mut Vec<String>,
) -> bool {
    let before = text(seen).unwrap_or_default();
    let differs = edited.text != before || (seen.before.is_none() && !edited.text.is_empty());
    if differs {
        steps.push(Step::Containerd {
            path: config.containerd.config.to_string(),
            added: edited.added.clone(),
            changed: edited.changed.clone(),
            removed: edited.gone(),
            adopted: edited.adopted.clone(),
            drifted: edited.drifted.clone(),
            diff: diff(before, &edited.text),
        });
    }
    let not_live: Vec<String> = seen
        .live
        .not_live(&seen.wanted)
        .iter()
        .map(ToString::to_string)
        .collect();
    let by_hand = config.containerd.restart.mode == RestartMode::None;
    let owed = !differs && !not_live.is_empty() && !by_hand;
    if by_hand && (differs || !not_live.is_empty()) {
        warnings.push(format!(
            "containerd must be restarted by hand before the handlers are live: {}",
            Daemon::restart_words(&config.containerd)
        ));
    } else if differs || owed {
        steps.push(Step::Restart {
            how: Daemon::restart_words(&config.containerd),
        });
    }
    owed
}

/// The changed lines, with two lines around them.
pub(crate) fn diff(before: &str, after: &str) -> String {
    let text = TextDiff::from_lines(before, after)
        .unified_diff()
        .context_radius(2)
        .to_string();
    text.replace("\\ No newline at end of file\n", "")
}

impl Plan {
    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The plan for people.
    pub(crate) fn to_text(&self) -> String {
        let mut out = String::new();
        for step in &self.steps {
            // Writing to a string does not fail.
            let _ = step.write_text(&mut out);
        }
        out
    }
}

impl Step {
    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        match self {
            Step::Fetch {
                reference,
                layers,
                bytes,
                ..
            } => {
                writeln!(
                    out,
                    "  + fetch {reference}\n      {layers} layers, {}, each verified against its digest",
                    output::bytes(*bytes)
                )
            }
            Step::Generation {
                class,
                number,
                manifest,
            } => {
                writeln!(
                    out,
                    "  + generation {number} of {class}\n      immutable, from {manifest}"
                )
            }
            Step::Activate {
                class,
                from: None,
                to,
                displaces: None,
            } => writeln!(out, "  + {class} -> generation {to}"),
            Step::Activate {
                class,
                from: None,
                to,
                displaces: Some(path),
            } => {
                writeln!(
                    out,
                    "  ~ {class} -> generation {to}\n      {path} is in its place; it is kept aside and comes back at uninstall"
                )
            }
            Step::Activate {
                class,
                from: Some(from),
                to,
                ..
            } => {
                writeln!(
                    out,
                    "  ~ {class} -> generation {to} (now {from}); running pods keep what they started with"
                )
            }
            Step::Containerd {
                path,
                diff,
                adopted,
                drifted,
                ..
            } => {
                writeln!(out, "  ~ {path}")?;
                for name in adopted {
                    writeln!(
                        out,
                        "      {name} is somebody else's: set aside in comments, back at uninstall"
                    )?;
                }
                for name in drifted {
                    writeln!(out, "      {name} was changed by somebody since: put right")?;
                }
                diff.lines()
                    .filter(|line| !line.starts_with("--- ") && !line.starts_with("+++ "))
                    .try_for_each(|line| writeln!(out, "      {line}"))
            }
            Step::Restart { how } => writeln!(
                out,
                "  ! restart containerd ({how}) and wait until the handlers are live\n      running pods survive it"
            ),
            Step::Remove { class } => writeln!(out, "  - {class}: it is configured no more"),
        }
    }
}
