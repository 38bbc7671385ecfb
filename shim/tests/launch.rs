//! Launches as Kata writes them, right and wrong: what is refused and why, what is added, what is tuned.

use std::collections::BTreeSet;
use std::ffi::OsString;

use km_host::claims::Device;
use km_shim::launch::argv::Argv;
use km_shim::launch::check::{self, Wanted};
use km_shim::launch::inject::{self, Injected};
use km_shim::launch::tune;
use km_shim::launch::view::View;
use km_topology::{Flavor, Kata, Version};
use km_vfio::Address;

/// What both runtimes write before devices of the host.
const MACHINE: &str = "-name sandbox-abc -machine q35,accel=kvm -m 8192M,slots=10,maxmem=65536M -nodefaults -nographic --no-reboot \
    -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k \
    -device virtio-serial-pci,disable-modern=true,id=serial0 -object rng-random,id=rng0,filename=/dev/urandom \
    -device virtio-rng-pci,rng=rng0 -append root=/dev/vda1,ro -smp 1,cores=1";

/// The Go runtime, 3.24 to 4.1, with iommufd.
const GO: &str = "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off \
    -device pcie-root-port,id=rp1,bus=pcie.0,chassis=0,slot=1,multifunction=off \
    -object iommufd,id=iommufdvfio-a \
    -device vfio-pci,host=0000:21:00.0,id=vfio-a,x-pci-vendor-id=0x10de,x-pci-device-id=0x2321,bus=rp0,iommufd=iommufdvfio-a \
    -object iommufd,id=iommufdvfio-b \
    -device vfio-pci,host=0000:a1:00.0,id=vfio-b,x-pci-vendor-id=0x10de,x-pci-device-id=0x2321,bus=rp1,iommufd=iommufdvfio-b";

/// runtime-rs 4.x.
const RUST: &str = "-object iommufd,id=iommufdrp0 \
    -device pcie-root-port,id=rp0,addr=0x09,chassis=10,slot=9,bus=pcie.0,multifunction=off \
    -device pcie-root-port,id=rp1,addr=0x0a,chassis=11,slot=10,bus=pcie.0,multifunction=off \
    -device vfio-pci,host=0000:21:00.0,bus=rp0,addr=0x0,iommufd=iommufdrp0 -object iommufd,id=iommufdrp1 \
    -device vfio-pci,host=0000:a1:00.0,bus=rp1,addr=0x0,iommufd=iommufdrp1";

/// The Go runtime with `enable_numa`.
const NUMA: &str = "-object memory-backend-ram,id=numa-mem0,size=4096M,host-nodes=0,policy=bind -numa node,nodeid=0,memdev=numa-mem0,cpus=0 \
    -object memory-backend-ram,id=numa-mem1,size=4096M,host-nodes=1,policy=bind -numa node,nodeid=1,memdev=numa-mem1,cpus=1 \
    -device pxb-pcie,id=pxb-numa0,bus=pcie.0,bus_nr=32,numa_node=0 -device pxb-pcie,id=pxb-numa1,bus=pcie.0,bus_nr=64,numa_node=1 \
    -device pcie-root-port,id=rp-numa0-0,bus=pxb-numa0,chassis=10,slot=0,multifunction=off \
    -device pcie-root-port,id=rp-numa1-0,bus=pxb-numa1,chassis=11,slot=0,multifunction=off \
    -object iommufd,id=iommufdvfio-a -device vfio-pci,host=0000:21:00.0,id=vfio-a,bus=rp-numa0-0,iommufd=iommufdvfio-a \
    -object iommufd,id=iommufdvfio-b -device vfio-pci,host=0000:a1:00.0,id=vfio-b,bus=rp-numa1-0,iommufd=iommufdvfio-b";

/// The Go runtime with `cold_plug_vfio = "switch-port"` and groups.
const SWITCH: &str = "-device pcie-root-port,id=srp0,bus=pcie.0,chassis=1,slot=0,multifunction=off -device x3130-upstream,id=swup0,bus=srp0 \
    -device xio3130-downstream,id=swdp0,bus=swup0,chassis=2,slot=0,multifunction=off \
    -device xio3130-downstream,id=swdp1,bus=swup0,chassis=2,slot=1,multifunction=off \
    -device vfio-pci,host=0000:21:00.0,id=vfio-a,bus=swdp0 -device vfio-pci,host=0000:a1:00.0,id=vfio-b,bus=swdp1";

