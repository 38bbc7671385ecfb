//! A forward proxy, as companies have between their machines and the network: `CONNECT` for TLS, whole URLs for the rest.
//!
//! Whatever host it is asked for, it goes to the same port of 127.0.0.1. So nobody has to know the names that tests make up,
//! and a request that reaches a registry by such a name has come through here.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use crate::http::{Request, read_head};
use crate::registry::User;
use crate::sandbox::Sandbox;

/// A running proxy. Its threads end with the program.
#[derive(Debug)]
pub struct Forward {
    port: u16,
    user: Option<User>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Forward {
    /// Starts a proxy that lets in everyone, or one user.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(sandbox: &Sandbox, user: Option<User>) -> Result<Self> {
        let port = sandbox.port();
        let listener = TcpListener::bind(("127.0.0.1", port))
            .with_context(|| format!("listen on 127.0.0.1:{port}"))?;
        let requests = Arc::new(Mutex::default());
        let (shared, wanted) = (Arc::clone(&requests), user.as_ref().map(User::basic));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (shared, wanted) = (Arc::clone(&shared), wanted.clone());
                // A connection that breaks is the client's to notice.
                thread::spawn(move || drop(serve(&client, wanted.as_deref(), &shared)));
            }
        });
        Ok(Self {
            port,
            user,
            requests,
        })
    }

    /// Its URL, with its user's name and password.
    pub fn url(&self) -> String {
        let user = self.user.as_ref();
        let user = user.map(|user| format!("{}:{}@", user.name, user.password));
        format!("http://{}127.0.0.1:{}", user.unwrap_or_default(), self.port)
    }

    /// Method and target of each request since the last call.
    pub fn take_requests(&self) -> Vec<String> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = std::mem::take(&mut *requests).into_iter();
        taken
            .map(|request| format!("{} {}", request.method, request.path))
            .collect()
    }
}

fn serve(
    mut client: &TcpStream,
    wanted: Option<&str>,
    requests: &Mutex<Vec<Request>>,
) -> io::Result<()> {
    let (head, rest) = read_head(&mut client)?;
    let request = Request::parse(&head).ok_or(io::ErrorKind::InvalidData)?;
    let knows = wanted.is_none() || request.header("Proxy-Authorization") == wanted;
    let (method, target) = (request.method.clone(), request.path.clone());
    requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(request);
    if !knows {
        return client.write_all(
            b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    }
    let connect = method == "CONNECT";
    let whole = target.strip_prefix("http://").unwrap_or(&target);
    let (authority, path) = whole.split_at(whole.find('/').unwrap_or(whole.len()));
    let port = authority
        .rsplit(':')
        .next()
        .and_then(|port| port.parse().ok());
    let mut server = TcpStream::connect(("127.0.0.1", port.unwrap_or(80)))?;
    if connect {
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    } else {
        server.write_all(forwarded(&head, &format!("{method} {path}")).as_bytes())?;
    }
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let up = thread::spawn(move || {
        let sent = io::copy(&mut (&rest[..]).chain(&mut from), &mut to);
        // The other half may still be on its way.
        drop(to.shutdown(Shutdown::Write));
        sent
    });
    let outcome = io::copy(&mut server, &mut client);
    drop(client.shutdown(Shutdown::Both));
    drop(up.join());
    outcome.map(drop)
}

/// A request's head for the server itself; one request a connection, so that each is seen here.
fn forwarded(head: &str, first: &str) -> String {
    let mut kept = vec![format!("{first} HTTP/1.1")];
    let mut lines = head.trim_end().split("\r\n");
    lines.next();
    for line in lines {
        let lower = line.to_ascii_lowercase();
        if !lower.starts_with("proxy-") && !lower.starts_with("connection:") {
            kept.push(line.to_owned());
        }
    }
    kept.push("Connection: close\r\n\r\n".to_owned());
    kept.join("\r\n")
}
