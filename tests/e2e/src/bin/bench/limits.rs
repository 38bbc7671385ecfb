//! What the machine itself can do, in the simplest way: hash, copy, receive.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};

/// Bytes moved at once.
const PIECE: usize = 1 << 20;

/// Hashes files once, one after the other.
///
/// # Errors
/// When one cannot be read.
pub(crate) fn hash(files: &[impl AsRef<Path>]) -> Result<()> {
    let mut buffer = vec![0; PIECE];
    for path in files {
        let mut file = open(path.as_ref())?;
        let mut context = digest::Context::new(&digest::SHA256);
        loop {
            let got = file.read(&mut buffer)?;
            if got == 0 {
                break;
            }
            context.update(&buffer[..got]);
        }
        std::hint::black_box(context.finish());
    }
    Ok(())
}

/// Copies a file, and waits until it is on the disk.
///
/// # Errors
/// When it cannot be read or written.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut from = open(from)?;
    let mut to = File::create(to).with_context(|| format!("make {}", to.display()))?;
    loop {
        let got = from.read(&mut buffer)?;
        if got == 0 {
            break;
        }
        to.write_all(&buffer[..got])?;
    }
    to.sync_all().context("sync a copy")
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("open {}", path.display()))
}

/// Receives a blob over TLS and HTTP/1.1, and drops it.
///
/// # Errors
/// When the registry does not send `size` bytes.
pub(crate) fn receive(port: u16, ca: &Path, path: &str, size: u64) -> Result<()> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).context("read the registry's CA")? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1")?;
    let session = rustls::ClientConnection::new(Arc::new(config), name)?;
    let socket = TcpStream::connect(("127.0.0.1", port)).context("connect to the registry")?;
    let mut stream = rustls::StreamOwned::new(session, socket);
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut buffer = vec![0; PIECE];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => received += got as u64,
            // A server that ends without TLS's own end: the length tells.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error).context("receive a blob"),
        }
    }
    ensure!(
        received > size,
        "{received} bytes came of {size} and a head"
    );
    Ok(())
}