fn argv(parts: &[&str]) -> Argv {
    let words = parts.iter().flat_map(|part| part.split_whitespace());
    Argv::parse(words.map(OsString::from).collect())
}

fn device(address: &str, node: u16, cdev: bool) -> Device {
    Device {
        address: address.to_owned(),
        class: 0x03_0200,
        numa_node: Some(node),
        iommu_group: Some(40 + u32::from(node)),
        cdev: cdev.then(|| format!("vfio{node}")),
    }
}

struct Sandbox {
    devices: Vec<Device>,
    confidential: bool,
    kata: Kata,
    guarded: BTreeSet<Address>,
}

impl Sandbox {
    fn of(flavor: Flavor, cdev: bool) -> Sandbox {
        let guarded = ["0000:21:00.0", "0000:a1:00.0", "0000:c1:00.0"];
        Sandbox {
            devices: vec![
                device("0000:21:00.0", 0, cdev),
                device("0000:a1:00.0", 1, cdev),
            ],
            confidential: false,
            kata: Kata {
                flavor,
                version: Version::new(4, 1),
            },
            guarded: guarded
                .iter()
                .map(|one| one.parse().expect("an address"))
                .collect(),
        }
    }

    fn wanted(&self) -> Wanted<'_> {
        Wanted {
            devices: &self.devices,
            confidential: self.confidential,
            kata: self.kata,
            guarded: &self.guarded,
        }
    }

    fn problems(&self, argv: &Argv) -> Vec<String> {
        match check::check(&View::of(argv), &self.wanted()) {
            Ok(()) => Vec::new(),
            Err(refused) => refused.0,
        }
    }
}

#[test]
fn what_each_kata_writes_is_right() {
    for (form, flavor, cdev) in [
        (GO, Flavor::Go, true),
        (RUST, Flavor::Rust, true),
        (NUMA, Flavor::Go, true),
        (SWITCH, Flavor::Go, false),
    ] {
        let problems = Sandbox::of(flavor, cdev).problems(&argv(&[MACHINE, form]));
        assert_eq!(problems, Vec::<String>::new(), "{form}");
    }
    let mut confidential = Sandbox::of(Flavor::Go, true);
    confidential.confidential = true;
    assert!(confidential.problems(&argv(&[MACHINE, GO])).is_empty());
    // Ports that nothing is behind are no harm: pcie_root_port makes them.
    let spare = "-device pcie-root-port,id=rp2,bus=pcie.0,chassis=0,slot=2,multifunction=off";
    let sandbox = Sandbox::of(Flavor::Go, true);
    assert!(sandbox.problems(&argv(&[MACHINE, GO, spare])).is_empty());
    // A network function of somebody else's that nobody guards.
    let other = "-device pcie-root-port,id=rp3,bus=pcie.0,chassis=0,slot=3 -device vfio-pci,host=0000:05:00.0,bus=rp3";
    assert!(sandbox.problems(&argv(&[MACHINE, GO, other])).is_empty());
    let json = GO.replace(
        "vfio-pci,host=0000:21:00.0,id=vfio-a,x-pci-vendor-id=0x10de,x-pci-device-id=0x2321,bus=rp0,iommufd=iommufdvfio-a",
        r#"{"driver":"vfio-pci","host":"0000:21:00.0","bus":"rp0","iommufd":"iommufdvfio-a"}"#,
    );
    assert!(sandbox.problems(&argv(&[MACHINE, &json])).is_empty());
    // runtime-rs leaves audio out, although the claim has it.
    let mut audio = Sandbox::of(Flavor::Rust, true);
    audio.devices.push(Device {
        class: 0x04_0300,
        ..device("0000:21:00.1", 0, true)
    });
    assert!(audio.problems(&argv(&[MACHINE, RUST])).is_empty());
    let there = View::of(&argv(&[MACHINE, RUST]));
    assert_eq!(
        inject::inject(&there, &audio.wanted()),
        Ok(Injected::Nothing)
    );
}

