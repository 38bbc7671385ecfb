//! Plays registries, token servers and their faults against the client. What a real registry does is tested end to end.

mod authorization;
mod blobs;
mod manifests;
mod mirrors;
mod publishing;
mod redirects;
mod server;
mod tls;

use std::io;
use std::time::Duration;

use super::*;
use server::{End, Reply, Seen, Server};

/// The path of a manifest in the test repository.
const MANIFEST: &str = "/v2/team/kata/manifests/v1";

/// Times that a busy machine does not reach: tests of giving up have their own.
fn options() -> ClientOptions {
    ClientOptions {
        connect_timeout: Duration::from_secs(30),
        read_timeout: Duration::from_secs(30),
        ..ClientOptions::default()
    }
}

fn client() -> Client {
    Client::new(options()).unwrap()
}

fn client_with(credentials: Credentials) -> Client {
    Client::new(ClientOptions {
        credentials,
        ..options()
    })
    .unwrap()
}

fn reference(server: &Server) -> Reference {
    format!("{}/team/kata:v1", server.host()).parse().unwrap()
}

fn amd64() -> Platform {
    Platform {
        os: "linux".into(),
        architecture: "amd64".into(),
        variant: None,
    }
}

/// The error and its causes, as a person sees them.
fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

/// A blob of the test repository.
const KERNEL: &[u8] = b"guest kernel";

async fn fetch_kernel(client: &Client, server: &Server) -> (Result<()>, Collect) {
    let mut sink = Collect::default();
    let (digest, reference) = (Digest::of(KERNEL), reference(server));
    let result = client.fetch_blob(&reference, &digest, KERNEL.len() as u64, &mut sink);
    (result.await, sink)
}

/// Collects what it is given, and remembers the most that it ever held.
#[derive(Debug, Default)]
struct Collect {
    bytes: Vec<u8>,
    most: usize,
    restarts: usize,
    fails: bool,
}

impl BlobSink for Collect {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.fails {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        self.most = self.most.max(self.bytes.len());
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.bytes.clear();
        self.restarts += 1;
        Ok(())
    }
}

#[test]
fn futures_can_be_spawned() {
    fn is_send<T: Send>(_: T) {}
    let client = client();
    let reference: Reference = "r.example/a:b".parse().unwrap();
    let (digest, platform) = (Digest::of(b""), amd64());
    let mut sink = Collect::default();
    is_send(client.digest(&reference));
    is_send(client.resolve(&reference, &platform));
    is_send(client.fetch_blob(&reference, &digest, 1, &mut sink));
    is_send(client.push_blob(&reference, &digest, 1, BlobSource::Bytes(b"x"), &|_| ()));
    is_send(client.push_manifest(&reference, "x", Vec::new()));
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let reference: Reference = format!("{host}/a:b").parse().unwrap();
    let error = client().digest(&reference).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(!error.is_verification() && !error.is_configuration() && !error.is_local());
    let text = whole(&error);
    assert!(text.contains(&host) && text.contains("refused"), "{text}");
}

#[tokio::test]
async fn a_registry_that_says_nothing_is_given_up() {
    let server = Server::start(|_, _| {
        Reply::ok("x")
            .header("Content-Length", 9)
            .end(End::Stall(1))
    })
    .await;
    let client = Client::new(ClientOptions {
        read_timeout: Duration::from_secs(1),
        ..options()
    });
    let error = client
        .unwrap()
        .resolve(&reference(&server), &amd64())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert_eq!(server.seen().len(), 3);
}
