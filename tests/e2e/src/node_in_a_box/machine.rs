//! QEMU's arguments for a shape. Pure; every odd one says why it is there.

use std::path::Path;

use super::shape::{Named, Shape, slots, socket};

/// Files that the machine is made of, and where it talks.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initrd.
    pub initrd: &'a Path,
    /// The root file system; never written.
    pub disk: &'a Path,
    /// The tar with what the tests brought.
    pub payload: &'a Path,
    /// The folder with the emulator's sockets.
    pub devices: &'a Path,
    /// The socket on which the node's agent is reached.
    pub agent: &'a Path,
    /// The socket that leads to the node's containerd.
    pub containerd: &'a Path,
}

/// Where the node's console goes.
#[derive(Clone, Copy, Debug)]
pub enum Console<'a> {
    /// To a file.
    File(&'a Path),
    /// To the terminal that this program runs on, with a shell.
    Terminal,
}

/// The TCP port in the node behind which containerd's socket is; see [`super::image`].
pub const CONTAINERD: u16 = 7;

/// All arguments after the program's name.
pub fn arguments(shape: &Shape, files: &Files<'_>, console: Console<'_>) -> Vec<String> {
    let mut all = Arguments::default();
    all.processors_and_memory(shape);
    all.basics(files, console);
    if shape.iommu {
        // Without caching mode the first mapping aborts QEMU: VFIO below an IOMMU has to see each of them.
        all.device("intel-iommu,intremap=on,caching-mode=on");
    }
    for (node, bus) in shape.numa_buses().iter().enumerate() {
        let slot = 8 + node;
        all.device(&format!(
            "pxb-pcie,id=numa{node},bus=pcie.0,bus_nr={bus},numa_node={node},addr={slot:#x}"
        ));
    }
    let mut chassis = 0;
    for port in 0..shape.ports.len() {
        all.port(shape, port, files.devices, &mut chassis);
    }
    all.two("-append", &kernel_command_line(shape, console));
    all.0
}

