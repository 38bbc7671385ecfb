//! The one table: what is done with a device, by where it comes from, which Kata starts the guest, and which containerd calls.
//!
//! Exactly one row fits each case; a test counts. The book shows the same table (docs/src/shim.md), and a test holds the two
//! against each other.
//!
//! A Kata that finds a device by itself must not get it written as well: it would attach it twice. So `check` is what most rows
//! say, and `write` is for what that Kata does not look at. Sources are files of kata-containers 4.1.0.

use std::fmt;

use serde::{Deserialize, Serialize};

use km_topology::{Flavor, Kata};

/// Where a device of a sandbox comes from, in the order of authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The kubelet gave it to the pod for a device plugin (PodResources, `ContainerDevices`).
    Plugin,
    /// The kubelet gave it to the pod for a claim of dynamic resource allocation (PodResources, `DynamicResources`).
    Claim,
    /// The sandbox's config.json has its node already.
    Spec,
    /// The pod has an annotation `cdi.k8s.io/*`, and there is no kubelet.
    Annotation,
    /// It goes with a device of the pod, and is not in any other source.
    Companion,
}

impl Source {
    /// All of them.
    pub const ALL: [Source; 5] = [
        Source::Plugin,
        Source::Claim,
        Source::Spec,
        Source::Annotation,
        Source::Companion,
    ];
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Plugin => "device plugin",
            Source::Claim => "resource claim",
            Source::Spec => "config.json",
            Source::Annotation => "annotation",
            Source::Companion => "companion",
        })
    }
}

/// What matters of a containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Containerd {
    /// 1.6: no CDI devices in CRI.
    #[serde(rename = "1.6")]
    V1_6,
    /// 1.7.
    #[serde(rename = "1.7")]
    V1_7,
    /// 2.x.
    #[serde(rename = "2")]
    V2,
}

impl Containerd {
    /// All of them.
    pub const ALL: [Containerd; 3] = [Containerd::V1_6, Containerd::V1_7, Containerd::V2];
}

impl fmt::Display for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Containerd::V1_6 => "1.6",
            Containerd::V1_7 => "1.7",
            Containerd::V2 => "2.x",
        })
    }
}

/// What is done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is checked. This Kata finds it by itself.
    Check,
    /// It is checked, and its node is written into the sandbox's config.json.
    Write,
    /// The pod does not start.
    Refuse,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::Check => "check",
            Action::Write => "write",
            Action::Refuse => "refuse",
        })
    }
}

/// A case: everything that a row may ask for but the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Which Kata.
    pub kata: Kata,
    /// Whether the guest's memory is encrypted.
    pub confidential: bool,
    /// Which containerd.
    pub containerd: Containerd,
}

/// Which Katas a row is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Katas {
    /// Every one.
    Any,
    /// Those that do not ask the kubelet: Go before 3.24, runtime-rs before 4.0.
    Older,
    /// Those that ask the kubelet, in either language.
    Asking,
    /// Those in Go that ask the kubelet.
    AskingGo,
    /// Those of runtime-rs that ask the kubelet.
    AskingRust,
    /// Those in Go.
    Go,
    /// Those of runtime-rs.
    Rust,
}

impl Katas {
    fn has(self, kata: Kata) -> bool {
        let go = kata.flavor == Flavor::Go;
        match self {
            Katas::Any => true,
            Katas::Older => !kata.cold_plugs(),
            Katas::Asking => kata.cold_plugs(),
            Katas::AskingGo => kata.cold_plugs() && go,
            Katas::AskingRust => kata.cold_plugs() && !go,
            Katas::Go => go,
            Katas::Rust => !go,
        }
    }
}

impl fmt::Display for Katas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Katas::Any => "any",
            Katas::Older => "Go before 3.24, runtime-rs before 4.0",
            Katas::Asking => "Go from 3.24, runtime-rs from 4.0",
            Katas::AskingGo => "Go from 3.24",
            Katas::AskingRust => "runtime-rs from 4.0",
            Katas::Go => "Go",
            Katas::Rust => "runtime-rs",
        })
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Where the device comes from.
    pub source: Source,
    /// Which Katas.
    pub katas: Katas,
    /// Confidential guests, or others, or both.
    pub confidential: Option<bool>,
    /// containerd 1.6, or later ones, or both.
    pub cdi_in_cri: Option<bool>,
    /// What is done.
    pub action: Action,
    /// Why.
    pub why: &'static str,
}

const fn rule(
    source: Source,
    katas: Katas,
    confidential: Option<bool>,
    action: Action,
    why: &'static str,
) -> Rule {
    Rule {
        source,
        katas,
        confidential,
        cdi_in_cri: None,
        action,
        why,
    }
}

const PLAIN: Option<bool> = Some(false);
const CONFIDENTIAL: Option<bool> = Some(true);
const BOTH: Option<bool> = None;

