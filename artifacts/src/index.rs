//! What an OCI image layout's `index.json` says of a manifest (image specification, image-layout.md and descriptor.md).
//!
//! It must not know where the layout is: in the store, or in a file that travels.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A reference's name (image specification, annotations.md). It is the whole reference, so that two repositories with equal tags
/// do not collide; the grammar there allows it.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A manifest that is listed. Nothing of it is verified.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    pub(crate) media_type: String,
    pub(crate) digest: String,
    /// In bytes.
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub(crate) annotations: Map<String, Value>,
}

impl Entry {
    pub(crate) fn name(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).and_then(Value::as_str)
    }
}
