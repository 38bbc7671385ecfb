//! What a node adds to a Kata configuration: `config.d/60-kata-manager.toml`, which Kata reads after the configuration beside it
//! (src/runtime/pkg/katautils/config.go; src/libs/kata-types/src/config/drop_in.rs). Data in, text out.
//!
//! Each key is written for the runtimes and versions that know it, and for no others: runtime-rs keeps timeouts elsewhere than the
//! Go runtime, has no hot plug, and no NUMA nodes. Keys and defaults are those of Kata's GPU configurations (`src/runtime/Makefile` and
//! `src/runtime-rs/Makefile`, 4.1; src/libs/kata-types/src/config/agent.rs).

use toml_edit::{Array, DocumentMut, Item, Table, Value, value};

use crate::{ClassKind, Provider, Runtime, Tee};

/// The file, relative to the generation. Kata reads these in alphabetical order: after kata-deploy's (10 to 30), before a user's (70).
pub const DROP_IN: &str = "config.d/60-kata-manager.toml";

/// The ports that Kata's GPU configurations have.
const PORTS: u32 = 8;

/// The most that a configuration may ask for (`maxPCIeRootPort`, src/runtime/pkg/katautils/config.go).
const PORTS_MAX: u32 = 16;

/// What a node has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Functions that a pod may be given, each behind a port.
    pub functions: u32,
    /// How long a guest with all of them may take to start, in seconds.
    pub timeout_seconds: u32,
}

/// A version of Kata: major and minor.
pub type KataVersion = (u16, u16);

/// What goes into the drop-in besides the class.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Where Kata is, and which runtime.
    pub provider: &'a Provider,
    /// Its version.
    pub version: KataVersion,
    /// What the node has.
    pub sizing: Sizing,
    /// The program that stands in QEMU's place.
    pub launcher: Option<&'a str>,
}

/// A drop-in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DropIn {
    /// The whole file.
    pub text: String,
    /// What this Kata cannot be told, and what that means.
    pub warnings: Vec<String>,
}

/// A key, and who knows it.
struct Key {
    table: &'static str,
    name: &'static str,
    runtime: Option<Runtime>,
    /// The first version that knows it, where earlier ones are of interest: Go, runtime-rs.
    since: Option<(KataVersion, KataVersion)>,
    /// What is lost without it.
    without: &'static str,
}

const QEMU: &str = "hypervisor.qemu";
const AGENT: &str = "agent.kata";
const RUNTIME: &str = "runtime";

const fn key(table: &'static str, name: &'static str, runtime: Option<Runtime>) -> Key {
    Key {
        table,
        name,
        runtime,
        since: None,
        without: "",
    }
}

/// Every key that is written, in order.
const KEYS: [Key; 13] = [
    key(QEMU, "path", None),
    key(QEMU, "valid_hypervisor_paths", None),
    key(QEMU, "cold_plug_vfio", None),
    key(QEMU, "hot_plug_vfio", Some(Runtime::Go)),
    key(QEMU, "pcie_root_port", None),
    Key {
        since: Some(((4, 1), (u16::MAX, 0))),
        ..key(QEMU, "enable_numa", Some(Runtime::Go))
    },
    key(AGENT, "dial_timeout", Some(Runtime::Go)),
    key(AGENT, "dial_timeout_ms", Some(Runtime::Rust)),
    key(AGENT, "reconnect_timeout_ms", Some(Runtime::Rust)),
    key(AGENT, "create_container_timeout", Some(Runtime::Rust)),
    key(RUNTIME, "create_container_timeout", Some(Runtime::Go)),
    key(RUNTIME, "vfio_mode", None),
    Key {
        since: Some(((3, 24), (4, 0))),
        without: "it does not ask the kubelet which devices a pod has",
        ..key(RUNTIME, "pod_resource_api_sock", None)
    },
];

