//! Configurations shaped like those that distributions and tools write.

use super::*;

const FIXTURES: &[(&str, &str)] = &[
    ("aks", include_str!("../../../fixtures/aks.toml")),
    (
        "bottlerocket",
        include_str!("../../../fixtures/bottlerocket.toml"),
    ),
    ("by-hand", include_str!("../../../fixtures/by-hand.toml")),
    ("coco", include_str!("../../../fixtures/coco.toml")),
    (
        "comments-only",
        include_str!("../../../fixtures/comments-only.toml"),
    ),
    (
        "debian-package",
        include_str!("../../../fixtures/debian-package.toml"),
    ),
    (
        "default-1.7",
        include_str!("../../../fixtures/default-1.7.toml"),
    ),
    (
        "default-2.1",
        include_str!("../../../fixtures/default-2.1.toml"),
    ),
    (
        "docker-package",
        include_str!("../../../fixtures/docker-package.toml"),
    ),
    ("doks", include_str!("../../../fixtures/doks.toml")),
    ("eks", include_str!("../../../fixtures/eks.toml")),
    ("empty", include_str!("../../../fixtures/empty.toml")),
    ("flatcar", include_str!("../../../fixtures/flatcar.toml")),
    ("gaudi", include_str!("../../../fixtures/gaudi.toml")),
    ("gke", include_str!("../../../fixtures/gke.toml")),
    (
        "gpu-operator",
        include_str!("../../../fixtures/gpu-operator.toml"),
    ),
    ("gvisor", include_str!("../../../fixtures/gvisor.toml")),
    ("k3d", include_str!("../../../fixtures/k3d.toml")),
    ("k3s", include_str!("../../../fixtures/k3s.toml")),
    ("k3s-v3", include_str!("../../../fixtures/k3s-v3.toml")),
    (
        "kata-deploy-1.x",
        include_str!("../../../fixtures/kata-deploy-1.x.toml"),
    ),
    (
        "kata-deploy-2.x",
        include_str!("../../../fixtures/kata-deploy-2.x.toml"),
    ),
    ("kind", include_str!("../../../fixtures/kind.toml")),
    ("kops", include_str!("../../../fixtures/kops.toml")),
    ("kubeadm", include_str!("../../../fixtures/kubeadm.toml")),
    (
        "kubespray",
        include_str!("../../../fixtures/kubespray.toml"),
    ),
    ("lima", include_str!("../../../fixtures/lima.toml")),
    ("minikube", include_str!("../../../fixtures/minikube.toml")),
    (
        "no-final-newline",
        include_str!("../../../fixtures/no-final-newline.toml"),
    ),
    (
        "nvidia-drop-in",
        include_str!("../../../fixtures/nvidia-drop-in.toml"),
    ),
    (
        "nvidia-kata-manager",
        include_str!("../../../fixtures/nvidia-kata-manager.toml"),
    ),
    (
        "nvidia-toolkit",
        include_str!("../../../fixtures/nvidia-toolkit.toml"),
    ),
    ("nydus", include_str!("../../../fixtures/nydus.toml")),
    ("oke", include_str!("../../../fixtures/oke.toml")),
    ("rke2", include_str!("../../../fixtures/rke2.toml")),
    ("rootless", include_str!("../../../fixtures/rootless.toml")),
    ("stargz", include_str!("../../../fixtures/stargz.toml")),
    ("talos", include_str!("../../../fixtures/talos.toml")),
    ("wasm", include_str!("../../../fixtures/wasm.toml")),
    ("windows", include_str!("../../../fixtures/windows.toml")),
    ("youki", include_str!("../../../fixtures/youki.toml")),
];

fn fixture(name: &str) -> &'static str {
    FIXTURES.iter().find(|(found, _)| *found == name).unwrap().1
}

#[test]
fn adding_keeps_every_byte_and_removing_gives_them_back() {
    for (name, text) in FIXTURES {
        let wanted = [handler("km-gpu"), plain("km-demo")];
        let edited = set(text, &wanted);
        assert_eq!(edited.added, ["km-gpu", "km-demo"], "{name}");
        assert!(
            edited.text.contains(text.trim_start_matches('\u{feff}')),
            "{name}: the text is there in one piece"
        );
        assert_eq!(
            edited.text.starts_with('\u{feff}'),
            text.starts_with('\u{feff}'),
            "{name}"
        );
        assert_eq!(ours(&edited.text), ["km-gpu", "km-demo"], "{name}");

        let again = set(&edited.text, &wanted);
        assert_eq!(
            again,
            Edited {
                text: edited.text.clone(),
                ..Edited::default()
            },
            "{name}: a second edit does nothing"
        );

        let undone = remove_all(&edited.text, &[]).unwrap();
        assert_eq!(undone.text, *text, "{name}");
        assert_eq!(undone.removed, ["km-demo", "km-gpu"], "{name}");
        assert!(!undone.remove_file, "{name}: we did not create it");
    }
}

