//! A folder of a container image as an artifact, for guests that come inside one.
//!
//! The image's layers are fetched as they are, flattened ([`crate::unpack::flatten`]), and what is left in the folder becomes
//! one tar layer of an artifact like any other, whose manifest says which image and folder it is from. The layers are dropped
//! then. The same image and folder give the same manifest, byte for byte, so that a second pull finds it and fetches nothing.
//!
//! It must not know of classes and generations.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::sync::Arc;

use km_host::Error as HostError;
use serde_json::json;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::Artifact;
use crate::layers;
use crate::progress::Progress;
use crate::publish::{ARTIFACT_TYPE, EMPTY, EMPTY_TYPE, MANIFEST_TYPE};
use crate::pull::{Root, fetch_layers, finish};
use crate::reference::Reference;
use crate::registry::{Client, Resolved};
use crate::store::{FileSink, Store, blocking};
use crate::unpack::{Flat, FlattenError, Format, Layers, Limits, flatten, normalise};

/// Which image an artifact is from (OCI image specification, annotations.md).
const BASE_NAME: &str = "org.opencontainers.image.base.name";
const BASE_DIGEST: &str = "org.opencontainers.image.base.digest";

/// Which folder of the image it is.
const FOLDER: &str = "vnd.kata-manager.image.folder";

/// The media type of what is left of the layers.
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Bytes between the thread that flattens and the one that unpacks.
const PIPE_BUFFER: usize = 256 << 10;

