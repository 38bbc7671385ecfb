//! What the shim adds to a sandbox's `start`: pairs of runs, the shim with an inner shim behind it and that inner shim alone. And what stays
//! in memory afterwards, beside what a shim that stays would take.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use km_podresources::Client;
use km_tests_e2e::km::Km;
use km_tests_e2e::kubelet::Kubelet;
use km_tests_e2e::process::{memory, running};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::wait;
use km_tests_sysfs::{Machine, shapes};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::table::{Figure, Table, Unit, say};

/// The handlers: a Kata that finds a pod's devices by itself, and one that gets their nodes written.
const CHECKED: &str = "bench-check";
const WRITTEN: &str = "bench-write";

/// The shim's file, which the handlers' links lead to.
const INSTALLED: &str = "shim";

/// journald's socket, where the shim's log goes to on most nodes.
const JOURNAL: &str = "run/systemd/journal/socket";

/// How many functions of others the bus has.
const FOREIGN: u32 = 300;

/// Runs that are not counted: files come into the page cache.
const WARM: usize = 20;

/// How long an answer is waited for that does not come, to learn what is asked.
const UNHEARD: Duration = Duration::from_millis(300);

/// Writes neither files nor to a terminal, and ends at once: what an inner shim costs at the least.
const INNER: &str = "/bin/echo";

/// A program that does nothing but become another: what is added by being there.
const THROUGH: &str = "/usr/bin/env";

/// A pod: its name, the handler, how many GPUs it has, and the bytes of its config.json.
struct Case {
    pod: &'static str,
    handler: &'static str,
    gpus: usize,
    bytes: usize,
}

const CASES: &[Case] = &[
    Case {
        pod: "plain",
        handler: CHECKED,
        gpus: 0,
        bytes: 10_000,
    },
    Case {
        pod: "one",
        handler: CHECKED,
        gpus: 1,
        bytes: 10_000,
    },
    Case {
        pod: "all",
        handler: WRITTEN,
        gpus: 16,
        bytes: 300_000,
    },
];

/// Measures it.
///
/// # Errors
/// When a program fails; a figure that is missed is none.
pub(crate) fn measure(sandbox: &Sandbox, runs: usize) -> Result<Table> {
    let root = sandbox.folder("shim")?;
    // Bundles and claims are in memory.
    fs::create_dir(root.join("run"))?;
    sandbox.cover(&root.join("run"))?;
    fs::create_dir_all(root.join("run/systemd/journal"))?;
    let gpus = write(&root)?;
    let mut kubelet = Kubelet::new(&root.join("kubelet"), &root.join("kubelet.log"))?;
    kubelet.start()?;
    for case in CASES {
        kubelet.ask(&json!({ "give": {
            "resource": "nvidia.com/pgpu", "ids": gpus[..case.gpus],
            "namespace": "default", "pod": case.pod, "container": "main",
        } }))?;
    }
    let mut table = Table::default();
    let load = fs::read_to_string("/proc/loadavg")?;
    say(&format!(
        "{runs} pairs each, {FOREIGN} functions of others on the bus; load {}. The exchange with the kubelet is left out: what it takes to connect, to send \
         the very bytes that the shim sends and to get all of the answer, at the median of one such call beside each pair.",
        load.split(' ').next().unwrap_or_default()
    ));
    for case in CASES {
        let pairs = pairs(&root, case, runs)?;
        let answer = median(pairs.iter().map(|pair| pair.answer));
        let name = format!(
            "start, {} GPUs, config.json of {} kB",
            case.gpus,
            case.bytes / 1000
        );
        say(&format!(
            "{name}: the inner shim alone {:.2} ms at the median, with ours before it {:.2} ms, of which the exchange with the kubelet {answer:.2} ms; with {THROUGH} before \
             it {:.2} ms, which adds {:.2} ms at the 99th percentile",
            median(pairs.iter().map(|pair| pair.inner)),
            median(pairs.iter().map(|pair| pair.both)),
            median(pairs.iter().map(|pair| pair.through)),
            quantile(pairs.iter().map(|pair| pair.through - pair.inner), 0.99)
        ));
        let added = || pairs.iter().map(|pair| pair.both - pair.inner - answer);
        let mut add = |what: &str, must: f64, measured| {
            table.add(Figure {
                work: format!("{name}: added, {what}"),
                unit: Unit::Milliseconds,
                must,
                goal: must,
                measured,
            });
        };
        match case.gpus {
            0 | 1 => add("median", 1.0, median(added())),
            _ => add("p99", 5.0, quantile(added(), 0.99)),
        }
    }
    let ours = fs::canonicalize(root.join(INSTALLED))?;
    table.add(Figure {
        work: "processes of the shim that stay".to_owned(),
        unit: Unit::Count,
        must: 0.0,
        goal: 0.0,
        measured: running(&ours)?.len() as f64,
    });
    resident(&root)?;
    Ok(table)
}

