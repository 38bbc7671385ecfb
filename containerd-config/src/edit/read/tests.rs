//! Held against `toml_edit`, which is slower and known to be right.

use proptest::prelude::*;
use serde_json::{Value as Json, json};
use toml_edit::{Item, Table, Value};

use super::*;

/// What `toml_edit` reads.
fn oracle(text: &str) -> Option<Json> {
    let document = toml_edit::Document::parse(text).ok()?;
    Some(table(document.as_table()))
}

fn table(table: &Table) -> Json {
    let items = table.iter().filter(|(_, item)| !item.is_none());
    items
        .map(|(name, found)| (name.to_owned(), item(found)))
        .collect()
}

fn item(item: &Item) -> Json {
    match item {
        Item::None => Json::Null,
        Item::Value(found) => value(found),
        Item::Table(found) => table(found),
        Item::ArrayOfTables(tables) => tables.iter().map(table).collect(),
    }
}

fn value(found: &Value) -> Json {
    match found {
        Value::String(text) => json!(text.value()),
        Value::Integer(number) => json!(number.value()),
        Value::Float(number) if number.value().is_finite() => json!(number.value()),
        Value::Float(number) => json!({ "$float": number.value().to_string() }),
        Value::Boolean(flag) => json!(flag.value()),
        Value::Datetime(date) => json!({ "$date": date.value().to_string() }),
        Value::Array(list) => list.iter().map(value).collect(),
        Value::InlineTable(table) => table
            .iter()
            .map(|(name, found)| (name.to_owned(), value(found)))
            .collect(),
    }
}

fn ours(text: &str) -> Option<Json> {
    read(text)
        .ok()
        .map(|read| Json::Object(read.tree.into_json()))
}

#[test]
fn what_toml_allows_and_what_not() {
    for (text, wanted) in [
        ("", Some(json!({}))),
        (
            "\u{feff}a = 1 # x\r\n[b.c]\r\nd.e = 'f'\r\n",
            Some(json!({ "a": 1, "b": { "c": { "d": { "e": "f" } } } })),
        ),
        (
            "[a.b]\n[a]\nc = 1\n",
            Some(json!({ "a": { "b": {}, "c": 1 } })),
        ),
        (
            "[[a]]\nb = 1\n[[a.c]]\nd = 2\n[[a]]\n",
            Some(json!({ "a": [{ "b": 1, "c": [{ "d": 2 }] }, {}] })),
        ),
        (
            "a = { b.c = 1, b.d = [{ e = 2 }] }",
            Some(json!({ "a": { "b": { "c": 1, "d": [{ "e": 2 }] } } })),
        ),
        (
            "[a]\nb.c = 1\n[a.b.d]\n",
            Some(json!({ "a": { "b": { "c": 1, "d": {} } } })),
        ),
        (
            "a = 0x_f\n", // an underscore has digits on both sides
            None,
        ),
        (
            "a = 1979-05-27\nb = -inf",
            Some(json!({ "a": { "$date": "1979-05-27" }, "b": { "$float": "-inf" } })),
        ),
        ("a = 1\na = 2", None),
        ("[a]\n[a]", None),
        ("a.b = 1\n[a]", None),
        ("[a]\n[b]\n[[a]]", None),
        ("[[a]]\n[a]", None),
        ("a = []\n[[a]]", None),
        ("a = {}\n[a.b]", None),
        ("a = {}\na.b = 1", None),
        ("[a.b]\n[a]\nb.c = 1", None),
        ("a = { b = 1, b = 2 }", None),
        ("a = { b = {}, b.c = 1 }", None),
        ("a = 9223372036854775808", None),
        ("a = 1e999", None),
        ("a =", None),
        ("[a", None),
        ("a = 'b", None),
        ("= 1", None),
        ("a = \"\\q\"", None),
        ("a = 1 # \u{7}", None),
    ] {
        assert_eq!(ours(text), wanted, "{text:?}");
        assert_eq!(oracle(text), wanted, "{text:?}, by toml_edit");
    }
}

#[test]
fn arrays_of_tables_are_not_extended_by_dotted_keys() {
    // Here toml_edit is laxer than TOML, and than what containerd reads its configuration with.
    assert_eq!(ours("[[t.a]]\n[t]\na.b.c = 1\n"), None);
}

#[test]
fn depth_is_bounded() {
    for open in ["[", "{ a = "] {
        let deep = format!("a = {}", open.repeat(100_000));
        assert!(read(&deep).is_err());
    }
    let path = vec!["a"; 100_000].join(".");
    assert!(read(&format!("[{path}]")).is_err());
    assert!(read(&format!("{path} = 1")).is_err());
}

/// Keys, values and headers of a few names, so that they meet.
fn line() -> impl Strategy<Value = String> {
    let key = prop_oneof![
        3 => "[ab]",
        1 => Just("\"a\"".to_owned()),
        1 => Just("'b'".to_owned()),
    ];
    let path = prop::collection::vec(key, 1..4).prop_map(|keys| keys.join("."));
    let scalar = prop_oneof![
        Just("1".to_owned()),
        Just("'x'".to_owned()),
        Just("\"\\u00e9\\n\"".to_owned()),
        Just("\"\"\"\nx\\\n  y\"\"\"".to_owned()),
        Just("true".to_owned()),
        Just("0.5".to_owned()),
        Just("nan".to_owned()),
        Just("1979-05-27T07:32:00Z".to_owned()),
    ];
    let value = scalar.prop_recursive(3, 8, 3, {
        let path = path.clone();
        move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3)
                    .prop_map(|list| format!("[ {} ]", list.join(",\n # c\n"))),
                prop::collection::vec((path.clone(), inner), 0..3).prop_map(|pairs| {
                    let pairs: Vec<String> =
                        pairs.iter().map(|(k, v)| format!("{k} = {v}")).collect();
                    format!("{{ {} }}", pairs.join(", "))
                }),
            ]
        }
    });
    prop_oneof![
        2 => (path.clone(), value).prop_map(|(path, value)| format!("{path} = {value}")),
        2 => path.clone().prop_map(|path| format!("[{path}]")),
        1 => path.prop_map(|path| format!("[[{path}]]  # c")),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Everything that we read is read alike by `toml_edit`, and what it refuses we refuse.
    #[test]
    fn reads_as_toml_edit_does(lines in prop::collection::vec(line(), 0..6)) {
        let text = lines.join("\n");
        match (ours(&text), oracle(&text)) {
            (None, Some(_)) => {
                // Only where it is laxer than TOML.
                let refusal = read(&text).err().map(|refusal| refusal.message);
                prop_assert_eq!(refusal.as_deref(), Some("duplicate key"));
                prop_assert!(text.contains("[["));
            }
            (ours, oracle) => prop_assert_eq!(ours, oracle),
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[ab.\\[\\]{}=\"'#\\\\\n\r0-9eEx+:_ \u{feff}\u{0}-]{0,40}") {
        prop_assert_eq!(ours(&text), oracle(&text));
    }
}
