//! The sandbox's virtual machine: QEMU's arguments as Kata's runtimes write them, the process, and its monitor.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::devices::Function;
use crate::numa::{self, Nodes};
use crate::settings::{Runtime, Settings};

/// A folder for each sandbox, as Kata's /run/vc/vm: a bundle's path is too long for a socket.
const FOLDER: &str = "/run/km-inner";

/// The longest that QEMU may take until its monitor answers, which is when all devices are there.
const LAUNCH: Duration = Duration::from_secs(240);

/// The longest that QEMU may take to end when asked to.
const END: Duration = Duration::from_secs(20);

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(20);

/// The folder of a sandbox.
pub(crate) fn folder(sandbox: &str) -> PathBuf {
    Path::new(FOLDER).join(sandbox.chars().take(16).collect::<String>())
}

/// The arguments (kata-containers 4.1, src/runtime/pkg/govmm/qemu/qemu.go): ports, then the functions behind them.
fn arguments(settings: &Settings, sandbox: &str, functions: &[Function]) -> Result<Vec<String>> {
    let functions = match settings.cold_plug {
        true => functions,
        false => &[],
    };
    let folder = folder(sandbox);
    let file = |name: &str| folder.join(name).display().to_string();
    let mut words: Vec<String> = [
        "-name",
        &format!("sandbox-{sandbox},debug-threads=on"),
        "-machine",
        "q35,accel=kvm",
        "-cpu",
        "host",
        "-m",
        &format!("{}M", settings.memory),
        "-nodefaults",
        "-nographic",
        "-vga",
        "none",
        "--no-reboot",
        "-serial",
        &format!("file:{}", file("console")),
        "-chardev",
        &format!("socket,id=agent,path={},server=on,wait=off", file("agent")),
        "-serial",
        "chardev:agent",
        "-qmp",
        &format!("unix:{},server=on,wait=off", file("qmp")),
        "-kernel",
        &settings.kernel,
        "-initrd",
        &settings.initrd,
        "-append",
        &settings.append,
        // What Kata has on the root bus before any port; it counts for the numbers of buses.
        "-device",
        "pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m",
        "-device",
        "virtio-serial-pci,disable-modern=true,id=serial0",
    ]
    .map(str::to_owned)
    .to_vec();
    let buses = match settings.numa && settings.runtime == Runtime::Go {
        true => {
            let Nodes { arguments, buses } = numa::nodes(settings.memory, functions)?;
            words.extend(arguments);
            buses
        }
        // As many as are configured or needed.
        false => {
            let most = functions.len().max(settings.ports);
            let ports = (0..most).map(|at| port(settings.runtime, at));
            words.extend(ports.flat_map(|port| ["-device".to_owned(), port]));
            (0..most).map(|at| format!("rp{at}")).collect()
        }
    };
    for (at, (function, bus)) in functions.iter().zip(buses).enumerate() {
        let bus = settings.bus.clone().unwrap_or(bus);
        words.extend(device(settings, at, function, &bus));
    }
    Ok(words)
}

/// A root port, as the runtimes write it (Go: qemu.go as above; runtime-rs: src/runtime-rs/crates/hypervisor/src/qemu/cmdline_generator.rs).
fn port(runtime: Runtime, at: usize) -> String {
    match runtime {
        Runtime::Go => {
            format!("pcie-root-port,id=rp{at},bus=pcie.0,chassis=0,slot={at},multifunction=off")
        }
        Runtime::Rust => {
            let (slot, chassis) = (RUST_SLOT + at, RUST_CHASSIS + at);
            format!(
                "pcie-root-port,id=rp{at},addr={slot:#04x},chassis={chassis},slot={slot},bus=pcie.0,multifunction=off"
            )
        }
    }
}

/// The first slot and chassis of runtime-rs' ports (same file, and topology.rs beside it).
const RUST_SLOT: usize = 9;
const RUST_CHASSIS: usize = 10;

