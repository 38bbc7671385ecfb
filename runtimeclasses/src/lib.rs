//! What the GPU runtime classes are: the Kata configuration that each needs, and its Kubernetes object.
//!
//! Text in, text out: nothing here reads or writes a file, and every path is a path as the host sees it. Who calls it
//! hands in what the artifact holds and checks that the files exist which the result names.
//!
//! - [`catalogue`]: the classes, and what each needs of a Kata installation.
//! - [`configuration`]: the Kata configuration of a generation: the artifact's own with its paths re-rooted, or a rendered one.
//! - [`drop_in`]: what the node adds to it; [`has_numa`]: what all of it together says.
//! - [`check_own`]: whether what the user adds can go beside it.
//! - [`runtime_class_manifest`]: the RuntimeClass object.

mod catalogue;
mod drop_in;
mod error;
mod manifest;
mod own;
mod render;
mod reroot;

use std::collections::BTreeSet;

pub use catalogue::{
    ClassKind, POD_ANNOTATIONS, Provider, RequiredFile, Runtime, Tee, catalogue, find,
};
pub use drop_in::{DROP_IN, DropIn, Facts, Kata, KataVersion, Sizing, drop_in, has_numa};
pub use error::ConfigError;
pub use manifest::{runtime_class_manifest, to_yaml};
pub use own::{OWN_PREFIX, OwnError, check_own};

/// One file of the artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// Relative to the artifact, such as `vmlinuz`.
    pub path: String,
}

/// The Kata configuration of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The whole file.
    pub text: String,
    /// Paths of the artifact's own configuration that were changed.
    pub rerooted: Vec<Reroot>,
    /// Every host path that the file names and that must exist.
    pub references: Vec<Reference>,
}

/// A path that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reroot {
    /// The key, such as `hypervisor.qemu.kernel`.
    pub key: String,
    /// As the artifact had it.
    pub from: String,
    /// As it is now.
    pub to: String,
}

/// A host path that a configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The key, such as `hypervisor.qemu.firmware`.
    pub key: String,
    /// The path.
    pub path: String,
    /// Whether it is a program.
    pub executable: bool,
}

/// The Kata configuration of a generation in the folder `dir`. `artifact_config` is the name and the text of the artifact's own
/// configuration, if it has one ([`pick_configuration`]).
///
/// # Errors
/// [`ConfigError`]: no TOML, a path that leads nowhere, no kernel or root file system, or several.
pub fn configuration(
    kind: &ClassKind,
    provider: &Provider,
    dir: &str,
    files: &[GuestFile],
    artifact_config: Option<(&str, &str)>,
) -> Result<Rendered, ConfigError> {
    match artifact_config {
        Some((name, text)) => reroot::reroot(provider, dir, files, name, text),
        None => render::render(kind, provider, dir, files),
    }
}

/// Chooses an artifact's own configuration among its files: a `configuration*.toml` at its top. Of several,
/// `configuration-<class>.toml` is taken, else `configuration.toml`.
///
/// # Errors
/// [`ConfigError::Ambiguous`] when several are left.
pub fn pick_configuration<'a>(
    class: &str,
    names: impl Iterator<Item = &'a str>,
) -> Result<Option<&'a str>, ConfigError> {
    let is_one = |name: &&str| {
        name.starts_with("configuration") && name.ends_with(".toml") && !name.contains('/')
    };
    let found: BTreeSet<&str> = names.filter(is_one).collect();
    let preferred = [
        format!("configuration-{class}.toml"),
        "configuration.toml".to_owned(),
    ];
    if let Some(name) = preferred.iter().find_map(|name| found.get(name.as_str())) {
        return Ok(Some(name));
    }
    match found.len() {
        0 | 1 => Ok(found.first().copied()),
        _ => Err(ConfigError::Ambiguous {
            what: "Kata configuration",
            candidates: found.iter().map(ToString::to_string).collect(),
            hint: format!("call one of them {}", preferred[0]),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_picked_by_class_or_refused() {
        let pick = |names: &[&'static str]| {
            pick_configuration("kata-qemu-nvidia-gpu-snp", names.iter().copied())
        };
        assert_eq!(pick(&["vmlinuz", "sub/configuration.toml"]).unwrap(), None);
        assert_eq!(
            pick(&["configuration-x.toml"]).unwrap(),
            Some("configuration-x.toml")
        );
        let own = "configuration-kata-qemu-nvidia-gpu-snp.toml";
        assert_eq!(pick(&["configuration.toml", own]).unwrap(), Some(own));
        let error = pick(&["configuration-a.toml", "configuration-b.toml"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("configuration-a.toml, configuration-b.toml"),
            "{error}"
        );
    }
}
