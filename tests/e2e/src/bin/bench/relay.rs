//! A TCP relay in front of a registry, which counts bytes and can make each connection slow, as a storage service does that
//! caps connections, or a long way.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use km_tests_e2e::sandbox::Sandbox;

/// Bytes moved at once.
const PIECE: usize = 64 << 10;

/// Where nothing comes for so long, what comes then is the answer to a request.
const IDLE: Duration = Duration::from_millis(1);

/// How slow each connection is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slow {
    /// The most bytes a second towards the client.
    pub(crate) rate: u64,
    /// Time between a request and the first byte of its answer.
    pub(crate) latency: Duration,
}

/// A running relay. Its threads end with the program.
#[derive(Debug)]
pub(crate) struct Relay {
    port: u16,
    to_client: Arc<AtomicU64>,
}

impl Relay {
    /// Starts a relay to `upstream`, a port of 127.0.0.1.
    ///
    /// # Errors
    /// When it cannot listen.
    pub(crate) fn start(sandbox: &Sandbox, upstream: u16, slow: Option<Slow>) -> Result<Self> {
        let port = sandbox.port();
        let listener = TcpListener::bind(("127.0.0.1", port))
            .with_context(|| format!("listen on 127.0.0.1:{port}"))?;
        let to_client = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&to_client);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let count = Arc::clone(&count);
                // A connection that breaks is the client's to notice.
                thread::spawn(move || drop(serve(&client, upstream, slow, &count)));
            }
        });
        Ok(Self { port, to_client })
    }

    /// A reference to something behind it.
    pub(crate) fn reference(&self, name_and_tag: &str) -> String {
        format!("127.0.0.1:{}/{name_and_tag}", self.port)
    }

    /// Bytes that went to clients since the last call, heads and encryption included.
    pub(crate) fn take_bytes(&self) -> u64 {
        self.to_client.swap(0, Ordering::Relaxed)
    }
}

fn serve(
    client: &TcpStream,
    upstream: u16,
    slow: Option<Slow>,
    count: &AtomicU64,
) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", upstream))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let asked = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            drop(pass(&server, client, slow, &asked, count));
            drop(client.shutdown(Shutdown::Both));
        });
        let mut buffer = vec![0; PIECE];
        loop {
            let got = (&mut &*client).read(&mut buffer)?;
            if got == 0 {
                break;
            }
            asked.store(true, Ordering::Relaxed);
            (&mut &server).write_all(&buffer[..got])?;
        }
        server.shutdown(Shutdown::Both)
    })
}

/// Passes the answers on.
fn pass(
    mut from: &TcpStream,
    mut to: &TcpStream,
    slow: Option<Slow>,
    asked: &AtomicBool,
    count: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut free = Instant::now();
    loop {
        let waiting = Instant::now();
        let got = from.read(&mut buffer)?;
        if got == 0 {
            return Ok(());
        }
        if let Some(slow) = slow {
            let now = Instant::now();
            // What HTTP/2 sends while an answer comes is no request.
            let idle = now.duration_since(waiting) > IDLE;
            if asked.swap(false, Ordering::Relaxed) && idle {
                thread::sleep(slow.latency);
            }
            // Time that was not used is not saved up, but for a few pieces: a thread does not wake to the microsecond.
            free = free.max(now.checked_sub(Duration::from_millis(5)).unwrap_or(now));
            free += Duration::from_secs_f64(got as f64 / slow.rate as f64);
            thread::sleep(free.saturating_duration_since(Instant::now()));
        }
        to.write_all(&buffer[..got])?;
        count.fetch_add(got as u64, Ordering::Relaxed);
    }
}
