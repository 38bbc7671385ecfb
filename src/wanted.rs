//! What the configuration asks for: handlers in containerd, and the inputs of each class's generation. Pure.

use km_artifacts::digest::Digest;
use km_containerd_config::handler::Settings;
use km_containerd_config::{ContainerdVersion, Handler};
use km_host::HostPath;
use km_runtimeclasses::{ClassKind, POD_ANNOTATIONS, Provider, Runtime};
use serde_json::json;

use crate::additions::Addition;
use crate::config::{Config, HandlerSettings, KataRuntime, RuntimeClass};
use crate::programs;

/// The name of the derived Kata configuration in a generation, and so of the file that a handler points at.
pub(crate) const CONFIGURATION: &str = "configuration.toml";

/// Counts changes in how configurations are derived; a new number makes new generations.
const DERIVATION: u32 = 2;

/// What a class is in the catalogue; `None` for one with a runtime type of its own.
pub(crate) fn class_kind(class: &RuntimeClass) -> Option<&'static ClassKind> {
    if class.runtime_type.is_some() {
        return None;
    }
    km_runtimeclasses::find(class.like.as_deref().unwrap_or(&class.name))
}

/// The provider as the catalogue wants it.
pub(crate) fn provider(config: &Config) -> Provider {
    Provider {
        prefix: config.provider.prefix.as_str().to_owned(),
        runtime: match config.provider.runtime {
            KataRuntime::Go => Runtime::Go,
            KataRuntime::Rust => Runtime::Rust,
        },
    }
}

/// The handlers for this version of containerd.
///
/// `shim` says whether our shim is there to stand before Kata's.
pub(crate) fn handlers(config: &Config, version: ContainerdVersion, shim: bool) -> Vec<Handler> {
    config
        .runtime_classes
        .iter()
        .map(|class| handler(config, class, shim).for_version(version))
        .collect()
}

fn handler(config: &Config, class: &RuntimeClass, shim: bool) -> Handler {
    let name = class.handler();
    let annotations: Vec<String> = POD_ANNOTATIONS.iter().map(ToString::to_string).collect();
    let mut handler = Handler {
        name: name.to_owned(),
        pod_annotations: annotations.clone(),
        container_annotations: annotations,
        ..Handler::default()
    };
    match (&class.runtime_type, class_kind(class)) {
        (Some(runtime_type), _) => handler.runtime_type.clone_from(runtime_type),
        (None, kind) => {
            handler.runtime_type = format!("io.containerd.{name}.v2");
            handler.runtime_path = kind.map(|kind| kind.shim(&provider(config)));
            handler.config_path = Some(
                config
                    .artifacts_dir
                    .join(&class.name)
                    .join(CONFIGURATION)
                    .as_str()
                    .to_owned(),
            );
            handler.privileged_without_host_devices = true;
        }
    }
    if shim && programs::fronts(class) {
        handler.runtime_path = Some(programs::link(name));
    }
    overridden(handler, &class.handler_settings)
}

/// The handler with what the configuration says otherwise.
fn overridden(mut handler: Handler, settings: &HandlerSettings) -> Handler {
    let path = |path: &Option<HostPath>| path.as_ref().map(|path| path.as_str().to_owned());
    handler.runtime_path = path(&settings.runtime_path).or(handler.runtime_path);
    handler.config_path = path(&settings.config_path).or(handler.config_path);
    handler.snapshotter = settings.snapshotter.clone().or(handler.snapshotter);
    let privileged = settings.privileged_without_host_devices;
    handler.privileged_without_host_devices =
        privileged.unwrap_or(handler.privileged_without_host_devices);
    for (list, more) in [
        (&mut handler.pod_annotations, &settings.pod_annotations),
        (
            &mut handler.container_annotations,
            &settings.container_annotations,
        ),
    ] {
        for pattern in more {
            if !list.contains(pattern) {
                list.push(pattern.clone());
            }
        }
    }
    handler
}

/// Settings of the CRI plugin that are to be written where nobody set them. 1.6 has none of these, 2.x injects CDI devices
/// unless told otherwise.
pub(crate) fn cri_settings(config: &Config, version: ContainerdVersion) -> Settings {
    let mut settings = Settings::new();
    if version < ContainerdVersion::new(1, 7, 0) {
        return settings;
    }
    let catalogue = config.runtime_classes.iter();
    let needs = version.major < 2 && catalogue.filter_map(class_kind).next().is_some();
    let enable = config.containerd.enable_cdi.or(needs.then_some(true));
    if let Some(enable) = enable {
        settings.insert("enable_cdi".to_owned(), enable.into());
    }
    let folders = config.containerd.cdi_spec_dirs.iter();
    let folders: Vec<&str> = folders.map(HostPath::as_str).collect();
    if !folders.is_empty() {
        settings.insert("cdi_spec_dirs".to_owned(), folders.into());
    }
    settings
}

/// The digest of everything but the artifact that a class's derived files are made from. `added` is what the node and
/// the user add.
pub(crate) fn inputs(config: &Config, class: &RuntimeClass, added: &[Addition]) -> Digest {
    let text = |path: &str| added.iter().find(|one| one.path == path);
    let drop_in = text(km_runtimeclasses::DROP_IN).map(|one| one.text.as_str());
    let mut inputs = json!({
        "derivation": DERIVATION,
        "class": class.name,
        "kind": class_kind(class).map(|kind| kind.name),
        "artifactsDir": config.artifacts_dir.as_str(),
        "provider": config.provider.prefix.as_str(),
        "runtime": config.provider.runtime,
        "dropIn": drop_in,
    });
    let artifacts = class.artifacts.as_ref();
    if let Some(folder) = artifacts.and_then(|artifacts| artifacts.image_folder.as_ref()) {
        inputs["imageFolder"] = folder.as_str().into();
    }
    let own = added
        .iter()
        .filter(|one| one.path != km_runtimeclasses::DROP_IN);
    let own: Vec<(&str, &str)> = own.map(|one| (&*one.path, &*one.text)).collect();
    if !own.is_empty() {
        inputs["own"] = json!(own);
    }
    Digest::of(inputs.to_string().as_bytes())
}
