//! A sandbox's config.json (OCI runtime specification, config.md and config-linux.md): what of it matters here, and VFIO nodes written
//! into it. Text in, text out: what is not touched keeps its bytes, so unknown fields, numbers of any size and the order of keys stay.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// The name of the file in a bundle.
pub const FILE: &str = "config.json";

/// The largest config.json that is read, in bytes. A pod with thousands of environment variables has some hundred kilobytes; etcd takes
/// objects of 1.5 MiB.
pub const LIMIT: u64 = 16 << 20;

/// The prefix of annotations that name CDI devices (CDI, SPEC.md, "CDI in Kubernetes").
const CDI: &str = "cdi.k8s.io/";

/// Annotations that containerd's CRI plugin writes (containerd, internal/cri/annotations/annotations.go).
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

/// The most CDI devices that annotations may name. A machine has tens.
const NAMES: usize = 1024;

/// Why a config.json cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// It is not JSON of a runtime specification's form.
    #[error("it is no runtime specification: {0}")]
    Malformed(String),
    /// An annotation names something that is no CDI device.
    #[error("its annotation {key} does not name CDI devices: {value:?} is not vendor/class=name")]
    Annotation {
        /// The annotation.
        key: String,
        /// The part of its value.
        value: String,
    },
}

/// What the container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A pod's sandbox, or a container without a pod.
    Sandbox,
    /// A container of a sandbox that runs.
    Container,
}

/// What matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// What it is.
    pub role: Role,
    /// The pod's namespace and name; `None` without Kubernetes.
    pub pod: Option<(String, String)>,
    /// CDI devices that annotations name.
    pub annotated: Vec<String>,
    /// VFIO's nodes in `linux.devices`.
    pub nodes: Vec<String>,
}

#[derive(Deserialize)]
struct Spec<'a> {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default, borrow, deserialize_with = "present")]
    linux: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct Linux<'a> {
    #[serde(default, borrow, deserialize_with = "present")]
    devices: Option<&'a RawValue>,
    #[serde(default, borrow, deserialize_with = "present")]
    resources: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct Resources<'a> {
    #[serde(default, borrow, deserialize_with = "present")]
    devices: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Device {
    path: String,
}

/// A value as it stands, `null` included, which is not the same as no value.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Reads an object; `null` and no value hold what the type's default does. serde would take a list for an object as well.
fn inside<'a, T: Deserialize<'a> + Default>(
    value: Option<&'a RawValue>,
) -> Result<T, serde_json::Error> {
    match value.map(RawValue::get) {
        None | Some("null") => Ok(T::default()),
        Some(text) => object(text),
    }
}

fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, serde_json::Error> {
    match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text),
        false => Err(serde::de::Error::custom(
            "there is no object where one must be",
        )),
    }
}

fn list(value: Option<&RawValue>) -> Result<Vec<&RawValue>, serde_json::Error> {
    match value.map(RawValue::get) {
        None | Some("null") => Ok(Vec::new()),
        Some(text) => serde_json::from_str(text),
    }
}

fn malformed(error: impl ToString) -> BundleError {
    // Words of strangers may be in it.
    let text = error.to_string();
    let plain = text.chars().filter(|char| !char.is_control());
    BundleError::Malformed(plain.take(200).collect())
}

/// Whether a path is a node by which VFIO gives a device away. `/dev/vfio/vfio`, the container's, gives none.
pub fn is_vfio_node(path: &str) -> bool {
    path.strip_prefix("/dev/vfio/")
        .is_some_and(|name| name != "vfio" && !name.is_empty())
}

/// A sandbox's config.json, read once: it may be large, and the sandbox waits.
#[derive(Debug)]
pub struct Bundle<'a> {
    /// What matters of it.
    pub facts: Facts,
    text: &'a str,
    linux: Option<&'a RawValue>,
}

impl<'a> Bundle<'a> {
    /// Reads it.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn read(text: &'a str) -> Result<Bundle<'a>, BundleError> {
        let spec: Spec<'_> = object(text).map_err(malformed)?;
        let annotations = spec.annotations.unwrap_or_default();
        let linux: Linux<'_> = inside(spec.linux).map_err(malformed)?;
        let devices = list(linux.devices).map_err(malformed)?.into_iter();
        let devices: Result<Vec<Device>, _> = devices.map(|device| object(device.get())).collect();
        let role = match annotations.get(CONTAINER_TYPE).map(String::as_str) {
            Some("container") => Role::Container,
            _ => Role::Sandbox,
        };
        let nodes = devices
            .map_err(malformed)?
            .into_iter()
            .map(|device| device.path);
        let facts = Facts {
            role,
            pod: pod(&annotations)?,
            annotated: annotated(&annotations)?,
            nodes: nodes.filter(|path| is_vfio_node(path)).collect(),
        };
        let linux = spec.linux;
        Ok(Bundle { facts, text, linux })
    }

    /// The specification with these nodes in `linux.devices`, and allowed in `linux.resources.devices`, after those that are there; in parts
    /// that follow each other.
    ///
    /// # Errors
    /// When the specification has something else in the place of these lists.
    pub fn with_nodes(&self, nodes: &[Node]) -> Result<Vec<Cow<'a, str>>, BundleError> {
        let text = self.text;
        if nodes.is_empty() {
            return Ok(vec![text.into()]);
        }
        let old = self.linux.map_or("{}", RawValue::get);
        let new = add(old, &["devices"], &joined(nodes.iter().map(device)))?;
        let new = add(
            &new,
            &["resources", "devices"],
            &joined(nodes.iter().map(rule)),
        )?;
        if self.linux.is_some() {
            let at = old.as_ptr() as usize - text.as_ptr() as usize;
            let after = &text[at + old.len()..];
            return Ok(vec![text[..at].into(), new.into(), after.into()]);
        }
        // After the beginning of the whole, which is an object.
        let at = text.len() - text.trim_start().len() + 1;
        let comma = comma(text.trim());
        let new = format!("\"linux\":{new}{comma}");
        Ok(vec![text[..at].into(), new.into(), text[at..].into()])
    }
}