/// Sixteen GPUs on VFIO among other functions, their CDI specs, and two handlers. Gives the GPUs' addresses.
fn write(root: &Path) -> Result<Vec<String>> {
    let mut machine = shapes::crowd(FOREIGN);
    let nvidia = machine
        .devices
        .iter_mut()
        .filter(|device| device.vfio.is_some() || device.id == shapes::L40);
    for (number, device) in (0..).zip(nvidia) {
        let mut gpu = device.clone().vfio(number);
        gpu.id = shapes::H100_SXM;
        gpu.class = shapes::GPU;
        *device = gpu;
    }
    Machine::write(&machine, root);
    fs::remove_dir_all(root.join("proc"))?;
    symlink("/proc", root.join("proc"))?;
    let nodes = root.join("dev/vfio");
    fs::create_dir_all(&nodes)?;
    let mut gpus = Vec::new();
    for device in machine.devices.iter().filter(|one| one.vfio.is_some()) {
        let group = device.group.context("a device on VFIO has a group")?;
        // Any device that can be opened, as a group's node that nobody has.
        rustix::fs::mknodat(
            rustix::fs::CWD,
            nodes.join(group.to_string()),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::RWXU,
            rustix::fs::makedev(1, 3),
        )?;
        gpus.push(device.address.clone());
    }
    let km = Km::find()?.env("KATA_MANAGER_HOST_ROOT", root);
    km.expect(&["cdi", "generate"], 0)?;
    fs::copy(INNER, root.join("inner"))?;
    for (handler, kata) in [(CHECKED, "4.1"), (WRITTEN, "3.2")] {
        let settings = json!({
            "handler": handler, "class": handler, "innerShim": "/inner", "kata": {"flavor": "go", "version": kata},
            "containerd": "2", "kubeletSocket": "/kubelet/pod-resources/kubelet.sock",
        });
        let folder = root.join("etc/kata-manager/handlers");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("{handler}.json")), settings.to_string())?;
        symlink(INSTALLED, shim(root, handler))?;
    }
    // As `apply` installs it: a file that a linker has written lies in the page cache in single pages, and costs more to start.
    let installed = root.join(INSTALLED);
    fs::write(&installed, fs::read(km.shim()?)?)?;
    fs::set_permissions(&installed, fs::Permissions::from_mode(0o755))?;
    ensure!(gpus.len() == 16, "there are {} GPUs", gpus.len());
    Ok(gpus)
}

/// What the shim sends to ask about a pod.
struct Question {
    socket: PathBuf,
    bytes: Vec<u8>,
}

impl Question {
    fn learn(root: &Path, case: &Case) -> Result<Question> {
        let deaf = root.join("deaf.sock");
        let listener = UnixListener::bind(&deaf)?;
        let asks = std::thread::spawn({
            let deaf = deaf.clone();
            let pod = case.pod;
            move || Client::connect(&deaf, UNHEARD).and_then(|client| client.get("default", pod))
        });
        let mut bytes = Vec::new();
        listener.accept()?.0.read_to_end(&mut bytes)?;
        let asked = asks
            .join()
            .map_err(|_| anyhow::anyhow!("asking has panicked"))?;
        ensure!(asked.is_err(), "somebody has answered");
        fs::remove_file(deaf)?;
        let socket = root.join("kubelet/pod-resources/kubelet.sock");
        Ok(Question { socket, bytes })
    }

    /// Milliseconds until all of the answer is there.
    fn ask(&self) -> Result<f64> {
        let mut answer = Vec::new();
        let mut chunk = [0; 4096];
        let begin = Instant::now();
        let mut connection = UnixStream::connect(&self.socket)?;
        connection.set_read_timeout(Some(Duration::from_secs(10)))?;
        connection.write_all(&self.bytes)?;
        while !is_whole(&answer) {
            let read = connection.read(&mut chunk)?;
            ensure!(read > 0, "the kubelet has hung up");
            answer.extend_from_slice(&chunk[..read]);
        }
        Ok(begin.elapsed().as_secs_f64() * 1000.0)
    }
}

/// Whether an HTTP/2 answer has its trailers: headers (frame type 1) that end the stream (flag 1; RFC 9113, sections 4.1 and 6.2).
fn is_whole(mut answer: &[u8]) -> bool {
    while let [a, b, c, kind, flags, _, _, _, _, rest @ ..] = answer {
        if (*kind, flags & 1) == (1, 1) {
            return true;
        }
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        answer = rest.get(length..).unwrap_or_default();
    }
    false
}

fn shim(root: &Path, handler: &str) -> PathBuf {
    root.join(format!("containerd-shim-{handler}-v2"))
}

/// Milliseconds of the inner shim alone, of ours with it, of [`THROUGH`] with it, and of the kubelet's answer.
struct Pair {
    inner: f64,
    both: f64,
    through: f64,
    answer: f64,
}

