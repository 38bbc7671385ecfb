use km_host::Root;
use km_tests_sysfs::{Machine, shapes};
use proptest::prelude::*;

use super::*;
use crate::look::{WITHIN, look};
use crate::table::Containerd;
use km_topology::{Kata, Version};

fn case(flavor: Flavor, major: u16, minor: u16) -> Case {
    Case {
        kata: Kata {
            flavor,
            version: Version { major, minor },
        },
        confidential: false,
        containerd: Containerd::V2,
    }
}

const GO: (Flavor, u16, u16) = (Flavor::Go, 3, 24);
const OLD: (Flavor, u16, u16) = (Flavor::Go, 3, 2);
const RUST: (Flavor, u16, u16) = (Flavor::Rust, 4, 1);

/// A machine, with a CDI device for each GPU and NVSwitch by its address: its group's node, or its own.
struct Place {
    machine: Machine,
    cdev: bool,
}

impl Place {
    fn new(machine: Machine) -> Place {
        Place {
            machine,
            cdev: false,
        }
    }

    fn catalogue(&self) -> Catalogue {
        let devices = self.machine.devices.iter();
        let mut catalogue: Catalogue = devices
            .filter_map(|device| {
                let node = match (self.cdev, device.vfio, device.group) {
                    (true, Some(number), _) => format!("{CDEVS}vfio{number}"),
                    (false, _, Some(group)) => format!("/dev/vfio/{group}"),
                    _ => return None,
                };
                let nodes = vec![node, "/dev/vfio/vfio".to_owned()];
                Some((name(&device.address), nodes))
            })
            .collect();
        catalogue.insert("nvidia.com/twice=0".to_owned(), Vec::new());
        catalogue.insert("vendor.com/nic=0".to_owned(), vec!["/dev/nic".to_owned()]);
        catalogue
    }

    fn decide_with(
        &self,
        asked: &Asked,
        case: Case,
        policy: Companions,
        change: impl FnOnce(&mut Seen),
    ) -> Result<Decision, Refusal> {
        let dir = tempfile::tempdir().unwrap();
        self.machine.write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        let wanted = wanted(asked, case, &self.catalogue())?;
        let mut seen = look(&root, &wanted, &[], WITHIN).unwrap();
        change(&mut seen);
        decide(asked, &wanted, case, policy, &seen)
    }

    fn decide(
        &self,
        asked: &Asked,
        (flavor, major, minor): (Flavor, u16, u16),
    ) -> Result<Decision, Refusal> {
        self.decide_with(
            asked,
            case(flavor, major, minor),
            Companions::Refuse,
            |_| {},
        )
    }
}

fn name(address: &str) -> String {
    format!("nvidia.com/pgpu={address}")
}

fn names(addresses: &[&str]) -> Vec<String> {
    addresses.iter().map(|address| name(address)).collect()
}

fn given(plugin: &[&str], claims: &[&str]) -> Asked {
    Asked {
        given: Given::Pod {
            plugin: names(plugin),
            claims: names(claims),
            serves_get: true,
        },
        spec: Vec::new(),
        annotated: Vec::new(),
    }
}

fn addresses(decision: &Decision) -> Vec<&str> {
    let devices = decision.devices.iter();
    devices.map(|device| device.address.as_str()).collect()
}

/// GPUs of [`shapes::eight_gpus`] and the node of the first.
const FIRST: &str = "0000:13:00.0";
const SECOND: &str = "0000:14:00.0";
const SWITCH: &str = "0000:15:00.0";
const NODE: &str = "/dev/vfio/34";

fn big() -> Place {
    Place::new(shapes::eight_gpus())
}

#[test]
fn what_kata_finds_is_checked_and_what_it_does_not_is_written() {
    for (asked, kata, write) in [
        (given(&[FIRST], &[]), GO, &[][..]),
        (given(&[FIRST], &[]), RUST, &[]),
        (given(&[FIRST], &[]), OLD, &[NODE]),
        (given(&[], &[FIRST]), GO, &[NODE]),
        (given(&[], &[FIRST]), RUST, &[NODE]),
    ] {
        let decision = big().decide(&asked, kata).unwrap();
        assert_eq!(addresses(&decision), [FIRST], "{asked:?}");
        assert_eq!(decision.write, write, "{asked:?}");
        assert_eq!(decision.devices[0].iommu_group, Some(34));
        assert_eq!(decision.devices[0].numa_node, Some(0));
    }
    let nothing = big().decide(&given(&[], &[]), GO).unwrap();
    assert_eq!(nothing, Decision::default());
}

