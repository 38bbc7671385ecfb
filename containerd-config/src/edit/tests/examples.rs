//! One situation each.

use super::*;

const V2: &str = "version = 2\n";
const V3: &str = "version = 3\n";

#[test]
fn the_block_is_what_the_documentation_shows() {
    let edited = set(V3, &[handler("km-gpu"), plain("km.demo")]);
    let expected = r#"version = 3

# >>> kata-manager: runtime handlers, added by "kata-manager apply"; "kata-manager uninstall" removes them
# kata-manager state: {"handlers":{"km-gpu":"DIGEST","km.demo":"DIGEST"}}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.km-gpu]
runtime_type = "io.containerd.km-gpu.v2"
privileged_without_host_devices = true
pod_annotations = ["io.katacontainers.*", "cdi.k8s.io/*"]
container_annotations = ["io.katacontainers.*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.km-gpu.options]
ConfigPath = "/opt/classes/km-gpu/configuration.toml"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes."km.demo"]
runtime_type = "io.containerd.runc.v2"
# <<< kata-manager
"#;
    let gpu = settings_digest(&handler("km-gpu").settings());
    let demo = settings_digest(&plain("km.demo").settings());
    let expected = expected
        .replacen("DIGEST", &gpu, 1)
        .replacen("DIGEST", &demo, 1);
    assert_eq!(edited.text, expected);
    assert!(
        set(V2, &[plain("km")])
            .text
            .contains("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km]")
    );
    let v4 = set("version = 4\n", &[plain("km")]);
    assert!(v4.text.contains("io.containerd.cri.v1.runtime"));
}

#[test]
fn an_absent_file_is_created_with_a_version_and_goes_again() {
    let absent = SetOptions {
        absent: true,
        ..options(3)
    };
    let edited = set_handlers("", &[plain("km")], &absent).unwrap();
    assert!(edited.text.starts_with("# >>> kata-manager: version"));
    assert_eq!(Document::parse(&edited.text).unwrap().version(), Some(3));

    let changed = set_handlers(&edited.text, &[handler("km")], &options(4)).unwrap();
    assert_eq!(changed.changed, ["km"]);
    assert_eq!(
        Document::parse(&changed.text).unwrap().version(),
        Some(3),
        "the version that it got stays"
    );
    let undone = remove_all(&changed.text, &[]).unwrap();
    assert_eq!((undone.text.as_str(), undone.remove_file), ("", true));
    // Wanting nothing is the same as removing.
    assert_eq!(set(&changed.text, &[]), undone);

    let foreign = format!("{}[debug]\nlevel = \"info\"\n", changed.text);
    let undone = remove_all(&foreign, &[]).unwrap();
    assert_eq!(
        (undone.text.as_str(), undone.remove_file),
        ("version = 3\n[debug]\nlevel = \"info\"\n", false),
        "somebody's later settings stay, and so does the version that they need"
    );
}

#[test]
fn containerd_1_keeps_its_default_handler() {
    let old = options(2);
    let edited = set_handlers(V2, &[plain("km")], &old).unwrap();
    assert_eq!(edited.added, ["km"]);
    let found = Document::parse(&edited.text).unwrap().handlers();
    let owners: Vec<_> = found.iter().map(|h| (h.name.as_str(), h.owner)).collect();
    assert_eq!(owners, [("km", Owner::Ours), ("runc", Owner::Restated)]);
    assert_eq!(
        set_handlers(&edited.text, &[plain("km")], &old)
            .unwrap()
            .text,
        edited.text
    );
    assert_eq!(
        set(&edited.text, &[plain("km")]).text,
        edited.text,
        "a newer containerd needs no change"
    );
    assert_eq!(edited.restated, ["runc"]);
    let undone = remove_all(&edited.text, &[]).unwrap();
    assert_eq!(undone.restated, ["runc"]);
    assert_eq!(
        (undone.text.as_str(), undone.removed),
        (V2, vec!["km".to_owned()])
    );

    // Without it in a block of ours from before: it is added. With a handler in the file: not our business.
    let without = set(V2, &[plain("km")]).text;
    assert_eq!(
        set_handlers(&without, &[plain("km")], &old).unwrap().text,
        edited.text
    );
    let other = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.crun]\nruntime_type = \"x\"\n";
    let beside = set_handlers(other, &[plain("km")], &old).unwrap().text;
    assert!(!beside.contains("runtimes.runc]"));
    let wanted = set_handlers(V2, &[handler("runc")], &old).unwrap().text;
    assert_eq!(ours(&wanted), ["runc"]);

    let named = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"runc\"\n";
    let edited = set_handlers(named, &[plain("km")], &old).unwrap().text;
    assert_eq!(remove_all(&edited, &[]).unwrap().text, named);
}

