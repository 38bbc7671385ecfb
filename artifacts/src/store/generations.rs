//! Makes generations and reads them back.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use km_host::{Error as HostError, atomic};

use super::complete::{read, to_json};
use super::place::link_or_copy;
use super::{DIR_MODE, Store, check_class, look, names, verity};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::{
    Artifact, ArtifactFile, ArtifactLink, DerivedFile, FILE_MODE, FORMAT, Generation,
    GenerationManifest, GenerationMeta, Stamp, StoredDerived, StoredFile, rfc3339,
};
use crate::unpack::path::RESERVED;
use crate::unpack::{Refusal, Shape, normalise};

impl Store {
    /// The classes that have generations, by name.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn classes(&self) -> Result<Vec<String>> {
        names(&self.under("generations"))
    }

    /// The generations of a class, oldest first.
    ///
    /// # Errors
    /// [`Error::Damaged`] when one's manifest cannot be read.
    pub fn generations(&self, class: &str) -> Result<Vec<Generation>> {
        check_class(class)?;
        self.numbers(class)?
            .into_iter()
            .map(|number| self.generation(class, number))
            .collect()
    }

    /// One generation.
    ///
    /// # Errors
    /// [`Error::NoGeneration`] when it is not there, [`Error::Damaged`] when its manifest cannot be read.
    pub fn generation(&self, class: &str, number: u64) -> Result<Generation> {
        check_class(class)?;
        let dir = self.generation_dir(class, number);
        if look(&dir)?.is_none() {
            return Err(Error::NoGeneration {
                class: class.to_owned(),
                number,
                path: dir,
            });
        }
        let path = dir.join(RESERVED);
        let damaged = |problem: String| Error::Damaged {
            path: path.clone(),
            problem: format!("{problem}; a new generation replaces it"),
        };
        let bytes = read(&path)?.ok_or_else(|| damaged("it is missing".to_owned()))?;
        let manifest: GenerationManifest = serde_json::from_slice(&bytes)
            .map_err(|error| damaged(format!("it cannot be read ({error})")))?;
        if manifest.format != FORMAT {
            return Err(damaged(format!(
                "its format is {}, this kata-manager knows {FORMAT}",
                manifest.format
            )));
        }
        if manifest.class != class || manifest.number != number {
            return Err(damaged(format!(
                "it describes generation {} of {}",
                manifest.number, manifest.class
            )));
        }
        Ok(Generation { dir, manifest })
    }

    /// The number that the next generation of a class may have: above every one that is there, readable or not.
    ///
    /// # Errors
    /// When the class's name is unusable or the disk fails.
    pub fn next_number(&self, class: &str) -> Result<u64> {
        check_class(class)?;
        let last = self.numbers(class)?.last().copied().unwrap_or(0);
        Ok(last.max(self.live_number(class)?.unwrap_or(0)) + 1)
    }

    /// Makes a generation: hard links to the artifact's files, the derived files beside them, everything synced, then one
    /// rename. The lock must be held.
    ///
    /// # Errors
    /// [`Error::GenerationExists`], [`Error::Derived`] when a derived file's path is unusable, or when the disk fails.
    pub fn create_generation(
        &self,
        class: &str,
        number: u64,
        artifact: &Artifact,
        derived: &[DerivedFile],
        meta: GenerationMeta,
    ) -> Result<Generation> {
        check_class(class)?;
        let dir = self.generation_dir(class, number);
        if look(&dir)?.is_some() {
            return Err(Error::GenerationExists {
                class: class.to_owned(),
                number,
                path: dir,
            });
        }
        let content = Content::new(artifact, derived).map_err(|(path, source)| Error::Derived {
            class: class.to_owned(),
            path,
            source,
        })?;
        let staging = self.temp_dir("generation")?;
        let made = self
            .fill(&staging, &content)
            .and_then(|(files, made)| {
                let manifest = GenerationManifest {
                    format: FORMAT,
                    class: class.to_owned(),
                    number,
                    created: rfc3339(SystemTime::now()),
                    reference: meta.reference,
                    source: meta.source,
                    manifest: artifact.manifest.clone(),
                    artifact_type: artifact.artifact_type.clone(),
                    inputs: meta.inputs,
                    signers: meta.signers,
                    layers: artifact.layers.clone(),
                    files,
                    links: content.links.clone(),
                    derived: made,
                    replaced: content.replaced.clone(),
                };
                let path = staging.join(RESERVED);
                write_new(&path, &to_json(&path, &manifest)?)?;
                Ok(manifest)
            })
            .and_then(|manifest| self.publish_generation(&staging, &dir).map(|()| manifest));
        match made {
            Ok(manifest) => Ok(Generation { dir, manifest }),
            Err(error) => {
                // The first error is the one to report; a leftover is swept later.
                let _ = atomic::remove_dir_all(&staging);
                Err(error)
            }
        }
    }

    fn publish_generation(&self, staging: &Path, dir: &Path) -> Result<()> {
        sync_tree(staging)?;
        if let Some(parent) = dir.parent() {
            atomic::create_dir_all(parent, DIR_MODE)?;
        }
        Ok(atomic::rename(staging, dir)?)
    }

    fn fill(
        &self,
        staging: &Path,
        content: &Content<'_>,
    ) -> Result<(Vec<StoredFile>, Vec<StoredDerived>)> {
        let mut files = Vec::new();
        for file in &content.files {
            let to = make_parents(staging, &file.path)?;
            link_or_copy(&self.file_path(file), &to)?;
            verity::seal(&to)?;
            files.push(StoredFile {
                file: (*file).clone(),
                stamp: stamp(&to)?,
            });
        }
        for link in &content.links {
            let at = make_parents(staging, &link.path)?;
            std::os::unix::fs::symlink(&link.target, &at)
                .map_err(HostError::io("create symlink", &at))?;
        }
        let mut made = Vec::new();
        for (path, bytes) in &content.derived {
            let to = make_parents(staging, path)?;
            write_new(&to, bytes)?;
            verity::seal(&to)?;
            made.push(StoredDerived {
                path: path.clone(),
                digest: Digest::of(bytes),
                size: bytes.len() as u64,
                stamp: stamp(&to)?,
            });
        }
        Ok((files, made))
    }

    /// The numbers of a class's generations, ascending.
    pub(super) fn numbers(&self, class: &str) -> Result<Vec<u64>> {
        let mut numbers: Vec<u64> = names(&self.class_dir(class))?
            .iter()
            .filter_map(|name| {
                let number: u64 = name.parse().ok()?;
                (number.to_string() == *name).then_some(number)
            })
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }
}

