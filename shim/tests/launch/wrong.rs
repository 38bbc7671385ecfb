//! Launches that are wrong in one thing each: a table, and the reason that each is refused with.

use km_topology::Flavor;

use crate::forms::{GO, MACHINE, NUMA, RUST, SWITCH, Sandbox, argv};

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
