//! What fuzz targets call: readers of bytes of strangers that are otherwise inside, each with what must hold of its result.
//! Not part of the crate's interface.

#![expect(
    clippy::panic,
    reason = "a result that must not be is what a fuzz target looks for"
)]

use reqwest::header::HeaderMap;

use super::manifest::{self, Kind, MANIFEST_MAX};
use super::{Credentials, Platform, helper, hosts};
use crate::layers::{self, Role};
use crate::reference::Reference;
use crate::unpack::normalise;

/// A `hosts.toml`: whatever it says, a host is a web server, and has no user name in its address.
pub fn hosts_toml(text: &str) {
    let Ok(file) = hosts::parse(text) else {
        return;
    };
    for host in file.hosts.iter().chain([&file.server]) {
        let Some(root) = &host.root else {
            continue;
        };
        let web = matches!(root.scheme(), "http" | "https") && root.has_host();
        if !web || !root.username().is_empty() || root.query().is_some() {
            panic!("{root} is taken for a host");
        }
    }
}

/// Credentials, and what a helper prints.
pub fn credentials(bytes: &[u8]) {
    let read = [
        Credentials::from_docker_config(bytes),
        Credentials::from_kubernetes_secret(bytes),
    ];
    for credentials in read.into_iter().flatten() {
        let _ = format!("{credentials:?}");
        for (registry, repository) in [("r.example:5000", "a/b"), ("docker.io", "library/a")] {
            let _ = credentials.find(registry, repository);
            let _ = credentials.hint(registry, repository);
        }
    }
    let _ = helper::read(bytes);
}

/// An image manifest as a registry sends it: the files that it names stay inside their folder.
pub fn manifest(bytes: &[u8]) {
    let Some(reference) = reference() else {
        return;
    };
    if !matches!(
        manifest::kind(&reference, &HeaderMap::new(), bytes),
        Ok((Kind::Manifest, _))
    ) {
        return;
    }
    let Ok(parts) = layers::parse(bytes).map(|manifest| layers::parts(&manifest)) else {
        return;
    };
    for part in parts.into_iter().flatten() {
        if let Role::Raw { path } = part.role
            && normalise(path.as_bytes()).as_ref() != Ok(&path)
        {
            panic!("{path} is taken for a file's name");
        }
    }
}

/// An index as a registry sends it: what is chosen has a size that is read.
pub fn index(bytes: &[u8]) {
    let Some(reference) = reference() else {
        return;
    };
    let platform = Platform {
        os: "linux".to_owned(),
        architecture: "amd64".to_owned(),
        variant: None,
    };
    let _ = manifest::kind(&reference, &HeaderMap::new(), bytes);
    if let Ok((_, size)) = manifest::choose(bytes, &reference, &platform)
        && size > MANIFEST_MAX
    {
        panic!("a manifest of {size} bytes is fetched");
    }
}

fn reference() -> Option<Reference> {
    "r.example/a:b".parse().ok()
}
