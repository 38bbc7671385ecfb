//! What the program says: text for people, one JSON object for machines.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::failure;

/// The version of every JSON object that the program prints.
pub(crate) const API_VERSION: &str = "kata-manager/v1";

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// Prints text to standard output. A reader that went away is no error.
pub(crate) fn to_stdout(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

/// Prints a line to standard error, where progress and errors go. There is nobody to tell when that fails.
pub(crate) fn to_stderr(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// An object of a kind, as JSON.
pub(crate) fn object(kind: &str, body: impl Serialize) -> Result<Value> {
    let mut object = json!({ "apiVersion": API_VERSION, "kind": kind });
    let body = serde_json::to_value(body).context("build the JSON output")?;
    if let (Some(object), Value::Object(body)) = (object.as_object_mut(), body) {
        object.extend(body);
    }
    Ok(object)
}

/// Prints the object or the text.
pub(crate) fn result(format: Format, kind: &str, body: impl Serialize, text: &str) -> Result<()> {
    match format {
        Format::Text => to_stdout(text),
        Format::Json => to_stdout(&format!("{:#}\n", object(kind, body)?)),
    }
}

/// Prints an error with its causes, each once.
pub(crate) fn error(format: Format, error: &anyhow::Error) {
    let kind = failure::kind(error);
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.iter().all(|before| !before.contains(&cause)) {
            said.push(cause);
        }
    }
    let (message, causes) = said
        .split_first()
        .map_or((String::new(), &[][..]), |(first, rest)| {
            (first.clone(), rest)
        });
    if format == Format::Json {
        let body = json!({ "exitCode": kind as u8, "message": message, "causes": causes });
        if let Ok(object) = object("Error", body) {
            return to_stderr(&format!("{object:#}"));
        }
    }
    to_stderr(&format!("error: {message}"));
    for cause in causes {
        to_stderr(&format!("  cause: {}", cause.replace('\n', "\n         ")));
    }
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{count} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} GiB")
}

/// An age for people, in its largest unit alone: it tells new from old.
pub(crate) fn age(age: std::time::Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Rows in columns as wide as their widest cell; the last one ends the line.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
