//! A node in a box: a virtual machine with a real Linux, systemd and containerd, and emulated GPUs behind a real IOMMU driver.
//!
//! - [`shape`]: what a node has, by name.
//! - [`machine`]: QEMU's arguments for a shape.
//! - [`image`]: what it boots from, and what tests bring along.
//! - [`emulator`]: the process that plays the devices.
//! - [`channel`]: the line to the agent inside.
//! - [`pci`]: the node's PCI functions, held against the shape.
//!
//! [`Node`] puts these together.

pub mod channel;
pub mod emulator;
pub mod image;
pub mod machine;
pub mod pci;
pub mod shape;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::channel::Channel;
use self::emulator::Emulator;
use self::image::{Image, Payload};
use self::machine::{Console, Files};
use self::shape::Shape;
use crate::cri::Cri;
use crate::parts::Parts;
use crate::process::{self, Daemon, Finished};

/// The groups of parts that a node needs, beside those of `hack/node-image`.
pub const PARTS: &[&str] = &["qemu", "tools"];

/// The longest that a boot may take up to the agent's first word. A quiet machine needs a twentieth of it, and one whose processors
/// others use as much as a half.
const BOOT: Duration = Duration::from_secs(400);

/// Time that a program in the node is given unless the caller says otherwise.
const DEADLINE: Duration = Duration::from_secs(240);

/// What the nodes of one process do at a time: any number of them something, or one node something by itself.
static STEPS: RwLock<()> = RwLock::new(());

fn beside_others() -> RwLockReadGuard<'static, ()> {
    STEPS.read().unwrap_or_else(PoisonError::into_inner)
}

/// A running node. Dropping it switches it off.
#[derive(Debug)]
pub struct Node {
    shape: Shape,
    /// What it is called in the output: its folder's name.
    label: String,
    // In this order: the machine goes before its devices do.
    qemu: Daemon,
    emulator: Emulator,
    channel: Channel,
    console: PathBuf,
    containerd: PathBuf,
    started: Instant,
    holders: u32,
}

/// A program that runs in a node until it is released.
#[derive(Debug)]
#[must_use]
pub struct Holder(String);

/// All files of a node that was not started yet.
#[derive(Debug)]
struct Prepared {
    folder: PathBuf,
    initrd: PathBuf,
    payload: PathBuf,
    agent: PathBuf,
    containerd: PathBuf,
    image: Image,
}

impl Prepared {
    fn new(parts: &Parts, shape: &Shape, payload: &Payload, folder: &Path) -> Result<Self> {
        let prepared = Self {
            folder: folder.to_owned(),
            initrd: folder.join("initrd"),
            payload: folder.join("payload.tar"),
            agent: folder.join("agent.sock"),
            containerd: folder.join("containerd.sock"),
            image: Image::at(parts.dir(), shape.kernel)?,
        };
        prepared.image.write_initrd(&prepared.initrd)?;
        payload.write(&prepared.payload)?;
        Ok(prepared)
    }

    fn command(&self, parts: &Parts, shape: &Shape, console: Console<'_>) -> Command {
        let files = Files {
            kernel: &self.image.kernel(),
            initrd: &self.initrd,
            disk: &self.image.disk(),
            payload: &self.payload,
            devices: &self.folder,
            agent: &self.agent,
            containerd: &self.containerd,
        };
        let mut command = Command::new(parts.qemu());
        command.args(machine::arguments(shape, &files, console));
        command
    }
}

impl Node {
    /// Boots a node and waits for its agent. Its files are kept in `folder`, which must be empty.
    ///
    /// # Errors
    /// When it does not come up; carries the console.
    pub fn boot(parts: &Parts, shape: &Shape, payload: &Payload, folder: &Path) -> Result<Self> {
        let beside_others = beside_others();
        let started = Instant::now();
        let prepared = Prepared::new(parts, shape, payload, folder)?;
        let emulator = Emulator::start(&image::beside("gpu-emulator")?, shape, folder)?;
        let console = folder.join("console");
        let mut command = prepared.command(parts, shape, Console::File(&console));
        let mut qemu = Daemon::spawn("qemu", &mut command, &folder.join("qemu.log"))?;
        let channel = connect(&mut qemu, &prepared.agent).with_context(|| {
            format!(
                "boot the node {}; QEMU said:\n{}\nand the console ends with:\n{}",
                shape.name,
                qemu.log_tail(),
                process::tail(&console, 40)
            )
        })?;
        let label = folder.file_name().unwrap_or_default().to_string_lossy();
        let mut node = Self {
            shape: shape.clone(),
            label: label.into_owned(),
            qemu,
            emulator,
            channel,
            console,
            containerd: prepared.containerd,
            started,
            holders: 0,
        };
        node.report("boot", started);
        drop(beside_others);
        node.step("systemd", Node::settled)?;
        Ok(node)
    }

