//! Which generation a class points at, and the one rename that changes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use km_host::{Error as HostError, atomic};

use super::{DIR_MODE, STORE, Store, check_class, look};
use crate::error::{Error, Result};
use crate::generation::{Activation, Generation};

/// What lies under a class's name.
enum Found {
    Nothing,
    /// Our symlink to that generation.
    Ours(u64),
    /// Anything else: a folder of NVIDIA's manager, a user's symlink.
    Foreign,
}

impl Store {
    /// The generation that the class points at.
    ///
    /// # Errors
    /// [`Error::NoGeneration`] or [`Error::Damaged`] when it points at one that is gone or unreadable.
    pub fn live(&self, class: &str) -> Result<Option<Generation>> {
        self.live_number(class)?
            .map(|number| self.generation(class, number))
            .transpose()
    }

    /// The number of the generation that the class points at, there or not.
    ///
    /// # Errors
    /// When the class's name is unusable or the disk fails.
    pub fn live_number(&self, class: &str) -> Result<Option<u64>> {
        check_class(class)?;
        Ok(match self.found(class, &self.class_link(class))? {
            Found::Ours(number) => Some(number),
            Found::Nothing | Found::Foreign => None,
        })
    }

    /// Points the class at a generation by one rename. What is not ours under the class's name is exchanged with the
    /// symlink and kept (see [`Store::displaced`]). The lock must be held.
    ///
    /// # Errors
    /// [`Error::NoGeneration`]; [`Error::Occupied`] when something is not ours and an earlier one is kept already.
    pub fn activate(&self, class: &str, number: u64) -> Result<Activation> {
        let generation = self.generation(class, number)?;
        let link = self.class_link(class);
        match self.found(class, &link)? {
            Found::Ours(live) if live == generation.number() => Ok(Activation::Unchanged),
            Found::Ours(from) => {
                self.put_link(class, number, &link)?;
                Ok(Activation::Switched { from })
            }
            Found::Nothing => {
                self.put_link(class, number, &link)?;
                Ok(Activation::Created)
            }
            Found::Foreign => self.displace(class, number, &link),
        }
    }

    /// What was found under the class's name and is not ours; it goes back with [`Store::remove_class`].
    ///
    /// # Errors
    /// When the class's name is unusable or the disk fails.
    pub fn displaced(&self, class: &str) -> Result<Option<PathBuf>> {
        check_class(class)?;
        let kept = self.displaced_path(class);
        Ok(match self.found(class, &kept)? {
            Found::Foreign => Some(kept),
            // Our symlink lies there when a process was killed just before or after the exchange.
            Found::Nothing | Found::Ours(_) => None,
        })
    }

    /// Takes a class away: what was displaced comes back, or the symlink goes; then its generations go. The lock must be
    /// held. Doing it again, or after it was interrupted, is fine.
    ///
    /// # Errors
    /// [`Error::Occupied`] when something was displaced and something else is there now.
    pub fn remove_class(&self, class: &str) -> Result<()> {
        let link = self.class_link(class);
        let displaced = self.displaced(class)?;
        match (self.found(class, &link)?, displaced) {
            (Found::Foreign, Some(kept)) => return Err(Error::Occupied { path: link, kept }),
            (Found::Ours(_), Some(kept)) => atomic::exchange(&link, &kept)?,
            (Found::Nothing, Some(kept)) => atomic::rename(&kept, &link)?,
            (Found::Ours(_), None) => atomic::remove_file(&link)?,
            (Found::Nothing | Found::Foreign, None) => {}
        }
        if let Found::Ours(_) = self.found(class, &self.displaced_path(class))? {
            atomic::remove_file(&self.displaced_path(class))?;
        }
        atomic::remove_dir_if_empty(&self.under("displaced"))?;
        self.remove_at_once(&self.class_dir(class))
    }

    /// Exchanges what is there with the symlink, in one step: at no time is there nothing under the class's name, and at
    /// no time is the foreign thing anywhere but in one of the two places.
    fn displace(&self, class: &str, number: u64, link: &Path) -> Result<Activation> {
        let kept = self.displaced_path(class);
        if self.displaced(class)?.is_some() {
            return Err(Error::Occupied {
                path: link.to_owned(),
                kept,
            });
        }
        atomic::create_dir_all(&self.under("displaced"), DIR_MODE)?;
        self.put_link(class, number, &kept)?;
        atomic::exchange(link, &kept)?;
        Ok(Activation::Displaced { kept })
    }

    fn put_link(&self, class: &str, number: u64, at: &Path) -> Result<()> {
        let staged = self.temp_path("link")?;
        std::os::unix::fs::symlink(link_target(class, number), &staged)
            .map_err(HostError::io("create symlink", &staged))?;
        Ok(atomic::rename(&staged, at)?)
    }

    fn found(&self, class: &str, at: &Path) -> Result<Found> {
        let Some(meta) = look(at)? else {
            return Ok(Found::Nothing);
        };
        if !meta.is_symlink() {
            return Ok(Found::Foreign);
        }
        let target = match fs::read_link(at) {
            Ok(target) => target,
            // Gone since; anything else must not pass for a class without a live generation.
            Err(error) if error.kind() == io::ErrorKind::NotFound && look(at)?.is_none() => {
                return Ok(Found::Nothing);
            }
            Err(error) => return Err(HostError::io("read symlink", at)(error).into()),
        };
        let number = target
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse().ok())
            .filter(|number| target == Path::new(&link_target(class, *number)));
        Ok(number.map_or(Found::Foreign, Found::Ours))
    }
}

/// Relative to `artifactsDir`, so that it holds wherever that is mounted.
fn link_target(class: &str, number: u64) -> String {
    format!("{STORE}/generations/{class}/{number}")
}
