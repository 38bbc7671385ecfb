//! Blobs: whole, broken, too long, too short, wrong.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{LazyLock, Mutex};

use super::*;

static BLOB: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..3_000_000u32).map(|n| (n % 251) as u8).collect());

async fn fetch(server: &Server, digest: &Digest, size: u64) -> (Result<()>, Collect) {
    let mut sink = Collect::default();
    let result = client()
        .fetch_blob(&reference(server), digest, size, &mut sink)
        .await;
    (result, sink)
}

async fn fetch_blob(server: &Server) -> (Result<()>, Collect) {
    fetch(server, &Digest::of(&BLOB), BLOB.len() as u64).await
}

/// Where the request's range begins.
fn start(seen: &Seen) -> Option<usize> {
    let range = seen.header("range")?;
    range
        .strip_prefix("bytes=")?
        .strip_suffix('-')?
        .parse()
        .ok()
}

/// The rest of the blob, as a registry with ranges sends it.
fn rest(start: usize) -> Reply {
    let range = format!("bytes {start}-{}/{}", BLOB.len() - 1, BLOB.len());
    Reply::new(206)
        .header("Content-Range", range)
        .body(&BLOB[start..])
}

#[tokio::test]
async fn a_blob_arrives_whole() {
    let server = Server::start(|_, _| Reply::ok(&**BLOB)).await;
    let (result, sink) = fetch_blob(&server).await;
    result.unwrap();
    assert!(sink.bytes == *BLOB && sink.restarts == 0);
    assert_eq!(
        server.lines(),
        [format!("GET /v2/team/kata/blobs/{}", Digest::of(&BLOB))]
    );
    let seen = &server.seen()[0];
    assert_eq!(
        (seen.header("accept-encoding"), seen.header("range")),
        (Some("identity"), None)
    );
    let empty = Server::start(|_, _| Reply::ok("")).await;
    fetch(&empty, &Digest::of(b""), 0).await.0.unwrap();
    let sha512 = Digest::with(crate::digest::Algorithm::Sha512, &BLOB);
    fetch(&server, &sha512, BLOB.len() as u64).await.0.unwrap();
}

