//! Plans as a whole: every one that is made keeps the rules, whatever was asked for; every refusal is one of words.

use std::collections::{BTreeMap, BTreeSet};

use km_topology::{
    Class, Device, Flavor, Guest, Kata, Layout, Plan, PortKind, Refusal, Request, Taken, Version,
    Writer, plan,
};
use proptest::prelude::*;

const GPU: u32 = 0x03_0200;
const AUDIO: u32 = 0x04_0300;
const NVSWITCH: u32 = 0x06_8000;

fn kata(flavor: Flavor, major: u16, minor: u16) -> Kata {
    Kata {
        flavor,
        version: Version::new(major, minor),
    }
}

fn device(number: u8, class: u32, numa_node: Option<u16>) -> Device {
    Device {
        address: format!("0000:{:02x}:00.{}", 0x20 + number / 2, number % 2),
        class,
        numa_node,
        iommu_group: Some(u32::from(number)),
        cdev: true,
    }
}

fn request(flavor: Flavor, count: u8) -> Request {
    Request {
        devices: (0..count)
            .map(|number| device(number, GPU, Some(u16::from(number) % 2)))
            .collect(),
        class: Class::default(),
        kata: kata(flavor, 4, 1),
        guest: Guest {
            memory_mib: 8192,
            vcpus: 4,
            numa: Vec::new(),
        },
        layout: None,
        writer: Writer::Kata { pool: 0 },
    }
}

fn refused(request: &Request) -> Refusal {
    plan(request).expect_err("there is no such plan")
}

#[test]
fn the_go_runtime_puts_each_function_behind_a_port() {
    let mut asked = request(Flavor::Go, 3);
    asked.devices[1].class = AUDIO;
    asked.devices.reverse();
    let made = plan(&asked).unwrap();
    assert_eq!(
        made.arguments().join(" "),
        "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off \
         -device pcie-root-port,id=rp1,bus=pcie.0,chassis=0,slot=1,multifunction=off \
         -device pcie-root-port,id=rp2,bus=pcie.0,chassis=0,slot=2,multifunction=off \
         -object iommufd,id=iommufdvfio-0 -object iommufd,id=iommufdvfio-1 -object iommufd,id=iommufdvfio-2 \
         -device vfio-pci,host=0000:20:00.0,id=vfio-0,bus=rp0,iommufd=iommufdvfio-0 \
         -device vfio-pci,host=0000:20:00.1,id=vfio-1,bus=rp1,iommufd=iommufdvfio-1 \
         -device vfio-pci,host=0000:21:00.0,id=vfio-2,bus=rp2,iommufd=iommufdvfio-2"
    );
    let buses: Vec<u8> = made.ports.iter().map(|port| port.bus).collect();
    assert_eq!(buses, [2, 3, 4], "Kata's own bridge has bus 1");
}

#[test]
fn runtime_rs_has_fixed_slots_and_leaves_audio_out() {
    let mut asked = request(Flavor::Rust, 3);
    asked.devices[1].class = AUDIO;
    let made = plan(&asked).unwrap();
    assert_eq!(
        made.arguments().join(" "),
        "-device pcie-root-port,id=rp0,addr=0x09,chassis=10,slot=9,bus=pcie.0,multifunction=off \
         -device pcie-root-port,id=rp1,addr=0x0a,chassis=11,slot=10,bus=pcie.0,multifunction=off \
         -object iommufd,id=iommufdrp0 -object iommufd,id=iommufdrp1 \
         -device vfio-pci,host=0000:20:00.0,bus=rp0,addr=0x0,iommufd=iommufdrp0 \
         -device vfio-pci,host=0000:21:00.0,bus=rp1,addr=0x0,iommufd=iommufdrp1"
    );
    assert_eq!(made.skipped.len(), 1);
    assert_eq!(made.devices[1].guest_path.as_deref(), Some("0a/00"));
    assert_eq!(made.told.enable_numa, None);
}

