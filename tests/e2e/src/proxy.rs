//! A network that fails to order: an HTTP/1.1 proxy on 127.0.0.1 in front of a real plain registry.
//!
//! Each connection carries one request (`Connection: close` both ways), so that a rule meets exactly the response that it names.
//! It also writes down every request, for tests that count them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::sockopt::set_socket_linger;

use crate::http::{Request, read_head};
use crate::referrers;
use crate::sandbox::Sandbox;

/// What happens to a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The body ends cleanly after this many bytes; its announced length stays.
    Truncate(u64),
    /// The connection is reset (RST) after this many bytes of body.
    Reset(u64),
    /// Nothing comes for a time after this many bytes of body; then the rest.
    Stall(u64, Duration),
    /// The byte at this offset of the body has all its bits turned.
    Corrupt(u64),
    /// The registry is not asked; this HTTP status comes back with an empty body.
    Status(u16),
    /// The registry is not asked; the client is sent to the same path at this port of 127.0.0.1.
    Redirect(u16),
    /// The length is not announced, and after the body zeros come for ever.
    Endless,
}

/// Which responses a fault hits, and how many of them.
#[derive(Clone, Debug)]
pub struct Rule {
    /// A part of the request's path: `/blobs/`, `/manifests/`, a digest.
    pub path: String,
    /// What happens.
    pub fault: Fault,
    /// How many more responses it hits; a rule that is used up stays and does nothing.
    pub times: u32,
}

/// A header of a response that says something else than the registry did, whatever fault meets the response besides.
#[derive(Clone, Debug)]
struct Header {
    path: String,
    name: &'static str,
    value: &'static str,
    times: u32,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    headers: Vec<Header>,
    requests: Vec<Request>,
    /// The storage of a registry whose referrers are listed.
    referrers: Option<PathBuf>,
    /// Bytes of bodies that went to clients.
    bytes: u64,
}

/// A running proxy. Its threads end with the program.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Starts a proxy to the registry at `upstream`, a port of 127.0.0.1. It has no rules yet.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(sandbox: &Sandbox, upstream: u16) -> Result<Self> {
        let port = sandbox.port();
        let listener = TcpListener::bind(("127.0.0.1", port))
            .with_context(|| format!("listen on 127.0.0.1:{port}"))?;
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                // A connection that breaks is the client's to notice, as with a real network.
                thread::spawn(move || drop(serve(&client, upstream, &shared)));
            }
        });
        Ok(Self { port, state })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its host and port, as references begin.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A reference to something behind it.
    pub fn reference(&self, name_and_tag: &str) -> String {
        format!("{}/{name_and_tag}", self.host())
    }

    /// Adds a rule. The first rule that fits a response and is not used up counts.
    pub fn rule(&self, path: &str, fault: Fault, times: u32) {
        lock(&self.state).rules.push(Rule {
            path: path.to_owned(),
            fault,
            times,
        });
    }

    /// Replaces a header, which the response need not have, in the next responses to requests for `path`.
    pub fn header(&self, path: &str, name: &'static str, value: &'static str, times: u32) {
        lock(&self.state).headers.push(Header {
            path: path.to_owned(),
            name,
            value,
            times,
        });
    }

    /// Serves the referrers API, which the registry behind has not, over its storage ([`Registry::storage`]); or not any more.
    ///
    /// [`Registry::storage`]: crate::registry::Registry::storage
    pub fn serve_referrers(&self, storage: Option<PathBuf>) {
        lock(&self.state).referrers = storage;
    }

    /// Lets everything pass again.
    pub fn clear(&self) {
        let mut state = lock(&self.state);
        state.rules.clear();
        state.headers.clear();
    }

    /// Bytes of responses' bodies that went to clients since the last call.
    pub fn take_bytes(&self) -> u64 {
        std::mem::take(&mut lock(&self.state).bytes)
    }

    /// The requests since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.state).requests)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a response is to suffer.
#[derive(Debug)]
struct Fate {
    fault: Option<Fault>,
    headers: Vec<(&'static str, &'static str)>,
}

/// Writes the request down and finds what its response is to suffer.
fn admit(state: &Mutex<State>, request: Request) -> Fate {
    let mut state = lock(state);
    let fault = state
        .rules
        .iter_mut()
        .find(|rule| rule.times > 0 && request.path.contains(&rule.path))
        .map(|rule| {
            rule.times -= 1;
            rule.fault
        });
    let meets = |header: &&mut Header| header.times > 0 && request.path.contains(&header.path);
    let headers = state.headers.iter_mut().filter(meets).map(|header| {
        header.times -= 1;
        (header.name, header.value)
    });
    let headers = headers.collect();
    state.requests.push(request);
    Fate { fault, headers }
}

