//! Digests, manifests and indexes, and what a registry can do wrong with them.

use serde_json::{Value, json};

use super::*;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn manifest() -> Value {
    let blob = |bytes: &[u8], kind: &str| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
    json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": blob(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [blob(b"kernel", "application/octet-stream")],
    })
}

fn manifest_bytes() -> Vec<u8> {
    manifest().to_string().into_bytes()
}

fn entry(bytes: &[u8], platform: Option<Value>) -> Value {
    let mut entry =
        json!({ "mediaType": OCI_MANIFEST, "digest": Digest::of(bytes), "size": bytes.len() });
    if let Some(platform) = platform {
        entry["platform"] = platform;
    }
    entry
}

fn index(entries: &[Value]) -> Vec<u8> {
    json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries })
        .to_string()
        .into_bytes()
}

fn typed(kind: &str, body: impl Into<Vec<u8>>) -> Reply {
    Reply::ok(body).header("Content-Type", kind)
}

async fn resolve(reply: Reply) -> Result<Resolved> {
    let server = Server::start(move |_, _| reply.clone()).await;
    client().resolve(&reference(&server), &amd64()).await
}

/// A registry with `first` under the tag, and `second` under its own digest.
async fn resolve_index(first: Vec<u8>, second: Vec<u8>, kind: &'static str) -> Result<Resolved> {
    let server = Server::start(move |seen, _| match seen.path.as_str() {
        MANIFEST => typed(OCI_INDEX, first.clone()),
        path if path.ends_with(&format!("manifests/{}", Digest::of(&second))) => {
            typed(kind, second.clone())
        }
        _ => Reply::new(404),
    })
    .await;
    client().resolve(&reference(&server), &amd64()).await
}

