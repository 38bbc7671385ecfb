//! The kubelet's stand-in, as a process: lines of JSON to it and back. `tests/e2e/kubelet-stand-in/README.md` tells them, and what it
//! does not do.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::node_in_a_box::image::beside;

/// The longest that one answer may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running stand-in. Dropping it kills it.
#[derive(Debug)]
pub struct Kubelet {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

/// A device as the kubelet knows it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Device {
    /// Its ID.
    pub id: String,
    /// Whether the plugin says that it can be given out.
    pub healthy: bool,
    /// Its NUMA nodes.
    pub numa: Vec<i64>,
}

/// A resource as the kubelet knows it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// The name of the plugin's socket.
    pub endpoint: String,
    /// How often it was registered since the kubelet started.
    pub registrations: u64,
    /// Whether it says which devices it would take.
    pub prefers: bool,
    /// Whether the plugin is connected.
    pub connected: bool,
    /// How many lists it sent.
    pub lists: u64,
    /// When the last one came, in milliseconds since 1970.
    pub listed_at: u64,
    /// The last list.
    pub devices: Vec<Device>,
    /// What went wrong.
    pub problem: Option<String>,
}

impl Resource {
    /// The IDs of the devices that can be given out.
    pub fn healthy(&self) -> Vec<&str> {
        let healthy = self.devices.iter().filter(|device| device.healthy);
        healthy.map(|device| device.id.as_str()).collect()
    }
}

/// What Allocate gave.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Allocated {
    /// The devices.
    pub ids: Vec<String>,
    /// The nodes that a container gets.
    pub nodes: Vec<Node>,
    /// The CDI devices that a container gets.
    pub cdi: Vec<String>,
}

/// A node for a container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Node {
    /// On the host.
    pub host: String,
    /// In the container.
    pub container: String,
    /// Of r, w and m.
    pub permissions: String,
}

impl Kubelet {
    /// Starts the program; the kubelet itself is started by [`Self::start`]. What it says besides answers goes into `log`.
    ///
    /// # Errors
    /// When it is not built, or cannot be started.
    pub fn new(folder: &Path, log: &Path) -> Result<Self> {
        let binary = beside("kubelet-stand-in")?;
        let mut child = Command::new(&binary)
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("start {}", binary.display()))?;
        let stdin = child.stdin.take().context("its standard input")?;
        let stdout = BufReader::new(child.stdout.take().context("its standard output")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // It ends with the program, or with whoever listens.
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            stdin,
            lines,
        })
    }

    /// Gives a command and waits for its answer for as long as is told.
    ///
    /// # Errors
    /// When the answer is an error, or does not come.
    pub fn ask_for(&mut self, command: &Value, deadline: Duration) -> Result<Value> {
        writeln!(self.stdin, "{command}").with_context(|| format!("tell {command}"))?;
        let line = self.lines.recv_timeout(deadline);
        let line = line.with_context(|| format!("no answer to {command} within {deadline:?}"))?;
        let mut answer: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        match answer.get_mut("ok") {
            Some(ok) => Ok(ok.take()),
            None => bail!("{command}: {}", answer["error"].as_str().unwrap_or(&line)),
        }
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// As [`Self::ask_for`].
    pub fn ask(&mut self, command: &Value) -> Result<Value> {
        self.ask_for(command, DEADLINE)
    }

    /// Starts the kubelet, or starts it again.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&mut self) -> Result<()> {
        self.ask(&json!({ "start": {} })).map(drop)
    }

    /// A resource as it stands.
    ///
    /// # Errors
    /// When nobody has registered it.
    pub fn resource(&mut self, name: &str) -> Result<Resource> {
        let mut all = self.ask(&json!({ "show": {} }))?;
        let one = all.get_mut(name).map(Value::take);
        let one = one.with_context(|| format!("{name} is not registered; there is {all}"))?;
        serde_json::from_value(one).context("read a resource")
    }

    /// Which of all free devices the plugin would take.
    ///
    /// # Errors
    /// When it refuses.
    pub fn prefer(&mut self, resource: &str, size: usize) -> Result<Vec<String>> {
        let answer = self.ask(&json!({ "prefer": { "resource": resource, "size": size } }))?;
        serde_json::from_value(answer).context("read a preference")
    }

    /// Gives devices to a pod's only container: these, or as many as are told.
    ///
    /// # Errors
    /// When the plugin refuses.
    pub fn allocate(
        &mut self,
        resource: &str,
        pod: &str,
        ids: &[&str],
        size: usize,
    ) -> Result<Allocated> {
        let answer = self.ask(&json!({ "allocate": {
            "resource": resource, "ids": ids, "size": size,
            "namespace": "default", "pod": pod, "container": "main",
        } }))?;
        serde_json::from_value(answer).context("read an allocation")
    }

    /// Fails unless the program runs.
    ///
    /// # Errors
    /// When it has ended.
    pub fn still_runs(&mut self) -> Result<()> {
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "the stand-in has ended: {ended:?}");
        Ok(())
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
