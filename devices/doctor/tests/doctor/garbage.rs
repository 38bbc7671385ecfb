//! Garbage in any of the files that are read ends nothing, and is never a success.

use crate::support::{GPU, PORT, Place, RELEASE, gpu, port};
use km_doctor::{Case, Check, Finding, State, examine};
use proptest::prelude::*;

use Check::*;

/// Which checks stand on which file. Where a check needs something else to be missing before it asks a file, [`broken`] takes that
/// away.
fn files() -> Vec<(String, Vec<Check>)> {
    let device = |address: &str, file: &str| format!("{address}|{file}");
    vec![
        (
            device(GPU, "modalias"),
            vec![Devices, BarSpace, Drivers, Acs, Groups],
        ),
        (device(GPU, "resource"), vec![BarSpace]),
        (device(PORT, "config"), vec![Acs]),
        ("/proc/cmdline".to_owned(), vec![Acs]),
        ("/proc/cpuinfo".to_owned(), vec![Kvm]),
        ("/proc/sys/kernel/osrelease".to_owned(), vec![VfioModules]),
        (
            format!("/lib/modules/{RELEASE}/modules.dep"),
            vec![VfioModules],
        ),
        (
            "/sys/module/kvm_amd/parameters/sev_snp".to_owned(),
            vec![SevSnp],
        ),
        ("/sys/module/kvm_intel/parameters/tdx".to_owned(), vec![Tdx]),
        ("/proc/812/comm".to_owned(), vec![Memlock]),
        ("/proc/812/limits".to_owned(), vec![Memlock]),
        ("/proc/812/status".to_owned(), vec![Memlock]),
        ("/proc/900/comm".to_owned(), vec![KubeletTimeout]),
        ("/proc/900/cmdline".to_owned(), vec![KubeletTimeout]),
        (
            "/var/lib/kubelet/config.yaml".to_owned(),
            vec![KubeletTimeout],
        ),
    ]
}

/// A host where every check must ask its files: nothing is loaded, the group is shared, memory is limited.
fn broken() -> Place {
    let card = km_tests_sysfs::device("0000:02:00.0", (0x8086, 0x1572), 0x02_0000)
        .under("pci0000:00", &[PORT])
        .group(12);
    let place = Place::with(vec![port(), gpu().vfio(0), card]);
    for gone in [
        "/dev/kvm",
        "/dev/iommu",
        "/sys/module/vfio_pci",
        "/sys/module/vfio_iommu_type1",
    ] {
        place.remove(gone);
    }
    let limit = "Max locked memory         8388608              8388608              bytes\n";
    place.file("/proc/812/limits", limit);
    place
}

/// Bytes that are not, by chance, an answer.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..600),
        "\\PC{0,200}".prop_map(String::into_bytes),
        "[0-9a-fx: \\n]{0,300}".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 4096..4100),
    ];
    bytes.prop_filter("an answer", |bytes| {
        let text = String::from_utf8_lossy(bytes);
        !matches!(text.trim(), "Y" | "1")
    })
}

/// Puts bytes in a file's place and what was there back.
fn with_bytes<T>(place: &Place, file: &str, bytes: &[u8], look: impl FnOnce() -> T) -> T {
    let path = match file.split_once('|') {
        Some((address, name)) => place.path(&format!("{}/{name}", place.sys(address))),
        None => place.path(file),
    };
    let before = std::fs::read(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let seen = look();
    std::fs::write(&path, before).unwrap();
    seen
}

/// The checks among these that find that all is well.
fn content(place: &Place, checks: &[Check]) -> Vec<Finding> {
    let mut findings = place.examine();
    findings.retain(|finding| checks.contains(&finding.check) && finding.state == State::Ok);
    findings
}

fn config() -> ProptestConfig {
    ProptestConfig::with_cases(200)
}

#[test]
fn in_one_file() {
    let (place, files) = (broken(), files());
    proptest!(config(), |(bytes in garbage(), at in any::<prop::sample::Index>())| {
        let (file, checks) = at.get(&files);
        let found = with_bytes(&place, file, &bytes, || content(&place, checks));
        prop_assert!(found.is_empty(), "{file}: {found:#?}");
    });
}

#[test]
fn in_every_file() {
    let (place, files) = (broken(), files());
    let checks: Vec<Check> = files
        .iter()
        .flat_map(|(_, checks)| checks.clone())
        .collect();
    // The device is found by its modalias, which so stays: without it nothing else would be read.
    let rest: Vec<&str> = files
        .iter()
        .skip(1)
        .map(|(file, _)| file.as_str())
        .collect();
    let devices = [Devices, Drivers, Groups];
    let checks: Vec<Check> = checks
        .into_iter()
        .filter(|check| !devices.contains(check))
        .collect();
    proptest!(config(), |(bytes in garbage())| {
        for file in &rest {
            let path = match file.split_once('|') {
                Some((address, name)) => place.path(&format!("{}/{name}", place.sys(address))),
                None => place.path(file),
            };
            std::fs::write(path, &bytes).unwrap();
        }
        let found = content(&place, &checks);
        prop_assert!(found.is_empty(), "{found:#?}");
    });
}

#[test]
fn in_katas_version() {
    let place = Place::good();
    let host = place.look();
    proptest!(config(), |(text in "[^0-9]{0,40}")| {
        let mut software = place.software.clone();
        software.kata.version.found = km_doctor::fact::Found::Is(text);
        let findings = examine(Case {
            host: &host,
            software: &software,
            wants: &place.wants,
        });
        let kata = findings.iter().find(|finding| finding.check == Kata).unwrap();
        prop_assert_eq!(kata.state, State::CouldNotCheck);
    });
}