#[tokio::test]
async fn the_digest_of_a_tag_is_one_request_and_a_pinned_one_none() {
    let server =
        Server::start(|_, _| Reply::ok("").header("Docker-Content-Digest", Digest::of(b"m"))).await;
    let client = client();
    assert_eq!(
        client.digest(&reference(&server)).await.unwrap(),
        Digest::of(b"m")
    );
    assert_eq!(server.lines(), [format!("HEAD {MANIFEST}")]);
    assert!(
        server.seen()[0]
            .header("accept")
            .unwrap()
            .contains(OCI_INDEX)
    );
    let pinned = reference(&server).with_digest(Digest::of(b"p"));
    assert_eq!(client.digest(&pinned).await.unwrap(), Digest::of(b"p"));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_registry_without_the_header_is_asked_for_the_manifest() {
    for odd in [None, Some("sha256:12"), Some("md5:00")] {
        let server = Server::start(move |_, _| {
            let reply = typed(OCI_MANIFEST, manifest_bytes());
            match odd {
                Some(odd) => reply.header("Docker-Content-Digest", odd),
                None => reply,
            }
        })
        .await;
        let digest = client().digest(&reference(&server)).await.unwrap();
        assert_eq!(digest, Digest::of(&manifest_bytes()));
        assert_eq!(
            server.lines(),
            [format!("HEAD {MANIFEST}"), format!("GET {MANIFEST}")]
        );
    }
}

#[tokio::test]
async fn a_manifest_comes_back_byte_for_byte() {
    let resolved = resolve(typed(OCI_MANIFEST, manifest_bytes()))
        .await
        .unwrap();
    assert_eq!(resolved.digest, Digest::of(&manifest_bytes()));
    assert_eq!(resolved.manifest.digest, resolved.digest);
    assert_eq!(resolved.manifest.bytes, manifest_bytes());
    assert_eq!(resolved.manifest.media_type, OCI_MANIFEST);
    assert_eq!(resolved.manifest.parsed.layers().len(), 1);
    assert!(resolved.index.is_none());
}

#[tokio::test]
async fn a_type_may_be_told_by_the_document_or_the_header_or_the_form() {
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let mut untyped = manifest();
    untyped.as_object_mut().unwrap().remove("mediaType");
    let untyped = untyped.to_string();
    let cases = [
        (typed("application/json", manifest_bytes()), OCI_MANIFEST),
        (Reply::ok(manifest_bytes()), OCI_MANIFEST),
        (typed(docker, untyped.clone()), docker),
        (typed("Text/Plain; charset=utf-8", untyped), OCI_MANIFEST),
    ];
    for (reply, expected) in cases {
        assert_eq!(resolve(reply).await.unwrap().manifest.media_type, expected);
    }
}

#[tokio::test]
async fn content_that_is_not_what_it_is_called_is_refused() {
    let mut both = manifest();
    both["manifests"] = json!([]);
    let mut old = manifest();
    old["schemaVersion"] = json!(1);
    let mut bad_layer = manifest();
    bad_layer["layers"][0]["digest"] = json!("../../etc/passwd");
    let cases = [
        typed(OCI_MANIFEST, "no json \u{1b}[2J"),
        typed(OCI_MANIFEST, "[]"),
        typed(OCI_MANIFEST, "{}"),
        typed(OCI_MANIFEST, "[".repeat(100_000)),
        typed(OCI_MANIFEST, both.to_string()),
        typed(OCI_MANIFEST, old.to_string()),
        typed(OCI_MANIFEST, bad_layer.to_string()),
        typed(OCI_INDEX, manifest_bytes()),
        typed(OCI_MANIFEST, index(&[])),
        typed(OCI_INDEX, r#"{"schemaVersion":2,"config":{}}"#),
    ];
    for reply in cases {
        let shown = format!("{reply:?}");
        let error = resolve(reply).await.unwrap_err();
        assert!(
            matches!(error, Error::MalformedManifest { .. }),
            "{shown}: {error:?}"
        );
        assert!(
            error.is_verification() && !error.to_string().contains('\u{1b}'),
            "{error}"
        );
    }
    for kind in [
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "text/html",
    ] {
        let error = resolve(typed(kind, "{}")).await.unwrap_err();
        assert!(
            matches!(error, Error::UnsupportedMediaType { .. }),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn wrong_digests_are_refused() {
    let lie =
        typed(OCI_MANIFEST, manifest_bytes()).header("Docker-Content-Digest", Digest::of(b"other"));
    let error = resolve(lie).await.unwrap_err();
    assert!(
        matches!(&error, Error::DigestMismatch { got, .. } if *got == Digest::of(&manifest_bytes()))
    );
    assert!(error.is_verification());
    let server = Server::start(|_, _| typed(OCI_MANIFEST, manifest_bytes())).await;
    let pinned = reference(&server).with_digest(Digest::of(b"other"));
    let error = client().resolve(&pinned, &amd64()).await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
    let right = reference(&server).with_digest(Digest::of(&manifest_bytes()));
    client().resolve(&right, &amd64()).await.unwrap();
    let by_digest = format!(
        "GET /v2/team/kata/manifests/{}",
        Digest::of(&manifest_bytes())
    );
    assert_eq!(server.lines()[1], by_digest);
}

#[tokio::test]
async fn nothing_is_read_beyond_the_limit() {
    let announced = typed(OCI_MANIFEST, "x")
        .header("Content-Length", 5 << 20)
        .end(End::Stall(1));
    let endless = typed(OCI_MANIFEST, vec![b' '; 1 << 16]).end(End::Endless);
    for reply in [announced, endless] {
        let error = resolve(reply).await.unwrap_err();
        assert!(
            matches!(error, Error::TooLarge { limit, .. } if limit == 4 << 20),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_body_that_is_cut_is_fetched_again() {
    let server = Server::start(|_, number| {
        let end = if number == 0 {
            End::Cut(10)
        } else {
            End::Whole
        };
        typed(OCI_MANIFEST, manifest_bytes()).end(end)
    })
    .await;
    client()
        .resolve(&reference(&server), &amd64())
        .await
        .unwrap();
    assert_eq!(server.seen().len(), 2);
    let error = resolve(typed(OCI_MANIFEST, manifest_bytes()).end(End::Cut(10)))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Broken { got: 10, .. }), "{error:?}");
}

#[tokio::test]
async fn an_index_leads_to_the_platforms_manifest() {
    let arm = entry(
        b"arm",
        Some(json!({ "os": "linux", "architecture": "arm64", "variant": "v8" })),
    );
    let amd = entry(
        &manifest_bytes(),
        Some(json!({ "os": "linux", "architecture": "amd64" })),
    );
    let unknown = entry(
        b"attestation",
        Some(json!({ "os": "unknown", "architecture": "unknown" })),
    );
    let all = index(&[unknown, arm, amd]);
    let resolved = resolve_index(all.clone(), manifest_bytes(), OCI_MANIFEST)
        .await
        .unwrap();
    assert_eq!(resolved.digest, Digest::of(&all));
    assert_eq!(resolved.manifest.digest, Digest::of(&manifest_bytes()));
    assert_eq!(resolved.index, Some((Digest::of(&all), all)));
}

#[tokio::test]
async fn a_single_manifest_for_no_platform_is_meant() {
    let one = index(&[entry(&manifest_bytes(), None)]);
    resolve_index(one, manifest_bytes(), OCI_MANIFEST)
        .await
        .unwrap();
    let two = index(&[entry(&manifest_bytes(), None), entry(b"x", None)]);
    let error = resolve_index(two, manifest_bytes(), OCI_MANIFEST)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NoPlatform { .. }), "{error:?}");
}

#[tokio::test]
async fn a_platform_that_is_missing_is_told_with_those_that_are_there() {
    let windows = entry(
        b"w",
        Some(json!({ "os": "windows", "architecture": "amd64" })),
    );
    let arm = entry(
        b"a",
        Some(json!({ "os": "linux", "architecture": "arm64", "variant": "v8" })),
    );
    let error = resolve(typed(OCI_INDEX, index(&[windows, arm])))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("nothing for linux/amd64; it has linux/arm64/v8, windows/amd64"),
        "{text}"
    );
    assert!(!error.is_verification());
}

#[tokio::test]
async fn what_an_index_names_must_be_a_manifest_of_that_size() {
    let nested = index(&[]);
    let error = resolve_index(index(&[entry(&nested, None)]), nested, OCI_INDEX)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another index"), "{error}");
    let sized = |size: i64| {
        let mut wrong = entry(&manifest_bytes(), None);
        wrong["size"] = json!(size);
        resolve_index(index(&[wrong]), manifest_bytes(), OCI_MANIFEST)
    };
    let length = i64::try_from(manifest_bytes().len()).unwrap();
    assert!(matches!(
        sized(length + 1).await,
        Err(Error::MalformedManifest { .. })
    ));
    assert!(matches!(
        sized(length - 1).await,
        Err(Error::TooLarge { .. })
    ));
    assert!(matches!(sized(5 << 20).await, Err(Error::TooLarge { .. })));
    assert!(matches!(
        sized(-1).await,
        Err(Error::MalformedManifest { .. })
    ));
}

#[tokio::test]
async fn what_is_not_there_is_not_asked_for_again() {
    let server = Server::start(|_, _| {
        Reply::new(404)
            .body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#)
    })
    .await;
    let error = client()
        .resolve(&reference(&server), &amd64())
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NotFound { .. }), "{error:?}");
    assert!(
        text.contains("team/kata:v1") && text.contains("MANIFEST_UNKNOWN: manifest unknown"),
        "{text}"
    );
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_busy_registry_is_waited_for_as_it_asks() {
    let server = Server::start(|_, number| match number {
        0 => Reply::new(429).header("Retry-After", 1),
        1 => Reply::new(503),
        _ => typed(OCI_MANIFEST, manifest_bytes()),
    })
    .await;
    let start = std::time::Instant::now();
    client()
        .resolve(&reference(&server), &amd64())
        .await
        .unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.seen().len(), 3);
    let error = resolve(Reply::new(429).header("Retry-After", 3600))
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Busy { after, .. } if after.as_secs() == 3600),
        "{error:?}"
    );
    let error = resolve(Reply::new(500).body("<html>")).await.unwrap_err();
    assert!(
        matches!(error, Error::Status { status: 500, .. }),
        "{error:?}"
    );
}