#[test]
fn each_numa_node_has_an_expander() {
    let mut asked = request(Flavor::Go, 4);
    asked.guest.numa = vec![0, 1];
    let made = plan(&asked).unwrap();
    assert_eq!(made.layout, Layout::Numa);
    let text = made.arguments().join(" ");
    assert!(
        text.starts_with(
            "-device pxb-pcie,id=pxb-numa0,bus=pcie.0,bus_nr=32,numa_node=0 \
             -device pxb-pcie,id=pxb-numa1,bus=pcie.0,bus_nr=64,numa_node=1 \
             -device pcie-root-port,id=rp-numa0-0,bus=pxb-numa0,chassis=10,slot=0,multifunction=off"
        ),
        "{text}"
    );
    assert!(
        text.contains("host=0000:20:00.1,id=vfio-1,bus=rp-numa1-0"),
        "{text}"
    );
    assert_eq!(made.told.enable_numa, Some(true));
}

#[test]
fn a_switch_is_planned_where_kata_emits_one() {
    let mut asked = request(Flavor::Go, 2);
    asked.layout = Some(Layout::SwitchPort);
    let made = plan(&asked).unwrap();
    let text = made.arguments().join(" ");
    assert!(
        text.contains("-device x3130-upstream,id=swup0,bus=srp0 -device xio3130-downstream,id=swdp0,bus=swup0,chassis=2,slot=0"),
        "{text}"
    );
    assert_eq!(
        (made.told.cold_plug_vfio, made.told.pcie_switch_port),
        ("switch-port", Some(2))
    );
    asked.kata.flavor = Flavor::Rust;
    assert!(matches!(refused(&asked), Refusal::Layout { .. }));
}