#[test]
fn a_sandbox_without_devices_is_launched_as_it_is() {
    let mut sandbox = Sandbox::of(Flavor::Go, true);
    sandbox.devices.clear();
    let plain = argv(&[MACHINE]);
    assert!(sandbox.problems(&plain).is_empty());
    let problems = sandbox.problems(&argv(&[MACHINE, GO])).join("; ");
    assert!(
        problems.contains("0000:21:00.0 is there and was not given"),
        "{problems}"
    );
}

/// What is wrong, the form, what is replaced by what, and words of the reason.
type Wrong = (&'static str, Form, &'static str, &'static str, &'static str);

#[derive(Clone, Copy)]
enum Form {
    Go,
    Rust,
    Numa,
    Switch,
}
use Form::{Go, Numa, Rust, Switch};

const WRONG: &[Wrong] = &[
    (
        "missing",
        Go,
        "host=0000:21:00.0",
        "host=0000:05:00.0",
        "21:00.0 was given to this sandbox and is missing",
    ),
    (
        "another one",
        Go,
        "host=0000:21:00.0",
        "host=0000:c1:00.0",
        "c1:00.0 is there and was not given",
    ),
    (
        "by another path",
        Go,
        "host=0000:21:00.0",
        "sysfsdev=/sys/bus/pci/devices/0000:c1:00.0",
        "was not given",
    ),
    (
        "by both paths",
        Go,
        "host=0000:21:00.0",
        "host=0000:21:00.0,sysfsdev=/sys/x/0000:c1:00.0",
        "host and sysfsdev",
    ),
    (
        "by a descriptor",
        Go,
        "host=0000:21:00.0",
        "fd=12",
        "names no function",
    ),
    (
        "host twice",
        Go,
        "host=0000:21:00.0",
        "host=0000:c1:00.0,host=0000:21:00.0",
        "has host twice",
    ),
    (
        "no address",
        Go,
        "host=0000:21:00.0",
        "host=../21",
        "no PCI address",
    ),
    (
        "doubled",
        Go,
        "host=0000:a1:00.0",
        "host=0000:21:00.0",
        "21:00.0 is there 2 times",
    ),
    (
        "doubled, short",
        Go,
        "host=0000:a1:00.0",
        "host=21:00.0",
        "21:00.0 is there 2 times",
    ),
    (
        "doubled, in capitals",
        Go,
        "host=0000:21:00.0",
        "host=0000:A1:00.0",
        "a1:00.0 is there 2 times",
    ),
    (
        "on the root bus",
        Go,
        "bus=rp0,iommufd",
        "bus=pcie.0,iommufd",
        "is on bus \"pcie.0\", and no port",
    ),
    (
        "on no bus",
        Go,
        ",bus=rp0,iommufd",
        ",iommufd",
        "behind no port",
    ),
    (
        "on an absent port",
        Go,
        "bus=rp1,iommufd",
        "bus=rp9,iommufd",
        "no port of that name",
    ),
    (
        "on a bridge",
        Go,
        "bus=rp1,iommufd",
        "bus=pci-bridge-0,iommufd",
        "which is no port",
    ),
    (
        "on another's port",
        Go,
        "bus=rp1,iommufd",
        "bus=rp0,iommufd",
        "shares port \"rp0\"",
    ),
    (
        "with a neighbour",
        Go,
        "virtio-rng-pci,rng=rng0",
        "virtio-rng-pci,rng=rng0,bus=rp0",
        "shares port",
    ),
    (
        "second function",
        Go,
        "bus=rp1,iommufd",
        "bus=rp1,addr=0x0.1,iommufd",
        "at 00.1 behind its port",
    ),
    (
        "another slot",
        Go,
        "bus=rp1,iommufd",
        "bus=rp1,addr=1,iommufd",
        "at 01.0 behind its port",
    ),
    (
        "odd slot",
        Go,
        "bus=rp1,iommufd",
        "bus=rp1,addr=zz,iommufd",
        "none on a bus",
    ),
    (
        "port on a bridge",
        Go,
        "id=rp0,bus=pcie.0",
        "id=rp0,bus=pci-bridge-0",
        "where it cannot be",
    ),
    (
        "port on nothing",
        Go,
        "id=rp0,bus=pcie.0",
        "id=rp0,bus=pcie.7",
        "which is not made",
    ),
    (
        "port on itself",
        Go,
        "id=rp0,bus=pcie.0",
        "id=rp0,bus=rp0",
        "where it cannot be",
    ),
    (
        "same slot",
        Go,
        "chassis=0,slot=1",
        "chassis=0,slot=0",
        "another port has",
    ),
    ("same id", Go, "id=rp1", "id=rp0", "\"rp0\" is there twice"),
    (
        "other driver",
        Go,
        "vfio-pci,host=0000:21",
        "vfio-user-pci,host=0000:21",
        "not known here",
    ),
    (
        "object missing",
        Go,
        "-object iommufd,id=iommufdvfio-a",
        "",
        "which is not made",
    ),
    (
        "object twice",
        Go,
        "iommufd,id=iommufdvfio-b",
        "iommufd,id=iommufdvfio-a",
        "is there twice",
    ),
    (
        "group in place of node",
        Go,
        "bus=rp0,iommufd=iommufdvfio-a",
        "bus=rp0",
        "would open its group's",
    ),
    (
        "clique and iommufd",
        Go,
        "bus=rp0,",
        "bus=rp0,x-nv-gpudirect-clique=0,",
        "maps no peer's",
    ),
    (
        "JSON, host twice",
        Go,
        "vfio-pci,host=0000:21:00.0,",
        r#"{"driver":"vfio-pci","host":"x","host":"y"}"#,
        "cannot be read",
    ),
    (
        "changed by -set",
        Go,
        "-nographic",
        "-nographic -set device.vfio-a.host=0000:c1:00.0",
        "behind their arguments",
    ),
    (
        "changed by -global",
        Go,
        "-nographic",
        "-nographic -global vfio-pci.host=0000:c1:00.0",
        "behind their arguments",
    ),
    (
        "changed by a file",
        Go,
        "-nographic",
        "-nographic --readconfig /tmp/x",
        "behind their arguments",
    ),
    (
        "hidden in -append",
        Go,
        "-device vfio-pci,host=0000:a1",
        "-append -device vfio-pci,host=0000:a1",
        "a1:00.0 was given to this sandbox and is missing",
    ),
    (
        "swapped nodes",
        Numa,
        "bus=rp-numa0-0",
        "bus=rp-numa1-0",
        "whose memory is on {1}",
    ),
    (
        "expander past 255",
        Numa,
        "bus_nr=64",
        "bus_nr=256",
        "no second root's",
    ),
    (
        "expanders on one bus",
        Numa,
        "bus_nr=64",
        "bus_nr=32",
        "which another has",
    ),
    (
        "expanders too near",
        Numa,
        "bus_nr=64",
        "bus_nr=33",
        "bus numbers from 32 to 32 only",
    ),
    (
        "port beside its expander",
        Numa,
        "id=rp-numa0-0,bus=pxb-numa0",
        "id=rp-numa0-0,bus=pcie.0",
        "in place of that node's expander",
    ),
    (
        "memory elsewhere",
        Numa,
        "host-nodes=0",
        "host-nodes=1",
        "NUMA node 0 of the host, and the guest has none",
    ),
    (
        "port moved",
        Rust,
        "addr=0x09",
        "addr=0x0c",
        "where runtime-rs tells the guest to look",
    ),
    (
        "port without a slot",
        Rust,
        "addr=0x0a,",
        "",
        "where runtime-rs tells the guest to look",
    ),
    (
        "downstream port on a root port",
        Switch,
        "id=swdp0,bus=swup0",
        "id=swdp0,bus=srp0",
        "where it cannot be",
    ),
    (
        "switch behind nothing",
        Switch,
        "id=swup0,bus=srp0",
        "id=swup0,bus=none",
        "which is not made",
    ),
];

