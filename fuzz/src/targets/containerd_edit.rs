//! Handlers put into any text and taken out again: what we did not write is byte for byte what it was.

use km_containerd_config::Handler;
use km_containerd_config::edit::{Document, EditError, SetOptions, remove_all, set_handlers};

pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(before) = Document::parse(text) else {
        return;
    };
    let handler = Handler {
        name: "demo".to_owned(),
        runtime_type: "io.containerd.runc.v2".to_owned(),
        runtime_path: None,
        config_path: Some("/opt/demo/configuration.toml".to_owned()),
        pod_annotations: vec!["io.katacontainers.*".to_owned()],
        container_annotations: Vec::new(),
        privileged_without_host_devices: true,
        snapshotter: None,
    };
    let wanted = [handler];
    let options = SetOptions {
        assume_version: 2,
        ..SetOptions::default()
    };
    let Ok(edited) = set_handlers(text, &wanted, &options) else {
        return;
    };
    let again =
        set_handlers(&edited.text, &wanted, &options).expect("our own text is edited again");
    assert_eq!(again.text, edited.text, "a second edit changes nothing");
    // What carries our marks already is ours to clean up; anything else comes back as it was.
    if before
        .handlers()
        .iter()
        .all(|found| found.owner == km_containerd_config::edit::Owner::Foreign)
        && !text.contains("kata-manager")
    {
        match remove_all(&edited.text, &wanted) {
            Ok(removed) => assert_eq!(removed.text, text),
            // The text had made our handler containerd's default before there was one.
            Err(EditError::DefaultRuntime { .. }) => {}
            Err(error) => panic!("our own text is not undone: {error}"),
        }
    }
}