#[test]
fn what_would_not_come_out_is_refused_with_what_to_do() {
    let mut wrong = Vec::new();
    let mut case = |word: &'static str, change: &dyn Fn(&mut Request)| {
        let mut asked = request(Flavor::Go, 2);
        change(&mut asked);
        wrong.push((word, refused(&asked).to_string()));
    };
    case("name PCI addresses", &|r| r.devices.clear());
    case("no PCI address", &|r| {
        r.devices[0].address = "41:00.0,x=y".to_owned()
    });
    case("no PCI address", &|r| {
        r.devices[0].address = "0000:41:20.0".to_owned()
    });
    case("named twice", &|r| r.devices[0] = r.devices[1].clone());
    case("intel_iommu=on", &|r| r.devices[0].iommu_group = None);
    case("CONFIG_VFIO_DEVICE_CDEV", &|r| {
        r.devices[0].cdev = false;
        r.class.confidential = true;
    });
    case("CONFIG_VFIO_DEVICE_CDEV", &|r| {
        r.devices[0].cdev = false;
        r.kata.flavor = Flavor::Rust;
    });
    case("3.24 or later", &|r| r.kata.version = Version::new(3, 23));
    case("makes 16 at most", &|r| {
        r.devices = request(Flavor::Go, 17).devices
    });
    case("lower pcie_root_port", &|r| {
        r.writer = Writer::Kata { pool: 17 }
    });
    case("Kata 4.1 or later", &|r| {
        r.devices[0].class = NVSWITCH;
        r.kata.version = Version::new(4, 0);
    });
    case("the guest has none", &|r| r.layout = Some(Layout::Numa));
    case("emits no expander", &|r| {
        r.layout = Some(Layout::Numa);
        r.kata.version = Version::new(4, 0);
    });
    case("wraps to 0", &|r| r.guest.numa = (0..8).collect());
    case("set its numa_node", &|r| {
        r.guest.numa = vec![0, 1];
        r.devices[0].numa_node = None;
    });
    case("add it to numa_mapping", &|r| {
        r.guest.numa = vec![0, 1];
        r.devices[0].numa_node = Some(3);
    });
    case("expanders already", &|r| {
        r.guest.numa = vec![0, 1];
        r.writer = Writer::Launcher(Taken {
            expanders: true,
            ..Taken::default()
        });
    });
    case("left of pcie.0", &|r| {
        r.writer = Writer::Launcher(Taken {
            slots: 29,
            ..Taken::default()
        });
    });
    case("fewer devices", &|r| {
        r.writer = Writer::Launcher(Taken {
            buses: 254,
            ..Taken::default()
        });
    });
    // Slots 9 to 30 of pcie.0: 31 is the machine's.
    case("makes 22 at most", &|r| *r = request(Flavor::Rust, 23));
    case("emits no switch", &|r| {
        r.layout = Some(Layout::SwitchPort);
        r.kata.flavor = Flavor::Rust;
    });
    case("emits no switch", &|r| {
        r.layout = Some(Layout::SwitchPort);
        r.writer = Writer::Launcher(Taken::default());
    });
    case("emits no expander", &|r| {
        r.layout = Some(Layout::Numa);
        r.kata.flavor = Flavor::Rust;
    });
    // Bus numbers below an expander end where the next begins; those of pcie.0 where the first does.
    case("needs bus numbers up to 64, and 63 is its last", &|r| {
        r.devices = (0..32).map(|number| device(number, GPU, Some(0))).collect();
        r.guest.numa = vec![0, 1];
        r.writer = Writer::Launcher(Taken::default());
    });
    case(
        "pcie.0 needs bus numbers up to 32, and 31 is its last",
        &|r| {
            r.guest.numa = vec![0, 1];
            r.writer = Writer::Launcher(Taken {
                buses: 32,
                ..Taken::default()
            });
        },
    );
    case(
        "pcie.0 needs bus numbers up to 256, and 255 is its last",
        &|r| {
            r.writer = Writer::Launcher(Taken {
                buses: 254,
                ..Taken::default()
            });
        },
    );
    assert_eq!(wrong.len(), 26);
    for (word, message) in wrong {
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn the_limits_themselves_are_reached() {
    assert_eq!(plan(&request(Flavor::Go, 16)).unwrap().ports.len(), 16);
    let rust = plan(&request(Flavor::Rust, 22)).unwrap();
    assert_eq!(rust.ports.last().and_then(|port| port.addr), Some(30));
    let mut asked = request(Flavor::Go, 2);
    asked.writer = Writer::Launcher(Taken {
        buses: 253,
        ..Taken::default()
    });
    let last = plan(&asked).unwrap().ports.last().map(|port| port.bus);
    assert_eq!(last, Some(255));
    asked.writer = Writer::Launcher(Taken::default());
    asked.guest.numa = (0..7).collect();
    asked.devices = (0..31).map(|number| device(number, GPU, Some(6))).collect();
    let made = plan(&asked).unwrap();
    assert_eq!(made.expanders.last().map(|last| last.last_bus), Some(255));
    assert_eq!(made.ports.last().map(|port| port.bus), Some(255));
}

#[test]
fn confidential_guests_wait_longer() {
    let mut asked = request(Flavor::Go, 8);
    asked.guest.memory_mib = 1 << 20;
    let plain = plan(&asked).unwrap().told.timeout_seconds;
    asked.class.confidential = true;
    let confidential = plan(&asked).unwrap().told.timeout_seconds;
    assert!(
        confidential > plain && plain >= 1200,
        "{confidential} {plain}"
    );
}

/// The rules that every plan keeps.
fn sound(asked: &Request, made: &Plan) {
    let mut ids = BTreeSet::new();
    let named = made.ports.iter().map(|port| &port.id);
    let named = named.chain(made.expanders.iter().map(|expander| &expander.id));
    let named = named.chain(made.switches.iter().map(|switch| &switch.id));
    let named = named.chain(made.iommufd.iter().map(|object| &object.id));
    for id in named.chain(made.devices.iter().map(|device| &device.id)) {
        assert!(ids.insert(id), "{id} twice");
    }
    let mut buses = BTreeSet::from([0_u8]);
    let numbers = made.expanders.iter().map(|expander| expander.bus);
    let numbers = numbers.chain(made.switches.iter().map(|switch| switch.bus));
    for bus in numbers.chain(made.ports.iter().map(|port| port.bus)) {
        assert!(buses.insert(bus), "bus {bus} twice");
    }
    let mut slots = BTreeSet::new();
    let mut addresses = BTreeMap::<_, BTreeSet<u8>>::new();
    for port in &made.ports {
        assert!(slots.insert((port.chassis, port.slot)), "{port:?}");
        if let Some(addr) = port.addr {
            assert!((1..31).contains(&addr), "{port:?}");
            assert!(addresses.entry(&port.parent).or_default().insert(addr));
        }
        let range = match made.expanders.iter().find(|e| e.id == port.parent) {
            Some(expander) => expander.bus..=expander.last_bus,
            None => 0..=made.expanders.first().map_or(255, |first| first.bus - 1),
        };
        assert!(range.contains(&port.bus), "{port:?}");
    }
    for pair in made.expanders.windows(2) {
        assert!(pair[0].last_bus < pair[1].bus);
    }
    let mut taken = BTreeSet::new();
    for device in &made.devices {
        assert!(
            taken.insert(&device.port),
            "two devices behind {}",
            device.port
        );
        let port = made.port(&device.port).expect("its port is planned");
        assert!(port.kind == PortKind::Downstream || made.layout != Layout::SwitchPort);
        if made.layout == Layout::Numa {
            let expander = made
                .expanders
                .iter()
                .find(|e| e.id == port.parent)
                .expect("its expander is planned");
            assert_eq!(Some(expander.host_node), device.host_node);
        }
        if let Some(object) = &device.iommufd {
            assert!(made.iommufd.iter().any(|known| known.id == *object));
        }
    }
    assert_eq!(made.devices.len() + made.skipped.len(), asked.devices.len());
    if let (Writer::Launcher(taken), Some(first)) = (&asked.writer, made.expanders.first()) {
        assert!(taken.buses < u16::from(first.bus), "{taken:?} {first:?}");
    }
    if let Writer::Launcher(taken) = &asked.writer {
        assert!(taken.chassis.is_disjoint(&slots));
    }
    assert_eq!(made.arguments().len() % 2, 0);
}

fn devices() -> impl Strategy<Value = Vec<Device>> {
    let class =
        prop_oneof![6 => Just(GPU), 2 => Just(AUDIO), 1 => Just(NVSWITCH), 1 => Just(0x06_0400)];
    let one = (
        class,
        prop::option::weighted(0.9, 0_u16..4),
        prop::bool::weighted(0.9),
    );
    prop::collection::vec(one, 0..26).prop_map(|all| {
        all.into_iter()
            .zip(0..)
            .map(|((class, numa, cdev), number)| Device {
                cdev,
                ..device(number, class, numa)
            })
            .collect()
    })
}

fn writer() -> impl Strategy<Value = Writer> {
    let taken = (
        0_usize..34,
        prop::collection::btree_set((120_u8..136, 0_u16..4), 0..6),
        0_u16..260,
        prop::bool::weighted(0.1),
    );
    prop_oneof![
        (0_u32..20).prop_map(|pool| Writer::Kata { pool }),
        taken.prop_map(
            |(slots, chassis, buses, expanders)| Writer::Launcher(Taken {
                slots,
                chassis,
                buses,
                expanders,
            })
        ),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    let layout = prop::option::of(prop_oneof![
        Just(Layout::RootPort),
        Just(Layout::SwitchPort),
        Just(Layout::Numa)
    ]);
    let flavor = prop_oneof![Just(Flavor::Go), Just(Flavor::Rust)];
    let numa = prop::collection::vec(0_u16..4, 0..9);
    (
        devices(),
        any::<bool>(),
        flavor,
        prop_oneof![1 => Just((3, 24)), 1 => Just((4, 0)), 3 => Just((4, 1))],
        (0_u64..1 << 42, numa),
        layout,
        writer(),
    )
        .prop_map(
            |(
                devices,
                confidential,
                flavor,
                (major, minor),
                (memory_mib, numa),
                layout,
                writer,
            )| {
                Request {
                    devices,
                    class: Class { confidential },
                    kata: kata(flavor, major, minor),
                    guest: Guest {
                        memory_mib,
                        vcpus: 4,
                        numa,
                    },
                    layout,
                    writer,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]
    #[test]
    fn no_plan_collides(asked in requests()) {
        match plan(&asked) {
            Ok(made) => {
                sound(&asked, &made);
                // The same question has the same answer, in whatever order devices are named.
                let mut other = asked.clone();
                other.devices.reverse();
                prop_assert_eq!(plan(&other), Ok(made));
            }
            Err(refusal) => prop_assert!(refusal.to_string().len() > 20),
        }
    }
}