#[test]
fn names_lead_to_specs() {
    let mut asked = given(&[], &[]);
    let mut plugin = |name: &str| {
        asked.given = Given::Pod {
            plugin: vec![name.to_owned()],
            claims: Vec::new(),
            serves_get: true,
        };
        big().decide(&asked, GO)
    };
    for missing in ["nvidia.com/pgpu=99", "nvidia.com/twice=0"] {
        assert!(
            matches!(plugin(missing), Err(Refusal::NoSpec { .. })),
            "{missing}"
        );
    }
    // Of other vendors.
    for theirs in ["vendor.com/nic=0", "vendor.com/unknown=1"] {
        assert_eq!(plugin(theirs), Ok(Decision::default()), "{theirs}");
    }
}

#[test]
fn annotations_count_only_where_there_is_no_kubelet() {
    let annotated = |given, annotated: &[&str]| Asked {
        given,
        spec: Vec::new(),
        annotated: names(annotated),
    };
    let decision = big()
        .decide(&annotated(Given::NoKubelet, &[FIRST]), GO)
        .unwrap();
    assert_eq!(
        (addresses(&decision), decision.write.len()),
        (vec![FIRST], 0)
    );
    let decision = big()
        .decide(&annotated(Given::NoKubelet, &[FIRST]), RUST)
        .unwrap();
    assert_eq!(decision.write, [NODE]);
    let mine = given(&[FIRST], &[]).given;
    let repeated = annotated(mine.clone(), &[FIRST]);
    assert_eq!(addresses(&big().decide(&repeated, GO).unwrap()), [FIRST]);
    assert!(matches!(
        big().decide(&repeated, OLD),
        Err(Refusal::Twice { .. })
    ));
    let stolen = annotated(mine, &[FIRST, SECOND]);
    let refusal = big().decide(&stolen, GO).unwrap_err();
    assert!(refusal.to_string().contains(SECOND), "{refusal}");
    let none = annotated(given(&[], &[]).given, &[FIRST]);
    assert!(matches!(
        big().decide(&none, RUST),
        Err(Refusal::NotGiven { .. })
    ));
}

#[test]
fn never_twice() {
    let mut asked = given(&[FIRST], &[]);
    asked.spec = vec![NODE.to_owned()];
    assert!(matches!(
        big().decide(&asked, GO),
        Err(Refusal::Twice { .. })
    ));
    for kata in [RUST, OLD] {
        let decision = big().decide(&asked, kata).unwrap();
        assert_eq!(
            (addresses(&decision), decision.write.len()),
            (vec![FIRST], 0)
        );
    }
    // By its group's node and its own.
    asked.spec = vec![format!("{CDEVS}vfio0")];
    assert!(matches!(
        big().decide(&asked, RUST),
        Err(Refusal::Twice { .. })
    ));
    let mixed = given(&[FIRST], &[SECOND]);
    assert!(matches!(
        big().decide(&mixed, GO),
        Err(Refusal::Table { .. })
    ));
    assert_eq!(
        addresses(&big().decide(&mixed, RUST).unwrap()),
        [FIRST, SECOND]
    );
}

#[test]
fn a_kubelet_without_get_will_not_do_for_a_kata_that_asks() {
    let mut asked = given(&[FIRST], &[]);
    if let Given::Pod { serves_get, .. } = &mut asked.given {
        *serves_get = false;
    }
    assert_eq!(big().decide(&asked, GO), Err(Refusal::NoGet));
    assert_eq!(big().decide(&asked, OLD).unwrap().write, [NODE]);
}

#[test]
fn confidential_guests() {
    let confidential = Case {
        confidential: true,
        ..case(Flavor::Go, 4, 1)
    };
    let decide = |cdev, asked: &Asked| {
        let place = Place { cdev, ..big() };
        place.decide_with(asked, confidential, Companions::Add, |_| {})
    };
    let plugin = given(&[FIRST], &[]);
    assert!(matches!(
        decide(false, &plugin),
        Err(Refusal::NeedsIommufd { .. })
    ));
    let decision = decide(true, &plugin).unwrap();
    assert_eq!(decision.devices[0].cdev.as_deref(), Some("vfio0"));
    assert_eq!(decision.write, [""; 0]);
    let claimed = decide(true, &given(&[], &[FIRST]));
    assert!(matches!(claimed, Err(Refusal::Table { .. })), "{claimed:?}");
}