/// A registry that knows of conditions, and whose tag leads to `document`.
async fn conditional(document: Vec<u8>, kind: &'static str) -> Server {
    Server::start(move |seen, _| {
        let tag = format!("\"{}\"", Digest::of(&document));
        match seen.header("if-none-match") {
            Some(unless) if unless == tag => Reply::new(304).header("ETag", tag),
            _ if seen.path == MANIFEST => typed(kind, document.clone()),
            _ => typed(OCI_MANIFEST, manifest_bytes()),
        }
    })
    .await
}

#[tokio::test]
async fn what_is_known_and_has_not_changed_costs_one_answer_without_a_body() {
    let server = conditional(manifest_bytes(), OCI_MANIFEST).await;
    let (client, reference) = (client(), reference(&server));
    let known = client.resolve(&reference, &amd64()).await.unwrap();
    assert_eq!(server.seen()[0].header("if-none-match"), None);
    let platform = amd64();
    let again = client.resolve_again(&reference, &platform, Some(&known));
    assert_eq!(again.await.unwrap().manifest.bytes, known.manifest.bytes);
    assert_eq!(server.seen().len(), 2);
    let pinned = reference.with_digest(known.digest.clone());
    let again = client.resolve_again(&pinned, &platform, Some(&known));
    assert_eq!(again.await.unwrap().digest, known.digest);
    assert_eq!(server.seen().len(), 2, "a digest does not change");
}

#[tokio::test]
async fn what_has_changed_is_read_with_the_same_request() {
    let old = conditional(manifest_bytes(), OCI_MANIFEST).await;
    let known = client().resolve(&reference(&old), &amd64()).await.unwrap();
    let mut other = manifest();
    other["annotations"] = json!({ "version": "2" });
    let server = conditional(other.to_string().into_bytes(), OCI_MANIFEST).await;
    let again = client()
        .resolve_again(&reference(&server), &amd64(), Some(&known))
        .await
        .unwrap();
    assert_eq!(again.digest, Digest::of(other.to_string().as_bytes()));
    assert_eq!(server.lines(), [format!("GET {MANIFEST}")]);
}

#[tokio::test]
async fn an_index_that_leads_to_what_is_known_is_all_that_is_read() {
    let index = index(&[entry(&manifest_bytes(), None)]);
    let server = conditional(index.clone(), OCI_INDEX).await;
    let (client, reference) = (client(), reference(&server));
    let mut known = client.resolve(&reference, &amd64()).await.unwrap();
    assert_eq!(server.seen().len(), 2);
    // The store keeps an index for its signature only.
    (known.digest, known.index) = (known.manifest.digest.clone(), None);
    let platform = amd64();
    let again = client.resolve_again(&reference, &platform, Some(&known));
    assert_eq!(again.await.unwrap().digest, Digest::of(&index));
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn nothing_is_unchanged_that_was_not_asked_for() {
    let error = resolve(Reply::new(304)).await.unwrap_err();
    assert!(
        matches!(error, Error::Status { status: 304, .. }),
        "{error:?}"
    );
}