    /// Waits until systemd has started everything, and each unit has come up.
    fn settled(&mut self) -> Result<()> {
        let wait = ["/usr/bin/systemctl", "is-system-running", "--wait"];
        let state = self.run_for(&wait, BOOT)?;
        if state.stdout.trim() == "running" {
            return Ok(());
        }
        bail!(self.shell("systemctl --failed --no-pager; systemctl list-jobs --no-pager")?)
    }

    /// Restarts the node, as an administrator does, and waits until it is up again. Its disk stays as it is.
    ///
    /// # Errors
    /// When it does not come up; carries the console.
    pub fn reboot(&mut self) -> Result<()> {
        self.run(&["/usr/bin/systemctl", "--no-block", "reboot"])?
            .success()?;
        ready(&mut self.qemu, &mut self.channel).with_context(|| {
            let console = process::tail(&self.console, 40);
            format!("the console ends with:\n{console}")
        })?;
        self.settled()
    }

    /// Boots a node with its console on this terminal, and waits until it is switched off.
    ///
    /// # Errors
    /// When it cannot be started, or QEMU ends with an error.
    pub fn interactive(
        parts: &Parts,
        shape: &Shape,
        payload: &Payload,
        folder: &Path,
    ) -> Result<()> {
        let prepared = Prepared::new(parts, shape, payload, folder)?;
        let _emulator = Emulator::start(&image::beside("gpu-emulator")?, shape, folder)?;
        let status = prepared
            .command(parts, shape, Console::Terminal)
            .status()
            .context("start qemu")?;
        ensure!(status.success(), "qemu ended with {status}");
        Ok(())
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Its devices, from outside.
    pub fn emulator(&self) -> &Emulator {
        &self.emulator
    }

    /// Does one step of a test, and says on standard error how long it took.
    ///
    /// # Errors
    /// Those of the step, with its name and the end of the node's console.
    pub fn step<T>(&mut self, what: &str, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let _beside_others = beside_others();
        self.measured(what, step)
    }

    /// [`Self::step`] while no other node of this process boots or does a step: for what is timed, and for a machine inside the node, which
    /// hangs about one time in eight when another node takes the processors from it, and hardly ever when none does.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn step_alone<T>(
        &mut self,
        what: &str,
        step: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let _alone = STEPS.write().unwrap_or_else(PoisonError::into_inner);
        self.measured(what, step)
    }

    fn measured<T>(&mut self, what: &str, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let started = Instant::now();
        match step(self) {
            Ok(value) => {
                self.report(what, started);
                Ok(value)
            }
            Err(error) => Err(error).with_context(|| {
                self.report(&format!("{what}: FAILED"), started);
                format!(
                    "step {what:?} on {}, {:.1} s after its start; its console ends with:\n{}",
                    self.label,
                    self.started.elapsed().as_secs_f64(),
                    process::tail(&self.console, 15)
                )
            }),
        }
    }

    fn report(&self, what: &str, started: Instant) {
        let took = started.elapsed().as_secs_f64();
        self.line(&format!("{took:6.2} s  {what}"));
    }

    /// Says something on standard error, among the steps.
    pub fn note(&self, what: &str) {
        self.line(&format!("{:10}{what}", ""));
    }

    fn line(&self, text: &str) {
        // Nobody to tell is no failure.
        let _ = writeln!(std::io::stderr(), "{:>12}  {text}", self.label);
    }

    /// Runs a program to its end; its exit code is the caller's to judge.
    ///
    /// # Errors
    /// When it cannot be started or takes longer than four minutes, or the node is gone.
    pub fn run(&mut self, argv: &[&str]) -> Result<Finished> {
        self.run_for(argv, DEADLINE)
    }

