//! `cdi validate`. Reads only, and trusts nothing that it reads.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use km_cdi::files::{self, Doubled, File};
use km_host::{HostPath, Root};
use serde_json::{Value, json};

use super::Global;
use crate::draw;
use crate::failure::{Failure, Kind};
use crate::output;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Spec files; without any, all in /etc/cdi and /var/run/cdi of the host.
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result<()> {
    let folders = match arguments.files.is_empty() {
        true => super::folders(&Root::new(&global.host_root)?)?,
        // Files that somebody names need not lie in one folder: they are not held against each other.
        false => arguments
            .files
            .iter()
            .map(|file| named(file).map(|file| vec![file]))
            .collect::<Result<_>>()?,
    };
    let doubled: Vec<Doubled> = folders
        .iter()
        .flat_map(|files| files::doubled(files))
        .collect();
    let all: Vec<&File> = folders.iter().flatten().collect();
    let bad = all.iter().filter(|file| file.spec.is_err()).count();
    let good = bad == 0 && doubled.is_empty();
    let body = json!({
        "good": good,
        "specs": all.iter().map(|file| to_json(file)).collect::<Vec<_>>(),
        "listedTwice": doubled,
    });
    output::result(
        global.output,
        "CdiValidated",
        body,
        &to_text(&all, &doubled),
    )?;
    if good {
        return Ok(());
    }
    let message = match bad {
        0 => "devices are listed by more than one file, and CDI gives those to nobody".to_owned(),
        _ => format!(
            "{bad} of {} CDI specs are not valid: CDI gives none of their devices",
            all.len()
        ),
    };
    Err(Failure::new(Kind::Verification, message).into())
}

fn named(path: &std::path::Path) -> Result<File> {
    let missing = || Failure::new(Kind::Host, format!("cannot find {}", path.display()));
    let real = std::fs::canonicalize(path).with_context(missing)?;
    let real = HostPath::new(real)
        .map_err(|error| Failure::new(Kind::Configuration, error.to_string()))?;
    Ok(File::read(&Root::new("/")?, &real)?)
}

fn to_json(file: &File) -> Value {
    let problem = file.spec.as_ref().err().map(ToString::to_string);
    let spec = file.spec.as_ref().ok();
    json!({
        "file": file.path,
        "ours": file.ours,
        "kind": spec.map(|spec| &spec.kind),
        "names": spec.map(|spec| spec.devices.len()),
        "problem": problem,
    })
}

fn to_text(files: &[&File], doubled: &[Doubled]) -> String {
    let mut text = String::new();
    for file in files {
        let verdict = match &file.spec {
            Ok(spec) => format!("good: {}, names: {}", spec.kind, spec.devices.len()),
            Err(error) => format!("not valid: {}", draw::shortened(&error.to_string(), 300)),
        };
        text.push_str(&format!("{}: {verdict}\n", file.path));
    }
    for twice in doubled {
        let paths: Vec<&str> = twice.files.iter().map(|path| path.as_str()).collect();
        text.push_str(&format!("{} is in {}\n", twice.device, paths.join(" and ")));
    }
    if files.is_empty() {
        text.push_str("No CDI specs on this node.\n");
    }
    text
}
