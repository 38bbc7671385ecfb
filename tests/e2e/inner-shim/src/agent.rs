//! The guest's agent: a shell behind the second serial port that runs one line at a time.
//!
//! There: `NONCE COMMAND`. Back: what the command says, then `@NONCE CODE`. Lines before that with another number are of a command that
//! was given up.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// How long the guest may take to say that it listens. A guest that boots says nothing: whoever asks comes again.
const ALIVE: Duration = Duration::from_secs(4);

/// How long a command may be silent.
const SILENT: Duration = Duration::from_secs(120);

static NEXT: AtomicU32 = AtomicU32::new(1);

/// Runs a command in the guest: what it said, and its exit code.
pub(crate) fn run(socket: &Path, command: &[String]) -> Result<(String, u32)> {
    let stream = UnixStream::connect(socket).context("connect to the guest's serial port")?;
    stream.set_read_timeout(Some(ALIVE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    ask(&stream, &mut reader, "true").context("the guest's agent does not answer yet")?;
    stream.set_read_timeout(Some(SILENT))?;
    ask(&stream, &mut reader, &quoted(command))
}

fn ask(
    mut stream: &UnixStream,
    reader: &mut BufReader<UnixStream>,
    line: &str,
) -> Result<(String, u32)> {
    let nonce = NEXT.fetch_add(1, Ordering::Relaxed);
    // Whatever half a line there may be ends here.
    write!(stream, "\n{nonce} {line}\n")?;
    let end = format!("@{nonce} ");
    let mut said = String::new();
    loop {
        let mut bytes = Vec::new();
        let count = reader.read_until(b'\n', &mut bytes)?;
        anyhow::ensure!(count > 0, "the guest is gone");
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some(code) = text.strip_prefix(&end) {
            return Ok((said, code.trim().parse().context("an exit code")?));
        }
        if text.starts_with('@') {
            said.clear();
        } else {
            said.push_str(&text);
        }
    }
}

/// Words as a shell takes them.
fn quoted(command: &[String]) -> String {
    let word = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
    command.iter().map(word).collect::<Vec<_>>().join(" ")
}
