//! A small HTTP server that answers as it is told, right or wrong. One request a connection.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// How often a slow body goes on: fifty times a second.
const SLICE: Duration = Duration::from_millis(20);

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) method: String,
    /// Path and query.
    pub(super) path: String,
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter();
        all.find(|(key, _)| key == name).map(|(_, v)| v.as_str())
    }

    /// Method and path.
    pub(super) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// How an answer's body ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// As announced.
    Whole,
    /// The connection closes after so many bytes.
    Cut(usize),
    /// As announced, at so many bytes a second.
    Slow(usize),
    /// The same bytes again and again, without an announced length.
    Endless,
    /// Nothing more comes, and the connection stays open.
    Stall(usize),
}

/// An answer.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    end: End,
}

impl Reply {
    pub(super) fn new(status: u16) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            end: End::Whole,
        }
    }

    pub(super) fn ok(body: impl Into<Vec<u8>>) -> Reply {
        Reply::new(200).body(body)
    }

    pub(super) fn body(mut self, body: impl Into<Vec<u8>>) -> Reply {
        self.body = body.into();
        self
    }

    pub(super) fn header(mut self, name: &str, value: impl ToString) -> Reply {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub(super) fn end(mut self, end: End) -> Reply {
        self.end = end;
        self
    }
}

type Handler = dyn Fn(&Seen, usize) -> Reply + Send + Sync;

/// A running server; it ends when it is dropped.
pub(super) struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// The handler is given each request with its number, from 0.
    pub(super) async fn start(
        handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> Server {
        Server::run(handler, None).await
    }

    /// With TLS.
    pub(super) async fn start_tls(
        config: Arc<rustls::ServerConfig>,
        handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> Server {
        Server::run(handler, Some(config.into())).await
    }

    async fn run(
        handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
        tls: Option<tokio_rustls::TlsAcceptor>,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (handler, record): (Arc<Handler>, _) = (Arc::new(handler), Arc::clone(&seen));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (handler, record, tls) =
                    (Arc::clone(&handler), Arc::clone(&record), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, &*handler, &record).await,
                        // A client that does not trust us ends the handshake.
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => serve(stream, &*handler, &record).await,
                            Err(_) => None,
                        },
                    }
                });
            }
        });
        Server {
            address,
            seen,
            task,
        }
    }

    /// `127.0.0.1:port`.
    pub(super) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Method and path of every request.
    pub(super) fn lines(&self) -> Vec<String> {
        self.seen().iter().map(Seen::line).collect()
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    handler: &Handler,
    record: &Mutex<Vec<Seen>>,
) -> Option<()> {
    let seen = read_request(&mut stream).await?;
    let reply = {
        let mut record = record.lock().unwrap();
        record.push(seen.clone());
        let number = record.len() - 1;
        drop(record);
        handler(&seen, number)
    };
    answer(&mut stream, reply, seen.method == "HEAD").await
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<Seen> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8(bytes[..head].to_vec()).unwrap();
    let mut lines = text.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()))
        .collect();
    let length = headers.iter().find(|(k, _)| k == "content-length");
    let length: usize = length.map_or(0, |(_, v)| v.parse().unwrap());
    let mut body = bytes.split_off(head + 4);
    while body.len() < length {
        if stream.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Seen {
        method,
        path,
        headers,
        body,
    })
}

async fn answer(stream: &mut (impl AsyncWrite + Unpin), reply: Reply, head: bool) -> Option<()> {
    let mut text = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", reply.status);
    let has_length = reply.headers.iter().any(|(k, _)| k == "Content-Length");
    if !has_length && !matches!(reply.end, End::Endless) {
        text += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += "\r\n";
    stream.write_all(text.as_bytes()).await.ok()?;
    if !head {
        match reply.end {
            End::Whole => stream.write_all(&reply.body).await.ok()?,
            End::Cut(bytes) => stream.write_all(&reply.body[..bytes]).await.ok()?,
            End::Stall(bytes) => {
                stream.write_all(&reply.body[..bytes]).await.ok()?;
                stream.flush().await.ok()?;
                tokio::time::sleep(Duration::from_secs(600)).await;
            }
            End::Slow(rate) => {
                let mut tick = tokio::time::interval(SLICE);
                for piece in reply.body.chunks(rate / 50) {
                    tick.tick().await;
                    stream.write_all(piece).await.ok()?;
                }
            }
            // Until the client has enough.
            End::Endless => loop {
                stream.write_all(&reply.body).await.ok()?;
            },
        }
    }
    stream.shutdown().await.ok()
}