#[test]
fn a_default_handler_that_somebody_edited_in_our_block_is_theirs() {
    let old = options(2);
    let text = set_handlers(V2, &[plain("km")], &old).unwrap().text;
    let options = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\nSystemdCgroup = true\n";
    let edited = text.replace("# <<<", &format!("{options}# <<<"));
    let found = Document::parse(&edited).unwrap().handlers();
    assert_eq!(found[1].owner, Owner::Foreign);
    assert_eq!(
        set_handlers(&edited, &[plain("km")], &old).unwrap().text,
        edited
    );
    let undone = remove_all(&edited, &[]).unwrap().text;
    assert!(undone.starts_with("version = 2\n[plugins"), "{undone}");
    assert!(
        undone.ends_with(options) && undone.contains("runtime_type"),
        "{undone}"
    );
    let changed = set_handlers(&edited, &[handler("km")], &old).unwrap();
    assert_eq!(changed.changed, ["km"]);
    assert_eq!(remove_all(&changed.text, &[]).unwrap().text, undone);
}

#[test]
fn changes_and_removals_are_told_and_made_in_place() {
    let first = set(V2, &[plain("a"), plain("b"), plain("c")]).text;
    let foreign = format!("{first}\n[debug]\n  level = \"info\"");
    let edited = set(&foreign, &[plain("a"), handler("b"), plain("d")]);
    assert_eq!(edited.added, ["d"]);
    assert_eq!(edited.changed, ["b"]);
    assert_eq!(edited.removed, ["c"]);
    assert!(edited.drifted.is_empty());
    assert!(
        edited
            .text
            .ends_with("# <<< kata-manager\n\n[debug]\n  level = \"info\"")
    );
    assert_eq!(ours(&edited.text), ["a", "b", "d"]);
    let undone = remove_all(&edited.text, &[]).unwrap().text;
    assert_eq!(undone, format!("{V2}\n[debug]\n  level = \"info\""));
}

#[test]
fn what_somebody_edited_in_our_tables_is_told_and_repaired() {
    let wanted = [handler("a"), handler("b"), handler("c")];
    let text = set(V2, &wanted).text;
    let touched = text
        .replacen("privileged_without_host_devices = true\n", "", 1)
        .replace("/opt/classes/c/", "/home/me/");
    let edited = set(&touched, &wanted);
    assert_eq!(drifted(&edited), ["a", "c"]);
    assert!(edited.changed.is_empty() && edited.added.is_empty());
    assert_eq!(edited.text, text);

    let extra = text.replacen(
        "runtime_type",
        "base_runtime_spec = \"/x\"\nruntime_type",
        1,
    );
    assert_eq!(drifted(&set(&extra, &wanted)), ["a"]);

    let start = text
        .find("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.c]")
        .unwrap();
    let end = text.find("# <<<").unwrap();
    let removed = format!("{}{}", &text[..start], &text[end..]);
    let edited = set(&removed, &wanted);
    assert_eq!(
        (drifted(&edited), edited.text.clone()),
        (vec!["c"], text.clone())
    );

    let commented = text.replacen("runtime_type", "# mine\nruntime_type", 1);
    assert_eq!(
        set(&commented, &wanted).text,
        commented,
        "a comment changes no setting"
    );
    assert_eq!(remove_all(&commented, &[]).unwrap().text, V2);
}

#[test]
fn tables_that_others_put_between_our_lines_are_theirs() {
    let text = set(V2, &[plain("km")]).text;
    let table = "# theirs\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata-qemu]\nruntime_type = \"x\"\n";
    let inside = text.replace("# <<< kata", &format!("{table}# <<< kata"));
    let found = Document::parse(&inside).unwrap().handlers();
    let owners: Vec<_> = found.iter().map(|h| (h.name.as_str(), h.owner)).collect();
    assert_eq!(owners, [("km", Owner::Ours), ("kata-qemu", Owner::Foreign)]);
    assert_eq!(set(&inside, &[plain("km")]).text, inside);
    assert_eq!(
        remove_all(&inside, &[]).unwrap().text,
        format!("{V2}{table}")
    );
    let edited = set(&inside, &[handler("km")]).text;
    assert_eq!(
        remove_all(&edited, &[]).unwrap().text,
        format!("{V2}{table}")
    );
    assert!(matches!(
        set_handlers(&inside, &[plain("kata-qemu")], &options(3)),
        Err(EditError::Conflict { line: 8, .. })
    ));
}