#[tokio::test]
async fn other_content_is_refused_and_not_fetched_twice() {
    let server = Server::start(|_, _| Reply::ok(&**BLOB)).await;
    let (result, _) = fetch(&server, &Digest::of(b"other"), BLOB.len() as u64).await;
    let error = result.unwrap_err();
    assert!(
        matches!(&error, Error::DigestMismatch { got, .. } if *got == Digest::of(&BLOB)),
        "{error:?}"
    );
    assert!(error.is_verification());
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_broke() {
    let server = Server::start(|seen, _| match start(seen) {
        None => Reply::ok(&**BLOB).end(End::Cut(1_000_000)),
        Some(start) => rest(start),
    })
    .await;
    let (result, sink) = fetch_blob(&server).await;
    result.unwrap();
    assert!(sink.bytes == *BLOB && sink.restarts == 0);
    let starts: Vec<_> = server.seen().iter().map(start).collect();
    assert_eq!(starts, [None, Some(1_000_000)]);
}

#[tokio::test]
async fn as_long_as_it_moves_on_a_bad_connection_is_borne() {
    // More breaks than tries: each piece is larger than what counts as progress.
    let server = Server::start(|seen, _| match start(seen) {
        Some(start) if BLOB.len() - start < 1_100_000 => rest(start),
        Some(start) => rest(start).end(End::Cut(1_100_000)),
        None => Reply::ok(&**BLOB).end(End::Cut(1_100_000)),
    })
    .await;
    let mut sink = Collect::default();
    let client = Client::new(ClientOptions {
        tries: 2,
        ..options()
    });
    let client = client.unwrap();
    let (digest, size) = (Digest::of(&BLOB), BLOB.len() as u64);
    client
        .fetch_blob(&reference(&server), &digest, size, &mut sink)
        .await
        .unwrap();
    assert!(sink.bytes == *BLOB);
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn a_registry_without_ranges_is_asked_for_the_whole_again() {
    let server = Server::start(|_, number| match number {
        0 => Reply::ok(&**BLOB).end(End::Cut(1_000_000)),
        _ => Reply::ok(&**BLOB),
    })
    .await;
    let (result, sink) = fetch_blob(&server).await;
    result.unwrap();
    assert!(sink.bytes == *BLOB && sink.restarts == 1);
}

#[tokio::test]
async fn a_range_that_does_not_fit_is_thrown_away() {
    let odd: [fn(usize) -> Reply; 4] = [
        |start| Reply::new(206).body(&BLOB[start..]),
        |start| {
            Reply::new(206)
                .header("Content-Range", "bytes 0-1/2")
                .body(&BLOB[start..])
        },
        |start| {
            Reply::new(206)
                .header("Content-Range", "\"")
                .body(&BLOB[start..])
        },
        |_| Reply::new(416),
    ];
    for odd in odd {
        let server = Server::start(move |seen, number| match (start(seen), number) {
            (None, 0) => Reply::ok(&**BLOB).end(End::Cut(1_000_000)),
            (Some(start), _) => odd(start),
            (None, _) => Reply::ok(&**BLOB),
        })
        .await;
        let (result, sink) = fetch_blob(&server).await;
        result.unwrap();
        assert!(sink.bytes == *BLOB && sink.restarts == 1);
        let starts: Vec<_> = server.seen().iter().map(start).collect();
        assert_eq!(starts, [None, Some(1_000_000), None]);
    }
}

#[tokio::test]
async fn a_range_that_was_not_asked_for_is_not_taken() {
    let server = Server::start(|_, _| rest(0)).await;
    let (result, sink) = fetch_blob(&server).await;
    assert!(matches!(result, Err(Error::Protocol { .. })), "{result:?}");
    assert_eq!(sink.most, 0);
}

#[tokio::test]
async fn pieces_of_different_contents_are_fetched_as_one_whole() {
    // The first answer is cut and of other content, the second goes on with the right one.
    let server = Server::start(|seen, number| match (start(seen), number) {
        (None, 0) => Reply::ok(vec![7; BLOB.len()]).end(End::Cut(1_000_000)),
        (Some(start), _) => rest(start),
        _ => Reply::ok(&**BLOB),
    })
    .await;
    let (result, sink) = fetch_blob(&server).await;
    result.unwrap();
    assert!(sink.bytes == *BLOB && sink.restarts == 1);
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn a_blob_that_always_ends_early_is_told_with_both_lengths() {
    let server = Server::start(|_, _| Reply::ok(&**BLOB).end(End::Cut(700))).await;
    let (result, _) = fetch_blob(&server).await;
    let error = result.unwrap_err();
    let size = BLOB.len() as u64;
    assert!(
        matches!(error, Error::Truncated { got: 700, expected, .. } if expected == size),
        "{error:?}"
    );
    assert!(!error.is_verification());
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn a_length_that_is_not_the_blobs_is_seen_before_the_first_byte() {
    let longer = Server::start(|_, _| Reply::ok([&BLOB[..], b"more"].concat())).await;
    let (result, sink) = fetch_blob(&longer).await;
    assert!(matches!(result, Err(Error::TooLarge { .. })), "{result:?}");
    assert_eq!((sink.most, longer.seen().len()), (0, 1));
    let shorter = Server::start(|_, _| Reply::ok(&BLOB[..5])).await;
    let (result, sink) = fetch_blob(&shorter).await;
    assert!(
        matches!(result, Err(Error::Truncated { got: 5, .. })),
        "{result:?}"
    );
    assert_eq!((sink.most, shorter.seen().len()), (0, 3));
}

#[tokio::test]
async fn an_endless_blob_ends_at_its_size() {
    let server = Server::start(|_, _| Reply::ok(vec![1; 70_000]).end(End::Endless)).await;
    let (result, sink) = fetch_blob(&server).await;
    let error = result.unwrap_err();
    assert!(
        matches!(error, Error::TooLarge { .. }) && error.is_verification(),
        "{error:?}"
    );
    assert!(sink.most > 0 && sink.most <= BLOB.len(), "{}", sink.most);
}

#[tokio::test]
async fn a_stall_is_noticed_and_taken_up() {
    let server = Server::start(|seen, _| match start(seen) {
        None => Reply::ok(&**BLOB).end(End::Stall(2_000_000)),
        Some(start) => rest(start),
    })
    .await;
    let client = Client::new(ClientOptions {
        read_timeout: Duration::from_secs(2),
        ..options()
    });
    let (digest, size) = (Digest::of(&BLOB), BLOB.len() as u64);
    let mut sink = Collect::default();
    client
        .unwrap()
        .fetch_blob(&reference(&server), &digest, size, &mut sink)
        .await
        .unwrap();
    assert!(sink.bytes == *BLOB);
    assert_eq!(start(&server.seen()[1]), Some(2_000_000));
}

#[tokio::test]
async fn a_sink_that_fails_ends_it() {
    let server = Server::start(|_, _| Reply::ok(&**BLOB)).await;
    let mut sink = Collect {
        fails: true,
        ..Collect::default()
    };
    let (digest, size) = (Digest::of(&BLOB), BLOB.len() as u64);
    let error = client()
        .fetch_blob(&reference(&server), &digest, size, &mut sink)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Sink { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    );
    assert!(error.is_local());
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn whether_a_blob_is_there() {
    let server = Server::start(|seen, _| {
        let there = seen.path.ends_with(Digest::of(b"there").hex());
        Reply::new(if there { 200 } else { 404 })
    })
    .await;
    let client = client();
    assert!(
        client
            .has_blob(&reference(&server), &Digest::of(b"there"))
            .await
            .unwrap()
    );
    assert!(
        !client
            .has_blob(&reference(&server), &Digest::of(b"gone"))
            .await
            .unwrap()
    );
    assert!(
        server
            .lines()
            .iter()
            .all(|line| line.starts_with("HEAD /v2/team/kata/blobs/sha256:"))
    );
}

/// Parts in memory.
struct Parts {
    bytes: Mutex<(Vec<u8>, Vec<bool>)>,
    streams: usize,
}

impl Parts {
    fn new(size: usize, streams: usize) -> Parts {
        Parts {
            bytes: Mutex::new((vec![0; size], vec![false; size])),
            streams,
        }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        let mut held = self.bytes.lock().unwrap();
        held.0[at..at + bytes.len()].copy_from_slice(bytes);
        held.1[at..at + bytes.len()].fill(true);
    }
}

struct Part<'a>(&'a Parts, usize);

impl BlobPart for Part<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.put(self.1, bytes);
        self.1 += bytes.len();
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobParts for Parts {
    fn missing(&self) -> Vec<Range<u64>> {
        let held = self.bytes.lock().unwrap();
        let mut missing = Vec::new();
        let mut at = 0;
        for run in held.1.chunk_by(|a, b| a == b) {
            if !run[0] {
                missing.push(at..at + run.len() as u64);
            }
            at += run.len() as u64;
        }
        missing
    }

    fn part(&self, offset: u64) -> Box<dyn BlobPart + Send + '_> {
        Box::new(Part(self, offset as usize))
    }

    fn digest(&self) -> Pin<Box<dyn Future<Output = io::Result<Digest>> + Send + '_>> {
        let digest = Digest::of(&self.bytes.lock().unwrap().0);
        Box::pin(std::future::ready(Ok(digest)))
    }

    fn restart(&self) -> io::Result<()> {
        self.bytes.lock().unwrap().1.fill(false);
        Ok(())
    }

    fn streams(&self) -> usize {
        self.streams
    }
}

async fn fetch_parts(server: &Server, blob: &[u8], parts: &Parts) -> Result<()> {
    let (digest, size) = (Digest::of(blob), blob.len() as u64);
    let fetched = client()
        .fetch_parts(&reference(server), &digest, size, parts)
        .await;
    assert!(fetched.is_err() || parts.bytes.lock().unwrap().0 == blob);
    fetched
}

/// The range that was asked for, and the answer to it from a registry that knows ranges.
fn ranged(seen: &Seen, blob: &[u8]) -> Reply {
    let Some(range) = seen.header("range") else {
        return Reply::ok(blob).header("ETag", "\"strong\"");
    };
    let (first, last) = range["bytes=".len()..].split_once('-').unwrap();
    let (first, last): (usize, usize) = (
        first.parse().unwrap(),
        last.parse().unwrap_or(blob.len() - 1),
    );
    Reply::new(206)
        .header("ETag", "\"strong\"")
        .header(
            "Content-Range",
            format!("bytes {first}-{last}/{}", blob.len()),
        )
        .body(&blob[first..=last])
}

#[tokio::test]
async fn only_what_lacks_is_asked_for() {
    let server = Server::start(|seen, number| match number {
        1 => ranged(seen, &BLOB).end(End::Cut(1000)),
        _ => ranged(seen, &BLOB),
    })
    .await;
    let parts = Parts::new(BLOB.len(), 1);
    parts.put(0, &BLOB[..1_000_000]);
    parts.put(2_000_000, &BLOB[2_000_000..2_500_000]);
    fetch_parts(&server, &BLOB, &parts).await.unwrap();
    let seen = server.seen();
    let asked: Vec<_> = seen
        .iter()
        .map(|seen| (seen.header("range").unwrap(), seen.header("if-range")))
        .collect();
    assert_eq!(
        asked,
        [
            ("bytes=1000000-1999999", None),
            ("bytes=2500000-", Some("\"strong\"")),
            ("bytes=2501000-", Some("\"strong\"")),
        ]
    );
}

#[tokio::test]
async fn parts_of_other_content_are_thrown_away() {
    let server = Server::start(|seen, _| ranged(seen, &BLOB)).await;
    let parts = Parts::new(BLOB.len(), 1);
    parts.put(0, &vec![1; 1_000_000]);
    fetch_parts(&server, &BLOB, &parts).await.unwrap();
    let asked: Vec<_> = server.seen().iter().map(start).collect();
    assert_eq!(asked, [Some(1_000_000), None]);
}

static LARGE: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..40_000_000u32).map(|n| (n % 251) as u8).collect());