/// What goes into a generation, after derived files have taken the places that they claim.
struct Content<'a> {
    files: Vec<&'a ArtifactFile>,
    links: Vec<ArtifactLink>,
    derived: Vec<(String, &'a [u8])>,
    replaced: Vec<ArtifactFile>,
}

impl<'a> Content<'a> {
    fn new(
        artifact: &'a Artifact,
        derived: &'a [DerivedFile],
    ) -> std::result::Result<Content<'a>, (String, Refusal)> {
        let mut shape = Shape::new(usize::MAX);
        let mut content = Content {
            files: Vec::new(),
            links: Vec::new(),
            derived: Vec::new(),
            replaced: Vec::new(),
        };
        let mut claimed = BTreeSet::new();
        for file in derived {
            let path =
                normalise(file.path.as_bytes()).map_err(|reason| (file.path.clone(), reason))?;
            claimed.insert(path.clone());
            content.derived.push((path, &file.bytes));
        }
        for file in &artifact.files {
            if claimed.contains(&file.path) {
                content.replaced.push(file.clone());
                continue;
            }
            shape
                .file(&file.path)
                .map_err(|reason| (file.path.clone(), reason))?;
            content.files.push(file);
        }
        for link in artifact
            .links
            .iter()
            .filter(|link| !claimed.contains(&link.path))
        {
            shape
                .link(&link.path, &link.target)
                .map_err(|reason| (link.path.clone(), reason))?;
            content.links.push(link.clone());
        }
        for (path, _) in &content.derived {
            shape.file(path).map_err(|reason| (path.clone(), reason))?;
        }
        shape
            .finish()
            .map_err(|refused| (refused.entry, refused.reason))?;
        Ok(content)
    }
}

fn make_parents(top: &Path, path: &str) -> Result<PathBuf> {
    let to = top.join(path);
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(HostError::io("create folder", parent))?;
    }
    Ok(to)
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(HostError::io("create", path))?;
    file.write_all(bytes)
        .map_err(HostError::io("write", path))?;
    file.set_permissions(fs::Permissions::from_mode(FILE_MODE))
        .map_err(HostError::io("set mode of", path))?;
    Ok(file.sync_all().map_err(HostError::io("sync", path))?)
}

/// Sets the mode of every folder, whatever the umask was, and makes their entries durable.
fn sync_tree(dir: &Path) -> Result<()> {
    for name in names(dir)? {
        let path = dir.join(name);
        if look(&path)?.is_some_and(|meta| meta.is_dir()) {
            sync_tree(&path)?;
        }
    }
    File::open(dir)
        .and_then(|file| file.set_permissions(fs::Permissions::from_mode(DIR_MODE)))
        .map_err(HostError::io("set mode of", dir))?;
    Ok(atomic::sync_dir(dir)?)
}

pub(super) fn stamp_of(meta: &fs::Metadata) -> Stamp {
    Stamp {
        inode: meta.ino(),
        modified_ns: meta
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(meta.mtime_nsec()),
    }
}

fn stamp(path: &Path) -> Result<Stamp> {
    let meta = fs::symlink_metadata(path).map_err(HostError::io("look at", path))?;
    Ok(stamp_of(&meta))
}
