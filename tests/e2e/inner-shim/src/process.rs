//! The processes of a pod, as containerd knows them: the sandbox, its containers, and what is executed in them.

use std::collections::HashMap;
use std::fs::File;

use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;

/// A process.
#[derive(Debug, Default)]
pub(crate) struct Process {
    /// Its bundle; empty for what is executed in a container.
    pub(crate) bundle: String,
    /// Where its words go: a FIFO of containerd's, or nowhere.
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// What is executed.
    pub(crate) command: Vec<String>,
    pub(crate) started: bool,
    pub(crate) ended: Option<(u32, Timestamp)>,
    /// FIFOs that are kept open until it ends.
    pub(crate) kept: Vec<File>,
    /// What is executed in it.
    pub(crate) inside: HashMap<String, Process>,
}

impl Process {
    /// Ends it, once.
    pub(crate) fn end(&mut self, code: u32) {
        if self.ended.is_none() {
            let now = containerd_shim::util::timestamp().unwrap_or_default();
            self.ended = Some((code, now));
            self.kept.clear();
        }
        for inside in self.inside.values_mut() {
            inside.end(code);
        }
    }
}

/// A pod.
#[derive(Debug, Default)]
pub(crate) struct Pod {
    /// The sandbox's id.
    pub(crate) sandbox: String,
    /// QEMU's number.
    pub(crate) pid: u32,
    /// The sandbox and the containers.
    pub(crate) tasks: HashMap<String, Process>,
}

impl Pod {
    pub(crate) fn process(&self, id: &str, exec: &str) -> Option<&Process> {
        let task = self.tasks.get(id)?;
        match exec {
            "" => Some(task),
            exec => task.inside.get(exec),
        }
    }

    pub(crate) fn process_mut(&mut self, id: &str, exec: &str) -> Option<&mut Process> {
        let task = self.tasks.get_mut(id)?;
        match exec {
            "" => Some(task),
            exec => task.inside.get_mut(exec),
        }
    }
}
