//! The part of a plan that changes containerd: which files, how, and whether it must be restarted.

use anyhow::{Context as _, Result};
use km_artifacts::digest::Digest;
use km_containerd_config::edit::{Drift, Owner};
use km_containerd_config::peers;
use km_containerd_config::place::{self, FileEdit, Placed, Request};
use serde::{Deserialize, Serialize};
use similar::TextDiff;

use super::Step;
use crate::config::{Config, RestartMode};
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::observe::SeenContainerd;

/// A file of containerd's that a plan changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ChangedFile {
    pub(crate) path: String,
    /// `created`, `changed` or `removed`.
    pub(crate) what: String,
    /// The changed lines.
    pub(crate) diff: String,
}

impl ChangedFile {
    /// The file and its changed lines, as they stand in a plan.
    pub(crate) fn write_text(&self, out: &mut String) -> std::fmt::Result {
        use std::fmt::Write as _;
        let sign = match self.what.as_str() {
            "created" => '+',
            "removed" => '-',
            _ => '~',
        };
        writeln!(out, "  {sign} {}", self.path)?;
        let lines = self.diff.lines();
        let mut lines = lines.filter(|line| !line.starts_with("--- ") && !line.starts_with("+++ "));
        lines.try_for_each(|line| writeln!(out, "      {line}"))
    }
}

/// What somebody did to a handler of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Drifted {
    pub(crate) handler: String,
    /// `-` lines say what is wanted, `+` lines what somebody wrote.
    pub(crate) diff: Vec<String>,
}

impl From<&Drift> for Drifted {
    fn from(drift: &Drift) -> Drifted {
        Drifted {
            handler: drift.name.clone(),
            diff: drift.lines(),
        }
    }
}

/// What a user allows beyond the configuration.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Allowed {
    /// Take over handlers that somebody else registered.
    pub(crate) adopt: bool,
    /// Leave handlers as somebody edited them.
    pub(crate) keep_drift: bool,
}

/// Plans the edit of containerd's files.
pub(crate) fn place(config: &Config, seen: &SeenContainerd, allowed: Allowed) -> Result<Placed> {
    let names = seen.wanted.iter().map(|handler| handler.name.clone());
    let adopt: Vec<String> = names.filter(|_| allowed.adopt).collect();
    let request = Request {
        wanted: &seen.wanted,
        placement: config.containerd.placement.into(),
        adopt: &adopt,
        recorded: &seen.recorded,
        keep_drift: allowed.keep_drift || config.containerd.keep_drift,
        cri: seen.cri.clone(),
        rendered: seen.flavor.is_rendered(),
    };
    let placed = place::plan(
        &seen.files,
        &seen.effective,
        &config.containerd.config,
        &request,
    );
    placed.with_context(|| {
        let others = others(seen);
        if others.is_empty() {
            return "cannot register the handlers in containerd".to_owned();
        }
        format!(
            "cannot register the handlers in containerd: {}",
            others.join("; ")
        )
    })
}

/// Who has handlers of the wanted names.
fn others(seen: &SeenContainerd) -> Vec<String> {
    let handlers = seen.effective.handlers();
    let theirs = handlers.iter().filter(|found| {
        found.owner == Owner::Foreign && seen.wanted.iter().any(|w| w.name == found.name)
    });
    theirs
        .map(|found| format!("{} is registered by {}", found.name, peers::who(found)))
        .collect()
}

/// Refuses to take away handlers that sandboxes use.
pub(super) fn refuse_in_use(seen: &SeenContainerd, placed: &Placed) -> Result<(), Failure> {
    let gone = placed.edited.gone();
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

/// Adds the steps for containerd, and says whether a restart is owed although its files are right.
pub(super) fn steps(
    config: &Config,
    seen: &SeenContainerd,
    placed: &Placed,
    steps: &mut Vec<Step>,
    warnings: &mut Vec<String>,
) -> bool {
    warnings.extend(placed.warnings.iter().cloned());
    for drift in &placed.edited.kept {
        warnings.push(format!(
            "{} was changed by somebody since, and stays so:\n{}",
            drift.name,
            indented(&drift.lines(), "    ")
        ));
    }
    let edited = &placed.edited;
    let differs = placed.differs();
    if differs {
        steps.push(Step::Containerd {
            files: changed_files(placed),
            added: edited.added.clone(),
            changed: edited.changed.clone(),
            removed: edited.gone(),
            adopted: edited.adopted.clone(),
            drifted: edited.drifted.iter().map(Drifted::from).collect(),
        });
    }
    let not_live: Vec<String> = seen
        .live
        .not_live(&placed.live)
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

/// Each file that changes, drop-ins that come first.
pub(crate) fn changed_files(placed: &Placed) -> Vec<ChangedFile> {
    let (come, go): (Vec<&FileEdit>, Vec<&FileEdit>) = placed
        .drop_ins
        .iter()
        .partition(|edit| edit.after.is_some());
    let all = come.into_iter().chain([&placed.main]).chain(go);
    all.filter(|edit| edit.differs())
        .map(|edit| {
            let text = |bytes: &Option<Vec<u8>>| {
                String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned()
            };
            let what = match (&edit.before, &edit.after) {
                (None, _) => "created",
                (_, None) => "removed",
                _ => "changed",
            };
            ChangedFile {
                path: edit.path.to_string(),
                what: what.to_owned(),
                diff: diff(&text(&edit.before), &text(&edit.after)),
            }
        })
        .collect()
}

/// The changed lines, with two lines around them.
pub(crate) fn diff(before: &str, after: &str) -> String {
    let text = TextDiff::from_lines(before, after)
        .unified_diff()
        .context_radius(2)
        .to_string();
    text.replace("\\ No newline at end of file\n", "")
}

/// Lines, each behind the same indent.
pub(crate) fn indented(lines: &[String], indent: &str) -> String {
    let lines: Vec<String> = lines.iter().map(|line| format!("{indent}{line}")).collect();
    lines.join("\n")
}

/// The digest of every file that is in force; of the main file alone where that is the only one.
pub(super) fn digest(seen: &SeenContainerd) -> Option<String> {
    let files = &seen.effective.files;
    if let [main] = files.as_slice() {
        return Some(Digest::of(&main.bytes).to_string());
    }
    let each = files
        .iter()
        .map(|file| format!("{} {}\n", file.path, Digest::of(&file.bytes)));
    let all: String = each.collect();
    (!all.is_empty()).then(|| Digest::of(all.as_bytes()).to_string())
}
