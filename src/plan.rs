//! The plan: a pure function from what is there and what is wanted to an ordered list of steps.

mod containerd;

use std::fmt::Write as _;

use anyhow::Result;
use km_artifacts::digest::Digest;
use km_containerd_config::place::Placed;
use serde::{Deserialize, Serialize};

pub(crate) use containerd::{
    Allowed, ChangedFile, Drifted, changed_files, diff, indented, place, users,
};

use crate::config::Config;
use crate::failure::Failure;
use crate::observe::{Observation, SeenArtifact, SeenClass};
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
        /// The ids of the keys that signed it, where that is demanded.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        signers: Vec<String>,
        /// How what the node adds to the Kata configuration differs from the live generation's: lines with `+` and `-`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        settings: Vec<String>,
        /// The user's own files that go into it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        own: Vec<String>,
    },
    /// Point a class at a generation.
    Activate {
        class: String,
        from: Option<u64>,
        to: u64,
        displaces: Option<String>,
    },
    /// Bring our shim, its links and its settings, or take them away.
    Shim(crate::programs::Change),
    /// Change containerd's configuration.
    Containerd {
        files: Vec<ChangedFile>,
        added: Vec<String>,
        changed: Vec<String>,
        removed: Vec<String>,
        adopted: Vec<String>,
        drifted: Vec<Drifted>,
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
    pub(crate) placed: Placed,
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
    allowed: Allowed,
) -> Result<Prepared> {
    if !seen.missing.is_empty() {
        return Err(Failure::refused(seen.missing.join("\n")).into());
    }
    let mut steps = Vec::new();
    let mut warnings = seen.warnings.clone();
    let mut classes = Vec::new();
    let mut activations = Vec::new();
    for class in &seen.classes {
        let work = plan_class(class, &mut steps);
        if let ClassWork::Make(to) | ClassWork::Reuse(to) = work {
            activations.push(activate(class, to));
        }
        classes.push(work);
    }
    steps.extend(seen.programs.change.clone().map(Step::Shim));
    steps.append(&mut activations);
    let placed = containerd::place(config, &seen.containerd, allowed)?;
    containerd::refuse_in_use(&seen.containerd, &placed)?;
    let restart_owed =
        containerd::steps(config, &seen.containerd, &placed, &mut steps, &mut warnings);
    steps.extend(seen.surplus.iter().map(|class| Step::Remove {
        class: class.clone(),
    }));
    let inputs = Inputs {
        configuration: Digest::of(config_bytes).to_string(),
        containerd: containerd::digest(&seen.containerd),
    };
    Ok(Prepared {
        plan: Plan {
            steps,
            warnings,
            inputs,
        },
        classes,
        placed,
        restart_owed,
    })
}

/// The keys of signatures, each once.
pub(crate) fn keys_of(signers: &[km_artifacts::trust::Signer]) -> Vec<String> {
    let mut keys: Vec<String> = signers.iter().map(|one| one.key.to_string()).collect();
    keys.sort();
    keys.dedup();
    keys
}

fn plan_class(seen: &SeenClass, steps: &mut Vec<Step>) -> ClassWork {
    let (reference, resolved, stored, verified) = match &seen.artifact {
        SeenArtifact::None | SeenArtifact::Live => return ClassWork::Keep,
        SeenArtifact::Held(number) => return ClassWork::Reuse(*number),
        SeenArtifact::Wanted {
            reference,
            resolved,
            stored,
            verified,
        } => (reference, resolved, stored, verified),
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
            && seen.trusted.contains(&generation.number())
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
            signers: keys_of(&verified.signers),
            settings: settings(seen),
            own: own(seen),
        });
    }
    work
}

/// The user's files among what is added.
fn own(seen: &SeenClass) -> Vec<String> {
    let added = seen.additions.iter().map(|added| &added.path);
    added
        .filter(|path| *path != km_runtimeclasses::DROP_IN)
        .cloned()
        .collect()
}

/// The lines of what is added to Kata's configuration that are new, and those that go.
fn settings(seen: &SeenClass) -> Vec<String> {
    let lines = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.contains('='));
        lines
            .filter(|line| !line.trim_start().starts_with('#'))
            .map(str::to_owned)
            .collect()
    };
    let new: Vec<&str> = seen
        .additions
        .iter()
        .map(|added| added.text.as_str())
        .collect();
    let new = new.join("\n");
    let (old, new) = (lines(&seen.live_additions), lines(&new));
    let gone = old.iter().filter(|line| !new.contains(line));
    let come = new.iter().filter(|line| !old.contains(line));
    gone.map(|line| format!("- {line}"))
        .chain(come.map(|line| format!("+ {line}")))
        .collect()
}

fn activate(seen: &SeenClass, to: u64) -> Step {
    Step::Activate {
        class: seen.class.name.clone(),
        from: seen.live.as_ref().map(km_artifacts::Generation::number),
        to,
        displaces: seen
            .displaces
            .as_ref()
            .map(|path| path.display().to_string()),
    }
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
                signers,
                settings,
                own,
            } => {
                writeln!(
                    out,
                    "  + generation {number} of {class}\n      immutable, from {manifest}"
                )?;
                signers
                    .iter()
                    .try_for_each(|key| writeln!(out, "      signed by key {key}"))?;
                own.iter()
                    .try_for_each(|path| writeln!(out, "      with your {path}"))?;
                if settings.is_empty() {
                    return Ok(());
                }
                let whose = if own.is_empty() {
                    "from what this node has"
                } else {
                    "from what this node has and you wrote"
                };
                writeln!(out, "      {}, {whose}:", km_runtimeclasses::DROP_IN)?;
                writeln!(out, "{}", indented(settings, "        "))
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
            Step::Shim(change) => change.write_text(out),
            Step::Containerd {
                files,
                adopted,
                drifted,
                ..
            } => {
                for file in files {
                    file.write_text(out)?;
                }
                for name in adopted {
                    writeln!(
                        out,
                        "      {name} is somebody else's: set aside in comments, back at uninstall"
                    )?;
                }
                for drift in drifted {
                    writeln!(
                        out,
                        "      {} was changed by somebody since, and is put right; --keep-drift leaves it:\n{}",
                        drift.handler,
                        indented(&drift.diff, "        ")
                    )?;
                }
                Ok(())
            }
            Step::Restart { how } => writeln!(
                out,
                "  ! restart containerd ({how}) and wait until the handlers are live\n      running pods survive it"
            ),
            Step::Remove { class } => writeln!(out, "  - {class}: it is configured no more"),
        }
    }
}
