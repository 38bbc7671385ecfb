//! What the device plugin costs: memory, wake-ups while nothing happens, and the time of an allocation.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::km::Km;
use km_tests_e2e::kubelet::Kubelet;
use km_tests_e2e::process::{Daemon, memory};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::wait;
use km_tests_sysfs::shapes;
use serde_json::json;

use crate::table::{Figure, Table, Unit, say};

const GPUS: &str = "nvidia.com/pgpu";

/// How many functions of others the bus has.
const FOREIGN: u32 = 300;

/// How long nothing happens.
const IDLE: Duration = Duration::from_secs(60);

const MEBIBYTE: f64 = (1 << 20) as f64;

/// How many allocations are timed.
const CALLS: u32 = 10_000;

/// Where Debian keeps the names of PCI devices: reading them is a part of the work.
const NAMES: &str = "/usr/share/misc/pci.ids";

/// Measures it.
///
/// # Errors
/// When a program fails; a figure that is missed is none.
pub(crate) fn measure(sandbox: &Sandbox) -> Result<Table> {
    // In memory, as sysfs is: waiting for a disk would count as waking up.
    let folder = sandbox.small_disk("plugin", 64)?;
    write(&folder)?;
    let kubelet_dir = folder.join("var/lib/kubelet");
    let mut kubelet = Kubelet::new(&kubelet_dir, &folder.join("kubelet.log"))?;
    kubelet.start()?;
    let km = Km::find()?.env("KATA_MANAGER_HOST_ROOT", &folder);
    let mut command = km.command(&["device-plugin", "--log", "warn"]);
    let plugin = Daemon::spawn("device-plugin", &mut command, &folder.join("plugin.log"))?;
    let listed = wait::until("the first list", Duration::from_secs(20), || {
        let gpus = kubelet.resource(GPUS)?;
        ensure!(gpus.healthy().len() == 12, "{gpus:?}");
        Ok(gpus)
    })?;
    let id = listed.healthy()[0].to_owned();
    let pid = plugin.pid();
    // Past the checks that follow a registration.
    std::thread::sleep(Duration::from_secs(12));
    let (before, started) = (switches(pid)?, Instant::now());
    std::thread::sleep(IDLE);
    let wakeups = switches(pid)? - before;
    let wakeups = wakeups as f64 / started.elapsed().as_secs_f64();
    let (resident, peak) = (memory(pid, "VmRSS")? as f64, memory(pid, "VmHWM")? as f64);
    let rate = json!({ "rate": { "resource": GPUS, "ids": [id], "calls": CALLS } });
    let rate = kubelet.ask_for(&rate, Duration::from_secs(120))?;
    let rate = rate.as_f64().context("a rate is a number")?;
    say(&format!(
        "16 devices among {FOREIGN} functions of others. Resident: {:.1} MiB, at most {:.1} MiB; the daemon that it replaces (NVIDIA's Sandbox \
         Device Plugin) has 41 MiB. {wakeups:.2} wake-ups a second in {} s. {rate:.0} Allocate calls a second, one after the other.",
        resident / MEBIBYTE,
        peak / MEBIBYTE,
        IDLE.as_secs()
    ));
    let mut table = Table::default();
    let mut add = |work: &str, unit, must, goal, measured| {
        table.add(Figure {
            work: work.to_owned(),
            unit,
            must,
            goal,
            measured,
        });
    };
    let mebibytes = |count: u32| f64::from(count) * MEBIBYTE;
    add(
        "device plugin, 16 devices, RSS",
        Unit::Mebibytes,
        mebibytes(12),
        mebibytes(10),
        resident,
    );
    add(
        "the same, wake-ups a second while idle",
        Unit::Ratio,
        1.0,
        1.0,
        wakeups,
    );
    add(
        "the same, seconds for 1,000 Allocate calls",
        Unit::Ratio,
        1.0,
        0.5,
        1000.0 / rate,
    );
    plugin.stop()?;
    Ok(table)
}

/// Twelve GPUs and four NVSwitches on VFIO.
fn write(folder: &Path) -> Result<()> {
    let mut machine = shapes::crowd(FOREIGN);
    let unbound = machine
        .devices
        .iter_mut()
        .filter(|device| device.id == shapes::L40);
    for (number, device) in (100..).zip(unbound) {
        *device = device.clone().vfio(number);
    }
    machine.write(folder);
    machine.write_nodes(folder);
    if Path::new(NAMES).exists() {
        let copy = folder.join(NAMES.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().context("it has a folder")?)?;
        fs::copy(NAMES, copy)?;
    }
    Ok(())
}

/// How often the threads of a process have gone to sleep: each time, something woke them. Being pushed off a busy processor is none.
fn switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let counts = status
            .lines()
            .filter(|line| line.starts_with("voluntary_ctxt_switches:"));
        for line in counts {
            let count = line.rsplit(':').next().context("a count")?;
            sum += count.trim().parse::<u64>()?;
        }
    }
    Ok(sum)
}