/// Makes the drop-in of a class.
pub fn drop_in(kind: &ClassKind, facts: &Facts<'_>) -> DropIn {
    let mut document = DocumentMut::new();
    document.decor_mut().set_prefix(format!(
        "# Written by kata-manager for {} from what this node has. The next generation does not have changes to this file.\n\n",
        kind.name
    ));
    let mut warnings = Vec::new();
    let (mut qemu, mut agent, mut runtime_table) = (Table::new(), Table::new(), Table::new());
    for key in &KEYS {
        let Some(setting) = setting(kind, facts, key) else {
            continue;
        };
        let runtime = facts.provider.runtime;
        if key.runtime.is_some_and(|only| only != runtime) {
            continue;
        }
        let since = key.since.map(|(go, rust)| match runtime {
            Runtime::Go => go,
            Runtime::Rust => rust,
        });
        if let Some(first) = since.filter(|first| facts.version < *first) {
            if !key.without.is_empty() {
                warnings.push(format!(
                    "{}: Kata {}.{} does not know {}, so {}; {}.{} is the first that does",
                    kind.name,
                    facts.version.0,
                    facts.version.1,
                    key.name,
                    key.without,
                    first.0,
                    first.1
                ));
            }
            continue;
        }
        let table = match key.table {
            QEMU => &mut qemu,
            AGENT => &mut agent,
            _ => &mut runtime_table,
        };
        table.insert(key.name, value(setting));
    }
    document.insert("hypervisor", nested("qemu", qemu));
    document.insert("agent", nested("kata", agent));
    document.insert("runtime", Item::Table(runtime_table));
    if facts.sizing.functions > PORTS_MAX {
        warnings.push(format!(
            "{}: the node has {} functions to give away, and Kata makes {PORTS_MAX} ports for a pod",
            kind.name, facts.sizing.functions
        ));
    }
    DropIn {
        text: document.to_string(),
        warnings,
    }
}

/// A table within a table that is not written for itself.
fn nested(name: &str, table: Table) -> Item {
    let mut outer = Table::new();
    outer.set_implicit(true);
    outer.insert(name, Item::Table(table));
    Item::Table(outer)
}

/// A key's value; `None` where the class or the node has none.
fn setting(kind: &ClassKind, facts: &Facts<'_>, key: &Key) -> Option<Value> {
    let confidential = kind.tee != Tee::None;
    let seconds = i64::from(facts.sizing.timeout_seconds);
    Some(match (key.table, key.name) {
        (QEMU, "path") => facts.launcher?.into(),
        (QEMU, "valid_hypervisor_paths") => {
            let real = facts.provider.path(kind.qemu);
            Array::from_iter([facts.launcher?, real.as_str()]).into()
        }
        (QEMU, "cold_plug_vfio") => "root-port".into(),
        (QEMU, "hot_plug_vfio") => (!confidential).then_some("no-port")?.into(),
        (QEMU, "pcie_root_port") => i64::from(ports(kind, facts)).into(),
        (QEMU, "enable_numa") => false.into(),
        (AGENT, "dial_timeout") => seconds.into(),
        (AGENT, "dial_timeout_ms") => 1000.into(),
        (AGENT, "reconnect_timeout_ms") => (seconds * 1000).into(),
        (_, "create_container_timeout") => seconds.into(),
        (RUNTIME, "vfio_mode") => "guest-kernel".into(),
        (RUNTIME, "pod_resource_api_sock") => crate::render::POD_RESOURCES.into(),
        _ => return None,
    })
}

