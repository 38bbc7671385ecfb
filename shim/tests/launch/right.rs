//! Launches that are right.

use km_host::claims::Device;
use km_shim::launch::inject::{self, Injected};
use km_shim::launch::view::View;
use km_topology::Flavor;

use crate::forms::{GO, MACHINE, NUMA, RUST, SWITCH, Sandbox, argv, device};

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
