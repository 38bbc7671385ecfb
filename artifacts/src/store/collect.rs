//! Removes what no generation needs, and in the end everything.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use km_host::atomic;

use super::{Store, check_class, look, names};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::{GenerationManifest, Removed};
use crate::layers::parse;

/// File names below `.store` that are needed.
#[derive(Default)]
struct Needed {
    manifests: BTreeSet<Digest>,
    blobs: BTreeSet<String>,
    contents: BTreeSet<String>,
    records: BTreeSet<String>,
}

impl Store {
    /// Removes one generation that no class points at. The lock must be held, and the caller knows that no sandbox uses it.
    ///
    /// # Errors
    /// [`Error::InUse`] when it is the live one; an absent one is fine.
    pub fn remove_generation(&self, class: &str, number: u64) -> Result<()> {
        if self.live_number(class)? == Some(number) {
            return Err(Error::InUse {
                path: self.generation_dir(class, number),
                why: format!("{class} points at it; activate another generation first"),
            });
        }
        self.remove_at_once(&self.generation_dir(class, number))?;
        atomic::remove_dir_if_empty(&self.class_dir(class))?;
        Ok(())
    }

    /// Removes blobs, contents and records that no generation needs. The lock must be held.
    ///
    /// # Errors
    /// [`Error::Damaged`] when a generation's manifest cannot be read: what it needs is then not known.
    pub fn remove_unreferenced(&self) -> Result<Removed> {
        let mut needed = Needed::default();
        for class in self.classes()? {
            check_class(&class)?;
            for generation in self.generations(&class)? {
                self.add_needed(&generation.manifest, &mut needed)?;
            }
        }
        // First the list, then what it lists: nothing is listed that is not there.
        if look(&self.oci_dir())?.is_some() {
            self.keep_manifests(&needed.manifests)?;
        }
        let mut removed = Removed::default();
        let blobs = self.oci_dir().join("blobs/sha256");
        keep(&blobs, &needed.blobs, &mut removed)?;
        keep(
            &self.under("unpacked/sha256"),
            &needed.records,
            &mut removed,
        )?;
        keep(&self.under("files/sha256"), &needed.contents, &mut removed)?;
        Ok(removed)
    }

    /// Removes the store but for `.store/state`, where the caller's journal is; [`Store::remove_state`] is the last step.
    /// The lock must be held.
    ///
    /// # Errors
    /// [`Error::InUse`] while a class has generations or something displaced has not gone back.
    pub fn remove_all(&self) -> Result<()> {
        for (name, why) in [
            (
                "generations",
                "it holds generations; remove their classes first",
            ),
            (
                "displaced",
                "it holds what was there before us; it goes back when its class is removed",
            ),
        ] {
            let dir = self.under(name);
            if !names(&dir)?.is_empty() {
                return Err(Error::InUse {
                    path: dir,
                    why: why.to_owned(),
                });
            }
        }
        for name in ["oci", "unpacked", "files", "generations", "displaced"] {
            self.remove_at_once(&self.under(name))?;
        }
        Ok(atomic::remove_dir_all(&self.under("tmp"))?)
    }

    /// Removes `.store/state` with the lock file, and `.store` when nothing else is in it. After [`Store::remove_all`];
    /// the lock may still be held, its file is unlinked.
    ///
    /// # Errors
    /// [`Error::InUse`] when `.store` holds anything else.
    pub fn remove_state(&self) -> Result<()> {
        atomic::remove_dir_all(&self.state_dir())?;
        if atomic::remove_dir_if_empty(&self.store_dir())? {
            return Ok(());
        }
        Err(Error::InUse {
            path: self.store_dir(),
            why: "something is in it that is not ours, or that was not removed before".to_owned(),
        })
    }

    fn add_needed(&self, manifest: &GenerationManifest, needed: &mut Needed) -> Result<()> {
        needed.manifests.insert(manifest.manifest.clone());
        needed.blobs.insert(manifest.manifest.hex().to_owned());
        if let Some(bytes) = self.manifest_bytes(&manifest.manifest)?
            && let Ok(parsed) = parse(&bytes)
            && let Ok(config) = crate::layers::digest(parsed.config())
        {
            needed.blobs.insert(config.hex().to_owned());
        }
        for layer in &manifest.layers {
            if layer.unpacked {
                needed
                    .records
                    .insert(format!("{}.json", layer.digest.hex()));
            } else {
                needed.blobs.insert(layer.digest.hex().to_owned());
            }
        }
        let files = manifest.files.iter().map(|stored| &stored.file);
        for file in files.chain(&manifest.replaced) {
            if let Some(name) = self
                .file_path(file)
                .file_name()
                .and_then(|name| name.to_str())
            {
                needed.contents.insert(name.to_owned());
            }
        }
        Ok(())
    }
}

fn keep(dir: &Path, needed: &BTreeSet<String>, removed: &mut Removed) -> Result<()> {
    for name in names(dir)? {
        if needed.contains(&name) {
            continue;
        }
        let path = dir.join(name);
        let Some(meta) = look(&path)? else { continue };
        atomic::remove_file(&path)?;
        removed.files += 1;
        if meta.nlink() == 1 {
            removed.bytes += meta.len();
        }
    }
    Ok(())
}