#[test]
fn what_is_not_fit_is_refused() {
    let first: Address = FIRST.parse().unwrap();
    let problem = |change: &dyn Fn(&mut Seen)| {
        let asked = given(&[FIRST], &[]);
        let refused = big().decide_with(&asked, case(Flavor::Go, 4, 1), Companions::Refuse, change);
        refused.unwrap_err().to_string()
    };
    let function = |seen: &mut Seen, change: fn(&mut Glance)| {
        change(seen.functions.get_mut(&first).unwrap());
    };
    for (expected, change) in [
        (
            "in use by sandbox x",
            &(|seen: &mut Seen| {
                seen.used.insert(first, "sandbox x".to_owned());
            }) as &dyn Fn(&mut Seen),
        ),
        ("answers nothing (all ones)", &|seen| {
            function(seen, |f| f.dead = true)
        }),
        ("the driver nvidia has it", &|seen| {
            function(seen, |f| f.driver = Some("nvidia".to_owned()))
        }),
        ("no driver has it", &|seen| {
            function(seen, |f| f.driver = None)
        }),
        ("no IOMMU group", &|seen| {
            function(seen, |f| f.iommu_group = None)
        }),
        ("which lists no function", &|seen| seen.groups.clear()),
        ("behind which there is no device", &|seen| {
            seen.behind.clear()
        }),
    ] {
        let said = problem(change);
        assert!(said.contains(expected), "{said}");
    }
    // A network card of the same group still has its driver.
    let mut shared = shapes::shared_group();
    shared.devices[1].driver = Some("vfio-pci".to_owned());
    shared.devices[2].driver = Some("vfio-pci".to_owned());
    // Kata attaches all of a group, so none may be without a driver.
    let said = Place::new(shared.clone()).decide(&given(&["0000:01:00.0"], &[]), GO);
    assert!(said.unwrap_err().to_string().contains("no driver has it"));
    shared.devices[3].driver = Some("vfio-pci".to_owned());
    let asked = given(&["0000:01:00.0"], &[]);
    assert_eq!(
        Place::new(shared.clone())
            .decide(&asked, GO)
            .unwrap()
            .devices
            .len(),
        3
    );
    shared.devices[3].driver = Some("i40e".to_owned());
    let said = Place::new(shared)
        .decide(&asked, GO)
        .unwrap_err()
        .to_string();
    assert!(said.contains("the driver i40e"), "{said}");
}

#[test]
fn companions_go_along_or_the_pod_does_not_start() {
    let all: Vec<String> = shapes::eight_gpus()
        .devices
        .iter()
        .filter(|device| device.class == 0x03_0200)
        .map(|device| device.address.clone())
        .collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let asked = given(&all, &[]);
    let said = big().decide(&asked, GO).unwrap_err().to_string();
    assert!(said.contains("the pod has all 8 GPUs"), "{said}");
    let add = |(flavor, major, minor)| {
        big().decide_with(&asked, case(flavor, major, minor), Companions::Add, |_| {})
    };
    let decision = add(RUST).unwrap();
    assert_eq!((decision.devices.len(), decision.write.len()), (12, 4));
    assert!(addresses(&decision).contains(&SWITCH));
    assert!(matches!(add(GO), Err(Refusal::Companion { .. })));
    // By devices of their own, too.
    let place = Place {
        cdev: true,
        ..big()
    };
    let decision = place
        .decide_with(&asked, case(Flavor::Rust, 4, 1), Companions::Add, |_| {})
        .unwrap();
    assert_eq!((decision.devices.len(), decision.write.len()), (12, 4));
    assert!(decision.write.iter().all(|node| node.starts_with(CDEVS)));
    assert!(decision.devices.iter().all(|device| device.cdev.is_some()));
    // Seven of eight may do without.
    assert_eq!(
        big()
            .decide(&given(&all[1..], &[]), GO)
            .unwrap()
            .devices
            .len(),
        7
    );

    // Two functions of one group, and the spec lists one of them alone.
    let mut shared = shapes::shared_group();
    shared.devices.truncate(3);
    for (number, device) in shared.devices.iter_mut().skip(1).enumerate() {
        device.driver = Some("vfio-pci".to_owned());
        device.vfio = Some(u32::try_from(number).unwrap());
    }
    let place = Place {
        machine: shared,
        cdev: true,
    };
    let asked = given(&["0000:01:00.0"], &[]);
    let said = place.decide(&asked, GO).unwrap_err().to_string();
    assert!(said.contains("0000:01:00.1 goes with"), "{said}");
    let decision = place
        .decide_with(&asked, case(Flavor::Rust, 4, 1), Companions::Add, |_| {})
        .unwrap();
    assert_eq!(decision.write, [format!("{CDEVS}vfio1")]);
}

