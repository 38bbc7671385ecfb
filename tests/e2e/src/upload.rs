//! Puts an artifact or an image into a plain registry, layer by layer as they are (OCI distribution specification, "Push").
//!
//! The product's own pushing would not send most of what tests need.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use crate::images;

/// The media type of what is pushed.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// One layer.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Its media type.
    pub media_type: &'a str,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// The file's path, for a layer that is a file.
    pub title: Option<&'a str>,
}

/// Pushes layers under one tag; gives the manifest's digest.
///
/// # Errors
/// When the registry does not take something.
pub fn artifact(host: &str, repository: &str, tag: &str, layers: &[Layer<'_>]) -> Result<String> {
    let config = b"{}";
    blob(host, repository, config)?;
    for layer in layers {
        blob(host, repository, layer.bytes)?;
    }
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let title = layer
                .title
                .map(|title| json!({ "org.opencontainers.image.title": title }))
                .unwrap_or(json!({}));
            json!({
                "mediaType": layer.media_type,
                "digest": images::sha256(layer.bytes),
                "size": layer.bytes.len(),
                "annotations": title,
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/vnd.test.guest",
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": images::sha256(config),
            "size": config.len(),
        },
        "layers": layers,
    })
    .to_string();
    put_manifest(host, repository, tag, &manifest)
}

/// Pushes a container image of these tars, the lowest first, each compressed with gzip; gives the manifest's digest.
///
/// # Errors
/// When the registry does not take something.
pub fn image(host: &str, repository: &str, tag: &str, tars: &[Vec<u8>]) -> Result<String> {
    let diff_ids: Vec<_> = tars.iter().map(|tar| images::sha256(tar)).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    blob(host, repository, config.as_bytes())?;
    let mut layers = Vec::new();
    for tar in tars {
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(tar)?;
        let packed = packed.finish()?;
        blob(host, repository, &packed)?;
        layers.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": images::sha256(&packed),
            "size": packed.len(),
        }));
    }
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": images::sha256(config.as_bytes()),
            "size": config.len(),
        },
        "layers": layers,
    });
    put_manifest(host, repository, tag, &manifest.to_string())
}

fn put_manifest(host: &str, repository: &str, tag: &str, manifest: &str) -> Result<String> {
    let path = format!("/v2/{repository}/manifests/{tag}");
    let put = http(host, "PUT", &path, MANIFEST, manifest.as_bytes())?;
    ensure!(put.starts_with("HTTP/1.1 201"), "{put}");
    Ok(images::sha256(manifest.as_bytes()))
}

/// Pushes one blob.
///
/// # Errors
/// When the registry does not take it.
pub fn blob(host: &str, repository: &str, bytes: &[u8]) -> Result<()> {
    let begun = http(
        host,
        "POST",
        &format!("/v2/{repository}/blobs/uploads/"),
        "",
        b"",
    )?;
    let location = begun
        .lines()
        .find_map(|line| line.strip_prefix("Location: "))
        .with_context(|| format!("no Location in {begun}"))?
        .trim();
    let path = location.split_once(host).map_or(location, |(_, path)| path);
    let digest = images::sha256(bytes);
    let put = http(
        host,
        "PUT",
        &format!("{path}&digest={digest}"),
        "application/octet-stream",
        bytes,
    )?;
    ensure!(put.starts_with("HTTP/1.1 201"), "{put}");
    Ok(())
}

/// One HTTP request; gives the response as text.
fn http(host: &str, method: &str, path: &str, kind: &str, body: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let kind = match kind {
        "" => String::new(),
        kind => format!("Content-Type: {kind}\r\n"),
    };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{kind}Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