    /// [`Self::run`] with a deadline of the caller's.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_for(&mut self, argv: &[&str], deadline: Duration) -> Result<Finished> {
        let result = self.channel.run(argv, deadline);
        if result.is_err() {
            self.qemu.still_runs()?;
        }
        result
    }

    /// Runs shell commands, which must succeed, and gives what they print.
    ///
    /// # Errors
    /// When they fail; carries all that they said.
    pub fn shell(&mut self, script: &str) -> Result<String> {
        let finished = self.run(&["/usr/bin/bash", "-euo", "pipefail", "-c", script])?;
        Ok(finished
            .success()
            .with_context(|| format!("in the node: {script}"))?
            .stdout)
    }

    /// A CRI client of the node's containerd.
    ///
    /// # Errors
    /// When the path of its socket is no address.
    pub fn cri(&self) -> Result<Cri> {
        Cri::new(&self.containerd)
    }

    /// Runs kata-manager, which must end with an exit code.
    ///
    /// # Errors
    /// When it ends otherwise; carries all that it said.
    pub fn kata_manager(&mut self, words: &[&str], code: i32) -> Result<Finished> {
        let argv = [&["/usr/local/bin/kata-manager"], words].concat();
        let finished = self.run(&argv)?;
        let line = words.join(" ");
        ensure!(
            finished.code() == Some(code),
            "kata-manager {line}: expected exit code {code}; it {finished}"
        );
        Ok(finished)
    }

    /// Starts a program that has something and keeps it, and waits until it has: it then makes the file that the environment
    /// variable `READY` names.
    ///
    /// # Errors
    /// When it cannot be started, or does not make the file.
    pub fn hold(&mut self, argv: &[impl AsRef<str>]) -> Result<Holder> {
        self.holders += 1;
        let unit = format!("holder-{}.service", self.holders);
        let ready = format!("/run/{unit}");
        let mut start: Vec<String> = ["systemd-run", "--quiet", "--unit", &unit, "--setenv"]
            .map(str::to_owned)
            .to_vec();
        start.push(format!("READY={ready}"));
        start.extend(argv.iter().map(|word| word.as_ref().to_owned()));
        let start: Vec<&str> = start.iter().map(String::as_str).collect();
        self.run(&start)?.success()?;
        crate::wait::until(&format!("{start:?} to be ready"), DEADLINE, || {
            if self.run(&["/usr/bin/test", "-e", &ready])?.code() == Some(0) {
                return Ok(());
            }
            bail!(self.shell(&format!("systemctl status --no-pager {unit} || true"))?)
        })?;
        Ok(Holder(unit))
    }

    /// Ends a program that [`Self::hold`] started.
    ///
    /// # Errors
    /// When it does not end.
    #[expect(clippy::needless_pass_by_value, reason = "it is gone afterwards")]
    pub fn release(&mut self, holder: Holder) -> Result<()> {
        self.run(&["/usr/bin/systemctl", "stop", &holder.0])?
            .success()?;
        Ok(())
    }

    /// Makes a file in the node.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.channel.put(path, mode, content)
    }

    /// Reads a file of the node.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        self.channel.get(path)
    }

    /// The node's PCI functions.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn pci(&mut self) -> Result<Vec<pci::Function>> {
        let finished = self.run(&pci::command())?.success()?;
        pci::parse(&finished.stdout)
    }

    /// The PCI address of an emulated function.
    ///
    /// # Errors
    /// When the shape has none of this name, or the node does not show it.
    pub fn address(&mut self, name: &str) -> Result<String> {
        let functions = self.pci()?;
        let placed = self.shape.placed();
        let placed = placed.iter().find(|placed| placed.named.name == name);
        let placed = placed.with_context(|| format!("the shape has no function {name:?}"))?;
        Ok(pci::at(&functions, &placed.place)?.address.clone())
    }
}

fn connect(qemu: &mut Daemon, socket: &Path) -> Result<Channel> {
    let mut channel = crate::wait::until("QEMU's agent socket", Duration::from_secs(30), || {
        qemu.still_runs()?;
        Channel::connect(socket)
    })?;
    ready(qemu, &mut channel)?;
    Ok(channel)
}

/// Waits for the agent's first word after a boot.
fn ready(qemu: &mut Daemon, channel: &mut Channel) -> Result<()> {
    let started = Instant::now();
    while channel.ready(Duration::from_secs(1))?.is_none() {
        qemu.still_runs()?;
        if started.elapsed() > BOOT {
            bail!("the agent did not answer within {BOOT:?}");
        }
    }
    Ok(())
}
