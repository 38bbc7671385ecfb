//! Removes what no generation needs, and in the end everything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use km_host::atomic;

use super::{Store, check_class, look, names};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::generation::{GenerationManifest, Removed};
use crate::layers::parse;

/// What the generations need.
#[derive(Default)]
struct Needed {
    manifests: BTreeSet<Digest>,
    /// Blobs, contents and records.
    paths: BTreeSet<PathBuf>,
    /// What signatures may be of.
    signed: BTreeSet<Digest>,
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

    /// Blobs, contents and records that no generation needs.
    ///
    /// # Errors
    /// [`Error::Damaged`] when a generation's manifest cannot be read: what it needs is then not known.
    pub fn unreferenced(&self) -> Result<Unreferenced> {
        self.unreferenced_without(&BTreeSet::new())
    }

    /// The same, as it will be once these generations (class and number) are gone.
    ///
    /// # Errors
    /// As [`Store::unreferenced`].
    pub fn unreferenced_without(&self, gone: &BTreeSet<(String, u64)>) -> Result<Unreferenced> {
        let mut needed = Needed::default();
        let mut going = Vec::new();
        for class in self.classes()? {
            check_class(&class)?;
            for generation in self.generations(&class)? {
                if gone.contains(&(class.clone(), generation.number())) {
                    going.push(generation);
                } else {
                    self.add_needed(&generation.manifest, &mut needed)?;
                }
            }
        }
        self.add_signatures(&mut needed)?;
        let mut found = Unreferenced {
            manifests: needed.manifests,
            paths: Vec::new(),
            bytes: 0,
        };
        let mut links = Links::default();
        for generation in &going {
            links.count_below(&generation.dir)?;
        }
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            for dir in [
                self.blobs_dir(algorithm),
                self.records_dir(algorithm),
                self.files_dir(algorithm),
            ] {
                for name in names(&dir)? {
                    let path = dir.join(name);
                    if needed.paths.contains(&path) {
                        continue;
                    }
                    let Some(meta) = look(&path)? else { continue };
                    links.count(&meta);
                    found.paths.push(path);
                }
            }
        }
        found.bytes = links.freed();
        Ok(found)
    }

    /// Removes blobs, contents and records that no generation needs. The lock must be held.
    ///
    /// # Errors
    /// As [`Store::unreferenced`], and when one cannot be removed.
    pub fn remove_unreferenced(&self) -> Result<Removed> {
        let found = self.unreferenced()?;
        // First the list, then what it lists: nothing is listed that is not there.
        if look(&self.oci_dir())?.is_some() {
            self.keep_manifests(&found.manifests)?;
        }
        for path in &found.paths {
            atomic::remove_file(path)?;
        }
        Ok(Removed {
            files: found.paths.len() as u64,
            bytes: found.bytes,
        })
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
        for name in [
            "oci",
            "unpacked",
            "files",
            "generations",
            "displaced",
            "partial",
        ] {
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

    /// What is needed of the signatures: every one of what is needed, whether a policy asks for it now or not.
    fn add_signatures(&self, needed: &mut Needed) -> Result<()> {
        let signed = std::mem::take(&mut needed.signed);
        for evidence in self.signatures_of(&signed)? {
            let parts = evidence.blobs.keys().chain([&evidence.digest]);
            needed
                .paths
                .extend(parts.map(|digest| self.blob_path(digest)));
            needed.manifests.insert(evidence.digest);
        }
        Ok(())
    }

    fn add_needed(&self, manifest: &GenerationManifest, needed: &mut Needed) -> Result<()> {
        needed.manifests.insert(manifest.manifest.clone());
        needed.paths.insert(self.blob_path(&manifest.manifest));
        // An index is kept only for the sake of its signature.
        needed.paths.insert(self.blob_path(&manifest.source));
        needed
            .signed
            .extend([manifest.source.clone(), manifest.manifest.clone()]);
        if let Some(bytes) = self.manifest_bytes(&manifest.manifest)?
            && let Ok(parsed) = parse(&bytes)
            && let Ok(config) = crate::layers::digest(parsed.config())
        {
            needed.paths.insert(self.blob_path(&config));
        }
        for layer in &manifest.layers {
            if layer.unpacked {
                needed.paths.insert(self.record_path(&layer.digest));
            }
            if !layer.unpacked || self.keep_blobs {
                needed.paths.insert(self.blob_path(&layer.digest));
            }
        }
        let files = manifest.files.iter().map(|stored| &stored.file);
        needed.paths.extend(
            files
                .chain(&manifest.replaced)
                .map(|file| self.file_path(file)),
        );
        Ok(())
    }
}

/// What no generation needs.
#[derive(Clone, Debug, Default)]
pub struct Unreferenced {
    /// The manifests that are needed: the only ones that the layout goes on listing.
    manifests: BTreeSet<Digest>,
    /// Files that can go.
    pub paths: Vec<PathBuf>,
    /// Bytes that the disk gets back, as far as no other name leads to them.
    pub bytes: u64,
}

/// Counts the names of inodes that go, to tell which of them go with their last name.
#[derive(Default)]
struct Links(BTreeMap<(u64, u64), Inode>);

#[derive(Clone, Copy)]
struct Inode {
    gone: u64,
    links: u64,
    bytes: u64,
}

impl Links {
    fn count(&mut self, meta: &fs::Metadata) {
        let inode = self.0.entry((meta.dev(), meta.ino())).or_insert(Inode {
            gone: 0,
            links: meta.nlink(),
            bytes: meta.len(),
        });
        inode.gone += 1;
    }

    fn count_below(&mut self, dir: &Path) -> Result<()> {
        for name in names(dir)? {
            let path = dir.join(name);
            match look(&path)? {
                Some(meta) if meta.is_dir() => self.count_below(&path)?,
                Some(meta) if meta.is_file() => self.count(&meta),
                _ => {}
            }
        }
        Ok(())
    }

    fn freed(&self) -> u64 {
        let last = |inode: &&Inode| inode.gone >= inode.links;
        self.0.values().filter(last).map(|inode| inode.bytes).sum()
    }
}
