//! The server's side of TLS, for the small servers of this harness.

use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A certificate and its key, ready to serve with.
#[derive(Clone, Debug)]
pub(crate) struct Server(Arc<ServerConfig>);

impl Server {
    /// With `server.pem` and `server.key` of a folder.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let certificate = CertificateDer::from_pem_file(dir.join("server.pem"))
            .context("read the server's certificate")?;
        let key = PrivateKeyDer::from_pem_file(dir.join("server.key"))
            .context("read the server's key")?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        Ok(Self(Arc::new(config)))
    }

    /// TLS over a connection that came in. The handshake happens with the first byte that is read.
    pub(crate) fn accept(
        &self,
        client: TcpStream,
    ) -> io::Result<StreamOwned<ServerConnection, TcpStream>> {
        let connection = ServerConnection::new(Arc::clone(&self.0)).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, client))
    }
}