/// The pod's namespace and name.
fn pod(annotations: &BTreeMap<String, String>) -> Result<Option<(String, String)>, BundleError> {
    match (
        annotations.get(SANDBOX_NAMESPACE),
        annotations.get(SANDBOX_NAME),
    ) {
        (Some(namespace), Some(name)) => Ok(Some((namespace.clone(), name.clone()))),
        (None, None) if !annotations.contains_key(CONTAINER_TYPE) => Ok(None),
        _ => Err(malformed(format!(
            "it is a pod's sandbox and has no annotations {SANDBOX_NAMESPACE} and {SANDBOX_NAME}"
        ))),
    }
}

/// The devices that annotations name, with commas between (CDI, pkg/cdi/annotations.go, `ParseAnnotations`).
fn annotated(annotations: &BTreeMap<String, String>) -> Result<Vec<String>, BundleError> {
    let mut found = Vec::new();
    for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with(CDI)) {
        for name in value.split(',') {
            let bad = || BundleError::Annotation {
                key: key.chars().take(100).collect(),
                value: name.chars().take(100).collect(),
            };
            if !is_qualified(name) || found.len() >= NAMES {
                return Err(bad());
            }
            if !found.iter().any(|known| known == name) {
                found.push(name.to_owned());
            }
        }
    }
    Ok(found)
}

/// Whether a text is a whole CDI name, `vendor/class=device`.
fn is_qualified(name: &str) -> bool {
    let parts = || {
        let (kind, device) = name.split_once('=')?;
        let (vendor, class) = kind.split_once('/')?;
        km_cdi::names::vendor_or_class(vendor).ok()?;
        km_cdi::names::vendor_or_class(class).ok()?;
        km_cdi::names::device(device).ok()
    };
    parts().is_some()
}

/// A character device to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its path.
    pub path: String,
    /// Its numbers.
    pub number: (u32, u32),
}

fn device(node: &Node) -> String {
    let path = serde_json::Value::from(node.path.as_str());
    let (major, minor) = node.number;
    format!(
        "{{\"path\":{path},\"type\":\"c\",\"major\":{major},\"minor\":{minor},\"fileMode\":384,\"uid\":0,\"gid\":0}}"
    )
}

fn rule(node: &Node) -> String {
    let (major, minor) = node.number;
    format!(
        "{{\"allow\":true,\"type\":\"c\",\"major\":{major},\"minor\":{minor},\"access\":\"rwm\"}}"
    )
}

fn joined(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(",")
}

/// What is to stand between something new and what a list or object has already.
fn comma(value: &str) -> &'static str {
    match value[1..value.len() - 1].trim().is_empty() {
        true => "",
        false => ",",
    }
}

/// Adds items to a list below `linux`, and makes what is not there on the way.
fn add(linux: &str, path: &[&str], items: &str) -> Result<String, BundleError> {
    let found = locate(linux, path).map_err(malformed)?;
    // What is not there is made from the inside out.
    let mut new = format!("[{items}]");
    for key in path[found.depth..].iter().skip(1).rev() {
        new = format!("{{\"{key}\":{new}}}");
    }
    let value = found.value;
    let (at, length, insert) = match (value.as_bytes().first(), path.get(found.depth)) {
        // The list itself: before its end.
        (Some(b'['), None) => {
            let comma = comma(value);
            (value.len() - 1, 0, format!("{comma}{items}"))
        }
        // An object that lacks the next key: after its beginning.
        (Some(b'{'), Some(key)) => {
            let comma = comma(value);
            (1, 0, format!("\"{key}\":{new}{comma}"))
        }
        _ if value == "null" => {
            let whole = match path.get(found.depth) {
                None => format!("[{items}]"),
                Some(key) => format!("{{\"{key}\":{new}}}"),
            };
            (0, value.len(), whole)
        }
        _ => {
            return Err(malformed(format!(
                "linux.{} has another form",
                path.join(".")
            )));
        }
    };
    let at = value.as_ptr() as usize - linux.as_ptr() as usize + at;
    Ok([&linux[..at], &insert, &linux[at + length..]].concat())
}

/// The deepest value on a path that is there, without white space around it.
struct Located<'a> {
    value: &'a str,
    /// How many keys lead to it.
    depth: usize,
}

fn locate<'a>(linux: &'a str, path: &[&str]) -> Result<Located<'a>, serde_json::Error> {
    let whole: &RawValue = serde_json::from_str(linux)?;
    let located = |value: &'a RawValue, depth| Located {
        value: value.get(),
        depth,
    };
    let inner: Linux<'a> = inside(Some(whole))?;
    if let ["devices"] = path {
        return Ok(inner.devices.map_or(located(whole, 0), |v| located(v, 1)));
    }
    let Some(resources) = inner.resources else {
        return Ok(located(whole, 0));
    };
    let deepest: Resources<'a> = inside(Some(resources))?;
    Ok(deepest
        .devices
        .map_or(located(resources, 1), |v| located(v, 2)))
}

#[cfg(test)]
mod tests;
