//! Fetches OCI artifacts, verifies them, stores them by content and activates them by one rename.
//!
//! A class (a Kata runtime class, but nothing here knows that) has one artifact: kernel, image, configuration. What this
//! crate promises about it: nothing is seen under a final name that was not verified; what is live is always whole; a
//! switch, forwards or back, is one rename; what a running guest uses stays.
//!
//! The flow, each step on its own and observable on disk:
//!
//! 1. [`registry`] resolves a [`mod@reference`] to a manifest and streams blobs, verified by their [`digest`].
//! 2. [`pull()`] brings what lacks into the [`Store`]: to temporary files, through [`unpack`] for archives, then by rename
//!    to final names. The result is an [`Artifact`].
//! 3. [`verify()`] finds the signatures that a policy demands, and [`trust`] judges them; [`Store::keep_signatures`] keeps them
//!    with the artifact, so that [`Store::signers`] can ask again without a network.
//! 4. [`Store::create_generation`] makes an immutable folder of it, with files derived for this node.
//! 5. [`Store::activate`] points the class there.
//! 6. [`Store::check`] compares with what was written down; [`Store::remove_unreferenced`] and its siblings clean up.
//!
//! [`pull_image()`] takes a folder out of a container image in place of step 2.
//!
//! [`publish()`] goes the other way: a folder becomes an artifact in a registry.
//!
//! [`archive`] carries artifacts between stores in one file, without a network.
//!
//! It must not know of containerd, Kata's configuration, Kubernetes or the command line.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests prepare their files plainly"
    )
)]

pub mod archive;
pub mod digest;
mod error;
mod generation;
mod image;
mod index;
mod layers;
mod progress;
mod publish;
mod pull;
pub mod reference;
pub mod registry;
mod store;
pub mod trust;
pub mod unpack;
mod verify;

pub use error::{Error, Result};
pub use generation::{
    Activation, Artifact, ArtifactFile, ArtifactLink, Damage, DerivedFile, Generation,
    GenerationManifest, GenerationMeta, Layer, Problem, Removed, Stamp, StoredDerived, StoredFile,
};
pub use image::pull_image;
pub use progress::{Item, Progress, Silent};
pub use publish::{ARTIFACT_TYPE, Options as PublishOptions, Published, PublishedFile, publish};
pub use pull::pull;
pub use store::{Store, Unreferenced, check_class};
pub use unpack::Limits;
pub use verify::verify;