#[test]
fn wrong_launches_are_refused_with_the_reason() {
    assert!(WRONG.len() >= 30);
    for (name, form, from, to, words) in WRONG {
        let (form, flavor, cdev) = match form {
            Go => (GO, Flavor::Go, true),
            Rust => (RUST, Flavor::Rust, true),
            Numa => (NUMA, Flavor::Go, true),
            Switch => (SWITCH, Flavor::Go, false),
        };
        let whole = [MACHINE, form].join(" ");
        let changed = whole.replacen(from, to, 1);
        assert_ne!(changed, whole, "{name} changes nothing");
        let problems = Sandbox::of(flavor, cdev)
            .problems(&argv(&[&changed]))
            .join("; ");
        assert!(problems.contains(words), "{name}: {problems:?}");
    }
}

#[test]
fn confidential_guests_have_iommufd() {
    let mut sandbox = Sandbox::of(Flavor::Go, false);
    sandbox.confidential = true;
    let problems = sandbox.problems(&argv(&[MACHINE, SWITCH])).join("; ");
    assert!(problems.contains("needs iommufd"), "{problems}");
}

fn injected(sandbox: &Sandbox, before: &Argv) -> Argv {
    match inject::inject(&View::of(before), &sandbox.wanted()) {
        Ok(Injected::Added(plan)) => Argv::parse(inject::add(before, &plan)),
        other => panic!("nothing was added: {other:?}"),
    }
}

