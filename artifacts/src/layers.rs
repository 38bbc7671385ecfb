//! What each layer of a manifest becomes: a file of its own, an archive to unpack, or nothing.
//!
//! The rules follow what tools really push. `oras push` gives every plain file the media type
//! `application/vnd.oci.image.layer.v1.tar` and a title, tar or not; a folder becomes a tar+gzip with
//! `io.deis.oras.content.unpack=true` (oras-go, content/file). Image builders push tars without titles.
//!
//! It must not know of the disk or the registry.

use oci_spec::image::{Descriptor, ImageManifest};

use crate::digest::Digest;
use crate::unpack::{Format, Refused, normalise};

/// A raw file's name (OCI image specification, annotations.md).
pub(crate) const TITLE: &str = "org.opencontainers.image.title";
/// "true" on an archive that is to be unpacked (oras-go, `AnnotationUnpack`).
pub(crate) const UNPACK: &str = "io.deis.oras.content.unpack";
/// Digest of the tar inside a compressed layer (oras-go, `AnnotationDigest`).
pub(crate) const CONTENT_DIGEST: &str = "io.deis.oras.content.digest";

/// The most bytes of a manifest that is read (OCI distribution specification, "Pushing Manifests": registries should take
/// at least 4 MiB).
const MANIFEST_MAX: usize = 4 << 20;

/// What is to be done with a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The layer is the file of this path.
    Raw { path: String },
    /// The layer is an archive.
    Archive {
        format: Format,
        /// Of the uncompressed tar, when the publisher said so.
        content: Option<Digest>,
    },
}

/// A layer with its role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// What people know it by: its title, or its digest.
    pub(crate) name: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: String,
    pub(crate) role: Role,
}

/// Parses a manifest.
pub(crate) fn parse(bytes: &[u8]) -> Result<ImageManifest, String> {
    if bytes.len() > MANIFEST_MAX {
        return Err(format!("it is larger than {MANIFEST_MAX} bytes"));
    }
    let manifest: ImageManifest = serde_json::from_slice(bytes)
        .map_err(|error| format!("it is no image manifest: {error}"))?;
    if manifest.schema_version() != 2 {
        return Err(format!(
            "its schemaVersion is {}, only 2 is known",
            manifest.schema_version()
        ));
    }
    Ok(manifest)
}

/// The layers that hold files.
pub(crate) fn parts(manifest: &ImageManifest) -> Result<Vec<Part>, PartError> {
    let mut parts = Vec::new();
    for descriptor in manifest.layers() {
        let Some(role) = role(descriptor)? else {
            continue;
        };
        let digest = digest(descriptor)?;
        parts.push(Part {
            name: annotation(descriptor, TITLE).map_or_else(|| digest.to_string(), str::to_owned),
            digest,
            size: descriptor.size(),
            media_type: descriptor.media_type().to_string(),
            role,
        });
    }
    if parts.is_empty() {
        return Err(PartError::Unusable(
            "it has no layer with a title and no tar layer, so there is no file in it".to_owned(),
        ));
    }
    Ok(parts)
}

/// Why the layers cannot be used.
#[derive(Debug)]
pub(crate) enum PartError {
    Unusable(String),
    Refused(Refused),
}

/// A descriptor's digest in our type.
pub(crate) fn digest(descriptor: &Descriptor) -> Result<Digest, PartError> {
    let text = descriptor.digest().to_string();
    text.parse()
        .map_err(|error| PartError::Unusable(format!("digest {text:?}: {error}")))
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    let all = descriptor.annotations().as_ref()?;
    all.get(key).map(String::as_str)
}

fn role(descriptor: &Descriptor) -> Result<Option<Role>, PartError> {
    let media_type = descriptor.media_type().to_string();
    let title = annotation(descriptor, TITLE);
    if let Some(format) = archive_format(
        &media_type,
        title,
        annotation(descriptor, UNPACK) == Some("true"),
    ) {
        let content = annotation(descriptor, CONTENT_DIGEST)
            .map(|text| {
                text.parse().map_err(|error| {
                    PartError::Unusable(format!("annotation {CONTENT_DIGEST} {text:?}: {error}"))
                })
            })
            .transpose()?;
        return Ok(Some(Role::Archive { format, content }));
    }
    let Some(title) = title else {
        return Ok(None);
    };
    let refused = |reason| {
        PartError::Refused(Refused {
            entry: title.to_owned(),
            reason,
        })
    };
    let path = normalise(title.as_bytes()).map_err(refused)?;
    if path.is_empty() {
        return Err(refused(crate::unpack::Refusal::EmptyName));
    }
    Ok(Some(Role::Raw { path }))
}