#[test]
fn a_key_that_somebody_wrote_right_after_our_block_is_not_lost() {
    let text = format!("{}oom_score = 1\n", set(V2, &[plain("km")]).text);
    let error = remove_all(&text, &[]).unwrap_err();
    assert_eq!(error, EditError::LooseKeys { line: 8 });
    assert!(set_handlers(&text, &[plain("km")], &options(3)).is_err());
}

#[test]
fn keys_that_somebody_wrote_before_our_first_table_stay_where_they_belong() {
    let base = "version = 2\n[debug]\nlevel = \"info\"\n";
    let text = set(base, &[plain("km")]).text;
    let inside = text.replace("[plugins", "uid = 3\n[plugins");
    let edited = set(&inside, &[handler("km")]).text;
    for text in [&inside, &edited] {
        assert_eq!(
            remove_all(text, &[]).unwrap().text,
            "version = 2\n[debug]\nlevel = \"info\"\nuid = 3\n"
        );
    }
}

#[test]
fn a_foreign_handler_is_adopted_only_when_told() {
    let text = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km]\nruntime_type = \"theirs\" # why\n\n[debug]\n";
    let error = set_handlers(text, &[plain("km")], &options(3)).unwrap_err();
    assert_eq!(
        error,
        EditError::Conflict {
            name: "km".into(),
            line: 2
        }
    );
    let adopt = ["km".to_owned()];
    let allow = SetOptions {
        adopt: &adopt,
        ..options(3)
    };
    let edited = set_handlers(text, &[plain("km")], &allow).unwrap();
    assert_eq!(
        (edited.adopted.clone(), edited.added.clone()),
        (vec!["km".to_owned()], vec!["km".to_owned()])
    );
    assert!(
        edited
            .text
            .contains("\n#kata-manager:kept# runtime_type = \"theirs\" # why\n\n[debug]\n")
    );
    let found = Document::parse(&edited.text).unwrap().handlers();
    assert_eq!((found[0].owner, found[0].line), (Owner::Adopted, 2));
    assert_eq!(found[0].settings["runtime_type"], "theirs");

    // Another handler joins, the adopted one stays adopted; then ours of that name goes, and theirs is back.
    let more = set(&edited.text, &[plain("km"), plain("b")]);
    assert_eq!((more.added, more.adopted), (vec!["b".to_owned()], vec![]));
    let fewer = set(&more.text, &[plain("b")]);
    assert_eq!(
        (fewer.removed, fewer.given_back),
        (vec!["km".to_owned()], vec!["km".to_owned()])
    );
    assert_eq!(remove_all(&fewer.text, &[]).unwrap().text, text);

    let taken = more.text.replace("[debug]", "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km.options]\nBinaryName = \"x\"\n[debug]");
    assert!(matches!(
        set_handlers(&taken, &[plain("km")], &options(3)),
        Err(EditError::Conflict { .. }
            | EditError::LooseKeys { .. }
            | EditError::NotAsMeant { .. })
    ));
    let twice = edited.text.replace(
        "# >>> kata-manager",
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.other]\n# >>> kata-manager",
    );
    assert!(set_handlers(&twice, &[plain("km")], &options(3)).is_ok());
}

#[test]
fn an_adopted_table_that_was_registered_anew_is_not_given_back_twice() {
    let theirs = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km]\nruntime_type = \"theirs\"\n";
    let adopt = ["km".to_owned()];
    let allow = SetOptions {
        adopt: &adopt,
        ..options(3)
    };
    let edited = set_handlers(&format!("{V2}{theirs}"), &[plain("km")], &allow).unwrap();
    // Somebody removed our block and put the table in again, but left the comments.
    let at = edited.text.find("\n# >>>").unwrap();
    let text = format!("{}{theirs}", &edited.text[..at]);
    let error = remove_all(&text, &[]).unwrap_err();
    assert!(
        matches!(error, EditError::GiveBack { line: 4, .. }),
        "{error:?}"
    );
}

