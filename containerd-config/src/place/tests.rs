//! Plans over files in memory, carried out by writing them there.

use super::*;
use crate::effective::tests::Memory;
use crate::handler::ContainerdVersion;

const MAIN: &str = "/etc/containerd/config.toml";
const BESIDE: &str = "/etc/containerd/conf.d/60-kata-manager.toml";
const V17: ContainerdVersion = ContainerdVersion::new(1, 7, 24);
const V21: ContainerdVersion = ContainerdVersion::new(2, 1, 9);

fn handler(name: &str) -> Handler {
    Handler {
        name: name.to_owned(),
        runtime_type: "io.containerd.kata.v2".to_owned(),
        pod_annotations: vec!["io.katacontainers.*".into()],
        ..Handler::default()
    }
}

fn main_path() -> HostPath {
    HostPath::new(MAIN).unwrap()
}

fn planned(
    files: &Memory,
    version: ContainerdVersion,
    request: &Request<'_>,
) -> Result<Placed, PlaceError> {
    let effective = Effective::load(files, &main_path(), version)?;
    plan(files, &effective, &main_path(), request)
}

pub(crate) fn carried_out(files: &Memory, placed: &Placed) -> Memory {
    let mut files = Memory(files.0.clone());
    for edit in std::iter::once(&placed.main).chain(&placed.drop_ins) {
        match &edit.after {
            Some(after) => {
                let text = String::from_utf8(after.clone()).unwrap();
                files.0.insert(edit.path.as_str().to_owned(), text);
            }
            None => {
                files.0.remove(edit.path.as_str());
            }
        }
    }
    files
}

/// Adds, sees that a second time is nothing, removes, and sees the same bytes. Gives the files in between.
fn there_and_back(
    files: &Memory,
    version: ContainerdVersion,
    placement: Placement,
) -> (Memory, Placed) {
    let wanted = [handler("km-a"), handler("km-b")];
    let request = Request {
        wanted: &wanted,
        placement,
        ..Request::default()
    };
    let placed = planned(files, version, &request).unwrap();
    assert!(placed.differs());
    assert_eq!(placed.edited.added, ["km-a", "km-b"]);
    let after = carried_out(files, &placed);
    let again = planned(&after, version, &request).unwrap();
    assert!(!again.differs(), "{again:#?}");
    let auto = Request {
        placement: Placement::Auto,
        ..request.clone()
    };
    assert!(!planned(&after, version, &auto).unwrap().differs());
    let removed = planned(&after, version, &Request::default()).unwrap();
    assert_eq!(removed.edited.removed, ["km-a", "km-b"]);
    assert_eq!(carried_out(&after, &removed).0, files.0);
    (after, placed)
}

const V3: &str = "version = 3\nroot = '/x'\n";

#[test]
fn each_placement_is_there_and_back() {
    let plain = Memory::new(&[(MAIN, V3)]);
    let (after, placed) = there_and_back(&plain, V21, Placement::Auto);
    assert_eq!(placed.target.as_str(), BESIDE);
    assert!(after.0[MAIN].contains("imports = [\"/etc/containerd/conf.d/60-kata-manager.toml\"]"));
    assert!(after.0[BESIDE].contains("version = 3"));
    let DryText { main: text, copies } = placed.dry_run.unwrap();
    assert_eq!(
        copies[0].0.as_str(),
        "/etc/containerd/.60-kata-manager.toml.kata-manager.check"
    );
    assert!(text.contains(copies[0].0.as_str()), "{text}");

    let (after, placed) = there_and_back(&plain, V21, Placement::Main);
    assert_eq!(placed.target.as_str(), MAIN);
    assert!(!after.0.contains_key(BESIDE));

    let stock = Memory::new(&[
        (
            MAIN,
            "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n",
        ),
        (
            "/etc/containerd/conf.d/99-nvidia.toml",
            "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.nvidia]\nruntime_type = 'io.containerd.runc.v2'\n",
        ),
    ]);
    let (after, placed) = there_and_back(&stock, V21, Placement::DropIn);
    assert_eq!(placed.target.as_str(), BESIDE);
    assert_eq!(after.0[MAIN], stock.0[MAIN]);
    assert_eq!(placed.understood.1, ["km-a", "km-b", "nvidia"]);

    for files in [Memory::new(&[]), Memory::new(&[(MAIN, "")])] {
        let (after, _) = there_and_back(&files, V21, Placement::Auto);
        assert!(!after.0.contains_key(BESIDE));
        let (after, _) = there_and_back(&files, V21, Placement::DropIn);
        assert!(after.0.contains_key(BESIDE));
        there_and_back(&files, V17, Placement::Auto);
    }
    let old = Memory::new(&[
        (MAIN, "version = 2\nimports = [ # theirs\n  '/o.toml',\n]\n"),
        ("/o.toml", ""),
    ]);
    there_and_back(&old, V17, Placement::Auto);
    let (after, _) = there_and_back(&old, V21, Placement::Auto);
    assert!(
        after.0[BESIDE].contains("version = 2"),
        "{}",
        after.0[BESIDE]
    );
    assert!(
        !after.0[BESIDE].contains("runtimes.runc"),
        "{}",
        after.0[BESIDE]
    );
}

