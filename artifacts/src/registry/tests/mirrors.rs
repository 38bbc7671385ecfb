//! Mirrors of `hosts.toml` files: their order, what they are asked, and that nothing of them is believed.

use std::path::Path;
use std::sync::Arc;

use km_host::{HostPath, Root};

use super::*;

fn digest_reply(_: &Seen, _: usize) -> Reply {
    Reply::ok("").header("Docker-Content-Digest", Digest::of(b"m"))
}

/// Writes a registry's `hosts.toml` below the folder.
fn write(dir: &Path, folder: &str, text: &str) {
    let folder = dir.join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
}

fn with_hosts(dir: &Path, credentials: Credentials) -> Client {
    reading(dir, true, credentials)
}

fn reading(dir: &Path, strict: bool, credentials: Credentials) -> Client {
    Client::new(ClientOptions {
        credentials,
        ..hosts_options(dir, strict)
    })
    .unwrap()
}

fn hosts_options(dir: &Path, strict: bool) -> ClientOptions {
    ClientOptions {
        root: Some(Arc::new(Root::new("/").unwrap())),
        hosts_dir: Some(HostsDir {
            path: HostPath::new(dir).unwrap(),
            strict,
        }),
        tries: 1,
        ..options()
    }
}

/// A port where nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn under_scores(server: &Server) -> String {
    format!("{}_", server.host().replace(':', "_"))
}

#[tokio::test]
async fn a_mirror_answers_for_its_registry_and_is_told_for_which() {
    let (origin, mirror) = (
        Server::start(digest_reply).await,
        Server::start(digest_reply).await,
    );
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "[host.\"http://{}\"]\nheader = {{ x-key = \"k3y\" }}\n",
        mirror.host()
    );
    write(dir.path(), &under_scores(&origin), &text);
    let all = Credentials::basic(&origin.host(), "bob", "s3cret");
    let client = with_hosts(dir.path(), all);
    client.digest(&reference(&origin)).await.unwrap();
    assert_eq!(origin.lines(), Vec::<String>::new());
    let ns = origin.host().replace(':', "%3A");
    assert_eq!(mirror.lines(), [format!("HEAD {MANIFEST}?ns={ns}")]);
    assert_eq!(mirror.seen()[0].header("authorization"), None);
    assert_eq!(mirror.seen()[0].header("x-key"), Some("k3y"));
    assert!(!format!("{client:?}").contains("k3y"));
}

#[tokio::test]
async fn what_a_mirror_cannot_give_comes_from_the_next() {
    let bad = Server::start(|_, n| match n {
        0 => Reply::new(404),
        1 => Reply::new(503),
        2 => Reply::ok(b"another kerne"[..KERNEL.len()].to_vec()),
        _ => Reply::ok(KERNEL).end(End::Cut(5)),
    })
    .await;
    let origin = Server::start(|_, _| Reply::ok(KERNEL)).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
        nobody(),
        bad.host()
    );
    write(dir.path(), &origin.host(), &text);
    let client = with_hosts(dir.path(), Credentials::anonymous());
    for (asked, restarts) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
        let (result, sink) = fetch_kernel(&client, &origin).await;
        result.unwrap();
        assert_eq!(sink.bytes, KERNEL);
        assert_eq!(sink.restarts, restarts);
        assert_eq!((bad.seen().len(), origin.seen().len()), (asked, asked));
    }
    // The registry itself is told nothing of mirrors.
    assert!(!origin.lines()[0].contains("ns="));
}

