//! The kubelet of a host: its process, its sockets, and how long it waits for the container runtime. Must not judge anything.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;

use crate::fact::{Fact, Found, Node, Reader};

/// The kubelet's folder unless it is told another (`--root-dir`).
const FOLDER: &str = "/var/lib/kubelet";

/// The most of a configuration file that is read, in bytes.
const LIMIT: usize = 1 << 20;

/// The most of a command line that is read, in bytes.
const COMMAND: usize = 128 << 10;

/// How long the kubelet waits when nobody says otherwise (KubeletConfiguration v1beta1, `runtimeRequestTimeout`).
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);

/// A kubelet.
#[derive(Clone, Debug)]
pub struct Kubelet {
    /// Its processes.
    pub processes: Fact<Vec<u32>>,
    /// What is in its folder.
    pub folder: Fact<BTreeSet<String>>,
    /// The socket that tells which pod has which devices.
    pub pod_resources: Fact<Node>,
    /// The sockets of device plugins.
    pub plugins: Fact<BTreeSet<String>>,
    /// How long it waits for an answer of the container runtime: the value as it is written, the last word first. Absent where
    /// nobody says so, and the default counts.
    pub timeout: Fact<String>,
}

/// What is read of a KubeletConfiguration.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    runtime_request_timeout: Option<String>,
}

impl Kubelet {
    pub(crate) fn observe(reader: Reader<'_>) -> Kubelet {
        let processes = reader.processes(|name| name == "kubelet");
        let timeout = match processes.get().and_then(|all| all.first()) {
            Some(number) => timeout(reader, *number),
            None => Fact::new("/proc", Found::Absent),
        };
        Kubelet {
            folder: reader.names(FOLDER),
            pod_resources: reader.node(&format!("{FOLDER}/pod-resources/kubelet.sock")),
            plugins: reader.names(&format!("{FOLDER}/device-plugins")),
            processes,
            timeout,
        }
    }

    /// Whether this is a node of Kubernetes, as far as its kubelet tells.
    pub fn is_there(&self) -> bool {
        let runs = self.processes.get().is_some_and(|all| !all.is_empty());
        runs || self.folder.get().is_some_and(|names| !names.is_empty())
    }
}

/// What counts: the flag, then the files of `--config-dir` from the last to the first, then the file of `--config` (kubernetes.io,
/// "Set Kubelet Parameters Via A Configuration File").
fn timeout(reader: Reader<'_>, number: u32) -> Fact<String> {
    let source = format!("/proc/{number}/cmdline");
    let command = reader.text(&source, COMMAND);
    let Some(text) = command.get() else {
        return command;
    };
    let words: Vec<&str> = text.split('\0').collect();
    if let Some(value) = flag(&words, "runtime-request-timeout") {
        return Fact::new(source, Found::Is(value.to_owned()));
    }
    let mut files = Vec::new();
    if let Some(folder) = flag(&words, "config-dir") {
        let names = reader.names(folder);
        if let Some(reason) = names.unknown() {
            return Fact::new(names.source, Found::Unknown(reason));
        }
        let named = names.get().into_iter().flatten();
        let named = named.filter(|name| name.ends_with(".conf"));
        files.extend(named.rev().map(|name| format!("{folder}/{name}")));
    }
    files.extend(flag(&words, "config").map(str::to_owned));
    let mut last = source;
    for file in files {
        let fact = configured(reader, &file);
        match fact.found {
            Found::Is(Some(value)) => return Fact::new(file, Found::Is(value)),
            Found::Unknown(reason) => return Fact::new(file, Found::Unknown(reason)),
            Found::Is(None) | Found::Absent => last = file,
        }
    }
    Fact::new(last, Found::Absent)
}

fn configured(reader: Reader<'_>, file: &str) -> Fact<Option<String>> {
    reader.text(file, LIMIT).and_read(|text| {
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! { max_depth: 32, max_documents: 1, max_aliases: 1000, max_anchors: 1000 },
        };
        if text.trim().is_empty() {
            return Some(None);
        }
        let read: Configuration = serde_saphyr::from_str_with_options(&text, options).ok()?;
        Some(read.runtime_request_timeout)
    })
}

/// The value of `--name=value` or `--name value`; the last one counts.
fn flag<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    let mut value = None;
    for (at, word) in words.iter().enumerate() {
        let Some(rest) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            continue;
        };
        match rest.split_once('=') {
            Some((given, after)) if given == name => value = Some(after),
            None if rest == name => value = words.get(at + 1).copied().or(value),
            _ => {}
        }
    }
    value
}

/// Reads a duration as Go writes it: `2m0s`, `1h30m`, `1.5s` (Go, package time, ParseDuration). Zero is the default, as the kubelet
/// has it.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    if matches!(text, "0" | "") {
        return (text == "0").then_some(DEFAULT_TIMEOUT);
    }
    let mut rest = text;
    let mut seconds = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|char: char| !char.is_ascii_digit() && char != '.')?;
        let (number, after) = rest.split_at(digits);
        let number: f64 = number.parse().ok()?;
        let end = after
            .find(|char: char| char.is_ascii_digit() || char == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        seconds += number
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = after;
    }
    let read = Duration::try_from_secs_f64(seconds).ok()?;
    Some(if read.is_zero() {
        DEFAULT_TIMEOUT
    } else {
        read
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_gos() {
        let seconds = |text| duration(text).map(|read| read.as_secs());
        assert_eq!(seconds("2m0s"), Some(120));
        assert_eq!(seconds("1h30m"), Some(5400));
        assert_eq!(seconds("1.5h"), Some(5400));
        assert_eq!(seconds("0s"), Some(120));
        for wrong in [
            "",
            "15",
            "m",
            "15 m",
            "-2m",
            "1d",
            "1e3s",
            "9999999999999999999999h",
        ] {
            assert_eq!(duration(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn flags_come_in_two_forms() {
        let words = ["kubelet", "--config=/a", "--v", "2", "--config", "/b", "x"];
        assert_eq!(flag(&words, "config"), Some("/b"));
        assert_eq!(flag(&words, "v"), Some("2"));
        assert_eq!(flag(&words, "config-dir"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_a_duration_or_none(text in "\\PC{0,40}") {
            let _ = duration(&text);
        }
    }
}