#[test]
fn a_handler_without_lines_of_its_own_cannot_be_adopted() {
    let adopt = ["km".to_owned()];
    let allow = SetOptions {
        adopt: &adopt,
        ..options(3)
    };
    for text in [
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes]\nkm = { runtime_type = \"x\" }\n",
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes]\nkm.runtime_type = \"x\"\n",
    ] {
        let error = set_handlers(text, &[plain("km")], &allow).unwrap_err();
        assert_eq!(
            error,
            EditError::NoOwnLines {
                name: "km".into(),
                line: 3
            }
        );
        let beside = set(text, &[plain("b")]).text;
        assert_eq!(remove_all(&beside, &[]).unwrap().text, text);
    }
}

#[test]
fn tables_of_ours_are_known_by_the_record_when_comments_were_dropped() {
    let rewritten = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km]\n    container_annotations = [\"io.katacontainers.*\"]\n    pod_annotations = [\"io.katacontainers.*\", \"cdi.k8s.io/*\"]\n    privileged_without_host_devices = true\n    runtime_type = \"io.containerd.km.v2\"\n    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.km.options]\n      ConfigPath = \"/opt/classes/km/configuration.toml\"\n[debug]\n";
    let recorded = [handler("km")];
    let with_record = SetOptions {
        recorded: &recorded,
        ..options(3)
    };
    let same = set_handlers(rewritten, &[handler("km")], &with_record).unwrap();
    assert!(same.added.is_empty() && same.changed.is_empty() && same.drifted.is_empty());
    assert_eq!(ours(&same.text), ["km"]);
    let undone = remove_all(rewritten, &recorded).unwrap();
    assert_eq!(undone.text, "version = 2\n\n[plugins]\n[debug]\n");
    assert_eq!(undone.removed, ["km"]);

    let edited = rewritten.replace("km.v2", "other.v2");
    assert!(matches!(
        set_handlers(&edited, &[handler("km")], &with_record),
        Err(EditError::Conflict { .. })
    ));
    assert_eq!(remove_all(&edited, &recorded).unwrap().text, edited);
}

#[test]
fn damaged_lines_of_ours_are_repaired_or_removed() {
    let text = set(V2, &[plain("km")]).text;
    for damaged in [
        text.replace("# <<< kata-manager\n", ""),
        text.replace("# kata-manager state: {\"", "# kata-manager state: {"),
        format!("{text}# <<< kata-manager\n"),
    ] {
        assert_eq!(set(&damaged, &[plain("km")]).text, text);
        assert_eq!(remove_all(&damaged, &[]).unwrap().text, V2);
    }
    let headless: String = text
        .lines()
        .filter(|l| !l.contains(">>>"))
        .map(|l| format!("{l}\n"))
        .collect();
    assert!(matches!(
        set_handlers(&headless, &[plain("km")], &options(3)),
        Err(EditError::Conflict { .. })
    ));
}

#[test]
fn the_default_handler_is_not_taken_away() {
    let text = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"km\"\n";
    let edited = set(text, &[plain("km"), plain("b")]).text;
    let wanted = EditError::DefaultRuntime { name: "km".into() };
    assert_eq!(remove_all(&edited, &[]).unwrap_err(), wanted);
    assert_eq!(
        set_handlers(&edited, &[plain("b")], &options(3)).unwrap_err(),
        wanted
    );
}

#[test]
fn handlers_that_cannot_be_written_are_refused() {
    for (bad, reason) in [
        (plain(""), "no name"),
        (
            Handler {
                runtime_type: String::new(),
                ..plain("a")
            },
            "no runtime_type",
        ),
        (
            Handler {
                snapshotter: Some("a\nb".into()),
                ..plain("a")
            },
            "control character",
        ),
    ] {
        let error = set_handlers(V2, &[bad], &options(3)).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert!(set_handlers(V2, &[plain("a"), plain("a")], &options(3)).is_err());
}

#[test]
fn a_hundred_handlers_in_a_large_file_are_edited() {
    let wanted: Vec<Handler> = (0..100).map(|i| handler(&format!("km-{i}"))).collect();
    let mut text = V2.to_owned();
    while text.len() < 1 << 20 {
        let n = text.len();
        text.push_str(&format!(
            "[proxy_plugins.p{n}]\n  # comment\n  address = \"/run/{n}.sock\"\n"
        ));
    }
    let edited = set(&text, &wanted);
    assert_eq!(ours(&edited.text).len(), 100);
    assert_eq!(remove_all(&edited.text, &[]).unwrap().text, text);
}
