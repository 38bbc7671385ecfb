//! Boots a kernel and an initrd in a real QEMU, with its software processor: /dev/kvm is not needed, and not trusted.
//!
//! QEMU 7.2 will not do: of 100 boots of a 6.12 kernel, about 8 ended in a kernel panic somewhere else each time, whatever the
//! processor model. None of 80 did with 11.1.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process::{self, Daemon};
use crate::wait;

/// What a booted guest left.
#[derive(Clone, Debug)]
pub struct Boot {
    /// All that came over its serial console.
    pub console: String,
    /// The line that was waited for, from there to its end, without the firmware's escape sequences before it.
    pub line: String,
    /// Time from QEMU's start to the guest's poweroff.
    pub took: Duration,
}

/// The arguments of a plain machine with `kernel`, `initrd` and kernel command line, its console on standard output.
pub fn arguments(kernel: &Path, initrd: &Path, cmdline: &str) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "-accel",
        "tcg,thread=multi",
        "-machine",
        "q35",
        "-cpu",
        "max",
        "-m",
        "256M",
        "-nodefaults",
        "-nographic",
        "-serial",
        "stdio",
        "-no-reboot",
    ]
    .map(str::to_owned)
    .to_vec();
    for (flag, value) in [
        ("-kernel", kernel.display().to_string()),
        ("-initrd", initrd.display().to_string()),
        ("-append", cmdline.to_owned()),
    ] {
        arguments.extend([flag.to_owned(), value]);
    }
    arguments
}

/// Boots, and waits until the guest has printed `line` and switched itself off.
///
/// # Errors
/// When it does not within `deadline`, or ends without the line; carries the console.
pub fn boot(
    qemu: &Path,
    kernel: &Path,
    initrd: &Path,
    line: &str,
    deadline: Duration,
) -> Result<Boot> {
    let cmdline = "console=ttyS0 quiet panic=-1 mitigations=off";
    let mut command = Command::new(qemu);
    command.args(arguments(kernel, initrd, cmdline));
    let finished = process::run(&mut command, deadline)
        .with_context(|| format!("boot {} with {}", kernel.display(), initrd.display()))?
        .success()?;
    let at = finished.stdout.find(line);
    let Some(at) = at else {
        bail!("the guest ended without the line {line:?}: {finished}");
    };
    let line = finished.stdout[at..].lines().next().unwrap_or_default();
    Ok(Boot {
        took: finished.took,
        line: line.to_owned(),
        console: finished.stdout,
    })
}

/// A QEMU that runs and answers questions. It ends when this is dropped.
#[derive(Debug)]
pub struct Machine {
    qemu: Daemon,
    monitor: BufReader<UnixStream>,
}

impl Machine {
    /// Starts QEMU as `command` says, with a monitor besides. `folder` takes its socket and log.
    ///
    /// # Errors
    /// When QEMU cannot be started, or its monitor does not answer; carries its log.
    pub fn start(command: &mut Command, folder: &Path) -> Result<Self> {
        let socket = folder.join("qmp");
        let server = format!("unix:{},server=on,wait=off", socket.display());
        command.arg("-qmp").arg(server);
        let mut qemu = Daemon::spawn("qemu", command, &folder.join("log"))?;
        let stream = wait::until("QEMU's monitor", Duration::from_secs(30), || {
            qemu.still_runs()?;
            Ok(UnixStream::connect(&socket)?)
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut machine = Self {
            qemu,
            monitor: BufReader::new(stream),
        };
        machine.ask("qmp_capabilities", &json!({}))?;
        Ok(machine)
    }

    /// One command of the QEMU Machine Protocol and its answer; events in between are passed over.
    ///
    /// # Errors
    /// When QEMU has ended, refuses, or does not answer.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{request}")?;
        let mut line = String::new();
        loop {
            line.clear();
            if self.monitor.read_line(&mut line).context("ask QEMU")? == 0 {
                bail!(
                    "QEMU ended when it was asked {command}: {}",
                    self.qemu.log_tail()
                );
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(said) = answer.get_mut("return") {
                return Ok(said.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
        }
    }
}

/// A machine that has an image mapped as an NVDIMM, the way in which Kata gives a guest its image. Its processor stands still;
/// it ends when this is dropped.
#[derive(Debug)]
pub struct Mapped(Machine);

impl Mapped {
    /// Starts QEMU with the first 4 MiB of `image` mapped, shared and read-only. `folder` takes its socket and log.
    ///
    /// # Errors
    /// When QEMU cannot be started, or its monitor does not answer.
    pub fn start(qemu: &Path, image: &Path, folder: &Path) -> Result<Self> {
        let image = image.display();
        let mut command = Command::new(qemu);
        command.args(["-accel", "tcg", "-machine", "q35,nvdimm=on", "-nodefaults"]);
        command.args(["-m", "64M,slots=2,maxmem=1G", "-S", "-display", "none"]);
        command.arg("-object").arg(format!(
            "memory-backend-file,id=image,mem-path={image},share=on,readonly=on,size=4M"
        ));
        command.args(["-device", "nvdimm,memdev=image,unarmed=on"]);
        Ok(Self(Machine::start(&mut command, folder)?))
    }

    /// What the machine has at the start of the image: 4 bytes in QEMU's own words, such as `0x01 0x01 0x01 0x01`.
    ///
    /// # Errors
    /// When QEMU has ended, as by a SIGBUS, or does not answer.
    pub fn reads(&mut self) -> Result<String> {
        self.0.qemu.still_runs()?;
        // Where q35 puts the first memory device: above 4 GiB.
        let command = json!({ "command-line": "xp /4xb 0x100000000" });
        let said = self.0.ask("human-monitor-command", &command)?;
        let said = said.as_str().unwrap_or_default();
        let bytes = said.split_once(": ").map(|(_, bytes)| bytes.trim());
        Ok(bytes
            .with_context(|| format!("QEMU said {said:?}"))?
            .to_owned())
    }
}