/// As [`crate::pull`], of one folder of a container image: `folder` is a path in the image, `/` the whole.
///
/// # Errors
/// As [`crate::pull`]; [`Error::Image`] when there is no such folder, nothing in it, or it is no image.
pub async fn pull_image(
    store: &Store,
    client: &Client,
    reference: &Reference,
    resolved: &Resolved,
    folder: &str,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Artifact> {
    if is_of_folder(resolved, folder) {
        // What was made of the image before, and stands in for a registry that cannot be reached.
        return crate::pull(store, client, reference, resolved, limits, progress).await;
    }
    let image = Image::new(reference, resolved, folder)?;
    if let Some((digest, bytes)) = image.known(store)? {
        return image.finish(store, &digest, &bytes);
    }
    let wanted: Vec<_> = image
        .layers
        .iter()
        .map(|l| (l.digest.clone(), l.size))
        .collect();
    let (fetched, came) = fetch_layers(store, client, reference, &wanted, progress).await;
    let taken = match came {
        Ok(()) => {
            let (image, store, limits) = (image.clone(), store.clone(), limits.clone());
            blocking("taking a folder out of an image", move || {
                image.take(&store, &limits)
            })
            .await
        }
        Err(error) => Err(error),
    };
    // The layers have done their work, or are of no use; after a full disk they need not be fetched again.
    if taken.as_ref().map_or_else(Error::is_verification, |_| true) {
        for digest in &fetched {
            store.drop_blob(digest)?;
        }
    }
    let (digest, bytes) = taken?;
    image.finish(store, &digest, &bytes)
}

/// Whether a manifest is what is made of such a folder.
fn is_of_folder(resolved: &Resolved, folder: &str) -> bool {
    let annotations = resolved.manifest.parsed.annotations().as_ref();
    let from = annotations.and_then(|all| all.get(FOLDER));
    from.is_some_and(|from| from.trim_matches('/') == folder.trim_matches('/'))
}

#[derive(Clone, Debug)]
struct Layer {
    digest: Digest,
    size: u64,
    format: Format,
}

/// An image, and which folder of it is wanted.
#[derive(Clone, Debug)]
struct Image {
    reference: String,
    /// Of the image's manifest.
    manifest: Digest,
    layers: Arc<[Layer]>,
    /// Normalised.
    folder: String,
}

impl Image {
    fn new(reference: &Reference, resolved: &Resolved, folder: &str) -> Result<Image> {
        let reference = reference.to_string();
        let unusable = |problem: String| Error::Image {
            image: reference.clone(),
            problem,
        };
        let inner = folder.trim_matches('/');
        let folder = match inner {
            "" => String::new(),
            inner => normalise(inner.as_bytes()).map_err(|reason| {
                unusable(format!("the folder {folder:?} cannot be one: {reason}"))
            })?,
        };
        let mut all = Vec::new();
        for descriptor in resolved.manifest.parsed.layers() {
            let media_type = descriptor.media_type().to_string();
            let format = layers::archive_format(&media_type, None, false).ok_or_else(|| {
                unusable(format!(
                    "one of its layers is of type {media_type:?}; if it is an artifact and no image, pull it as one"
                ))
            })?;
            let digest = descriptor.digest().to_string().parse();
            all.push(Layer {
                digest: digest.map_err(|error| unusable(format!("a layer's digest: {error}")))?,
                size: descriptor.size(),
                format,
            });
        }
        Ok(Image {
            reference,
            manifest: resolved.manifest.digest.clone(),
            layers: all.into(),
            folder,
        })
    }

    fn annotations(&self) -> [(&'static str, String); 3] {
        [
            (BASE_NAME, self.reference.clone()),
            (BASE_DIGEST, self.manifest.to_string()),
            (FOLDER, format!("/{}", self.folder)),
        ]
    }

    /// The manifest of an earlier pull of the same.
    fn known(&self, store: &Store) -> Result<Option<(Digest, Vec<u8>)>> {
        for (digest, _, _) in store.listed()? {
            let Some(bytes) = store.manifest_bytes(&digest)? else {
                continue;
            };
            let Ok(manifest) = layers::parse(&bytes) else {
                continue;
            };
            let annotations = manifest.annotations().clone().unwrap_or_default();
            let ours = self.annotations();
            let same = ours
                .iter()
                .all(|(key, value)| annotations.get(*key) == Some(value));
            if same
                && let Some(artifact) = store.assemble(&digest, &bytes)?
                && has_what_is_kept(store, &artifact)?
            {
                return Ok(Some((digest, bytes)));
            }
        }
        Ok(None)
    }

    /// Makes the artifact of the layers, which are in the store; gives its manifest.
    fn take(&self, store: &Store, limits: &Limits) -> Result<(Digest, Vec<u8>)> {
        let layers = Stored {
            store,
            layers: &self.layers,
        };
        let flat = flatten(&layers, &self.folder, limits).map_err(|error| self.error(error))?;
        store.make_room(&[(&self.manifest, flat.bytes())])?;
        let (layer, size) = self.unpack(store, &layers, &flat, limits)?;
        if store.keeps_blobs() && !store.has_blob(&layer, size)? {
            self.keep(store, &layers, &flat, limits, (&layer, size))?;
        }
        store.put_blob(&Digest::of(EMPTY), EMPTY)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": { "mediaType": EMPTY_TYPE, "digest": Digest::of(EMPTY), "size": EMPTY.len() },
            "layers": [{ "mediaType": LAYER_TYPE, "digest": layer, "size": size }],
            "annotations": std::collections::BTreeMap::from(self.annotations()),
        });
        let bytes = manifest.to_string().into_bytes();
        Ok((Digest::of(&bytes), bytes))
    }

    /// One thread flattens, this one unpacks what comes.
    fn unpack(
        &self,
        store: &Store,
        layers: &Stored<'_>,
        flat: &Flat,
        limits: &Limits,
    ) -> Result<(Digest, u64)> {
        let (from, to) = io::pipe().map_err(HostError::io("make a pipe for", store.dir()))?;
        let origin = format!("/{} of the image {}", self.folder, self.reference);
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let to = BufWriter::with_capacity(PIPE_BUFFER, to);
                flat.write(layers, limits, to)
            });
            let unpacked = store.unpack_tar(from, &origin, limits);
            match writer.join() {
                Ok(Ok(())) => unpacked,
                // Without a reader there is nothing to write to; why the reader went is what counts.
                Ok(Err(FlattenError::Write(_))) if unpacked.is_err() => unpacked,
                Ok(Err(error)) => Err(self.error(error)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Keeps the tar as a blob, which an export needs.
    fn keep(
        &self,
        store: &Store,
        layers: &Stored<'_>,
        flat: &Flat,
        limits: &Limits,
        (layer, size): (&Digest, u64),
    ) -> Result<()> {
        let mut kept = Kept {
            sink: FileSink::create(store, "blob", size)?,
            failed: None,
        };
        let written = flat.write(layers, limits, &mut kept);
        if let Some(error) = kept.failed {
            return Err(error);
        }
        written.map_err(|error| self.error(error))?;
        let (temp, got) = kept.sink.finish()?;
        if got != *layer {
            return Err(Error::Digest {
                what: format!("the tar of {}", self.reference),
                expected: layer.clone(),
                got,
            });
        }
        store.place_blob(temp.path(), layer)
    }

    fn finish(&self, store: &Store, digest: &Digest, bytes: &[u8]) -> Result<Artifact> {
        let root = Root {
            reference: &self.reference,
            digest,
            media_type: MANIFEST_TYPE,
            bytes,
        };
        finish(store, root)
    }

    fn error(&self, error: FlattenError) -> Error {
        // Counted from 1.
        let digest = |layer: usize| self.layers[layer - 1].digest.clone();
        match error {
            FlattenError::Refused { layer, source } => Error::Hostile {
                origin: format!("layer {} of the image {}", digest(layer), self.reference),
                source,
            },
            FlattenError::Damaged {
                layer,
                entry,
                source,
            } => Error::Archive {
                layer: digest(layer),
                entry,
                source,
            },
            FlattenError::Write(source) => HostError::io("write", &self.folder)(source).into(),
            nothing @ FlattenError::Nothing { .. } => Error::Image {
                image: self.reference.clone(),
                problem: nothing.to_string(),
            },
        }
    }
}

/// Whether the blobs of its layers are there, where they are to stay.
fn has_what_is_kept(store: &Store, artifact: &Artifact) -> Result<bool> {
    for layer in artifact.layers.iter().filter(|_| store.keeps_blobs()) {
        if !store.has_blob(&layer.digest, layer.size)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Layers whose blobs are in the store.
struct Stored<'a> {
    store: &'a Store,
    layers: &'a [Layer],
}

impl Layers for Stored<'_> {
    fn count(&self) -> usize {
        self.layers.len()
    }

    fn open(&self, layer: usize) -> io::Result<(Box<dyn Read + Send + '_>, Format)> {
        let layer = &self.layers[layer];
        let file = File::open(self.store.blob_path(&layer.digest))?;
        Ok((Box::new(file), layer.format))
    }
}

/// A sink that remembers its own error.
struct Kept {
    sink: FileSink,
    failed: Option<Error>,
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.sink.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                self.failed = Some(error);
                Err(io::ErrorKind::Other.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