/// The table.
pub const RULES: &[Rule] = &[
    rule(
        Source::Plugin,
        Katas::Asking,
        BOTH,
        Action::Check,
        "this Kata asks the kubelet itself",
    ),
    rule(
        Source::Plugin,
        Katas::Older,
        PLAIN,
        Action::Write,
        "this Kata asks nobody and attaches what config.json has",
    ),
    rule(
        Source::Plugin,
        Katas::Older,
        CONFIDENTIAL,
        Action::Refuse,
        "this Kata does not ask the kubelet, and a confidential guest's config.json is not ours to change: its policy would see it; install Kata 3.24 (Go) or 4.0 (runtime-rs) or later",
    ),
    Rule {
        cdi_in_cri: Some(false),
        ..rule(
            Source::Claim,
            Katas::Any,
            BOTH,
            Action::Refuse,
            "containerd 1.6 knows no CDI devices in CRI, so the pod's containers would not get what the claim names; use containerd 1.7 or later",
        )
    },
    Rule {
        cdi_in_cri: Some(true),
        ..rule(
            Source::Claim,
            Katas::Any,
            PLAIN,
            Action::Write,
            "no Kata reads DynamicResources",
        )
    },
    Rule {
        cdi_in_cri: Some(true),
        ..rule(
            Source::Claim,
            Katas::Any,
            CONFIDENTIAL,
            Action::Refuse,
            "no Kata reads DynamicResources, and a confidential guest's config.json is not ours to change: its policy would see it; request the device plugin's resource",
        )
    },
    rule(
        Source::Spec,
        Katas::Any,
        PLAIN,
        Action::Check,
        "each Kata attaches what config.json has",
    ),
    rule(
        Source::Spec,
        Katas::Go,
        CONFIDENTIAL,
        Action::Check,
        "this Kata attaches what config.json has and does not tell the guest of it",
    ),
    rule(
        Source::Spec,
        Katas::Rust,
        CONFIDENTIAL,
        Action::Refuse,
        "runtime-rs tells a confidential guest of VFIO nodes in the sandbox's config.json, and its policy may end it; request the device plugin's resource",
    ),
    rule(
        Source::Annotation,
        Katas::Go,
        BOTH,
        Action::Check,
        "this Kata reads the annotation itself where there is no kubelet",
    ),
    rule(
        Source::Annotation,
        Katas::Rust,
        PLAIN,
        Action::Write,
        "runtime-rs does not read the annotation",
    ),
    rule(
        Source::Annotation,
        Katas::Rust,
        CONFIDENTIAL,
        Action::Refuse,
        "runtime-rs does not read the annotation, and a confidential guest's config.json is not ours to change: its policy would see it",
    ),
    rule(
        Source::Companion,
        Katas::Older,
        PLAIN,
        Action::Write,
        "this Kata attaches what config.json has",
    ),
    rule(
        Source::Companion,
        Katas::AskingRust,
        PLAIN,
        Action::Write,
        "this Kata attaches what config.json has besides what the kubelet gave, each once",
    ),
    rule(
        Source::Companion,
        Katas::AskingGo,
        PLAIN,
        Action::Refuse,
        "whether this Kata attaches nodes of config.json beside the kubelet's is told nowhere; request the companion as a device of its own",
    ),
    rule(
        Source::Companion,
        Katas::Any,
        CONFIDENTIAL,
        Action::Refuse,
        "a confidential guest's config.json is not ours to change: its policy would see it; request the companion as a device of its own",
    ),
];

impl Rule {
    /// Whether the row is for a case.
    pub fn fits(&self, source: Source, case: Case) -> bool {
        let new = case.containerd != Containerd::V1_6;
        self.source == source
            && self.katas.has(case.kata)
            && self
                .confidential
                .is_none_or(|want| want == case.confidential)
            && self.cdi_in_cri.is_none_or(|want| want == new)
    }

    /// The row as the book has it.
    pub fn to_markdown(&self) -> String {
        let guests = match self.confidential {
            None => "any",
            Some(true) => "confidential",
            Some(false) => "others",
        };
        let containerd = match self.cdi_in_cri {
            None => "any",
            Some(true) => "1.7, 2.x",
            Some(false) => "1.6",
        };
        format!(
            "| {} | {} | {guests} | {containerd} | **{}** | {} |",
            self.source, self.katas, self.action, self.why
        )
    }
}

/// The row for a case.
pub fn look_up(source: Source, case: Case) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.fits(source, case))
}

#[cfg(test)]
mod tests {
    use super::*;
    use km_topology::Version;

    pub(crate) fn cases() -> Vec<Case> {
        let mut cases = Vec::new();
        for flavor in [Flavor::Go, Flavor::Rust] {
            for (major, minor) in [(3, 2), (3, 23), (3, 24), (4, 0), (4, 1), (5, 0)] {
                for confidential in [false, true] {
                    for containerd in Containerd::ALL {
                        let version = Version { major, minor };
                        cases.push(Case {
                            kata: Kata { flavor, version },
                            confidential,
                            containerd,
                        });
                    }
                }
            }
        }
        cases
    }

    #[test]
    fn exactly_one_row_fits_each_case() {
        let mut used = vec![0; RULES.len()];
        for case in cases() {
            for source in Source::ALL {
                let fitting: Vec<usize> = (0..RULES.len())
                    .filter(|row| RULES[*row].fits(source, case))
                    .collect();
                assert_eq!(fitting.len(), 1, "{source} {case:?}: {fitting:?}");
                used[fitting[0]] += 1;
            }
        }
        assert!(used.iter().all(|times| *times > 0), "{used:?}");
    }

    #[test]
    fn nothing_is_written_for_a_confidential_guest() {
        for case in cases().into_iter().filter(|case| case.confidential) {
            for source in Source::ALL {
                let rule = look_up(source, case).unwrap();
                assert_ne!(rule.action, Action::Write, "{source} {case:?}");
            }
        }
    }

    #[test]
    fn what_a_kata_finds_by_itself_is_never_written() {
        for case in cases().into_iter().filter(|case| case.kata.cold_plugs()) {
            let rule = look_up(Source::Plugin, case).unwrap();
            assert_eq!(rule.action, Action::Check, "{case:?}");
        }
    }

    #[test]
    fn the_book_has_the_same_table() {
        let book = include_str!("../../docs/src/shim.md");
        let rows: Vec<&str> = book
            .lines()
            .skip_while(|line| !line.starts_with("| source | Kata |"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .collect();
        let table: Vec<String> = RULES.iter().map(Rule::to_markdown).collect();
        assert_eq!(rows, table);
    }
}
