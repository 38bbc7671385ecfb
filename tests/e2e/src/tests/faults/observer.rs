//! Somebody who uses the live generation all the time, as guests do that start at any moment.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Time between two looks: shorter than any step of a command, long enough to leave the processor to it.
const INTERVAL: Duration = Duration::from_micros(500);

/// Files that no two versions share: one that they share would keep the older ones from being collected while it is open.
const FILES: &[&str] = &["vmlinuz", "modules/0.ko", ".generation.json"];

/// A thread that opens and reads the live generation's files until it is told to end.
pub(super) struct Observer {
    done: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize>>,
}

impl Observer {
    /// Begins to look at a class.
    pub(super) fn start(class: &Path) -> Observer {
        let done = Arc::new(AtomicBool::new(false));
        let (class, asked) = (class.to_owned(), Arc::clone(&done));
        Observer {
            done,
            thread: thread::spawn(move || watch(&class, &asked)),
        }
    }

    /// Ends it, and fails if a file was away once.
    pub(super) fn end(self) -> Result<()> {
        self.done.store(true, Ordering::Relaxed);
        let looks = self
            .thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(looks > 0, "nobody looked at the live generation");
        Ok(())
    }
}

fn watch(class: &Path, done: &AtomicBool) -> Result<usize> {
    let mut looks = 0;
    while !done.load(Ordering::Relaxed) || looks == 0 {
        // One generation, however the link moves meanwhile: as containerd, which opens the configuration by the link, and then
        // what it names.
        for file in FILES {
            let path: PathBuf = class.join(file);
            let mut bytes = [0; 512];
            let got = File::open(&path).and_then(|mut file| file.read(&mut bytes));
            let got = got.with_context(|| format!("{} was away for a moment", path.display()))?;
            ensure!(got > 0, "{} was empty for a moment", path.display());
        }
        looks += 1;
        thread::sleep(INTERVAL);
    }
    Ok(looks)
}
