//! Tests of the edit: over prepared configurations, step by step, and over generated ones.

mod examples;
mod fixtures;
mod imports;
mod properties;

use super::*;

fn handler(name: &str) -> Handler {
    Handler {
        name: name.to_owned(),
        runtime_type: format!("io.containerd.{name}.v2"),
        config_path: Some(format!("/opt/classes/{name}/configuration.toml")),
        pod_annotations: vec!["io.katacontainers.*".into(), "cdi.k8s.io/*".into()],
        container_annotations: vec!["io.katacontainers.*".into()],
        privileged_without_host_devices: true,
        ..Handler::default()
    }
}

fn plain(name: &str) -> Handler {
    Handler {
        name: name.to_owned(),
        runtime_type: "io.containerd.runc.v2".to_owned(),
        ..Handler::default()
    }
}

fn options(version: u32) -> SetOptions<'static> {
    SetOptions {
        assume_version: version,
        ..SetOptions::default()
    }
}

fn set(text: &str, wanted: &[Handler]) -> Edited {
    set_handlers(text, wanted, &options(3)).unwrap()
}

fn ours(text: &str) -> Vec<String> {
    let document = Document::parse(text).unwrap();
    let found = document.handlers().into_iter();
    found
        .filter(|handler| handler.owner == Owner::Ours)
        .map(|handler| handler.name)
        .collect()
}

fn drifted(edited: &Edited) -> Vec<&str> {
    edited
        .drifted
        .iter()
        .map(|drift| drift.name.as_str())
        .collect()
}
