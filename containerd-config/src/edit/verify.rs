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
    let given = after.version().is_none() && before.marks.version.is_some();
    if !given && surely_same([(&before.tree, removed), (&after.tree, given_back)]) {
        return Ok(());
    }
    let mut expected = without(&before.tree, removed);
    if given {
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
    base: &Stripped<'_>,
    result: &str,
    plan: &Plan<'_>,
) -> Result<Document, EditError> {
    let document = Document::parse(result).map_err(|error| EditError::NotAsMeant {
        what: format!("the result cannot be read: {error}"),
    })?;
    let names: Vec<String> = plan.handlers().map(|h| h.name.clone()).collect();
    let given = base.document.version().is_none();
    let sides = [
        (&base.document.tree, plan.displaced),
        (&document.tree, names.as_slice()),
    ];
    if given || !surely_same(sides) {
        let mut rest = without(&document.tree, &names);
        if given {
            rest.remove("version");
        }
        same(
            &without(&base.document.tree, plan.displaced),
            &rest,
            "after adding our handlers",
        )?;
    }
    for handler in plan.handlers() {
        if document.settings(&handler.name) != Some(&handler.settings) {
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

/// The handler of pods that name none is still there, or is one of containerd's defaults.
pub(super) fn default_runtime(
    before: &Document,
    after: &Document,
    restated: &[String],
) -> Result<(), EditError> {
    let lost = |name: &str| {
        after.settings(name).is_none()
            && before.settings(name).is_some()
            && !restated.iter().any(|restated| restated == name)
    };
    match after.default_runtime() {
        Some(name) if lost(name) => Err(EditError::DefaultRuntime {
            name: name.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Two documents are the same but for some root keys.
pub(super) fn same_but_for(
    before: &Settings,
    after: &Settings,
    keys: &[&str],
    when: &str,
) -> Result<(), EditError> {
    let [mut before, mut after] = [before.clone(), after.clone()];
    for key in keys {
        before.shift_remove(*key);
        after.shift_remove(*key);
    }
    same(&before, &after, when)
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

/// The settings in which two documents differ, each with both values; the handlers `ours` and the root keys `ignored` apart.
/// A value that is zero in Go counts as absent: a dump writes some of them out.
pub(crate) fn unlike(a: &Document, b: &Document, ours: &[String], ignored: &[&str]) -> Vec<String> {
    let [mut a, mut b] = [a, b].map(|document| without(&document.tree, ours));
    for key in ignored {
        a.shift_remove(*key);
        b.shift_remove(*key);
    }
    let mut found = Vec::new();
    differences(&mut String::new(), &a, &b, &mut found);
    found
}

fn differences(path: &mut String, a: &Settings, b: &Settings, found: &mut Vec<String>) {
    let only_b = b.keys().filter(|key| !a.contains_key(*key));
    for key in a.keys().chain(only_b) {
        let length = path.len();
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(key);
        let empty = Settings::new();
        let table = |side: Option<&Value>| match side {
            Some(Value::Object(table)) => Some(table.clone()),
            None => Some(empty.clone()),
            _ => None,
        };
        let sides = (a.get(key), b.get(key));
        match (table(sides.0), table(sides.1)) {
            (Some(a), Some(b)) => differences(path, &a, &b, found),
            _ if sides.0 == sides.1 || (is_zero(sides.0) && is_zero(sides.1)) => {}
            _ => {
                let show = |side: Option<&Value>| {
                    side.map_or_else(|| "nothing".to_owned(), Value::to_string)
                };
                found.push(format!("{path} ({} -> {})", show(sides.0), show(sides.1)));
            }
        }
        path.truncate(length);
    }
}

fn is_zero(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Number(number)) => number.as_f64() == Some(0.0),
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(table)) => table.is_empty(),
        Some(Value::Bool(true)) => false,
    }
}

/// Whether two documents are the same, some handlers of each apart. A large one is not copied for it; false may also mean that
/// a closer look is needed.
fn surely_same([(a, skip_a), (b, skip_b)]: [(&Settings, &[String]); 2]) -> bool {
    fn but_for(a: &Settings, b: &Settings, keys: &[&str]) -> bool {
        let counts = |table: &Settings| {
            table
                .keys()
                .filter(|key| !keys.contains(&key.as_str()))
                .count()
        };
        let mut rest = a.iter().filter(|(key, _)| !keys.contains(&key.as_str()));
        counts(a) == counts(b) && rest.all(|(key, value)| b.get(key) == Some(value))
    }
    fn below<'t>(table: &'t Settings, key: &str, empty: &'t Settings) -> Option<&'t Settings> {
        table.get(key).map_or(Some(empty), Value::as_object)
    }
    let empty = Settings::new();
    let step = |a, b, key| Some((below(a, key, &empty)?, below(b, key, &empty)?));
    let plugin_is_same = |a, b| -> Option<bool> {
        let (c, d) = step(a, b, "containerd")?;
        let (e, f) = step(c, d, "runtimes")?;
        let keep = |table: &Settings, skip: &[String]| -> Settings {
            let rest = table.iter().filter(|(name, _)| !skip.contains(name));
            rest.map(|(name, value)| (name.clone(), value.clone()))
                .collect()
        };
        let rest = but_for(a, b, &["containerd"]) && but_for(c, d, &["runtimes"]);
        Some(rest && keep(e, skip_a) == keep(f, skip_b))
    };
    let all = || -> Option<bool> {
        let (c, d) = step(a, b, "plugins")?;
        let mut same = but_for(a, b, &["plugins"]) && but_for(c, d, &PLUGINS);
        for plugin in PLUGINS {
            let (e, f) = step(c, d, plugin)?;
            same = same && plugin_is_same(e, f)?;
        }
        Some(same)
    };
    all().unwrap_or(false)
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
