//! A running gpu-emulator: its journal as the second witness, and its control socket.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_gpu_emulator::journal::{Entry, Event};

use super::shape::Shape;
use crate::process::Daemon;
use crate::wait;

/// Time for what takes the emulator milliseconds.
const SOON: Duration = Duration::from_secs(10);

/// A running emulator. Dropping it ends it.
#[derive(Debug)]
pub struct Emulator {
    daemon: Daemon,
    journal: PathBuf,
    control: PathBuf,
}

impl Emulator {
    /// Starts `binary` with a shape's devices, their sockets in `folder`, and waits until all are there.
    ///
    /// # Errors
    /// When it does not come up; carries what it said.
    pub fn start(binary: &Path, shape: &Shape, folder: &Path) -> Result<Self> {
        let settings = shape.settings(folder);
        let file = folder.join("emulator.yaml");
        fs::write(&file, serde_saphyr::to_string(&settings)?)
            .with_context(|| format!("write {}", file.display()))?;
        let journal = folder.join("emulator.journal");
        let mut daemon = Daemon::spawn("gpu-emulator", Command::new(binary).arg(&file), &journal)?;
        let mut emulator = wait::until("the emulated devices", SOON, || {
            daemon.still_runs()?;
            let there = parse(&journal)?
                .iter()
                .filter(|entry| entry.event == Event::Listening)
                .count();
            ensure!(there == settings.devices.len(), "{there} are there");
            Ok(())
        })
        .map(|()| Self {
            daemon,
            journal,
            control: folder.join("control.sock"),
        })?;
        emulator.daemon.still_runs()?;
        Ok(emulator)
    }

    /// Everything that has happened to a device so far.
    ///
    /// # Errors
    /// When the journal is none, which includes an emulator that ended with an error.
    pub fn events(&self, device: &str) -> Result<Vec<Event>> {
        let entries = parse(&self.journal)?;
        let of_device = entries.into_iter().filter(|entry| entry.device == device);
        Ok(of_device.map(|entry| entry.event).collect())
    }

    /// How often a device was reset, in any way.
    ///
    /// # Errors
    /// As [`Self::events`].
    pub fn resets(&self, device: &str) -> Result<usize> {
        let is_reset = |event: &&Event| matches!(event, Event::Reset { .. });
        Ok(self.events(device)?.iter().filter(is_reset).count())
    }

    /// Makes a device fall off the bus.
    ///
    /// # Errors
    /// When the emulator does not do so.
    pub fn kill(&self, device: &str) -> Result<()> {
        self.command(&format!("kill {device}"))
    }

    /// Brings a device back.
    ///
    /// # Errors
    /// When the emulator does not do so.
    pub fn revive(&self, device: &str) -> Result<()> {
        self.command(&format!("revive {device}"))
    }

    fn command(&self, line: &str) -> Result<()> {
        let answer = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(&self.control)?;
            stream.set_read_timeout(Some(SOON))?;
            stream.write_all(format!("{line}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer)
        };
        let answer = answer().with_context(|| format!("tell the emulator: {line}"))?;
        ensure!(
            answer == "ok\n",
            "the emulator answered {line:?} with {answer:?}"
        );
        Ok(())
    }
}

/// The journal's whole lines; the last one may still be in the making.
fn parse(journal: &Path) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(journal)
        .with_context(|| format!("read the journal {}", journal.display()))?;
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| {
            serde_json::from_str(line).with_context(|| format!("the emulator said: {line}"))
        })
        .collect()
}
