//! The checks that every edit passes before it is handed out.

use serde_json::Value;

use super::compose::Plan;
use super::document::{Document, PLUGINS};
use super::error::EditError;
use super::strip::{self, Stripped};
use crate::handler::Settings;

/// Taking our handlers out changed nothing else.
pub(super) fn stripped(
    before: &Document,
    removed: &[String],
    after: &Document,
    given_back: &[String],
) -> Result<(), EditError> {
    let mut expected = without(&before.tree, removed);
    if after.version().is_none() && before.marks.version.is_some() {
        expected.remove("version");
    }
    same(
        &expected,
        &without(&after.tree, given_back),
        "after removing our handlers",
    )
}

/// Putting our handlers in changed nothing else, made them what is wanted, and can be undone to the byte. Returns the
/// result as read.
pub(super) fn composed(
    base: &Stripped,
    result: &str,
    plan: &Plan<'_>,
) -> Result<Document, EditError> {
    let document = Document::parse(result).map_err(|error| EditError::NotAsMeant {
        what: format!("the result cannot be read: {error}"),
    })?;
    let names: Vec<String> = plan.wanted.iter().map(|h| h.name.clone()).collect();
    let mut rest = without(&document.tree, &names);
    if base.document.version().is_none() {
        rest.remove("version");
    }
    same(
        &without(&base.document.tree, plan.displaced),
        &rest,
        "after adding our handlers",
    )?;
    for handler in plan.wanted {
        if document.settings(&handler.name) != Some(&handler.settings()) {
            return Err(EditError::NotAsMeant {
                what: format!("the handler {:?} reads back differently", handler.name),
            });
        }
    }
    let undone = strip::take_out(result, &document, &[])?;
    if undone.text != base.text {
        return Err(EditError::NotAsMeant {
            what: "removing our handlers again would not give back the same bytes".to_owned(),
        });
    }
    Ok(document)
}

/// The handler of pods that name none is still there.
pub(super) fn default_runtime(before: &Document, after: &Document) -> Result<(), EditError> {
    match after.default_runtime() {
        Some(name) if after.settings(name).is_none() && before.settings(name).is_some() => {
            Err(EditError::DefaultRuntime {
                name: name.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

fn same(expected: &Settings, found: &Settings, when: &str) -> Result<(), EditError> {
    if expected == found {
        return Ok(());
    }
    let key = first_difference(expected, found);
    Err(EditError::NotAsMeant {
        what: format!("{when}, the setting {key:?} would differ"),
    })
}

fn first_difference(a: &Settings, b: &Settings) -> String {
    let mut keys = a.keys().chain(b.keys());
    let Some(key) = keys.find(|key| a.get(*key) != b.get(*key)) else {
        return String::new();
    };
    match (a.get(key), b.get(key)) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            format!("{key}.{}", first_difference(a, b))
        }
        _ => key.clone(),
    }
}

/// The first setting in which two documents differ, the handlers `ours` and the root keys `ignored` apart.
pub(crate) fn unlike(
    a: &Document,
    b: &Document,
    ours: &[String],
    ignored: &[&str],
) -> Option<String> {
    let [mut a, mut b] = [a, b].map(|document| without(&document.tree, ours));
    for key in ignored {
        a.shift_remove(*key);
        b.shift_remove(*key);
    }
    (a != b).then(|| first_difference(&a, &b))
}

/// The document without these handlers, and without the tables that only led to them.
fn without(tree: &Settings, names: &[String]) -> Settings {
    let mut tree = tree.clone();
    for plugin in PLUGINS {
        prune(
            &mut tree,
            &["plugins", plugin, "containerd", "runtimes"],
            names,
        );
    }
    tree
}

fn prune(table: &mut Settings, path: &[&str], names: &[String]) {
    let Some((key, rest)) = path.split_first() else {
        table.retain(|name, _| !names.contains(name));
        return;
    };
    if let Some(Value::Object(inner)) = table.get_mut(*key) {
        prune(inner, rest, names);
        if inner.is_empty() {
            table.shift_remove(*key);
        }
    }
}