/// All of [`shapes::eight_gpus`], by groups and by devices.
fn everything() -> &'static Seen {
    static SEEN: std::sync::LazyLock<Seen> = std::sync::LazyLock::new(|| {
        let dir = tempfile::tempdir().unwrap();
        big().machine.write(dir.path());
        let all = [
            big(),
            Place {
                cdev: true,
                ..big()
            },
        ]
        .map(|place| place.catalogue());
        let nodes = all
            .iter()
            .flat_map(|catalogue| catalogue.values())
            .flatten();
        let wanted: Vec<Wanted> = nodes
            .filter(|node| is_vfio_node(node))
            .map(|node| Wanted {
                source: Source::Plugin,
                name: String::new(),
                node: node.clone(),
            })
            .collect();
        look(&Root::new(dir.path()).unwrap(), &wanted, &[], WITHIN).unwrap()
    });
    &SEEN
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_for_is_right_or_refused(
        plugin in proptest::collection::vec(0_usize..12, 0..4),
        claims in proptest::collection::vec(0_usize..12, 0..3),
        spec in proptest::collection::vec(31_u32..54, 0..2),
        annotated in proptest::collection::vec(0_usize..12, 0..2),
        kubelet: bool, confidential: bool, cdev: bool, add: bool, rust: bool, version in 2_u16..6, used in 0_usize..12,
    ) {
        let place = Place { cdev, ..big() };
        let primaries: Vec<&str> = place.machine.devices.iter().filter(|device| device.vfio.is_some()).map(|device| device.address.as_str()).collect();
        let pick = |numbers: &[usize]| -> Vec<String> { numbers.iter().map(|number| name(primaries[*number])).collect() };
        let asked = Asked {
            given: match kubelet {
                true => Given::Pod { plugin: pick(&plugin), claims: pick(&claims), serves_get: true },
                false => Given::NoKubelet,
            },
            spec: spec.iter().map(|group| format!("/dev/vfio/{group}")).collect(),
            annotated: pick(&annotated),
        };
        let flavor = if rust { Flavor::Rust } else { Flavor::Go };
        let case = Case { confidential, ..case(flavor, version, 0) };
        let policy = if add { Companions::Add } else { Companions::Refuse };
        let busy: Address = primaries[used].parse().unwrap();
        let mut seen = everything().clone();
        seen.used.insert(busy, "somebody".to_owned());
        let decided = wanted(&asked, case, &place.catalogue())
            .and_then(|wanted| decide(&asked, &wanted, case, policy, &seen));
        if let Ok(decision) = decided {
            let got = addresses(&decision);
            let once: BTreeSet<&str> = got.iter().copied().collect();
            prop_assert_eq!(once.len(), got.len());
            prop_assert!(!once.contains(busy.to_string().as_str()));
            prop_assert!(decision.write.iter().all(|node| is_vfio_node(node) && !asked.spec.contains(node)));
            prop_assert!(!confidential || decision.write.is_empty());
            if let Given::Pod { plugin, claims, .. } = &asked.given {
                for name in plugin.iter().chain(claims) {
                    prop_assert!(once.contains(name.split_once('=').unwrap().1), "{name} was given and is not there");
                }
                for name in &asked.annotated {
                    prop_assert!(once.contains(name.split_once('=').unwrap().1));
                }
                // Nothing of what Kata takes from the kubelet is written.
                let catalogue = place.catalogue();
                if case.kata.cold_plugs() {
                    prop_assert!(plugin.iter().flat_map(|name| &catalogue[name]).all(|node| !decision.write.contains(node)));
                }
            }
        }
    }
}