#[test]
fn adopting_every_foreign_handler_and_giving_it_back_is_the_identity() {
    let mut adopted = 0;
    for (name, text) in FIXTURES {
        let document = Document::parse(text).unwrap();
        let names: Vec<String> = document.handlers().into_iter().map(|h| h.name).collect();
        if names.is_empty() {
            continue;
        }
        let wanted: Vec<Handler> = names.iter().map(|name| plain(name)).collect();
        let refused = set_handlers(text, &wanted, &options(3)).unwrap_err();
        assert!(
            matches!(refused, EditError::Conflict { .. }),
            "{name}: {refused}"
        );

        let allow = SetOptions {
            adopt: &names,
            ..options(3)
        };
        let edited = set_handlers(text, &wanted, &allow).unwrap();
        assert_eq!(edited.adopted, names, "{name}");
        let found = Document::parse(&edited.text).unwrap().handlers();
        let kept: Vec<_> = found.iter().filter(|h| h.owner == Owner::Adopted).collect();
        assert_eq!(kept.len(), names.len(), "{name}");
        adopted += kept.len();
        for (kept, before) in kept.iter().zip(document.handlers()) {
            assert_eq!(
                (&kept.name, &kept.settings),
                (&before.name, &before.settings)
            );
        }

        let again = set(&edited.text, &wanted);
        assert_eq!(
            again.text, edited.text,
            "{name}: no second permission is needed"
        );
        let undone = remove_all(&edited.text, &[]).unwrap();
        assert_eq!(undone.text, *text, "{name}");
    }
    assert!(adopted > 15, "{adopted}");
}

#[test]
fn the_same_holds_where_the_default_handler_must_be_written_out() {
    let mut restated = 0;
    for (name, text) in FIXTURES {
        if Document::parse(text).unwrap().version() == Some(3) {
            let error = set_handlers(text, &[handler("km")], &options(2)).unwrap_err();
            assert_eq!(error, EditError::TooNew { version: 3 }, "{name}");
            continue;
        }
        let edited = set_handlers(text, &[handler("km")], &options(2)).unwrap();
        let found = Document::parse(&edited.text).unwrap().handlers();
        restated += found.iter().filter(|h| h.owner == Owner::Restated).count();
        let again = set_handlers(&edited.text, &[handler("km")], &options(2)).unwrap();
        assert_eq!(again.text, edited.text, "{name}");
        assert_eq!(remove_all(&edited.text, &[]).unwrap().text, *text, "{name}");
    }
    assert_eq!(restated, 10);
}

#[test]
fn line_breaks_are_those_of_the_file() {
    let edited = set(fixture("windows"), &[handler("km")]);
    assert!(edited.text.lines().count() > 8);
    assert_eq!(
        edited.text.matches('\n').count(),
        edited.text.matches("\r\n").count()
    );
}

#[test]
fn documents_are_read() {
    let document = Document::parse(fixture("default-2.1")).unwrap();
    assert_eq!(document.version(), Some(3));
    assert_eq!(document.imports(), ["/etc/containerd/conf.d/*.toml"]);
    assert_eq!(document.default_runtime(), Some("runc"));
    let document = Document::parse(fixture("debian-package")).unwrap();
    assert_eq!(document.opt_path(), Some("/var/lib/containerd"));
    assert_eq!(document.default_runtime(), None);
    let document = Document::parse(fixture("by-hand")).unwrap();
    assert_eq!(document.version(), Some(2));
    let found = document.handlers();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].name.as_str(), found[0].line, found[0].owner),
        ("with.dots and spaces", 13, Owner::Foreign)
    );
    let document = Document::parse(fixture("kata-deploy-1.x")).unwrap();
    let found = &document.handlers()[0];
    let read = Handler::from_settings(&found.name, &found.settings);
    assert_eq!(
        read.runtime_path.as_deref(),
        Some("/opt/kata/bin/containerd-shim-kata-v2")
    );
    assert!(
        read.config_path
            .unwrap()
            .ends_with("configuration-qemu-nvidia-gpu.toml")
    );
    let document = Document::parse(fixture("talos")).unwrap();
    assert_eq!(document.disabled_plugins().len(), 3);
}

#[test]
fn what_cannot_be_edited_is_refused_with_line_and_remedy() {
    let cases: &[(&str, &str)] = &[
        (
            include_str!("../../../fixtures/refused/docker.toml"),
            "line 3: `disabled_plugins` has \"cri\"",
        ),
        (
            include_str!("../../../fixtures/refused/version-1.toml"),
            "no `version`, or version 1",
        ),
        (
            include_str!("../../../fixtures/refused/inline.toml"),
            "line 2: `plugins` is written with dotted keys",
        ),
        (
            include_str!("../../../fixtures/refused/dotted.toml"),
            "line 3: `containerd` is written with dotted keys",
        ),
        (
            include_str!("../../../fixtures/refused/array.toml"),
            "line 2: `plugins` is an array of tables",
        ),
        (
            include_str!("../../../fixtures/refused/version-text.toml"),
            "line 1: `version = \"2\"` is no version",
        ),
        (
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\ncontainerd = { runtimes = {} }\n",
            "line 3: `containerd` is an inline table",
        ),
        (
            "version = 2\nplugins = 3\n",
            "line 2: `plugins` is no table",
        ),
    ];
    for (text, wanted) in cases {
        let error = set_handlers(text, &[handler("km")], &options(3)).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        // Removing from a file that has nothing of ours never fails.
        assert_eq!(remove_all(text, &[]).unwrap().text, *text);
    }
    let broken = include_str!("../../../fixtures/refused/broken.toml");
    let error = set_handlers(broken, &[handler("km")], &options(3)).unwrap_err();
    let EditError::Parse(error) = error else {
        panic!("{error}")
    };
    assert_eq!((error.line, error.column), (2, 37), "{error}");
}