/// A function on a bus. One that was given by a node of its own has an iommufd object of its own.
fn device(settings: &Settings, at: usize, function: &Function, bus: &str) -> Vec<String> {
    let Function { address, iommufd } = function;
    let properties = &settings.properties;
    let (object, device) = match settings.runtime {
        Runtime::Go => {
            let object = format!("iommufdvfio-{at}");
            let by = iommufd.then(|| format!(",iommufd={object}"));
            let by = by.unwrap_or_default();
            let device = format!("vfio-pci,host={address},id=vfio-{at},bus={bus}{by}{properties}");
            (object, device)
        }
        Runtime::Rust => {
            let object = format!("iommufdrp{at}");
            let device =
                format!("vfio-pci,host={address},bus={bus},addr=0x0,iommufd={object}{properties}");
            (object, device)
        }
    };
    let mut words = Vec::new();
    if *iommufd || settings.runtime == Runtime::Rust {
        words.extend(["-object".to_owned(), format!("iommufd,id={object}")]);
    }
    words.extend(["-device".to_owned(), device]);
    words
}

/// Starts QEMU and waits until its monitor answers. One that ends before that has said why, and the pod's event says it too.
pub(crate) fn launch(settings: &Settings, sandbox: &str, functions: &[Function]) -> Result<Child> {
    let folder = folder(sandbox);
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let said = folder.join("said");
    let mut child = Command::new(&settings.qemu)
        .args(arguments(settings, sandbox, functions)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&said)?)
        .spawn()
        .with_context(|| format!("start {}", settings.qemu.display()))?;
    fs::write(folder.join("pid"), child.id().to_string())?;
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            let said = fs::read_to_string(&said).unwrap_or_default();
            bail!(
                "failed to launch qemu: {status}, error messages from qemu log: {}",
                said.trim()
            );
        }
        match answers(&folder.join("qmp")) {
            Ok(()) => return Ok(child),
            Err(error) if started.elapsed() > LAUNCH => {
                end(&mut child)?;
                return Err(
                    error.context(format!("QEMU's monitor did not answer within {LAUNCH:?}"))
                );
            }
            Err(_) => sleep(INTERVAL),
        }
    }
}

/// One question to the monitor (QEMU, docs/interop/qmp-spec.rst).
fn answers(socket: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LAUNCH))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut stream = stream;
    lines.next().context("no greeting")??;
    for command in ["qmp_capabilities", "query-status"] {
        writeln!(stream, "{}", json!({ "execute": command }))?;
        loop {
            let line = lines.next().context("no answer")??;
            let answer: Value = serde_json::from_str(&line)?;
            if answer.get("return").is_some() {
                break;
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
        }
    }
    Ok(())
}

/// Ends QEMU, in peace or by force.
pub(crate) fn end(child: &mut Child) -> Result<ExitStatus> {
    if let Some(status) = child.try_wait()? {
        return Ok(status);
    }
    signal(child.id(), Signal::TERM);
    let started = Instant::now();
    while started.elapsed() < END {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        sleep(INTERVAL);
    }
    signal(child.id(), Signal::KILL);
    Ok(child.wait()?)
}

/// Ends the QEMU of a sandbox whose shim is gone, and removes its folder.
pub(crate) fn end_by_file(sandbox: &str) -> Result<()> {
    let folder = folder(sandbox);
    if let Ok(text) = fs::read_to_string(folder.join("pid"))
        && let Ok(pid) = text.trim().parse::<u32>()
    {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let name = format!("sandbox-{sandbox}");
        if String::from_utf8_lossy(&line).contains(&name) {
            signal(pid, Signal::KILL);
        }
    }
    forget(sandbox)
}

/// Removes a sandbox's folder.
pub(crate) fn forget(sandbox: &str) -> Result<()> {
    match fs::remove_dir_all(folder(sandbox)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// A process that is gone already needs no signal.
fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}
