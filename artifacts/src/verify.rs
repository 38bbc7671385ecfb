//! Finds the signatures that an artifact must have: those that the store keeps first, and a registry's when they do not do.
//!
//! What is kept counts for what it is, not for having been believed once: each time it is verified again, with the keys that are
//! trusted now. So a registry is asked only for an artifact that is new here, or when keys have changed.
//!
//! It must not know of classes or configuration files.

use crate::error::{Error, Result};
use crate::reference::Reference;
use crate::registry::{Client, Resolved};
use crate::store::Store;
use crate::trust::{self, PublicKey, Verified};

/// Finds and verifies signatures of what a reference was resolved to.
///
/// # Errors
/// As [`trust::fetch`]; the disk's.
pub async fn verify(
    store: &Store,
    client: &Client,
    reference: &Reference,
    resolved: &Resolved,
    keys: &[PublicKey],
) -> Result<Verified> {
    match store.verify_resolved(reference, resolved, keys) {
        Err(Error::Untrusted { .. }) => trust::fetch(client, reference, resolved, keys).await,
        kept => kept,
    }
}
