//! The configuration read from its file.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::{Config, DEFAULT_PATH, parse};
use crate::failure::{Failure, Kind};

/// Reads the file. A missing one is an error that says how to begin.
pub(crate) fn load(path: &Path) -> Result<(Config, Vec<u8>)> {
    let bytes = std::fs::read(path).map_err(|error| {
        let hint = if error.kind() == std::io::ErrorKind::NotFound {
            "; write one (NVIDIA Kata Manager's config.yaml works; \"kata-manager config schema\" lists every key), or name \
             another with --config"
        } else {
            ""
        };
        let message = format!("cannot read the configuration {}{hint}", path.display());
        Failure::because(Kind::Configuration, message, error)
    })?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        Failure::because(
            Kind::Configuration,
            format!("{} is not UTF-8 text", path.display()),
            error,
        )
    })?;
    let config = parse(text).with_context(|| {
        Failure::new(
            Kind::Configuration,
            format!("{} is not usable", path.display()),
        )
    })?;
    Ok((config, bytes))
}

/// As [`load`]; without a file at the usual place everything is as by default. For work that is not about the node.
pub(crate) fn load_if_there(path: &Path) -> Result<(Config, Vec<u8>)> {
    if path == Path::new(DEFAULT_PATH) && matches!(path.try_exists(), Ok(false)) {
        return Ok((parse("")?, Vec::new()));
    }
    load(path)
}
