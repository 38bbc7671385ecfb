//! How long an edit takes. `cargo test --release -p km-containerd-config --test speed -- --ignored --nocapture` measures, and
//! fails above the limit; a debug build measures nothing of use.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement is to be seen, and fails by panicking"
)]

use std::time::{Duration, Instant};

use km_containerd_config::Handler;
use km_containerd_config::edit::{SetOptions, remove_all, set_handlers};

/// The longest that an edit may take: of a node's usual file with a hundred handlers, and of a MiB.
const LIMIT: Duration = Duration::from_millis(20);

fn handlers(count: usize) -> Vec<Handler> {
    let handler = |number| Handler {
        name: format!("km-{number}"),
        runtime_type: "io.containerd.kata.v2".into(),
        runtime_path: Some("/opt/kata/bin/containerd-shim-kata-v2".into()),
        config_path: Some(format!("/opt/classes/km-{number}/configuration.toml")),
        pod_annotations: vec!["io.katacontainers.*".into(), "cdi.k8s.io/*".into()],
        container_annotations: vec!["io.katacontainers.*".into()],
        privileged_without_host_devices: true,
        snapshotter: None,
    };
    (0..count).map(handler).collect()
}

/// A configuration of a MiB: what a node has, and registry mirrors by the thousand.
fn large() -> String {
    let mut text = String::from("version = 3\n");
    let mut number = 0;
    while text.len() < 1 << 20 {
        text.push_str(&format!(
            "\n# mirror {number}\n[plugins.\"io.containerd.cri.v1.images\".registry.mirrors.\"r{number}.example\"]\n  \
             endpoint = [\"https://mirror-{number}.example:5000\", \"https://r{number}.example\"]\n"
        ));
        number += 1;
    }
    text
}

/// The best of ten: what the edit takes, not what else the machine does.
fn best(what: &str, mut edit: impl FnMut()) -> Duration {
    let times = (0..10).map(|_| {
        let start = Instant::now();
        edit();
        start.elapsed()
    });
    let best = times.min().unwrap();
    println!("{what}: {:.2} ms", best.as_secs_f64() * 1000.0);
    best
}

#[test]
#[ignore = "measures; run it in a release build"]
fn an_edit_is_quick() {
    let options = SetOptions {
        assume_version: 3,
        ..SetOptions::default()
    };
    let text = "version = 3\n";
    let hundred = handlers(100);
    let edited = set_handlers(text, &hundred, &options).unwrap().text;
    let large = large();
    let one = handlers(1);
    let large_edited = set_handlers(&large, &one, &options).unwrap().text;
    let times = [
        best("100 handlers added", || {
            drop(set_handlers(text, &hundred, &options).unwrap())
        }),
        best("100 handlers, nothing to do", || {
            drop(set_handlers(&edited, &hundred, &options).unwrap())
        }),
        best("100 handlers removed", || {
            drop(remove_all(&edited, &[]).unwrap())
        }),
        best("1 handler added to 1 MiB", || {
            drop(set_handlers(&large, &one, &options).unwrap())
        }),
        best("1 handler removed from 1 MiB", || {
            drop(remove_all(&large_edited, &[]).unwrap())
        }),
    ];
    assert!(
        times.iter().all(|time| *time < LIMIT),
        "over {LIMIT:?}: {times:?}"
    );
}
