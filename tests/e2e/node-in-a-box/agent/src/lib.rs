//! What the harness outside and the agent inside the node say to each other, over one virtio-serial port.
//!
//! A message is a header and, after it, the bytes that the header announces:
//!
//! ```text
//! 4 bytes   length of the header, little endian
//! header    JSON: a Request or a Reply
//! bytes     in the order of the header's fields
//! ```
//!
//! The agent sends [`Reply::Ready`] once, when it has started. After that each request has one reply, in order.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port.
pub const PORT: &str = "node-in-a-box";

/// The longest header, in bytes.
pub const MAX_HEADER: usize = 1 << 20;

/// The most bytes that follow a header for one of its fields.
pub const MAX_BYTES: u64 = 1 << 30;

/// What the harness asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Run a program to its end.
    Run {
        /// The program and its arguments.
        argv: Vec<String>,
        /// Milliseconds after which it is killed.
        deadline_ms: u64,
    },
    /// Make a file; its folder is made too.
    Put {
        /// Its path.
        path: String,
        /// Its mode.
        mode: u32,
        /// Bytes that follow: its content.
        length: u64,
    },
    /// Read a file.
    Get {
        /// Its path.
        path: String,
    },
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The agent has started.
    Ready,
    /// The program has ended.
    Finished {
        /// Its raw wait status.
        status: i32,
        /// Milliseconds that it ran.
        took_ms: u64,
        /// Bytes that follow first: its standard output.
        stdout: u64,
        /// Bytes that follow then: its standard error.
        stderr: u64,
    },
    /// The file is written.
    Written,
    /// The file's content.
    Content {
        /// Bytes that follow.
        length: u64,
    },
    /// It could not be done.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Writes a message: its header, then the bytes of each field that announces some.
///
/// # Errors
/// When the channel fails.
pub fn send(out: &mut impl Write, header: &impl Serialize, bytes: &[&[u8]]) -> io::Result<()> {
    let header = serde_json::to_vec(header)?;
    let length = u32::try_from(header.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&header)?;
    for part in bytes {
        out.write_all(part)?;
    }
    out.flush()
}

/// Reads a header.
///
/// # Errors
/// When the channel fails or ends, or what comes is no header of this form.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_HEADER {
        return Err(invalid(format!("a header of {length} bytes")));
    }
    let mut header = vec![0; length];
    from.read_exact(&mut header)?;
    serde_json::from_slice(&header).map_err(io::Error::from)
}

/// Reads the bytes that a header announced.
///
/// # Errors
/// When the channel fails or ends, or more than [`MAX_BYTES`] were announced.
pub fn bytes(from: &mut impl Read, length: u64) -> io::Result<Vec<u8>> {
    if length > MAX_BYTES {
        return Err(invalid(format!("{length} bytes after a header")));
    }
    let mut content = Vec::new();
    from.take(length).read_to_end(&mut content)?;
    if content.len() as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(content)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written() {
        let request = Request::Put {
            path: "/etc/x".to_owned(),
            mode: 0o600,
            length: 3,
        };
        let mut channel = Vec::new();
        send(&mut channel, &request, &[b"abc"]).unwrap();
        send(&mut channel, &Reply::Written, &[]).unwrap();
        let mut from = &channel[..];
        assert_eq!(receive::<Request>(&mut from).unwrap(), request);
        assert_eq!(bytes(&mut from, 3).unwrap(), b"abc");
        assert_eq!(receive::<Reply>(&mut from).unwrap(), Reply::Written);
        assert!(receive::<Reply>(&mut from).is_err());
    }

    #[test]
    fn lengths_that_nothing_has_are_refused() {
        assert!(receive::<Reply>(&mut &[0xff; 8][..]).is_err());
        assert!(bytes(&mut &b"ab"[..], 3).is_err());
        assert!(bytes(&mut &b"ab"[..], u64::MAX).is_err());
    }
}
