//! Which Kata the provider is: the flavour that the configuration names, and the version that it names or that is installed.

use anyhow::{Context as _, Result};
use km_host::{HostPath, Root};
use km_topology::{Flavor, Kata, Version};

use crate::config;
use crate::failure::{Failure, Kind};

/// The file in which Kata's release archives tell their version, relative to the prefix
/// (kata-containers, tools/packaging/kata-deploy/local-build/kata-deploy-merge-builds.sh).
const VERSION_FILE: &str = "VERSION";

/// What is assumed where nothing tells: the version that every default here is taken from.
const ASSUMED: Version = Version::new(4, 1);

/// The largest version file that is read, in bytes.
const LIMIT: u64 = 256;

/// A Kata, and how its version is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) kata: Kata,
    /// Whether the version is told by nobody.
    pub(crate) assumed: bool,
}

impl Found {
    /// What a person should know.
    pub(crate) fn warning(&self, provider: &config::Provider) -> Option<String> {
        self.assumed.then(|| {
            format!(
                "{}/{VERSION_FILE} is not there, so Kata is taken for {}: name its version in provider.version",
                provider.prefix, self.kata.version
            )
        })
    }
}

/// Looks at the provider.
///
/// # Errors
/// A version file that cannot be read, or has something else in it.
pub(crate) fn find(root: &Root, provider: &config::Provider) -> Result<Found> {
    let flavor = match provider.runtime {
        config::KataRuntime::Go => Flavor::Go,
        config::KataRuntime::Rust => Flavor::Rust,
    };
    let told = match &provider.version {
        Some(version) => Some(version.0),
        None => installed(root, &provider.prefix.join(VERSION_FILE))?,
    };
    let version = told.unwrap_or(ASSUMED);
    Ok(Found {
        kata: Kata { flavor, version },
        assumed: told.is_none(),
    })
}

fn installed(root: &Root, path: &HostPath) -> Result<Option<Version>> {
    let bytes = match root.read(path.as_path(), LIMIT) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("cannot read {path}, which tells Kata's version"))?,
    };
    let version = String::from_utf8_lossy(&bytes).parse().map_err(|error| {
        let message = format!("{path} does not tell Kata's version: name it in provider.version");
        Failure::because(Kind::Configuration, message, error)
    })?;
    Ok(Some(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_named_or_read_or_assumed() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        let mut provider = config::Provider::default();
        let found = find(&root, &provider).unwrap();
        assert!(found.assumed && found.kata.flavor == Flavor::Go);
        assert!(
            found
                .warning(&provider)
                .unwrap()
                .contains("provider.version")
        );
        let file = dir.path().join("opt/kata/VERSION");
        km_host::atomic::create_dir_all(file.parent().unwrap(), 0o755).unwrap();
        km_host::atomic::write(&file, b"3.27.0\n", 0o644).unwrap();
        let found = find(&root, &provider).unwrap();
        assert_eq!(
            (found.kata.version, found.assumed),
            (Version::new(3, 27), false)
        );
        assert_eq!(found.warning(&provider), None);
        km_host::atomic::write(&file, b"main\n", 0o644).unwrap();
        assert!(format!("{:#}", find(&root, &provider).unwrap_err()).contains("opt/kata/VERSION"));
        provider.version = Some(config::KataVersion(Version::new(4, 0)));
        assert_eq!(
            find(&root, &provider).unwrap().kata.version,
            Version::new(4, 0)
        );
    }
}
