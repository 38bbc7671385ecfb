//! The line to the agent inside the node: requests out, replies in, each with a deadline.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use km_node_agent::{Reply, Request, bytes, receive, send};

use crate::process::Finished;

/// Time that the agent is given beyond a program's own deadline, and for everything that is no program. A software processor
/// on a busy machine is slow.
const GRACE: Duration = Duration::from_secs(30);

/// The line.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Connects to the socket that QEMU listens on.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("connect to the node's agent at {}", path.display()))?;
        Ok(Self { stream })
    }

    /// Waits until the agent says that it has started; none when it has not within `time`.
    ///
    /// # Errors
    /// When the line breaks, or something else comes.
    pub fn ready(&mut self, time: Duration) -> Result<Option<()>> {
        self.stream.set_read_timeout(Some(time))?;
        match receive(&mut self.stream) {
            Ok(Reply::Ready) => Ok(Some(())),
            Ok(other) => bail!("the agent began with {other:?}"),
            Err(error) if is_timeout(&error) => Ok(None),
            Err(error) => Err(error).context("the agent's first word"),
        }
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it cannot be started, runs longer than `deadline`, or the line breaks. A failing exit code is no error here.
    pub fn run(&mut self, argv: &[&str], deadline: Duration) -> Result<Finished> {
        let request = Request::Run {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            deadline_ms: u64::try_from(deadline.as_millis())?,
        };
        let reply = self.ask(&request, &[], deadline)?;
        let Reply::Finished {
            status,
            took_ms,
            stdout,
            stderr,
        } = reply
        else {
            bail!("the agent answered a run with {reply:?}");
        };
        let mut text = |length| -> Result<String> {
            let bytes = bytes(&mut self.stream, length).context("a program's output")?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Finished {
            stdout: text(stdout)?,
            stderr: text(stderr)?,
            status: ExitStatus::from_raw(status),
            took: Duration::from_millis(took_ms),
        })
    }

    /// Makes a file in the node.
    ///
    /// # Errors
    /// When it cannot be written, or the line breaks.
    pub fn put(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let request = Request::Put {
            path: path.to_owned(),
            mode,
            length: content.len() as u64,
        };
        let reply = self.ask(&request, content, Duration::ZERO)?;
        ensure!(reply == Reply::Written, "the agent answered {reply:?}");
        Ok(())
    }

    /// Reads a file of the node.
    ///
    /// # Errors
    /// When it cannot be read, or the line breaks.
    pub fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        let path = path.to_owned();
        match self.ask(&Request::Get { path }, &[], Duration::ZERO)? {
            Reply::Content { length } => Ok(bytes(&mut self.stream, length)?),
            reply => bail!("the agent answered {reply:?}"),
        }
    }

    fn ask(&mut self, request: &Request, content: &[u8], deadline: Duration) -> Result<Reply> {
        let patience = Some(deadline + GRACE);
        self.stream.set_read_timeout(patience)?;
        self.stream.set_write_timeout(patience)?;
        let reply = exchange(&mut self.stream, request, content)
            .with_context(|| format!("the line to the node's agent, at {request:?}"))?;
        match reply {
            Reply::Failed { reason } => bail!("in the node: {reason}"),
            reply => Ok(reply),
        }
    }
}

fn exchange(
    stream: &mut (impl Read + Write),
    request: &Request,
    content: &[u8],
) -> std::io::Result<Reply> {
    send(stream, request, &[content])?;
    receive(stream)
}

fn is_timeout(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | WouldBlock)
}