fn kernel_command_line(shape: &Shape, console: Console<'_>) -> String {
    let iommu = if shape.iommu { " intel_iommu=on" } else { "" };
    let unit = match console {
        // systemd asks a terminal for its size and waits for the answer, which a file does not give.
        Console::File(_) => " TERM=dumb",
        Console::Terminal => " systemd.wants=shell@ttyS0.service",
    };
    // mitigations=off and no5lvl spare a software processor what it does slowest. Without no_timer_check the kernel counts ticks
    // against a clock that goes on while a busy machine does not run the processor, and panics. A kernel that panics stands still,
    // with its reason on the console.
    format!(
        "console=ttyS0 quiet panic=0 audit=0 net.ifnames=0 mitigations=off no5lvl no_timer_check systemd.show_status=no{iommu}{unit}"
    )
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn two(&mut self, flag: &str, value: &str) {
        self.0.extend([flag.to_owned(), value.to_owned()]);
    }

    fn device(&mut self, value: &str) {
        self.two("-device", value);
    }

    fn processors_and_memory(&mut self, shape: &Shape) {
        // A software processor always: the kinds of /dev/kvm that a test machine has do not all run a whole kernel, and QEMU
        // then hangs. Hygon: an AMD by that name would have a hole in its address space where the BARs of a device that is
        // removed and found again must go, and an Intel would have no SVM, which nested virtual machines use.
        self.two("-accel", "tcg,thread=multi");
        self.two("-cpu", "max,vendor=HygonGenuine");
        let nodes = u64::from(shape.numa_nodes);
        self.two("-smp", &format!("{},sockets={nodes}", shape.cpus));
        self.two("-m", &format!("{}M", shape.memory.0 >> 20));
        // Shared, so that the emulated devices can read and write it.
        let object = |node: u64, bytes: u64| {
            format!("memory-backend-memfd,id=memory{node},size={bytes},share=on")
        };
        if nodes == 1 {
            self.two("-machine", "q35,sata=off,smbus=off,memory-backend=memory0");
            self.two("-object", &object(0, shape.memory.0));
            return;
        }
        self.two("-machine", "q35,sata=off,smbus=off");
        let cpus = u64::from(shape.cpus);
        for node in 0..nodes {
            self.two("-object", &object(node, shape.memory.0 / nodes));
            let (first, next) = (cpus * node / nodes, cpus * (node + 1) / nodes);
            let range = format!("{first}-{}", next - 1);
            self.two(
                "-numa",
                &format!("node,nodeid={node},cpus={range},memdev=memory{node}"),
            );
        }
    }

    fn basics(&mut self, files: &Files<'_>, console: Console<'_>) {
        for flag in ["-nodefaults", "-nographic"] {
            self.0.push(flag.to_owned());
        }
        self.two("-vga", "none");
        match console {
            Console::File(path) => self.two("-serial", &format!("file:{}", path.display())),
            Console::Terminal => self.two("-serial", "mon:stdio"),
        }
        for (id, path, slot) in [("root", files.disk, 2), ("payload", files.payload, 3)] {
            // A snapshot: what the node writes is gone with it, and many can share one file.
            let path = path.display();
            self.two(
                "-drive",
                &format!("if=none,id={id},file={path},format=raw,snapshot=on"),
            );
            self.device(&format!("virtio-blk-pci,drive={id},bus=pcie.0,addr={slot}"));
        }
        let agent = files.agent.display();
        self.two(
            "-chardev",
            &format!("socket,id=agent,path={agent},server=on,wait=off"),
        );
        self.device("virtio-serial-pci,bus=pcie.0,addr=4");
        let port = km_node_agent::PORT;
        self.device(&format!("virtserialport,chardev=agent,name={port}"));
        // Without a helper outside: the node is 10.0.2.15, and reaches the machine that it runs on as 10.0.2.2.
        let containerd = files.containerd.display();
        self.two(
            "-netdev",
            &format!("user,id=net,hostfwd=unix:{containerd}-10.0.2.15:{CONTAINERD}"),
        );
        self.device("virtio-net-pci,netdev=net,bus=pcie.0,addr=5,romfile=");
        self.two("-kernel", &files.kernel.display().to_string());
        self.two("-initrd", &files.initrd.display().to_string());
    }

    fn port(&mut self, shape: &Shape, port: usize, folder: &Path, chassis: &mut u8) {
        let (_, slot) = shape.root(port);
        let bus = match shape.ports[port].numa_node {
            None => "pcie.0".to_owned(),
            Some(node) => format!("numa{node}"),
        };
        *chassis += 1;
        // 5 GT/s: above that Linux waits for a bit that this port never sets, and resets of the bus fail. The devices below
        // keep their own 32 GT/s.
        self.device(&format!(
            "pcie-root-port,id=port{port},bus={bus},addr={slot:#x},chassis={chassis},slot={chassis},x-speed=5"
        ));
        let described = &shape.ports[port];
        if described.switch.is_empty() {
            self.functions(&described.functions, &format!("port{port}"), folder);
            return;
        }
        self.device(&format!("x3130-upstream,id=up{port},bus=port{port}"));
        for (index, functions) in slots(described).into_iter().enumerate() {
            *chassis += 1;
            self.device(&format!(
                "xio3130-downstream,id=down{port}-{index},bus=up{port},addr={index:#x},chassis={chassis},slot={chassis}"
            ));
            self.functions(functions, &format!("down{port}-{index}"), folder);
        }
    }

    fn functions(&mut self, functions: &[Named], bus: &str, folder: &Path) {
        for (number, named) in functions.iter().enumerate() {
            // JSON, because a socket is a structure.
            let device = serde_json::json!({
                "driver": "vfio-user-pci",
                "id": named.name,
                "bus": bus,
                "addr": format!("0.{number}"),
                "multifunction": functions.len() > 1,
                "socket": {"type": "unix", "path": socket(folder, &named.name)},
            });
            self.device(&device.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(shape: &str) -> String {
        let path = Path::new("/x");
        let files = Files {
            kernel: path,
            initrd: path,
            disk: path,
            payload: path,
            devices: Path::new("/run/d"),
            agent: path,
            containerd: path,
        };
        let shape = Shape::named(shape).unwrap();
        arguments(&shape, &files, Console::File(path)).join(" ")
    }

    #[test]
    fn a_machine_has_an_iommu_when_its_shape_says_so() {
        assert!(line("one-gpu").contains("intel-iommu"));
        assert!(!line("no-iommu").contains("iommu"));
    }

    #[test]
    fn functions_share_a_slot_and_switches_have_their_ports() {
        let shared = line("shared-group");
        assert!(
            shared.contains(r#""addr":"0.1","multifunction":true"#),
            "{shared}"
        );
        assert!(shared.contains("/run/d/audio0.sock"));
        let eight = line("eight-gpus");
        assert_eq!(eight.matches("vfio-user-pci").count(), 12);
        assert_eq!(eight.matches("xio3130-downstream").count(), 12);
        assert!(eight.contains("node,nodeid=1,cpus=1-1,memdev=memory1"));
    }
}