#[tokio::test]
async fn a_blob_goes_on_with_the_registry_where_a_mirror_broke_off() {
    let blob: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let origin = Server::start({
        let blob = blob.clone();
        move |seen, _| match seen.header("range") {
            Some("bytes=100000-") => Reply::new(206)
                .header("Content-Range", "bytes 100000-299999/300000")
                .body(&blob[100_000..]),
            _ => Reply::ok(blob.clone()),
        }
    })
    .await;
    let mirror = Server::start({
        let blob = blob.clone();
        move |_, n| {
            let bytes = if n == 0 {
                blob.clone()
            } else {
                vec![7; 300_000]
            };
            Reply::ok(bytes).end(End::Cut(100_000))
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!("[host.\"http://{}\"]\n", mirror.host());
    write(dir.path(), &origin.host(), &text);
    let client = Client::new(ClientOptions {
        tries: 2,
        ..hosts_options(dir.path(), true)
    });
    let client = client.unwrap();
    let (digest, reference) = (Digest::of(&blob), reference(&origin));
    // What the mirror gave is right, and kept; then it is not, which only the whole shows.
    for (requests, restarts) in [(1, 0), (2, 1)] {
        let mut sink = Collect::default();
        let before = origin.seen().len();
        client
            .fetch_blob(&reference, &digest, 300_000, &mut sink)
            .await
            .unwrap();
        assert!(sink.bytes == blob);
        assert_eq!(sink.restarts, restarts);
        let asked = &origin.seen()[before..];
        assert_eq!(asked.len(), requests);
        assert_eq!(asked[0].header("range"), Some("bytes=100000-"));
        assert_eq!(asked[0].header("if-range"), None);
    }
}

#[tokio::test]
async fn one_limit_holds_over_all_ways() {
    let blob = vec![7; 100_000];
    let served = |blob: &[u8]| {
        let blob = blob.to_vec();
        Server::start(move |_, _| Reply::ok(blob.clone()))
    };
    let (mirrored, plain) = (served(&blob).await, served(&blob).await);
    let mirror = served(&blob).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!("[host.\"http://{}\"]\n", mirror.host());
    write(dir.path(), &mirrored.host(), &text);
    let client = Client::new(ClientOptions {
        rate_limit: Some(200_000),
        ..hosts_options(dir.path(), true)
    });
    let client = client.unwrap();
    let digest = Digest::of(&blob);
    let (one, other) = (reference(&mirrored), reference(&plain));
    let (mut first, mut second) = (Collect::default(), Collect::default());
    let began = std::time::Instant::now();
    let (one, other) = tokio::join!(
        client.fetch_blob(&one, &digest, 100_000, &mut first),
        client.fetch_blob(&other, &digest, 100_000, &mut second),
    );
    one.unwrap();
    other.unwrap();
    // A limit for each would take half as long.
    assert!(began.elapsed() > Duration::from_millis(800));
    assert_eq!((mirror.seen().len(), mirrored.seen().len()), (1, 0));
}

#[tokio::test]
async fn a_mirror_that_may_not_resolve_gives_blobs_only() {
    let mirror = Server::start(|_, _| Reply::ok(KERNEL)).await;
    let origin = Server::start(digest_reply).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        mirror.host()
    );
    write(dir.path(), "_default", &text);
    let client = with_hosts(dir.path(), Credentials::anonymous());
    client.digest(&reference(&origin)).await.unwrap();
    assert_eq!((mirror.seen().len(), origin.seen().len()), (0, 1));
    fetch_kernel(&client, &origin).await.0.unwrap();
    assert_eq!((mirror.seen().len(), origin.seen().len()), (1, 1));
}

#[tokio::test]
async fn a_server_takes_the_registrys_place_and_gets_what_is_pushed() {
    let origin = Server::start(|_, _| Reply::new(404)).await;
    let server = Server::start(|_, _| Reply::new(201)).await;
    let mirror = Server::start(|_, _| Reply::new(201)).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "server = \"http://{}/api\"\noverride_path = true\n[host.\"http://{}\"]\n",
        server.host(),
        mirror.host()
    );
    write(dir.path(), &origin.host(), &text);
    let client = with_hosts(dir.path(), Credentials::anonymous());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let reference = reference(&origin);
    let pushed = client.push_manifest(&reference, kind, b"{}".to_vec());
    pushed.await.unwrap();
    assert!(server.lines()[0].starts_with("PUT /api/team/kata/manifests/v1"));
    assert_eq!((origin.seen().len(), mirror.seen().len()), (0, 0));
}

#[tokio::test]
async fn a_file_that_is_wrong_is_told_and_nobody_is_asked() {
    let origin = Server::start(digest_reply).await;
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("server = ", "not TOML"),
        ("ca = \"absent.pem\"", "absent.pem"),
        ("client = \"../../key\"", "write the path out"),
        ("ca = \"hosts.toml\"", "no certificate in it"),
        (
            "client = \"hosts.toml\"",
            "client certificate is not usable",
        ),
    ];
    for (text, expected) in cases {
        write(dir.path(), &origin.host(), text);
        let client = with_hosts(dir.path(), Credentials::anonymous());
        let error = client.digest(&reference(&origin)).await.unwrap_err();
        assert!(error.is_configuration(), "{error:?}");
        assert!(whole(&error).contains(expected), "{}", whole(&error));
        assert!(whole(&error).contains(&origin.host()), "{}", whole(&error));
    }
    assert_eq!(origin.seen().len(), 0);
    for (at, (text, _)) in cases.into_iter().enumerate() {
        write(dir.path(), &origin.host(), text);
        let client = reading(dir.path(), false, Credentials::anonymous());
        client.digest(&reference(&origin)).await.unwrap();
        assert_eq!(origin.seen().len(), at + 1);
    }
}

#[tokio::test]
async fn a_proxy_with_a_password_is_used_and_never_shown() {
    // It answers in the registry's place, whose name nobody could look up.
    let proxy = Server::start(digest_reply).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "[host.\"http://mirror.invalid\"]\nproxy = \"http://bob:s3cret@{}\"\n",
        proxy.host()
    );
    write(dir.path(), "r.example", &text);
    let client = with_hosts(dir.path(), Credentials::anonymous());
    let reference: Reference = "r.example/team/kata:v1".parse().unwrap();
    client.digest(&reference).await.unwrap();
    assert_eq!(
        proxy.lines(),
        [format!("HEAD http://mirror.invalid{MANIFEST}?ns=r.example")]
    );
    assert_eq!(
        proxy.seen()[0].header("proxy-authorization"),
        Some("Basic Ym9iOnMzY3JldA==")
    );
    let shown = format!("{client:?}");
    assert!(shown.contains(&proxy.host()), "{shown}");
    assert!(
        !shown.contains("s3cret") && !shown.contains("Ym9iOnMzY3JldA"),
        "{shown}"
    );
}

#[tokio::test]
async fn heads_without_end_and_heads_that_drip_are_given_up() {
    use tokio::io::AsyncWriteExt as _;
    for drips in [false, true] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
                    while stream.write_all(b"X-A: aaaaaaaa\r\n").await.is_ok() {
                        if drips {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    }
                });
            }
        });
        let client = Client::new(ClientOptions {
            connect_timeout: Duration::from_millis(200),
            read_timeout: Duration::from_millis(200),
            tries: 1,
            ..options()
        });
        let reference: Reference = format!("{host}/a:b").parse().unwrap();
        let asked = client.unwrap();
        let asked = tokio::time::timeout(Duration::from_secs(20), asked.digest(&reference));
        let error = asked.await.unwrap().unwrap_err();
        assert!(
            matches!(error, Error::Unreachable { .. } | Error::Timeout { .. }),
            "{error:?}"
        );
        server.abort();
    }
}