/// Pairs, again and again; who is first changes each time.
fn pairs(root: &Path, case: &Case, runs: usize) -> Result<Vec<Pair>> {
    let spec = spec(case);
    let (inner, ours) = (root.join("inner"), shim(root, case.handler));
    let question = Question::learn(root, case)?;
    let journal = UnixDatagram::bind(root.join(JOURNAL))?;
    journal.set_nonblocking(true)?;
    let mut found = Vec::with_capacity(runs);
    for run in 0..runs + WARM {
        let once = |words: &[&Path]| once(root, words, &ours, case, &spec);
        let first = if run % 2 == 0 { &inner } else { &ours };
        let second = if run % 2 == 0 { &ours } else { &inner };
        let (one, other) = (once(&[first])?, once(&[second])?);
        let through = once(&[THROUGH.as_ref(), &inner])?;
        let answer = question.ask()?;
        let entry = journal.recv(&mut [0; 4096]);
        entry.context("the shim has not written to its log")?;
        if run >= WARM {
            let (inner, both) = if run % 2 == 0 {
                (one, other)
            } else {
                (other, one)
            };
            found.push(Pair {
                inner,
                both,
                through,
                answer,
            });
        }
    }
    fs::remove_file(root.join(JOURNAL))?;
    Ok(found)
}

/// One `start`, as containerd calls it: its milliseconds. The bundle and the claim are gone afterwards.
/// `words` are the program and what stands before the call's own arguments.
fn once(root: &Path, words: &[&Path], name: &Path, case: &Case, spec: &str) -> Result<f64> {
    let (program, more) = words.split_first().context("a program to run")?;
    let bundle = root.join("run/bundle");
    fs::create_dir_all(&bundle)?;
    fs::write(bundle.join("config.json"), spec)?;
    let mut command = Command::new(program);
    command
        .arg0(name)
        .args(more)
        .args([
            "-namespace",
            "k8s.io",
            "-address",
            "/c.sock",
            "-id",
            case.pod,
            "start",
        ])
        .current_dir(&bundle)
        .env("KATA_MANAGER_HOST_ROOT", root)
        .env("MAX_SHIM_VERSION", "2")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let begin = Instant::now();
    let status = command.status()?;
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    ensure!(
        status.success(),
        "{} ended with {status}",
        program.display()
    );
    fs::remove_dir_all(&bundle)?;
    let claim = root.join(format!("run/kata-manager/sandboxes/{}.json", case.pod));
    match (*program == name, fs::remove_file(&claim)) {
        (true, Err(error)) => Err(error).context("the shim has left no claim"),
        (false, Ok(())) => Err(anyhow::anyhow!("the inner shim has left a claim")),
        _ => Ok(took),
    }
}

/// A config.json of about that size: environment variables make it large in life, too.
fn spec(case: &Case) -> String {
    let variables: Vec<String> = (0..case.bytes / 40)
        .map(|number| format!("VARIABLE_{number:06}=some value of some"))
        .collect();
    json!({
        "ociVersion": "1.1.0", "process": {"args": ["/pause"], "env": variables}, "root": {"path": "rootfs"},
        "annotations": {
            "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": case.pod,
            "io.kubernetes.cri.sandbox-name": case.pod, "io.kubernetes.cri.sandbox-namespace": "default",
        },
        "linux": {"devices": [], "resources": {"devices": [{"allow": false}]}},
    })
    .to_string()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: impl Iterator<Item = f64>, at: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is between 0 and the number of values"
    )]
    let place = (last as f64 * at).ceil() as usize;
    values.get(place).copied().unwrap_or_default()
}

/// Says what the least shim that stays takes: `KM_RESIDENT_SHIM` names it, a release build.
fn resident(root: &Path) -> Result<()> {
    let Some(program) = std::env::var_os("KM_RESIDENT_SHIM") else {
        say("A shim that stays is not measured: KM_RESIDENT_SHIM names none.");
        return Ok(());
    };
    let program = fs::canonicalize(program)?;
    let folder = root.join("resident");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("log"), "")?;
    let events = folder.join("c.sock.ttrpc");
    let _listens = UnixListener::bind(&events)?;
    let status = Command::new(&program)
        .args([
            "-namespace",
            "k8s.io",
            "-id",
            "resident",
            "-address",
            "/c.sock",
            "start",
        ])
        .current_dir(&folder)
        .env("TTRPC_ADDRESS", &events)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    ensure!(
        status.success(),
        "{} ended with {status}",
        program.display()
    );
    let pid = wait::until("the shim that stays", Duration::from_secs(30), || {
        let found = running(&program)?;
        found.first().copied().context("it does not run")
    })?;
    // It has come up when it takes no more.
    let mut before = 0;
    let resident = wait::until("its memory to stand still", Duration::from_secs(30), || {
        let now = memory(pid, "VmRSS")?;
        ensure!(
            std::mem::replace(&mut before, now) == now,
            "it has {now} bytes"
        );
        Ok(now)
    })? as f64;
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(raw.context("a process's number")?, Signal::KILL)?;
    say(&format!(
        "For comparison: the least shim of the containerd-shim crate, which stays as a proxy would, has {:.1} MiB resident for each pod.",
        resident / f64::from(1 << 20)
    ));
    Ok(())
}