/// What Kata 3.x (Go), 4.x (Go) and 4.x (runtime-rs) write when nothing is cold-plugged: with and without ports of a pool.
const BEFORE: &[(&str, Flavor, u16)] = &[
    ("", Flavor::Go, 3),
    (
        "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off,pref64-reserve=2097152B,mem-reserve=4194304B",
        Flavor::Go,
        3,
    ),
    (
        "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=0,slot=0,multifunction=off",
        Flavor::Go,
        4,
    ),
    (
        "-device pcie-root-port,id=rp0,addr=0x09,chassis=10,slot=9,bus=pcie.0,multifunction=off",
        Flavor::Rust,
        3,
    ),
    (
        "-device pcie-root-port,id=rp0,addr=0x09,chassis=10,slot=9,bus=pcie.0,multifunction=off",
        Flavor::Rust,
        4,
    ),
];

#[test]
fn devices_are_added_to_what_each_kata_writes() {
    for (form, flavor, major) in BEFORE {
        for cdev in [true, false] {
            // runtime-rs has no legacy groups.
            if *flavor == Flavor::Rust && !cdev {
                continue;
            }
            let mut sandbox = Sandbox::of(*flavor, cdev);
            sandbox.kata.version = Version::new(*major, 1);
            let before = argv(&[MACHINE, form]);
            let after = injected(&sandbox, &before);
            assert_eq!(
                after.words[..before.words.len()],
                before.words[..],
                "what was there stays"
            );
            let more: Vec<_> = after.words[before.words.len()..]
                .iter()
                .map(|word| word.to_string_lossy())
                .collect();
            let objects = if cdev {
                "-object iommufd,id=km-iommufd "
            } else {
                ""
            };
            let way = if cdev { ",iommufd=km-iommufd" } else { "" };
            assert_eq!(
                more.join(" "),
                format!(
                    "-device pcie-root-port,id=km-rp0,bus=pcie.0,chassis=128,slot=0,multifunction=off \
                     -device pcie-root-port,id=km-rp1,bus=pcie.0,chassis=128,slot=1,multifunction=off {objects}\
                     -device vfio-pci,host=0000:21:00.0,id=km-vfio-0,bus=km-rp0{way} \
                     -device vfio-pci,host=0000:a1:00.0,id=km-vfio-1,bus=km-rp1{way}"
                )
            );
            assert_eq!(sandbox.problems(&after), Vec::<String>::new());
            let view = View::of(&after);
            assert_eq!(
                inject::inject(&view, &sandbox.wanted()),
                Ok(Injected::Nothing)
            );
        }
    }
}

