//! How long an inventory takes: of this machine, or of a prepared one with 16 NVIDIA functions among 500. Beside it what cannot be
//! avoided: listing the bus and reading one attribute of each function. `hack/bench devices` runs it.
//!
//! `cargo run --release -p km-vfio --example discovery [ROOT]`

#![expect(clippy::print_stdout, reason = "this prints its result")]

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use km_host::Root;
use km_vfio::Inventory;
use rustix::time::{ClockId, clock_gettime};

/// How often each is done; in turn, so that a busy machine is busy for both.
const RUNS: usize = 101;

/// The longest that it may take, for 16 devices among 500 functions.
const LIMIT: Duration = Duration::from_millis(5);

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let prepared = tempfile::tempdir()?;
    let given = std::env::args_os().nth(1);
    let root = match &given {
        Some(path) => Root::new(path)?,
        None => {
            km_tests_sysfs::shapes::crowd(468).write(prepared.path());
            Root::new(prepared.path())?
        }
    };
    let (mut ours, mut least, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    let mut inventory = Inventory::default();
    let mut read = 0;
    for _ in 0..RUNS {
        let (start, before) = (Instant::now(), processor_time());
        inventory = Inventory::observe(&root)?;
        ours.push(start.elapsed());
        busy.push(processor_time().saturating_sub(before));
        let start = Instant::now();
        read = one_attribute_each(root.path())?;
        least.push(start.elapsed());
    }
    let (ours, slowest) = median_and_last(&mut ours);
    let (least, _) = median_and_last(&mut least);
    let (busy, _) = median_and_last(&mut busy);
    println!(
        "inventory of {} NVIDIA functions among {}: median {:.2} ms, slowest {:.2} ms, on a processor for {:.2} ms\n\
         one attribute of each of {read} functions: median {:.2} ms; the inventory takes {:.2} times that",
        inventory.functions.len(),
        inventory.scanned,
        milliseconds(ours),
        milliseconds(slowest),
        milliseconds(busy),
        milliseconds(least),
        ours.as_secs_f64() / least.as_secs_f64()
    );
    // Where others use the machine, a turn waits longer than it works.
    if given.is_none() && ours.min(busy) > LIMIT {
        println!("missed: it must be below {:.0} ms", milliseconds(LIMIT));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// How long this thread has been on a processor.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // It begins with zero and does not go back.
    Duration::try_from(time).unwrap_or_default()
}

/// Reads `modalias` of every function, as plainly as it can be done.
fn one_attribute_each(root: &Path) -> std::io::Result<usize> {
    let mut read = 0;
    for entry in std::fs::read_dir(root.join("sys/bus/pci/devices"))? {
        read += usize::from(!std::fs::read(entry?.path().join("modalias"))?.is_empty());
    }
    Ok(read)
}

fn median_and_last(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort();
    (times[times.len() / 2], times[times.len() - 1])
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