pub(crate) fn archive_format(
    media_type: &str,
    title: Option<&str>,
    unpack: bool,
) -> Option<Format> {
    let bare = media_type.split(';').next().unwrap_or_default().trim();
    let title_ends = |endings: &[&str]| {
        title.is_some_and(|title| endings.iter().any(|ending| title.ends_with(ending)))
    };
    let by_type = match bare {
        // The oras default for any file: an archive only if nothing, or its title too, says so.
        "application/vnd.oci.image.layer.v1.tar" if title.is_none() || title_ends(&[".tar"]) => {
            Some(Format::Tar)
        }
        "application/vnd.oci.image.layer.v1.tar" => None,
        "application/x-tar" => Some(Format::Tar),
        _ if bare.ends_with(".tar") => Some(Format::Tar),
        _ if bare.ends_with(".tar+gzip") || bare.ends_with(".tar.gzip") => Some(Format::TarGzip),
        _ if bare.ends_with(".tar+zstd") || bare.ends_with(".tar.zstd") => Some(Format::TarZstd),
        _ => None,
    };
    if by_type.is_some() || !unpack {
        return by_type;
    }
    Some(match bare {
        "application/zstd" => Format::TarZstd,
        "application/vnd.oci.image.layer.v1.tar" => Format::Tar,
        _ if title_ends(&[".tar"]) => Format::Tar,
        _ if title_ends(&[".tar.zst", ".tar.zstd", ".tzst"]) => Format::TarZstd,
        // oras-go knows no other.
        _ => Format::TarGzip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unpack::Refusal;

    const OCI: &str = "application/vnd.oci.image.layer.v1.tar";

    fn manifest(layers: &str) -> ImageManifest {
        let empty = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        parse(
            format!(
                r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
                "config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:{empty}","size":2}},
                "layers":[{layers}]}}"#
            )
            .as_bytes(),
        )
        .unwrap()
    }

    fn layer(media_type: &str, annotations: &str) -> String {
        let digest = "a".repeat(64);
        format!(
            r#"{{"mediaType":"{media_type}","digest":"sha256:{digest}","size":5,"annotations":{{{annotations}}}}}"#
        )
    }

    fn role_of(media_type: &str, title: Option<&str>, unpack: bool) -> Option<Role> {
        let mut annotations = Vec::new();
        if let Some(title) = title {
            annotations.push(format!(r#""{TITLE}":"{title}""#));
        }
        if unpack {
            annotations.push(format!(r#""{UNPACK}":"true""#));
        }
        let manifest = manifest(&layer(media_type, &annotations.join(",")));
        role(&manifest.layers()[0]).unwrap()
    }

    #[test]
    fn layers_get_the_role_that_their_publisher_meant() {
        let raw = |path: &str| {
            Some(Role::Raw {
                path: path.to_owned(),
            })
        };
        let archive = |format| {
            Some(Role::Archive {
                format,
                content: None,
            })
        };
        let octets = "application/octet-stream";
        let gzip = format!("{OCI}+gzip");
        let zstd = format!("{OCI}+zstd");
        let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        for (media_type, title, unpack, want) in [
            (octets, Some("vmlinuz"), false, raw("vmlinuz")),
            (octets, Some("./share/x"), false, raw("share/x")),
            (octets, None, false, None),
            // What `oras push ref vmlinuz` and `oras push ref folder/` make.
            (OCI, Some("vmlinuz"), false, raw("vmlinuz")),
            (&gzip, Some("folder"), true, archive(Format::TarGzip)),
            (OCI, Some("modules.tar"), false, archive(Format::Tar)),
            (OCI, None, false, archive(Format::Tar)),
            (
                &gzip,
                Some("rootfs.tar.gz"),
                false,
                archive(Format::TarGzip),
            ),
            (&gzip, None, false, archive(Format::TarGzip)),
            (&zstd, None, false, archive(Format::TarZstd)),
            (docker, None, false, archive(Format::TarGzip)),
            (
                "application/vnd.docker.image.rootfs.diff.tar",
                None,
                false,
                archive(Format::Tar),
            ),
            ("application/x-tar", Some("a"), false, archive(Format::Tar)),
            ("application/gzip", Some("a.tar.gz"), false, raw("a.tar.gz")),
            (
                "application/gzip",
                Some("a.tar.gz"),
                true,
                archive(Format::TarGzip),
            ),
            (octets, Some("a.tar.zst"), true, archive(Format::TarZstd)),
            (OCI, Some("folder"), true, archive(Format::Tar)),
        ] {
            assert_eq!(
                role_of(media_type, title, unpack),
                want,
                "{media_type} {title:?} {unpack}"
            );
        }
    }

    #[test]
    fn titles_are_names_from_a_stranger() {
        for (title, reason) in [
            ("../../etc/shadow", Refusal::Climbs),
            ("/etc/shadow", Refusal::AbsoluteName),
            ("./", Refusal::EmptyName),
            (".generation.json", Refusal::Reserved),
        ] {
            let layers = layer(
                "application/octet-stream",
                &format!(r#""{TITLE}":"{title}""#),
            );
            let Err(PartError::Refused(refused)) = parts(&manifest(&layers)) else {
                panic!("{title} was accepted");
            };
            assert_eq!(refused.reason, reason);
        }
    }

    #[test]
    fn manifests_without_files_are_not_artifacts() {
        let Err(PartError::Unusable(problem)) = parts(&manifest(&layer("application/json", "")))
        else {
            panic!("accepted");
        };
        assert!(problem.contains("no file"), "{problem}");
        assert!(parse(b"{}").is_err());
        assert!(parse(&vec![b' '; MANIFEST_MAX + 1]).is_err());
    }
}
