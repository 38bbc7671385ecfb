//! What is added to launches whose Kata attached nothing.

use km_host::claims::Device;
use km_shim::launch::argv::Argv;
use km_shim::launch::inject::{self, Injected};
use km_shim::launch::view::View;
use km_topology::{Flavor, Version};

use crate::forms::{GO, MACHINE, NUMA, Sandbox, argv, device};

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