#[test]
fn handlers_move_when_another_placement_is_asked_for() {
    let files = Memory::new(&[(MAIN, V3)]);
    let wanted = [handler("km-a")];
    let ask = |placement| Request {
        wanted: &wanted,
        placement,
        ..Request::default()
    };
    let beside = carried_out(
        &files,
        &planned(&files, V21, &ask(Placement::DropIn)).unwrap(),
    );
    let to_main = planned(&beside, V21, &ask(Placement::Main)).unwrap();
    assert_eq!(
        (to_main.edited.added.len(), to_main.edited.changed.len()),
        (0, 1)
    );
    assert!(to_main.edited.gone().is_empty());
    let main = carried_out(&beside, &to_main);
    assert_eq!(
        main.0,
        carried_out(
            &files,
            &planned(&files, V21, &ask(Placement::Main)).unwrap()
        )
        .0
    );
    let back = planned(&main, V21, &ask(Placement::DropIn)).unwrap();
    assert_eq!(carried_out(&main, &back).0, beside.0);
}

#[test]
fn what_cannot_be_done_is_refused_with_the_file() {
    let wanted = [handler("km-a")];
    let ask = |placement| Request {
        wanted: &wanted,
        placement,
        ..Request::default()
    };
    let table = |name: &str| {
        format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\nruntime_type = \"x.y.v1\"\n"
        )
    };
    let main = "version = 2\nimports = ['/o.toml']\n";
    let told = |files: &Memory, version, placement| {
        let error: Box<dyn std::error::Error> =
            Box::new(planned(files, version, &ask(placement)).unwrap_err());
        format!(
            "{error} {}",
            error.source().map(ToString::to_string).unwrap_or_default()
        )
    };
    let theirs = Memory::new(&[(MAIN, main), ("/o.toml", &table("km-a"))]);
    for version in [V17, V21] {
        let error = told(&theirs, version, Placement::Auto);
        assert!(
            error.contains("\"km-a\"") && error.contains("/o.toml, line 1"),
            "{error}"
        );
    }
    let replaced = Memory::new(&[(MAIN, main), ("/o.toml", &table("other"))]);
    let error = told(&replaced, V17, Placement::Auto);
    assert!(
        error.contains("/o.toml has a table") && error.contains("1.7.24"),
        "{error}"
    );
    planned(&replaced, V21, &ask(Placement::Auto)).unwrap();
    let error = told(&Memory::new(&[(MAIN, main)]), V21, Placement::Auto);
    assert!(error.contains("/o.toml, which is not there"), "{error}");
    let error = told(&Memory::new(&[(MAIN, V3)]), V17, Placement::DropIn);
    assert!(error.contains("switch off every handler"), "{error}");
    let both = format!("version = 2\n{}", table("km-a"));
    let error = told(&Memory::new(&[(MAIN, &both)]), V21, Placement::DropIn);
    assert!(error.contains("--adopt"), "{error}");
    let error = told(&Memory::new(&[(MAIN, &both)]), V21, Placement::Auto);
    assert!(error.contains("line 2"), "{error}");
    let off = Memory::new(&[
        (MAIN, "version = 2\nimports=['/o.toml']\n"),
        ("/o.toml", "disabled_plugins = ['cri']\n"),
    ]);
    let error = told(&off, V21, Placement::Auto);
    assert!(
        error.contains("/o.toml") && error.contains("disabled_plugins"),
        "{error}"
    );
}

#[test]
fn our_own_import_may_dangle_and_is_repaired() {
    let files = Memory::new(&[(MAIN, V3)]);
    let wanted = [handler("km-a")];
    let request = Request {
        wanted: &wanted,
        ..Request::default()
    };
    let after = carried_out(&files, &planned(&files, V21, &request).unwrap());
    let mut broken = Memory(after.0.clone());
    broken.0.remove(BESIDE);
    let repaired = carried_out(&broken, &planned(&broken, V21, &request).unwrap());
    assert_eq!(repaired.0, after.0);
    let removed = carried_out(
        &broken,
        &planned(&broken, V21, &Request::default()).unwrap(),
    );
    assert_eq!(removed.0, files.0);
}

