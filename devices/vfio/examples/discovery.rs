//! How long an inventory takes: of this machine, or of a prepared one with 16 NVIDIA functions among 500.
//!
//! `cargo run --release -p km-vfio --example discovery [ROOT]`

#![expect(clippy::print_stdout, reason = "this prints its result")]

use std::time::{Duration, Instant};

use km_host::Root;
use km_vfio::Inventory;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prepared = tempfile::tempdir()?;
    let root = match std::env::args_os().nth(1) {
        Some(path) => Root::new(path)?,
        None => {
            km_tests_sysfs::shapes::crowd(468).write(prepared.path());
            Root::new(prepared.path())?
        }
    };
    let mut times: Vec<Duration> = Vec::new();
    let mut inventory = Inventory::default();
    for _ in 0..51 {
        let start = Instant::now();
        inventory = Inventory::observe(&root)?;
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "{} of {} functions: median {:.2} ms, slowest {:.2} ms",
        inventory.functions.len(),
        inventory.scanned,
        times[25].as_secs_f64() * 1e3,
        times[50].as_secs_f64() * 1e3
    );
    Ok(())
}
