//! Publishing blobs and manifests.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const BLOB: &[u8] = b"guest image";

async fn push(client: &Client, server: &Server, source: BlobSource<'_>) -> (Result<()>, Vec<u64>) {
    let told = Mutex::new(Vec::new());
    let progress = |bytes| told.lock().unwrap().push(bytes);
    let digest = Digest::of(BLOB);
    let size = BLOB.len() as u64;
    let result = client
        .push_blob(&reference(server), &digest, size, source, &progress)
        .await;
    (result, told.into_inner().unwrap())
}

/// A registry with an upload session at `location`.
fn uploads(seen: &Seen, location: &str) -> Reply {
    match seen.method.as_str() {
        "POST" => Reply::new(202).header("Location", location),
        "PUT" => Reply::new(201),
        _ => Reply::new(405),
    }
}

#[tokio::test]
async fn a_file_goes_up_in_two_requests() {
    let server =
        Server::start(|seen, _| uploads(seen, "/v2/team/kata/blobs/uploads/1?_state=a%2Fb%3D"))
            .await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, BLOB).unwrap();
    let (result, told) = push(&client(), &server, BlobSource::File(&path)).await;
    result.unwrap();
    assert_eq!(told.last(), Some(&(BLOB.len() as u64)));
    let put = format!(
        "PUT /v2/team/kata/blobs/uploads/1?_state=a%2Fb%3D&digest=sha256%3A{}",
        Digest::of(BLOB).hex()
    );
    assert_eq!(
        server.lines(),
        ["POST /v2/team/kata/blobs/uploads/".to_owned(), put]
    );
    let seen = server.seen();
    assert_eq!(seen[1].body, BLOB);
    assert_eq!(seen[1].header("content-length"), Some("11"));
    assert_eq!(seen[1].header("transfer-encoding"), None);
}

#[tokio::test]
async fn storage_elsewhere_gets_the_bytes_and_not_the_credentials() {
    let storage = Server::start(|_, _| Reply::new(201)).await;
    let to = format!("http://{}/bucket", storage.host());
    let server = Server::start(move |seen, _| uploads(seen, &to)).await;
    let client = client_with(Credentials::basic(&server.host(), "bob", "s3cret"));
    push(&client, &server, BlobSource::Bytes(BLOB))
        .await
        .0
        .unwrap();
    assert!(server.seen()[0].header("authorization").is_some());
    assert_eq!(storage.seen()[0].header("authorization"), None);
    assert_eq!(storage.seen()[0].body, BLOB);
}

#[tokio::test]
async fn an_upload_that_fails_begins_anew() {
    let puts = AtomicUsize::new(0);
    let server = Server::start(move |seen, _| {
        let first = seen.method == "PUT" && puts.fetch_add(1, Ordering::Relaxed) == 0;
        if first {
            Reply::new(502)
        } else {
            uploads(seen, "/u")
        }
    })
    .await;
    push(&client(), &server, BlobSource::Bytes(BLOB))
        .await
        .0
        .unwrap();
    let methods: Vec<_> = server.seen().into_iter().map(|s| s.method).collect();
    assert_eq!(methods, ["POST", "PUT", "POST", "PUT"]);
}

#[tokio::test]
async fn a_token_for_pushing_is_asked_for() {
    let server = Server::start(|seen, _| {
        if seen.path.starts_with("/token") {
            return Reply::ok(r#"{"token":"t"}"#);
        }
        let own = seen.header("host").unwrap();
        match seen.header("authorization") {
            Some("Bearer t") => uploads(seen, "/u"),
            _ => Reply::new(401).header(
                "WWW-Authenticate",
                format!("Bearer realm=\"http://{own}/token\""),
            ),
        }
    })
    .await;
    let client = client();
    push(&client, &server, BlobSource::Bytes(BLOB))
        .await
        .0
        .unwrap();
    let lines = server.lines();
    assert_eq!(
        lines[1],
        "GET /token?scope=repository%3Ateam%2Fkata%3Apull%2Cpush"
    );
    assert_eq!(lines.len(), 4);
}

#[tokio::test]
async fn a_source_that_is_not_as_announced_is_the_news() {
    let server = Server::start(|seen, _| uploads(seen, "/u")).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let error = push(&client(), &server, BlobSource::File(&path))
        .await
        .0
        .unwrap_err();
    assert!(
        matches!(error, Error::Source { .. }) && error.is_local(),
        "{error:?}"
    );
    std::fs::write(&path, b"short").unwrap();
    let error = push(&client(), &server, BlobSource::File(&path))
        .await
        .0
        .unwrap_err();
    assert!(matches!(error, Error::SourceChanged { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("it has 5 bytes where 11 were announced"),
        "{error}"
    );
}

#[tokio::test]
async fn a_registry_that_says_no_or_not_where_is_told() {
    let server = Server::start(|_, _| Reply::new(202)).await;
    let error = push(&client(), &server, BlobSource::Bytes(BLOB))
        .await
        .0
        .unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    let server = Server::start(|seen, _| match seen.method.as_str() {
        "POST" => Reply::new(202).header("Location", "/u"),
        _ => Reply::new(400).body(r#"{"errors":[{"code":"DIGEST_INVALID"}]}"#),
    })
    .await;
    let error = push(&client(), &server, BlobSource::Bytes(BLOB))
        .await
        .0
        .unwrap_err();
    assert!(error.to_string().contains("DIGEST_INVALID"), "{error}");
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn a_manifest_goes_under_its_tag_or_its_digest() {
    let server = Server::start(|_, _| Reply::new(201)).await;
    let (client, tagged) = (client(), reference(&server));
    let digest = client
        .push_manifest(&tagged, "a/b", b"{}".to_vec())
        .await
        .unwrap();
    assert_eq!(digest, Digest::of(b"{}"));
    let untagged: Reference = format!("{}/team/kata@{digest}", server.host())
        .parse()
        .unwrap();
    client
        .push_manifest(&untagged, "a/b", b"{}".to_vec())
        .await
        .unwrap();
    let by_digest = format!("PUT /v2/team/kata/manifests/{digest}");
    assert_eq!(server.lines(), [format!("PUT {MANIFEST}"), by_digest]);
    assert_eq!(server.seen()[0].header("content-type"), Some("a/b"));
    assert_eq!(server.seen()[0].body, b"{}");
    let other = tagged.with_digest(Digest::of(b"other"));
    let error = client
        .push_manifest(&other, "a/b", b"{}".to_vec())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn a_registry_that_stores_another_manifest_is_caught() {
    let server =
        Server::start(|_, _| Reply::new(201).header("Docker-Content-Digest", Digest::of(b"x")))
            .await;
    let error = client()
        .push_manifest(&reference(&server), "a/b", b"{}".to_vec())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
}
