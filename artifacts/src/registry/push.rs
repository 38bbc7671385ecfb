//! Publishing blobs and manifests.
//!
//! OCI distribution specification, "Pushing a blob monolithically" (POST, then PUT) and "Pushing Manifests".
//!
//! It must not know what is published.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Body, Method, Url};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use super::authorize::{Access, Session, Target};
use super::manifest::announced;
use super::retry::Failure;
use super::transport::{Answer, Request};
use super::{BlobSource, Error, Result};
use crate::digest::{Digest, Hasher};
use crate::reference::Reference;

/// Bytes read and sent at once.
const PIECE: usize = 256 * 1024;

/// A blob to upload.
struct Upload<'a> {
    digest: &'a Digest,
    size: u64,
    source: BlobSource<'a>,
    action: String,
    what: String,
}

impl Session {
    pub(super) async fn push_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        source: BlobSource<'_>,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let target = self.target(reference, Access::Push)?;
        let what = format!("blob {digest} of {}", target.name());
        let upload = Upload {
            digest,
            size,
            source,
            action: format!("upload {what}"),
            what: format!("the repository {}", target.name()),
        };
        let mut tries = self.tries();
        loop {
            match self.upload(&target, &upload, progress).await {
                Ok(()) => return Ok(()),
                Err(failure) => tries.pause(failure).await?,
            }
        }
    }

    async fn upload(
        &self,
        target: &Target,
        upload: &Upload<'_>,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Failure> {
        let url = target.url("blobs/uploads/");
        let mut start = Request::new(Method::POST, url, &upload.action, &upload.what);
        start.headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
        let answer = self.send_once(target, &start).await?;
        let mut url = self.location(target, &answer, upload)?;
        // Registries keep state in the query: it stays as it is, and the digest is added.
        url.query_pairs_mut()
            .append_pair("digest", &upload.digest.to_string());
        let mut put = Request::new(Method::PUT, url, &upload.action, &upload.what);
        put.headers
            .insert(CONTENT_LENGTH, HeaderValue::from(upload.size));
        let octets = HeaderValue::from_static("application/octet-stream");
        put.headers.insert(CONTENT_TYPE, octets);
        let sent = Arc::new(AtomicU64::new(0));
        let body = body(upload, &sent).await?;
        let authorization = self.authorization(target).await?;
        let sending = self.transport.upload(
            &target.endpoint,
            &put,
            authorization.as_ref(),
            body,
            (upload.size, &sent),
            progress,
        );
        let answer = match sending.await {
            Ok(answer) => answer,
            Err(failure) => return Err(source_first(upload, &sent, failure).await),
        };
        self.checked(target, answer, &put).await.map(drop)
    }

    /// Where the registry wants the bytes.
    fn location(&self, target: &Target, answer: &Answer, upload: &Upload<'_>) -> Result<Url> {
        let location = answer.response.headers().get(LOCATION);
        let refuse = |problem: &str| Error::Protocol {
            host: answer.host.clone(),
            action: upload.action.clone(),
            problem: problem.to_owned(),
        };
        let location = location.and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| refuse("it does not say where to (Location)"))?;
        let url = target
            .endpoint
            .resolve(answer.response.url(), location)
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| refuse("its Location is not a URL of a web server"))?;
        let host = super::options::authority(&url);
        if url.scheme() == "http"
            && !target.endpoint.is_plain()
            && !self.transport.options.is_listed_plain(&host)
        {
            return Err(refuse(
                "it wants the bytes without TLS, while it has TLS itself",
            ));
        }
        Ok(url)
    }

    pub(super) async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Result<Digest> {
        let target = self.target(reference, Access::Push)?;
        let action = format!("publish {reference}");
        let what = format!("the repository {}", target.name());
        let digest = match reference.digest() {
            Some(pinned) => pinned_digest(reference, pinned, &bytes)?,
            None => Digest::of(&bytes),
        };
        let name = reference
            .tag()
            .map_or_else(|| digest.to_string(), str::to_owned);
        let url = target.url(&format!("manifests/{name}"));
        let mut request = Request::new(Method::PUT, url, &action, &what);
        let kind = HeaderValue::from_str(media_type).map_err(|_| Error::UnsupportedMediaType {
            reference: reference.to_string(),
            media_type: media_type.to_owned(),
        })?;
        request.headers.insert(CONTENT_TYPE, kind);
        request.body = Some(bytes);
        let answer = self.request(&target, &request).await?;
        match announced(answer.response.headers()) {
            Some(got) if got.algorithm() == digest.algorithm() && got != digest => {
                Err(Error::DigestMismatch {
                    what: format!("the manifest of {reference}, as the registry stored it,"),
                    expected: digest,
                    got,
                })
            }
            _ => Ok(digest),
        }
    }
}

fn pinned_digest(reference: &Reference, pinned: &Digest, bytes: &[u8]) -> Result<Digest> {
    let mut hasher = Hasher::like(pinned);
    hasher.update(bytes);
    let got = hasher.finish();
    if got == *pinned {
        return Ok(got);
    }
    Err(Error::DigestMismatch {
        what: format!("the manifest to publish as {reference}"),
        expected: pinned.clone(),
        got,
    })
}

/// The bytes as a stream of exactly the announced length, counted as they leave.
async fn body(upload: &Upload<'_>, sent: &Arc<AtomicU64>) -> Result<Body> {
    match upload.source {
        BlobSource::Bytes(bytes) => {
            sent.store(bytes.len() as u64, Ordering::Relaxed);
            Ok(Body::from(bytes.to_vec()))
        }
        BlobSource::File(path) => {
            let file = open(path, upload.size).await?;
            let state = (file, upload.size, Arc::clone(sent));
            Ok(Body::wrap_stream(stream::try_unfold(state, piece)))
        }
    }
}

type Reading = (File, u64, Arc<AtomicU64>);

async fn piece((mut file, left, sent): Reading) -> io::Result<Option<(Vec<u8>, Reading)>> {
    if left == 0 {
        return Ok(None);
    }
    let wanted = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
    let mut bytes = vec![0; wanted];
    let got = file.read(&mut bytes).await?;
    if got == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(got);
    sent.fetch_add(got as u64, Ordering::Relaxed);
    Ok(Some((bytes, (file, left - got as u64, sent))))
}

async fn open(path: &Path, size: u64) -> Result<File> {
    let failed = |source| Error::Source {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).await.map_err(failed)?;
    file.set_max_buf_size(PIECE);
    let length = file.metadata().await.map_err(failed)?.len();
    if length != size {
        return Err(Error::SourceChanged {
            path: path.to_owned(),
            problem: format!("it has {length} bytes where {size} were announced"),
        });
    }
    Ok(file)
}

/// A connection that broke because the file did: then the file is the news.
async fn source_first(upload: &Upload<'_>, sent: &AtomicU64, failure: Failure) -> Failure {
    let BlobSource::File(path) = upload.source else {
        return failure;
    };
    if sent.load(Ordering::Relaxed) >= upload.size {
        return failure;
    }
    match open(path, upload.size).await {
        Ok(_) => failure,
        Err(error) => error.into(),
    }
}