/// `pcie_root_port`. The Go runtime makes as many as there are devices anyway, and ports that nothing is behind would change what a
/// confidential guest is measured as.
fn ports(kind: &ClassKind, facts: &Facts<'_>) -> u32 {
    match (facts.provider.runtime, kind.tee) {
        (Runtime::Go, Tee::Snp | Tee::Tdx) => 0,
        _ => facts.sizing.functions.clamp(PORTS, PORTS_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(class: &str, runtime: Runtime, version: KataVersion, launcher: Option<&str>) -> DropIn {
        let provider = Provider {
            runtime,
            ..Provider::default()
        };
        let facts = Facts {
            provider: &provider,
            version,
            sizing: Sizing {
                functions: 12,
                timeout_seconds: 1980,
            },
            launcher,
        };
        drop_in(
            crate::find(class).expect("a class of the catalogue"),
            &facts,
        )
    }

    /// Every key as `table.key=value`, sorted.
    fn keys(text: &str) -> Vec<String> {
        fn walk(at: &Table, name: &str, found: &mut Vec<String>) {
            for (key, item) in at {
                match item {
                    Item::Table(table) => walk(table, &format!("{name}{key}."), found),
                    other => found.push(format!("{name}{key}={}", other.to_string().trim())),
                }
            }
        }
        let document: DocumentMut = text.parse().expect("it is TOML");
        let mut found = Vec::new();
        walk(document.as_table(), "", &mut found);
        found.sort();
        found
    }

    const PLAIN: &str = "kata-qemu-nvidia-gpu";
    const SNP: &str = "kata-qemu-nvidia-gpu-snp";

    #[test]
    fn each_runtime_and_version_gets_exactly_what_it_knows() {
        let socket =
            "runtime.pod_resource_api_sock=\"/var/lib/kubelet/pod-resources/kubelet.sock\"";
        let mode = "runtime.vfio_mode=\"guest-kernel\"";
        let cold = "hypervisor.qemu.cold_plug_vfio=\"root-port\"";
        let hot = "hypervisor.qemu.hot_plug_vfio=\"no-port\"";
        let numa = "hypervisor.qemu.enable_numa=false";
        let ports = |count: u32| format!("hypervisor.qemu.pcie_root_port={count}");
        let go = [
            "agent.kata.dial_timeout=1980",
            "runtime.create_container_timeout=1980",
        ];
        let rust = [
            "agent.kata.create_container_timeout=1980",
            "agent.kata.dial_timeout_ms=1000",
            "agent.kata.reconnect_timeout_ms=1980000",
        ];
        let rows: [(&str, Runtime, KataVersion, Vec<&str>, u32); 8] = [
            (
                PLAIN,
                Runtime::Go,
                (3, 20),
                [&go[..], &[cold, hot, mode]].concat(),
                12,
            ),
            (
                PLAIN,
                Runtime::Go,
                (3, 24),
                [&go[..], &[cold, hot, mode, socket]].concat(),
                12,
            ),
            (
                PLAIN,
                Runtime::Go,
                (4, 0),
                [&go[..], &[cold, hot, mode, socket]].concat(),
                12,
            ),
            (
                PLAIN,
                Runtime::Go,
                (4, 1),
                [&go[..], &[cold, hot, mode, socket, numa]].concat(),
                12,
            ),
            (
                SNP,
                Runtime::Go,
                (4, 1),
                [&go[..], &[cold, mode, socket, numa]].concat(),
                0,
            ),
            (
                PLAIN,
                Runtime::Rust,
                (3, 24),
                [&rust[..], &[cold, mode]].concat(),
                12,
            ),
            (
                PLAIN,
                Runtime::Rust,
                (4, 1),
                [&rust[..], &[cold, mode, socket]].concat(),
                12,
            ),
            (
                SNP,
                Runtime::Rust,
                (4, 1),
                [&rust[..], &[cold, mode, socket]].concat(),
                12,
            ),
        ];
        for (class, runtime, version, expected, count) in rows {
            let mut expected: Vec<String> = expected.into_iter().map(str::to_owned).collect();
            expected.push(ports(count));
            expected.sort();
            let made = made(class, runtime, version, None);
            assert_eq!(
                keys(&made.text),
                expected,
                "{class} {runtime:?} {version:?}"
            );
            let asks = expected.iter().any(|key| key == socket);
            assert_eq!(made.warnings.is_empty(), asks, "{:?}", made.warnings);
        }
    }

    #[test]
    fn the_launcher_stands_in_qemus_place() {
        let made = made(
            SNP,
            Runtime::Go,
            (4, 1),
            Some("/opt/km/bin/kata-manager-qemu"),
        );
        let document: DocumentMut = made.text.parse().expect("it is TOML");
        let qemu = &document["hypervisor"]["qemu"];
        assert_eq!(qemu["path"].as_str(), Some("/opt/km/bin/kata-manager-qemu"));
        let valid: Vec<_> = qemu["valid_hypervisor_paths"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        assert_eq!(
            valid,
            [
                "/opt/km/bin/kata-manager-qemu",
                "/opt/kata/bin/qemu-system-x86_64-snp-experimental"
            ]
        );
    }

    #[test]
    fn ports_are_as_many_as_the_node_needs_and_kata_makes() {
        let provider = Provider::default();
        for (functions, expected) in [(0, 8), (9, 9), (16, 16), (40, 16)] {
            let facts = Facts {
                provider: &provider,
                version: (4, 1),
                sizing: Sizing {
                    functions,
                    timeout_seconds: 1200,
                },
                launcher: None,
            };
            let made = drop_in(crate::find(PLAIN).expect("a class"), &facts);
            assert!(
                made.text
                    .contains(&format!("pcie_root_port = {expected}\n")),
                "{}",
                made.text
            );
            assert_eq!(made.warnings.is_empty(), functions <= 16);
        }
    }
}
