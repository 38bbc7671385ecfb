//! Of specs of others we take none that the library refuses. We may refuse more: it is more lenient in places than CDI's library in Go,
//! which is the one that containerd and Kata read specs with.

use container_device_interface::spec::read_spec;
use km_cdi::spec::Spec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

/// Whether the library takes a spec, and whether we do; each with its reason.
fn both(text: &str) -> (Result<(), String>, Result<(), String>) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spec.yaml");
    std::fs::write(&file, text).unwrap();
    let theirs = read_spec(&file, 0).map(drop);
    let ours = Spec::parse(text.as_bytes()).map(drop);
    (
        theirs.map_err(|error| format!("{error:#}")),
        ours.map_err(|error| error.to_string()),
    )
}

#[test]
fn the_judge_does_judge() {
    let spec = |version: &str, kind: &str, device: &str| {
        format!("cdiVersion: {version}\nkind: {kind}\ndevices:\n{device}")
    };
    let good = "- {name: a, containerEdits: {env: [A=b]}}\n";
    assert_eq!(
        both(&spec("0.5.0", "nvidia.com/pgpu", good)),
        (Ok(()), Ok(()))
    );
    for (what, text) in [
        (
            "a name twice",
            spec("0.5.0", "nvidia.com/pgpu", &good.repeat(2)),
        ),
        (
            "a class that begins with a digit",
            spec("0.5.0", "nvidia.com/2331", good),
        ),
        ("no devices", spec("0.5.0", "nvidia.com/pgpu", "[]")),
        ("no version of CDI", spec("0.9.0", "nvidia.com/pgpu", good)),
        ("a kind without a class", spec("0.5.0", "nvidia.com", good)),
        (
            "a name with a blank",
            spec(
                "0.5.0",
                "nvidia.com/pgpu",
                "- {name: a b, containerEdits: {env: [A=b]}}\n",
            ),
        ),
    ] {
        let (theirs, ours) = both(&text);
        assert!(theirs.is_err(), "the library takes {what}");
        assert!(ours.is_err(), "we take {what}");
    }
}

/// An object of those of these members that are there.
fn object(members: Vec<(&str, Option<Value>)>) -> Value {
    let members = members.into_iter();
    let members = members.filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(members.collect::<Map<String, Value>>())
}

fn maybe<S: Strategy<Value = Value>>(value: S) -> impl Strategy<Value = Option<Value>> {
    proptest::option::weighted(0.25, value)
}

fn text(choices: &'static [&'static str]) -> impl Strategy<Value = Value> {
    select(choices).prop_map(|text| json!(text))
}

fn list<S: Strategy<Value = Value>>(one: S) -> impl Strategy<Value = Value> {
    proptest::collection::vec(one, 0..3).prop_map(Value::Array)
}

fn env() -> impl Strategy<Value = Value> {
    list(text(&["A=b", "A=", "A", "=b", ""]))
}

fn node() -> impl Strategy<Value = Value> {
    let path = text(&["/dev/vfio/1", "dev/x", ""]);
    let kind = maybe(text(&["c", "b", "u", "p", "", "x"]));
    let permissions = maybe(text(&["rw", "r", "rwm", "", "none", "rx"]));
    (path, kind, permissions).prop_map(|(path, kind, permissions)| {
        object(vec![
            ("path", Some(path)),
            ("type", kind),
            ("permissions", permissions),
        ])
    })
}

fn mount() -> impl Strategy<Value = Value> {
    let path = || text(&["/a", "a", ""]);
    (path(), path())
        .prop_map(|(host, container)| json!({ "hostPath": host, "containerPath": container }))
}

fn hook() -> impl Strategy<Value = Value> {
    let name = text(&["createContainer", "prestart", "poststop", "create", ""]);
    (name, text(&["/bin/x", ""]), maybe(env())).prop_map(|(name, path, env)| {
        object(vec![
            ("hookName", Some(name)),
            ("path", Some(path)),
            ("env", env),
        ])
    })
}

fn net() -> impl Strategy<Value = Value> {
    let name = || text(&["eth0", "eth1", ""]);
    (name(), name()).prop_map(|(host, name)| json!({ "hostInterfaceName": host, "name": name }))
}

fn rdt() -> impl Strategy<Value = Value> {
    let id = maybe(text(&["good", "", ".", "..", "a/b", "a\nb"]));
    let flag = || maybe(any::<bool>().prop_map(|flag| json!(flag)));
    (id, flag(), flag(), maybe(list(text(&["L3:0=f"])))).prop_map(
        |(id, cmt, monitoring, schemata)| {
            object(vec![
                ("closID", id),
                ("enableCMT", cmt),
                ("enableMonitoring", monitoring),
                ("schemata", schemata),
            ])
        },
    )
}

fn edits() -> impl Strategy<Value = Value> {
    let groups = maybe(list((0..3_u32).prop_map(|group| json!(group))));
    let parts = (
        maybe(env()),
        maybe(list(node())),
        maybe(list(mount())),
        maybe(list(hook())),
        maybe(list(net())),
        maybe(rdt()),
        groups,
    );
    parts.prop_map(|(env, nodes, mounts, hooks, nets, rdt, groups)| {
        object(vec![
            ("env", env),
            ("deviceNodes", nodes),
            ("mounts", mounts),
            ("hooks", hooks),
            ("netDevices", nets),
            ("intelRdt", rdt),
            ("additionalGids", groups),
        ])
    })
}

fn annotations() -> impl Strategy<Value = Value> {
    let key = select(vec![
        "a",
        "vendor.com/a",
        "vendor.com/",
        "/a",
        "a b",
        "-a",
        "a/b/c",
        "UPPER.com/a",
        "",
    ]);
    (key, "[a-z]{0,3}").prop_map(|(key, value)| object(vec![(key, Some(json!(value)))]))
}

fn spec() -> impl Strategy<Value = Value> {
    let version = text(&[
        "0.3.0", "0.4.0", "0.5.0", "v0.5.0", "0.6.0", "0.7.0", "1.0.0", "1.1.0", "1.1.0", "0.9.0",
        "1", "",
    ]);
    let kind = text(&[
        "nvidia.com/pgpu",
        "nvidia.com/pgpu",
        "nvidia.com/a.b",
        "nvidia.com/2331",
        "nvidia.com/a_",
        "nvidia.com/",
        "9v.com/a",
        "v_/a",
        "a/b/c",
        "none",
        "",
    ]);
    let name = text(&[
        "0000:41:00.0",
        "gpu0",
        "0",
        "a.b",
        "a:",
        "-a",
        "a b",
        "a=b",
        "",
    ]);
    let device = (name, edits(), maybe(annotations())).prop_map(|(name, edits, annotations)| {
        object(vec![
            ("name", Some(name)),
            ("containerEdits", Some(edits)),
            ("annotations", annotations),
        ])
    });
    (
        version,
        kind,
        list(device),
        maybe(edits()),
        maybe(annotations()),
    )
        .prop_map(|(version, kind, devices, edits, annotations)| {
            object(vec![
                ("cdiVersion", Some(version)),
                ("kind", Some(kind)),
                ("devices", Some(devices)),
                ("containerEdits", edits),
                ("annotations", annotations),
            ])
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_it_refuses_we_refuse(spec in spec()) {
        let text = spec.to_string();
        let (theirs, ours) = both(&text);
        if let Err(theirs) = theirs {
            prop_assert!(ours.is_err(), "{text}\nthe library says {theirs}");
        }
    }
}
