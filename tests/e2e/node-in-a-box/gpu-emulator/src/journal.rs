//! What happened to each device: a JSON object a line, written at once. A test reads it as its second witness.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// How a reset reached the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetKind {
    /// By the function's own device control register (FLR).
    FunctionLevel,
    /// From the bus above it, or from the virtual machine's own reset.
    Bus,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// The socket is there.
    Listening,
    /// A virtual machine has gone; the function is as after power-on.
    Disconnected,
    /// The function was reset; `count` is how often so far.
    Reset {
        /// How.
        by: ResetKind,
        /// Resets since the emulator started, this one included.
        count: u32,
    },
    /// The virtual machine read a register of BAR 0.
    Read {
        /// Offset in BAR 0.
        offset: u64,
        /// What it got.
        value: u32,
    },
    /// The virtual machine wrote a register of BAR 0.
    Write {
        /// Offset in BAR 0.
        offset: u64,
        /// What it wrote.
        value: u32,
    },
    /// The device read or wrote the virtual machine's memory.
    Transfer {
        /// First address, as the device named it.
        address: u64,
        /// Bytes.
        length: u32,
        /// Whether the device wrote.
        write: bool,
        /// 0, or an errno.
        status: u32,
    },
    /// The device raised an MSI-X vector; `delivered` when the virtual machine listens to it.
    Interrupt {
        /// The vector.
        vector: u32,
        /// Whether anyone listened.
        delivered: bool,
    },
    /// A request that no PCI function can serve, and why.
    Refused {
        /// Why.
        reason: String,
    },
    /// The device fell off the bus, or came back.
    Dead {
        /// Whether it is dead now.
        dead: bool,
    },
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Milliseconds since the emulator started.
    pub at_ms: u64,
    /// The device's name.
    pub device: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Where all devices write what happens to them.
#[derive(Clone)]
pub struct Journal {
    started: Instant,
    out: Arc<Mutex<dyn Write + Send>>,
}

impl Journal {
    /// A journal that writes to `out`.
    pub fn new(out: impl Write + Send + 'static) -> Self {
        Self {
            started: Instant::now(),
            out: Arc::new(Mutex::new(out)),
        }
    }

    /// Writes one line. When nobody reads the journal any more, the devices go on without it.
    pub fn note(&self, device: &str, event: Event) {
        let entry = Entry {
            at_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            device: device.to_owned(),
            event,
        };
        if let Ok(mut line) = serde_json::to_vec(&entry) {
            line.push(b'\n');
            let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
            let _gone = out.write_all(&line).and_then(|()| out.flush());
        }
    }
}
