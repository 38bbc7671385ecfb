//! `gpu-emulator SETTINGS`: serves the devices that a settings file names until it is ended. The journal goes to standard
//! output, errors to standard error.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail};
use km_gpu_emulator::device::{self, Life};
use km_gpu_emulator::journal::Journal;
use km_gpu_emulator::{control, settings};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let result = match &arguments[..] {
        [file] => run(Path::new(file)),
        _ => Err(anyhow::anyhow!(
            "usage: gpu-emulator SETTINGS\nThe settings are described in README.md."
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "a program's error goes there")]
fn complain(error: &anyhow::Error) {
    eprintln!("gpu-emulator: {error:#}");
}

fn run(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the settings {}", file.display()))?;
    let settings = settings::parse(&text).with_context(|| file.display().to_string())?;
    let journal = Journal::new(std::io::stdout());
    let lives: BTreeMap<String, Life> = settings
        .devices
        .iter()
        .map(|device| (device.name.clone(), Life::new(device.function.dead)))
        .collect();
    // Whatever ends first ends the program: half of a machine's devices are no use.
    let (ended, end) = mpsc::channel::<Result<()>>();
    if let Some(path) = &settings.control {
        let listener = listen(path)?;
        let (lives, journal, ended) = (lives.clone(), journal.clone(), ended.clone());
        thread::spawn(move || {
            let result = control::serve(&listener, &lives, &journal).context("control socket");
            let _main_is_gone = ended.send(result);
        });
    }
    for device in settings.devices {
        let (life, journal) = (lives[&device.name].clone(), journal.clone());
        let ended = ended.clone();
        thread::spawn(move || {
            let result = device::serve(&device, life, journal).map_err(Into::into);
            let _main_is_gone = ended.send(result);
        });
    }
    drop(ended);
    end.recv()
        .context("every device ended without saying why")?
}

fn listen(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!(
                "cannot remove the old control socket {}: {error}",
                path.display()
            )
        }
        _ => {}
    }
    UnixListener::bind(path)
        .with_context(|| format!("cannot make the control socket {}", path.display()))
}
