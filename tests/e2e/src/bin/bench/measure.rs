//! What a program costs: time, processor time and memory, and how much of the machine others used meanwhile.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use km_tests_e2e::process::memory;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

/// The unit of processor time in /proc (proc(5)): USER_HZ, which is 100 on every architecture but alpha.
const TICK: f64 = 0.01;

/// How often the peak of memory is read. The kernel keeps the maximum, so only growth in the last moment is missed.
const SAMPLE: Duration = Duration::from_millis(4);

/// The longest that one run may take.
const DEADLINE: Duration = Duration::from_secs(300);

/// What one run cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// From start to end, in seconds.
    pub(crate) wall: f64,
    /// Processor time of all its threads, in seconds.
    pub(crate) cpu: f64,
    /// The most memory that was resident at a time, in bytes.
    pub(crate) rss: f64,
    /// Processors that others had meanwhile, on average; neither the program nor those that serve it.
    pub(crate) foreign: f64,
}

/// Runs a program to its end. `servers` are processes that work for it.
///
/// # Errors
/// When it fails, with what it said; when it takes more than five minutes.
pub(crate) fn run(command: &mut Command, servers: &[u32]) -> Result<Cost> {
    let name = command.get_program().to_owned();
    let mut said = tempfile::tempfile().context("temporary file for output")?;
    command
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said.try_clone()?);
    let before = (busy()?, ours(servers)?);
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("start {}", name.display()))?;
    let watched = watch(&child);
    let after = (busy()?, ours(servers)?);
    let cpu = processor_time(child.id());
    let status = child.wait().context("take the end of a program")?;
    let (ended, rss) = watched?;
    let wall = ended.duration_since(started).as_secs_f64();
    if !status.success() {
        bail!(
            "{} ended with {status}:\n{}",
            name.display(),
            read_back(&mut said)?
        );
    }
    let cpu = cpu?;
    let foreign = (after.0 - before.0) - (after.1 - before.1) - cpu;
    Ok(Cost {
        wall,
        cpu,
        rss,
        foreign: (foreign / wall).max(0.0),
    })
}

/// Measures work of this program itself; its memory is not told.
///
/// # Errors
/// Those of the work.
pub(crate) fn own<T>(servers: &[u32], work: impl FnOnce() -> Result<T>) -> Result<Cost> {
    let me = std::process::id();
    let before = (busy()?, ours(servers)?, processor_time(me)?);
    let started = Instant::now();
    work()?;
    let wall = started.elapsed().as_secs_f64();
    let foreign = (busy()? - before.0) - (ours(servers)? - before.1);
    Ok(Cost {
        wall,
        cpu: processor_time(me)? - before.2,
        rss: 0.0,
        foreign: (foreign / wall).max(0.0),
    })
}

/// Waits for the end of a child without taking it, so that /proc still tells of it. Gives the moment, which is before the sampler has woken
/// up and ended, and the child's peak memory in bytes.
fn watch(child: &Child) -> Result<(Instant, f64)> {
    let id = child.id();
    let pid = i32::try_from(id).ok().and_then(Pid::from_raw);
    let pid = pid.context("a process without a number")?;
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let (mut peak, started) = (0, Instant::now());
            while !ended.load(Ordering::Relaxed) {
                // Nothing when the process is gone.
                peak = memory(id, "VmHWM").unwrap_or(0).max(peak);
                if started.elapsed() > DEADLINE {
                    // It may have ended this moment.
                    let _ended = rustix::process::kill_process(pid, Signal::KILL);
                }
                thread::sleep(SAMPLE);
            }
            peak
        });
        let waited = loop {
            match waitid(
                WaitId::Pid(pid),
                WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        let end = Instant::now();
        ended.store(true, Ordering::Relaxed);
        let Ok(peak) = sampler.join() else {
            bail!("the thread that watches memory panicked");
        };
        waited.context("wait for a program")?;
        Ok((end, peak as f64))
    })
}

/// Processor time of a process and all its threads in seconds; also of one that has ended and was not waited for.
fn processor_time(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // proc(5): utime and stime are fields 14 and 15; the name, field 2, is in parentheses and may hold anything.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let ticks: f64 = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    Ok(ticks * TICK)
}

fn ours(servers: &[u32]) -> Result<f64> {
    let mut sum = processor_time(std::process::id())?;
    for server in servers {
        sum += processor_time(*server)?;
    }
    Ok(sum)
}

/// Processor time that the whole machine has used, in seconds.
fn busy() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // proc(5): user nice system idle iowait irq softirq steal; guest time is part of user time.
    let busy = fields.iter().take(8).sum::<f64>() - fields.iter().skip(3).take(2).sum::<f64>();
    Ok(busy * TICK)
}

fn read_back(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What is measured: a name and how to do it once.
pub(crate) type Contender<'a> = (&'static str, Box<dyn FnMut() -> Result<Cost> + 'a>);

/// Foreign work, in processors, above which a run does not count.
const DISTURBED: f64 = 0.15;

/// The runs of one contender.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runs(Vec<Cost>);

impl Runs {
    /// The median of one of the measures.
    pub(crate) fn median(&self, of: fn(&Cost) -> f64) -> f64 {
        let mut values: Vec<f64> = self.0.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        match values.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => values[n / 2],
            n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
        }
    }

    /// The least and the most.
    pub(crate) fn spread(&self, of: fn(&Cost) -> f64) -> (f64, f64) {
        let values = self.0.iter().map(of);
        values.fold((f64::INFINITY, 0.0), |(least, most), value| {
            (least.min(value), most.max(value))
        })
    }
}

/// Runs the contenders in turns, after one turn that does not count. A turn in which others kept the machine busy is repeated,
/// half as many times as turns were asked for; then the quieter ones of all count.
///
/// # Errors
/// The first contender's that fails.
pub(crate) fn in_turns(
    turns: usize,
    mut contenders: Vec<Contender<'_>>,
) -> Result<(Vec<Runs>, usize)> {
    let mut clean: Vec<Vec<Cost>> = Vec::new();
    let mut disturbed: Vec<Vec<Cost>> = Vec::new();
    for turn in 0..=turns + turns.div_ceil(2) {
        let mut costs = Vec::new();
        for (name, once) in &mut contenders {
            // What the one before left to be written is not this one's burden.
            rustix::fs::sync();
            costs.push(once().with_context(|| format!("run of {name}"))?);
        }
        if turn == 0 {
            continue;
        }
        if costs.iter().all(|cost| cost.foreign < DISTURBED) {
            clean.push(costs);
        } else {
            disturbed.push(costs);
        }
        if clean.len() == turns {
            break;
        }
    }
    let lacking = turns - clean.len();
    if lacking > 0 {
        // The quieter ones first.
        let noise = |costs: &Vec<Cost>| costs.iter().map(|cost| cost.foreign).fold(0.0, f64::max);
        disturbed.sort_by(|a, b| noise(a).total_cmp(&noise(b)));
        clean.extend(disturbed.into_iter().take(lacking));
    }
    let runs = (0..contenders.len()).map(|n| Runs(clean.iter().map(|costs| costs[n]).collect()));
    Ok((runs.collect(), lacking))
}