#[test]
fn what_others_put_into_our_drop_in_stays_in_force() {
    let files = Memory::new(&[(MAIN, V3)]);
    let wanted = [handler("km-a")];
    let request = Request {
        wanted: &wanted,
        ..Request::default()
    };
    let mut after = carried_out(&files, &planned(&files, V21, &request).unwrap());
    let theirs = "\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.theirs]\nruntime_type = 'x.y.v1'\n";
    after.0.get_mut(BESIDE).unwrap().push_str(theirs);
    let removed = planned(&after, V21, &Request::default()).unwrap();
    let left = carried_out(&after, &removed);
    assert!(left.0[BESIDE].contains("theirs") && !left.0[BESIDE].contains("km-a"));
    assert!(left.0[MAIN].contains(BESIDE), "{}", left.0[MAIN]);
    assert_eq!(removed.understood.1, ["theirs"]);
}

#[test]
fn the_default_handler_is_not_taken_away_from_another_file() {
    let main = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'km-a'\n";
    let files = Memory::new(&[(MAIN, main)]);
    let wanted = [handler("km-a")];
    let request = Request {
        wanted: &wanted,
        placement: Placement::DropIn,
        ..Request::default()
    };
    let after = carried_out(&files, &planned(&files, V21, &request).unwrap());
    let error = planned(&after, V21, &Request::default()).unwrap_err();
    assert!(
        matches!(error, PlaceError::DefaultRuntime { .. }),
        "{error}"
    );
}

#[test]
fn drift_is_told_repaired_or_kept() {
    for placement in [Placement::Main, Placement::DropIn] {
        let files = Memory::new(&[(MAIN, V3)]);
        let wanted = [handler("km-a"), handler("km-b")];
        let request = Request {
            wanted: &wanted,
            placement,
            ..Request::default()
        };
        let placed = planned(&files, V21, &request).unwrap();
        let whole = carried_out(&files, &placed);
        let mut touched = Memory(whole.0.clone());
        let text = touched.0.get_mut(placed.target.as_str()).unwrap();
        *text = text.replacen(
            "[\"io.katacontainers.*\"]",
            "['mine']\nsnapshotter = 'x'",
            1,
        );
        let effective = Effective::load(&touched, &main_path(), V21).unwrap();
        let drifts = drift(&effective, &wanted);
        assert_eq!(
            drifts[0].lines(),
            [
                "- pod_annotations = [\"io.katacontainers.*\"]",
                "+ pod_annotations = [\"mine\"]",
                "+ snapshotter = \"x\""
            ]
        );
        let repaired = planned(&touched, V21, &request).unwrap();
        assert_eq!(repaired.edited.drifted, drifts);
        assert_eq!(carried_out(&touched, &repaired).0, whole.0);

        let keep = Request {
            keep_drift: true,
            ..request.clone()
        };
        let kept = planned(&touched, V21, &keep).unwrap();
        assert!(!kept.differs());
        assert_eq!(kept.edited.kept, drifts);
        assert_eq!(kept.live[0].pod_annotations, ["mine"]);
        // It stays through another edit, is still told, and goes with everything else.
        let more = [handler("km-a"), handler("km-b"), handler("km-c")];
        let keep = Request {
            wanted: &more,
            ..keep
        };
        let grown = carried_out(&touched, &planned(&touched, V21, &keep).unwrap());
        assert!(grown.0[placed.target.as_str()].contains("snapshotter = \"x\""));
        let effective = Effective::load(&grown, &main_path(), V21).unwrap();
        assert_eq!(drift(&effective, &more), drifts);
        assert!(!planned(&grown, V21, &keep).unwrap().differs());
        let gone = planned(&grown, V21, &Request::default()).unwrap();
        assert_eq!(carried_out(&grown, &gone).0, files.0);
    }
}

