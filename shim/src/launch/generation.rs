//! What a generation says of its launches: `launch.json` in it, which `apply` writes beside Kata's configuration. The configuration of an
//! artifact may name another QEMU than the class has, and the launcher stands in the place of that one.

use km_host::{HostPath, Root};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// The file, relative to the generation.
pub const FILE: &str = "launch.json";

/// The largest file that is read, in bytes: a path and a little.
const LIMIT: u64 = 16 << 10;

/// The launches of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Generation {
    /// The QEMU that its Kata configuration means.
    pub qemu: HostPath,
}

impl Generation {
    /// The file.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub fn render(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }

    /// Reads the one of a number, beside the live one: the sandbox keeps its own when the class moves on. `None` where there is none.
    ///
    /// # Errors
    /// When it is there and cannot be used.
    pub(super) fn load(
        root: &Root,
        settings: &Settings,
        number: u64,
    ) -> Result<Option<Generation>, String> {
        let Some(link) = &settings.class_link else {
            return Ok(None);
        };
        let folder = || {
            let above = root.resolve(&link.parent()?).ok()?;
            let live = std::fs::read_link(above.join(link.as_path().file_name()?)).ok()?;
            Some(link.parent()?.join(live.parent()?).join(number.to_string()))
        };
        let Some(path) = folder().map(|folder| folder.join(FILE)) else {
            return Ok(None);
        };
        let bad = |why: String| {
            format!(
                "{path}, which says what QEMU this sandbox has, {why}; \"kata-manager apply\" makes a new generation, and sandboxes started after that have it"
            )
        };
        let bytes = match root.read(path.as_path(), LIMIT) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|error| bad(format!("cannot be read: {error}")))?,
        };
        let read = serde_json::from_slice(&bytes);
        read.map(Some)
            .map_err(|error| bad(format!("cannot be understood: {error}")))
    }
}