fn serve(mut client: &TcpStream, upstream: u16, state: &Mutex<State>) -> io::Result<()> {
    let (head, body_start) = read_head(&mut client)?;
    let Some(request) = Request::parse(&head) else {
        return client.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    };
    let path = request.path.clone();
    let storage = lock(state).referrers.clone();
    if let Some(listed) = storage.and_then(|storage| referrers::answer(&storage, &request)) {
        lock(state).requests.push(request);
        return client.write_all(&listed);
    }
    let fate = admit(state, request);
    if let Some(Fault::Redirect(port)) = fate.fault {
        let answer = format!(
            "HTTP/1.1 307 Fault\r\nLocation: http://127.0.0.1:{port}{path}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        return client.write_all(answer.as_bytes());
    }
    if let Some(Fault::Status(code)) = fate.fault {
        let answer =
            format!("HTTP/1.1 {code} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return client.write_all(answer.as_bytes());
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream))?;
    server.write_all(closing(&head, &[]).as_bytes())?;
    server.write_all(&body_start)?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    // The request's body. It ends when either side closes, which the end of the response brings about.
    let body = thread::spawn(move || drop(io::copy(&mut from, &mut to)));
    let outcome = respond(client, &server, &fate, state);
    // Only the reading half of the client's: closing it then tells the client of its end, orderly or by a reset.
    drop(server.shutdown(Shutdown::Both));
    drop(client.shutdown(Shutdown::Read));
    drop(body.join());
    outcome
}

/// Passes the response on.
fn respond(
    mut client: &TcpStream,
    server: &TcpStream,
    fate: &Fate,
    state: &Mutex<State>,
) -> io::Result<()> {
    let (mut head, mut body_start) = read_head(&mut &*server)?;
    while head.starts_with("HTTP/1.1 1") {
        client.write_all(head.as_bytes())?; // 100 Continue
        (head, body_start) = read_head(&mut (&body_start[..]).chain(server))?;
    }
    let mut head = closing(&head, &fate.headers);
    if let Some(Fault::Endless) = fate.fault {
        let lines = head.split_inclusive("\r\n");
        head = lines
            .filter(|line| !line.to_ascii_lowercase().starts_with("content-length:"))
            .collect();
    }
    client.write_all(head.as_bytes())?;
    let mut body = Counted { client, state };
    relay(&mut (&body_start[..]).chain(server), &mut body, fate.fault)
}

/// The way to a client, along which bytes are counted.
struct Counted<'a> {
    client: &'a TcpStream,
    state: &'a Mutex<State>,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.client.write(bytes)?;
        lock(self.state).bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.client.flush()
    }
}

/// Copies a response's body, with its fault.
fn relay(from: &mut impl Read, to: &mut Counted<'_>, fault: Option<Fault>) -> io::Result<()> {
    let mut pass = |limit: u64, to: &mut Counted<'_>| io::copy(&mut from.take(limit), to);
    match fault {
        None | Some(Fault::Status(_) | Fault::Redirect(_)) => {}
        Some(Fault::Endless) => {
            io::copy(from, to)?;
            loop {
                to.write_all(&[0; 1 << 16])?; // until the client has had enough
            }
        }
        Some(Fault::Truncate(after)) => {
            pass(after, to)?;
            return Ok(());
        }
        Some(Fault::Reset(after)) => {
            pass(after, to)?;
            // Closing with a linger of zero sends a reset in place of the orderly end.
            set_socket_linger(to.client, Some(Duration::ZERO))?;
            return Ok(());
        }
        Some(Fault::Stall(after, pause)) => {
            pass(after, to)?;
            thread::sleep(pause);
        }
        Some(Fault::Corrupt(at)) => {
            pass(at, to)?;
            let mut byte = [0];
            if from.read(&mut byte)? == 1 {
                to.write_all(&[!byte[0]])?;
            }
        }
    }
    io::copy(from, to)?;
    Ok(())
}

/// A head with `Connection: close` in place of what it said about the connection, and with other headers in place of its own.
fn closing(head: &str, headers: &[(&str, &str)]) -> String {
    let replaced = |line: &str| {
        let name = line.split(':').next().unwrap_or_default();
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        is("connection") || headers.iter().any(|(name, _)| is(name))
    };
    let lines = head.trim_end().split("\r\n");
    let mut kept: Vec<String> = lines
        .filter(|line| !replaced(line))
        .map(str::to_owned)
        .collect();
    kept.extend(
        headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}")),
    );
    kept.push("Connection: close\r\n\r\n".to_owned());
    kept.join("\r\n")
}
