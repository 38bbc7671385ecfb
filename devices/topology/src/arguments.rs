//! A plan as arguments of QEMU, in the form in which its Kata (src/runtime/pkg/govmm/qemu/qemu.go; runtime-rs'
//! cmdline_generator.rs) writes them.

use crate::plan::{Placed, Plan, Port, PortKind};
use crate::{Flavor, Layout};

impl Plan {
    /// The arguments, in an order in which QEMU can make them: each bus before what is on it.
    pub fn arguments(&self) -> Vec<String> {
        let mut all = Vec::new();
        for expander in &self.expanders {
            device(
                &mut all,
                format!(
                    "pxb-pcie,id={},bus=pcie.0,bus_nr={},numa_node={}",
                    expander.id, expander.bus, expander.guest_node
                ),
            );
        }
        for port in self.ports.iter().filter(|p| p.kind == PortKind::Root) {
            device(&mut all, self.root_port(port));
        }
        for switch in &self.switches {
            device(
                &mut all,
                format!("x3130-upstream,id={},bus={}", switch.id, switch.port),
            );
        }
        for port in self.ports.iter().filter(|p| p.kind == PortKind::Downstream) {
            device(
                &mut all,
                format!(
                    "xio3130-downstream,id={},bus={},chassis={},slot={},multifunction=off",
                    port.id, port.parent, port.chassis, port.slot
                ),
            );
        }
        for object in &self.iommufd {
            all.push("-object".to_owned());
            all.push(format!("iommufd,id={}", object.id));
        }
        for placed in &self.devices {
            device(&mut all, self.vfio(placed));
        }
        all
    }

    fn root_port(&self, port: &Port) -> String {
        let Port {
            id,
            parent,
            chassis,
            slot,
            ..
        } = port;
        match (port.addr, self.kata.flavor, self.layout) {
            (Some(addr), Flavor::Rust, Layout::RootPort) => format!(
                "pcie-root-port,id={id},addr={addr:#04x},chassis={chassis},slot={slot},bus={parent},multifunction=off"
            ),
            _ => format!(
                "pcie-root-port,id={id},bus={parent},chassis={chassis},slot={slot},multifunction=off"
            ),
        }
    }

    fn vfio(&self, placed: &Placed) -> String {
        let Placed {
            address, id, port, ..
        } = placed;
        let mut text = match &placed.guest_path {
            // runtime-rs gives devices no id.
            Some(_) => format!("vfio-pci,host={address},bus={port},addr=0x0"),
            None => format!("vfio-pci,host={address},id={id},bus={port}"),
        };
        if let Some(object) = &placed.iommufd {
            text.push_str(",iommufd=");
            text.push_str(object);
        }
        text
    }
}

fn device(all: &mut Vec<String>, value: String) {
    all.push("-device".to_owned());
    all.push(value);
}