#[tokio::test]
async fn slow_streams_get_company() {
    let server = Server::start(|seen, _| ranged(seen, &LARGE).end(End::Slow(10_000_000))).await;
    let parts = Parts::new(LARGE.len(), 4);
    fetch_parts(&server, &LARGE, &parts).await.unwrap();
    assert!(server.seen().len() >= 3, "{:?}", server.lines());
}

#[tokio::test]
async fn a_registry_that_has_no_ranges_is_left_with_one_stream() {
    let server = Server::start(|_, _| Reply::ok(LARGE.as_slice()).end(End::Slow(15_000_000))).await;
    let parts = Parts::new(LARGE.len(), 4);
    // Three more were tried, once. The first was told to end earlier, so the rest is asked for, and comes as a whole.
    fetch_parts(&server, &LARGE, &parts).await.unwrap();
    assert!(
        (2..=5).contains(&server.seen().len()),
        "{:?}",
        server.lines()
    );
}

#[tokio::test]
async fn a_limit_is_kept() {
    let server = Server::start(|seen, _| ranged(seen, &BLOB)).await;
    let client = Client::new(ClientOptions {
        rate_limit: Some(6_000_000),
        ..options()
    });
    let started = std::time::Instant::now();
    let parts = Parts::new(BLOB.len(), 4);
    client
        .unwrap()
        .fetch_parts(
            &reference(&server),
            &Digest::of(&BLOB),
            BLOB.len() as u64,
            &parts,
        )
        .await
        .unwrap();
    assert!(started.elapsed() >= Duration::from_millis(450));
    assert_eq!(server.seen().len(), 1);
}
