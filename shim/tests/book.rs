//! What the book tells people to look for is what the programs print: each message of its tables of symptoms is a part of one.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::PathBuf;
use std::time::Duration;

use km_podresources::Error as Kubelet;
use km_shim::decide::Refusal;
use km_shim::kubelet::AskError;
use km_shim::look::LookError;
use km_shim::prepare::PrepareError;
use km_shim::settings::{self, SettingsError};
use km_shim::table::Source;

/// One of each message that may end a start.
fn messages() -> Vec<String> {
    let name = || "nvidia.com/pgpu=0000:41:00.0".to_owned();
    let node = || "/dev/vfio/34".to_owned();
    let address = || "0000:41:00.0".parse().unwrap();
    let refusals = [
        Refusal::NoSpec {
            name: name(),
            source_: Source::Plugin,
        },
        Refusal::NotGiven { name: name() },
        Refusal::Table {
            name: name(),
            source_: Source::Claim,
            why: "a row's reason",
        },
        Refusal::Twice {
            node: node(),
            first: Source::Plugin,
            second: Source::Spec,
        },
        Refusal::NoGet,
        Refusal::NeedsIommufd { node: node() },
        Refusal::Nothing {
            name: name(),
            node: node(),
        },
        Refusal::Companion {
            address: address(),
            why: "it is in the IOMMU group of 0000:41:00.0".to_owned(),
            hint: String::new(),
        },
    ];
    let late = Kubelet::Timeout {
        call: "Get",
        socket: PathBuf::from("/kubelet.sock"),
        after: Duration::from_millis(settings::KUBELET_TIMEOUT_MS),
    };
    let no_pod = AskError::NoPod {
        namespace: "lab".to_owned(),
        name: "train".to_owned(),
    };
    let settings = SettingsError::Unreadable {
        handler: "kata-qemu-nvidia-gpu".to_owned(),
        path: "/etc/kata-manager/handlers/kata-qemu-nvidia-gpu.json".to_owned(),
        why: "No such file or directory".to_owned(),
    };
    let prepare = [
        PrepareError::NoSpec(PathBuf::from("/run/bundle")),
        PrepareError::Claim {
            path: "/run/kata-manager/sandboxes/x.json".to_owned(),
            problem: "EOF".to_owned(),
        },
        PrepareError::NoDevice { node: node() },
        PrepareError::Look(LookError::Late {
            within: km_shim::look::WITHIN,
            slowest: "0000:41:00.0".to_owned(),
            took: Duration::from_secs(14),
        }),
        PrepareError::Kubelet(no_pod),
    ];
    let mut all: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    all.extend(prepare.iter().map(ToString::to_string));
    let expanders = km_topology::Refusal::ExpandersThere;
    all.extend([
        late.to_string(),
        settings.to_string(),
        expanders.to_string(),
    ]);
    all
}

/// Words of messages that are made of what is found on the node: tests in `start.rs` and `become_qemu.rs` see the programs say them.
const SEEN_ELSEWHERE: &[&str] = &[
    include_str!("start.rs"),
    include_str!("become_qemu.rs"),
    include_str!("../src/decide/tests.rs"),
    include_str!("launch/wrong.rs"),
];

/// The first cells of the table that follows a heading, without their back quotes.
fn symptoms(page: &str, heading: &str) -> Vec<String> {
    let lines = page.lines().skip_while(|line| *line != heading);
    let rows = lines.skip_while(|line| !line.starts_with('|')).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .filter_map(|row| row.split('|').nth(1))
        .map(|cell| cell.trim().trim_matches('`').to_owned())
        .collect()
}

#[test]
fn each_symptom_in_the_book_is_what_is_printed() {
    let pages = [
        (
            include_str!("../../docs/src/shim.md"),
            "## When a pod does not start",
        ),
        (
            include_str!("../../docs/src/topology.md"),
            "### When a launch is refused",
        ),
    ];
    let messages = messages();
    for (page, heading) in pages {
        let symptoms = symptoms(page, heading);
        assert!(symptoms.len() > 4, "{heading}: {symptoms:?}");
        for symptom in symptoms {
            // `a ... b` stands for a message with something between.
            let parts: Vec<&str> = symptom.split("...").map(str::trim).collect();
            let has = |text: &str| parts.iter().all(|part| text.contains(part));
            assert!(
                messages.iter().any(|message| has(message))
                    || SEEN_ELSEWHERE.iter().any(|tests| has(tests)),
                "{heading}: nothing says {symptom:?}"
            );
        }
    }
}