#[test]
fn a_rendered_main_file_is_never_written() {
    let folder = "/var/lib/rancher/k3s/agent/etc/containerd";
    let main = HostPath::new(format!("{folder}/config.toml")).unwrap();
    let wanted = [handler("km-a")];
    let base = "# File generated by k3s. DO NOT EDIT.\nversion = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n";
    let ask = |files: &Memory, version, wanted: &[Handler], placement| {
        let effective = Effective::load(files, &main, version).unwrap();
        let request = Request {
            wanted,
            placement,
            rendered: true,
            ..Request::default()
        };
        plan(files, &effective, &main, &request)
    };
    // No template: one is made, and rendering it gives the block.
    let files = Memory::new(&[(main.as_str(), base)]);
    let placed = ask(&files, V21, &wanted, Placement::Auto).unwrap();
    let template = format!("{folder}/config-v3.toml.tmpl");
    assert_eq!(placed.main.path.as_str(), template);
    assert_eq!(placed.edited.added, ["km-a"]);
    let mut after = carried_out(&files, &placed);
    assert!(after.0[&template].starts_with(edit::TEMPLATE_BASE));
    assert_eq!(after.0[main.as_str()], base);
    let rendered = after.0[&template].replace(edit::TEMPLATE_BASE, base);
    after.0.insert(main.as_str().to_owned(), rendered);
    assert!(
        !ask(&after, V21, &wanted, Placement::Auto)
            .unwrap()
            .differs()
    );
    let removed = ask(&after, V21, &[], Placement::Auto).unwrap();
    assert_eq!(removed.edited.removed, ["km-a"]);
    assert!(!carried_out(&after, &removed).0.contains_key(&template));

    // An old template goes on to count on containerd 2.x, and is the only one on 1.x.
    let old = format!("{folder}/config.toml.tmpl");
    let files = Memory::new(&[
        (main.as_str(), base),
        (&old, "{{ template \"base\" . }}\n# theirs\n"),
    ]);
    let placed = ask(&files, V21, &wanted, Placement::Main).unwrap();
    assert_eq!(placed.main.path.as_str(), old);
    assert!(ask(&files, V21, &wanted, Placement::DropIn).is_err());

    // Newer ones import a folder.
    let import = format!("imports = ['{folder}/config-v3.toml.d/*.toml']\n{base}");
    let files = Memory::new(&[(main.as_str(), &import)]);
    let placed = ask(&files, V21, &wanted, Placement::Auto).unwrap();
    assert!(!placed.main.differs());
    assert_eq!(
        placed.target.as_str(),
        format!("{folder}/config-v3.toml.d/60-kata-manager.toml")
    );
    let after = carried_out(&files, &placed);
    assert!(
        !ask(&after, V21, &wanted, Placement::Auto)
            .unwrap()
            .differs()
    );
    let removed = ask(&after, V21, &[], Placement::Auto).unwrap();
    assert_eq!(carried_out(&after, &removed).0, files.0);

    let runc = [handler("runc")];
    let error = ask(&files, V21, &runc, Placement::Main).unwrap_err();
    assert!(matches!(error, PlaceError::InTemplate { .. }), "{error}");
}

#[test]
fn settings_of_the_cri_plugin_come_and_go_with_the_handlers() {
    let wanted = [handler("km-a")];
    let cri: Settings = [("enable_cdi".to_owned(), true.into())]
        .into_iter()
        .collect();
    let header = "[plugins.\"io.containerd.grpc.v1.cri\"]\n";
    for (version, main, placement) in [
        (
            V17,
            format!("version = 2\n{header}sandbox_image = 'x'\n"),
            Placement::Main,
        ),
        (V17, "version = 2\n".to_owned(), Placement::Main),
        (V21, format!("version = 2\n{header}"), Placement::DropIn),
        (V21, V3.to_owned(), Placement::Main),
    ] {
        let files = Memory::new(&[(MAIN, &main)]);
        let request = Request {
            wanted: &wanted,
            placement,
            cri: cri.clone(),
            ..Request::default()
        };
        let placed = planned(&files, version, &request).unwrap();
        let after = carried_out(&files, &placed);
        assert!(
            after.0[placed.target.as_str()].contains("enable_cdi = true"),
            "{main}"
        );
        assert!(
            !planned(&after, version, &request).unwrap().differs(),
            "{main}"
        );
        let without = Request {
            cri: Settings::new(),
            ..request.clone()
        };
        let without = carried_out(&after, &planned(&after, version, &without).unwrap());
        assert!(!without.0[placed.target.as_str()].contains("enable_cdi"));
        let removed = planned(&after, version, &Request::default()).unwrap();
        assert_eq!(carried_out(&after, &removed).0, files.0, "{main}");
    }
    let own = format!("version = 2\n{header}enable_cdi = false\n");
    for version in [V17, V21] {
        let files = Memory::new(&[(MAIN, &own)]);
        let request = Request {
            wanted: &wanted,
            cri: cri.clone(),
            ..Request::default()
        };
        let after = carried_out(&files, &planned(&files, version, &request).unwrap());
        assert!(
            !after
                .0
                .values()
                .any(|text| text.contains("enable_cdi = true"))
        );
    }
}
