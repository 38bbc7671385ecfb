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

/// A Kata, as far as its configuration differs. Whoever plans topologies has the table of versions, and hands these on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kata {
    /// Its version.
    pub version: KataVersion,
    /// The first version of its runtime that asks the kubelet for a pod's devices.
    pub asks_kubelet_since: KataVersion,
    /// Whether it knows `enable_numa`.
    pub knows_numa: bool,
    /// The most ports that a configuration may ask for.
    pub ports_max: u32,
}

/// What goes into the drop-in besides the class.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Where Kata is, and which runtime.
    pub provider: &'a Provider,
    /// Which Kata it is.
    pub kata: Kata,
    /// What the node has.
    pub sizing: Sizing,
    /// Where the kubelet answers which devices a pod was given.
    pub kubelet_socket: &'a str,
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
}

const QEMU: &str = "hypervisor.qemu";
const AGENT: &str = "agent.kata";
const RUNTIME: &str = "runtime";
const POD_RESOURCES: &str = "pod_resource_api_sock";

const fn key(table: &'static str, name: &'static str, runtime: Option<Runtime>) -> Key {
    Key {
        table,
        name,
        runtime,
    }
}

/// Every key that is written, in order.
const KEYS: [Key; 13] = [
    key(QEMU, "path", None),
    key(QEMU, "valid_hypervisor_paths", None),
    key(QEMU, "cold_plug_vfio", None),
    key(QEMU, "hot_plug_vfio", Some(Runtime::Go)),
    key(QEMU, "pcie_root_port", None),
    key(QEMU, "enable_numa", None),
    key(AGENT, "dial_timeout", Some(Runtime::Go)),
    key(AGENT, "dial_timeout_ms", Some(Runtime::Rust)),
    key(AGENT, "reconnect_timeout_ms", Some(Runtime::Rust)),
    key(AGENT, "create_container_timeout", Some(Runtime::Rust)),
    key(RUNTIME, "create_container_timeout", Some(Runtime::Go)),
    key(RUNTIME, "vfio_mode", None),
    key(RUNTIME, POD_RESOURCES, None),
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
        if key
            .runtime
            .is_some_and(|only| only != facts.provider.runtime)
        {
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
    let (version, first) = (facts.kata.version, facts.kata.asks_kubelet_since);
    if version < first {
        warnings.push(format!(
            "{}: Kata {}.{} does not know {POD_RESOURCES}, so it does not ask the kubelet which devices a pod has; {}.{} is the first that does",
            kind.name, version.0, version.1, first.0, first.1
        ));
    }
    if facts.sizing.functions > facts.kata.ports_max {
        warnings.push(format!(
            "{}: the node has {} functions to give away, and Kata makes {} ports for a pod",
            kind.name, facts.sizing.functions, facts.kata.ports_max
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
        // An annotation that names QEMU itself would go round the launcher, so it is not among them.
        (QEMU, "valid_hypervisor_paths") => Array::from_iter([facts.launcher?]).into(),
        (QEMU, "cold_plug_vfio") => "root-port".into(),
        (QEMU, "hot_plug_vfio") => (!confidential).then_some("no-port")?.into(),
        (QEMU, "pcie_root_port") => i64::from(ports(kind, facts)).into(),
        (QEMU, "enable_numa") => facts.kata.knows_numa.then_some(false)?.into(),
        (AGENT, "dial_timeout") => seconds.into(),
        (AGENT, "dial_timeout_ms") => 1000.into(),
        (AGENT, "reconnect_timeout_ms") => (seconds * 1000).into(),
        (_, "create_container_timeout") => seconds.into(),
        (RUNTIME, "vfio_mode") => "guest-kernel".into(),
        (RUNTIME, POD_RESOURCES) => {
            let asks = facts.kata.version >= facts.kata.asks_kubelet_since;
            asks.then_some(facts.kubelet_socket)?.into()
        }
        _ => return None,
    })
}

/// Whether guests get NUMA nodes: the last of Kata's files that says so counts. `texts` are the configuration and the files of `config.d`
/// beside it, in order. One that is no TOML says nothing.
pub fn has_numa<'a>(texts: impl IntoIterator<Item = &'a str>) -> bool {
    let says = |text: &str| -> Option<bool> {
        let document: DocumentMut = text.parse().ok()?;
        let qemu = document.get("hypervisor")?.get("qemu")?;
        qemu.get("enable_numa")?.as_bool()
    };
    texts.into_iter().filter_map(says).last().unwrap_or(false)
}

/// `pcie_root_port`. The Go runtime makes as many as there are devices anyway, and ports that nothing is behind would change what a
/// confidential guest is measured as.
fn ports(kind: &ClassKind, facts: &Facts<'_>) -> u32 {
    match (facts.provider.runtime, kind.tee) {
        (Runtime::Go, Tee::Snp | Tee::Tdx) => 0,
        _ => facts.sizing.functions.clamp(PORTS, facts.kata.ports_max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kata(runtime: Runtime, version: KataVersion) -> Kata {
        let is_go = runtime == Runtime::Go;
        Kata {
            version,
            asks_kubelet_since: if is_go { (3, 24) } else { (4, 0) },
            knows_numa: is_go && version >= (4, 1),
            ports_max: 16,
        }
    }

    fn made(class: &str, runtime: Runtime, version: KataVersion, launcher: Option<&str>) -> DropIn {
        let provider = Provider {
            runtime,
            ..Provider::default()
        };
        let facts = Facts {
            provider: &provider,
            kata: kata(runtime, version),
            sizing: Sizing {
                functions: 12,
                timeout_seconds: 1980,
            },
            kubelet_socket: "/k/kubelet.sock",
            launcher,
        };
        drop_in(
            crate::find(class).expect("a class of the catalogue"),
            &facts,
        )
    }

    #[test]
    fn who_is_read_last_says_whether_there_are_numa_nodes() {
        let ours = made(PLAIN, Runtime::Go, (4, 1), None).text;
        let on = "[hypervisor.qemu]\nenable_numa = true\n";
        assert!(has_numa([on]));
        assert!(!has_numa([on, &ours]));
        assert!(has_numa([&ours, on]));
        assert!(has_numa([&ours, on, "[hypervisor.qemu]\nkernel = 1\n"]));
        for silent in [
            "",
            "hypervisor",
            "hypervisor = 1\n",
            "[hypervisor.qemu]\nenable_numa = \"yes\"\n",
        ] {
            assert!(!has_numa([silent]), "{silent}");
            assert!(has_numa([on, silent]), "{silent}");
        }
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
        let socket = "runtime.pod_resource_api_sock=\"/k/kubelet.sock\"";
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
    fn the_launcher_stands_in_qemus_place_and_changes_nothing_else() {
        const LAUNCHER: &str = "/opt/km/bin/kata-manager-qemu";
        let named = [
            format!("hypervisor.qemu.path=\"{LAUNCHER}\""),
            format!("hypervisor.qemu.valid_hypervisor_paths=[\"{LAUNCHER}\"]"),
        ];
        for class in crate::catalogue() {
            for (runtime, version) in [
                (Runtime::Go, (3, 20)),
                (Runtime::Go, (4, 1)),
                (Runtime::Rust, (3, 24)),
                (Runtime::Rust, (4, 1)),
            ] {
                let with = keys(&made(class.name, runtime, version, Some(LAUNCHER)).text);
                let without = keys(&made(class.name, runtime, version, None).text);
                // What a confidential guest is measured as stays: neither key reaches QEMU's arguments.
                let (new, same): (Vec<String>, Vec<String>) =
                    with.into_iter().partition(|key| !without.contains(key));
                assert_eq!(new, named, "{} {runtime:?} {version:?}", class.name);
                assert_eq!(same, without);
            }
        }
    }

    #[test]
    fn ports_are_as_many_as_the_node_needs_and_kata_makes() {
        let provider = Provider::default();
        for (functions, expected) in [(0, 8), (9, 9), (16, 16), (40, 16)] {
            let facts = Facts {
                provider: &provider,
                kata: kata(Runtime::Go, (4, 1)),
                sizing: Sizing {
                    functions,
                    timeout_seconds: 1200,
                },
                kubelet_socket: "/k/kubelet.sock",
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