#[test]
fn devices_are_added_below_expanders_where_the_guest_has_numa_nodes() {
    let sandbox = Sandbox::of(Flavor::Go, true);
    let nodes = NUMA.split("-device").next().unwrap_or_default();
    let after = injected(&sandbox, &argv(&[MACHINE, nodes]));
    assert_eq!(sandbox.problems(&after), Vec::<String>::new());
    let view = View::of(&after);
    assert!(view.by_id("km-pxb-numa1").is_some() && view.by_id("km-rp-numa1-0").is_some());
}

#[test]
fn what_cannot_be_added_is_refused() {
    let refused = |sandbox: &Sandbox, form: &str| {
        let view = View::of(&argv(&[MACHINE, form]));
        inject::inject(&view, &sandbox.wanted())
            .unwrap_err()
            .to_string()
    };
    let mut sandbox = Sandbox::of(Flavor::Go, true);
    let half = GO
        .split("-object iommufd,id=iommufdvfio-b")
        .next()
        .unwrap_or_default();
    assert!(refused(&sandbox, half).contains("this Kata attaches devices itself"));
    let set = refused(&sandbox, "-set device.x.y=z");
    assert!(set.contains("behind their arguments"), "{set}");
    sandbox.confidential = true;
    assert!(refused(&sandbox, "").contains("measurement"));
    // A device that this Kata would drop is not left out in silence.
    let mut old = Sandbox::of(Flavor::Go, true);
    old.kata.version = Version::new(3, 20);
    old.devices.push(Device {
        class: 0x06_8000,
        ..device("0000:c1:00.0", 1, true)
    });
    assert!(refused(&old, "").contains("drops 0000:c1:00.0"));
}

#[test]
fn one_iommufd_object_is_shared() {
    let sandbox = Sandbox::of(Flavor::Go, true);
    for form in [GO, NUMA] {
        let before = argv(&[MACHINE, form]);
        let words = tune::tune(&before, &View::of(&before), &sandbox.wanted(), None).unwrap();
        let after = Argv::parse(words);
        let view = View::of(&after);
        assert_eq!(view.iommufd.len(), 1);
        assert!(
            view.vfio()
                .all(|device| device.keyed.get("iommufd") == Some("iommufdvfio-a"))
        );
        assert_eq!(after.words.len(), before.words.len() - 2);
        assert_eq!(sandbox.problems(&after), Vec::<String>::new());
        let again = tune::tune(&after, &view, &sandbox.wanted(), None).unwrap();
        assert_eq!(again, after.words);
    }
    let rust = Sandbox::of(Flavor::Rust, true);
    let before = argv(&[MACHINE, RUST]);
    let after = tune::tune(&before, &View::of(&before), &rust.wanted(), Some(1)).unwrap();
    let after = Argv::parse(after);
    assert_eq!(
        rust.problems(&after),
        Vec::<String>::new(),
        "slots are as before"
    );
    assert!(
        !format!("{:?}", after.words).contains("clique"),
        "iommufd has none"
    );
}

#[test]
fn cliques_are_for_several_gpus_of_legacy_groups() {
    let mut sandbox = Sandbox::of(Flavor::Go, false);
    let before = argv(&[MACHINE, SWITCH]);
    let tuned = |sandbox: &Sandbox, clique| {
        tune::tune(&before, &View::of(&before), &sandbox.wanted(), clique)
    };
    let after = Argv::parse(tuned(&sandbox, Some(3)).unwrap());
    let cliques = View::of(&after);
    assert!(
        cliques
            .vfio()
            .all(|device| device.keyed.get("x-nv-gpudirect-clique") == Some("3"))
    );
    assert_eq!(sandbox.problems(&after), Vec::<String>::new());
    assert_eq!(tuned(&sandbox, None).unwrap(), before.words);
    assert!(
        tuned(&sandbox, Some(16))
            .unwrap_err()
            .to_string()
            .contains("0 to 15")
    );
    sandbox.confidential = true;
    assert!(
        tuned(&sandbox, Some(3))
            .unwrap_err()
            .to_string()
            .contains("confidential")
    );
}
