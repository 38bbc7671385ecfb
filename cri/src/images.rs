//! containerd's images, as the CRI shows them.

use std::fmt;

use crate::client::Client;
use crate::error::Error;
use crate::wire;

/// An image that containerd has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The digest of its configuration.
    pub id: String,
    /// References by tag.
    pub tags: Vec<String>,
    /// References by digest.
    pub digests: Vec<String>,
    /// Bytes that it takes, compressed.
    pub size: u64,
    /// Whether the kubelet's garbage collection spares it.
    pub pinned: bool,
}

/// Who asks a registry for an image.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password, or a token in its place.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Every image that containerd has. After an import by other means it takes a moment until the CRI shows it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_images(&self) -> Result<Vec<Image>, Error> {
        let request = wire::ListImagesRequest { filter: None };
        let answer = self
            .call("ListImages", self.image_service().list_images(request))
            .await?;
        Ok(answer.images.into_iter().map(Image::from).collect())
    }

    /// The image that a reference or an identifier names, if containerd has it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn image(&self, reference: &str) -> Result<Option<Image>, Error> {
        let request = wire::ImageStatusRequest {
            image: Some(spec(reference)),
            verbose: false,
        };
        let answer = self
            .call("ImageStatus", self.image_service().image_status(request))
            .await?;
        Ok(answer.image.map(Image::from))
    }

    /// Pulls an image; gives the reference by which containers may name it. The client's timeout covers the whole
    /// transfer.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pull_image(
        &self,
        reference: &str,
        credentials: Option<&Credentials>,
    ) -> Result<String, Error> {
        let auth = credentials.map(|credentials| wire::AuthConfig {
            username: credentials.username.clone(),
            password: credentials.password.clone(),
            ..Default::default()
        });
        let request = wire::PullImageRequest {
            image: Some(spec(reference)),
            auth,
            sandbox_config: None,
        };
        let answer = self
            .call("PullImage", self.image_service().pull_image(request))
            .await?;
        Ok(answer.image_ref)
    }
}

impl From<wire::Image> for Image {
    fn from(from: wire::Image) -> Image {
        Image {
            id: from.id,
            tags: from.repo_tags,
            digests: from.repo_digests,
            size: from.size,
            pinned: from.pinned,
        }
    }
}

fn spec(reference: &str) -> wire::ImageSpec {
    wire::ImageSpec {
        image: reference.to_owned(),
        ..Default::default()
    }
}
