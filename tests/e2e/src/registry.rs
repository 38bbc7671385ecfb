//! A real registry (Debian's docker-registry) on 127.0.0.1: plain, with TLS from a CA of its own, with basic auth
//! or bearer tokens, or as a mirror of another.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::process::Daemon;
use crate::sandbox::Sandbox;
use crate::{tls, token, wait};

/// Basic authentication: one user.
#[derive(Clone, Debug)]
pub struct User {
    /// The name.
    pub name: String,
    /// The password.
    pub password: String,
}

/// How a registry is set up; the default is plain HTTP that lets everyone in.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// HTTPS, with a certificate for `127.0.0.1`, `localhost`, [`OUTSIDE`] and [`NAME`] that a private CA has signed.
    pub tls: bool,
    /// Asks for a certificate of the same CA, with TLS.
    pub client_certificate: bool,
    /// Lets in this user alone.
    pub user: Option<User>,
    /// Lets in who has a bearer token from a token server, which gives one to the user, or to everyone if there is none.
    pub token: bool,
    /// Serves what another registry (`http://host:port`) has, and keeps what it gave: a mirror.
    pub mirror_of: Option<String>,
}

/// An address of the sandbox that is not the loopback: the registries listen there, too.
pub const OUTSIDE: &str = "192.0.2.1";

/// A name that a registry's certificate is for, and that nobody can look up.
pub const NAME: &str = "registry.test";

impl User {
    /// The value of an `Authorization` header (RFC 7617).
    pub fn basic(&self) -> String {
        format!("Basic {}", self.encoded())
    }

    fn encoded(&self) -> String {
        BASE64_STANDARD.encode(format!("{}:{}", self.name, self.password))
    }
}

/// A running registry. Dropping it ends it; its content stays in its folder until the sandbox ends.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    port: u16,
    options: Options,
    daemon: Daemon,
}

impl Registry {
    /// Starts a registry with nothing in it, and waits until it listens.
    ///
    /// # Errors
    /// With the end of its log, when it does not listen in 20 seconds.
    pub fn start(sandbox: &Sandbox, options: Options) -> Result<Self> {
        let dir = sandbox.folder("registry")?;
        let port = sandbox.port();
        if options.tls {
            write_certificates(&dir).context("make the registry's certificates")?;
        }
        let realm = sandbox.port();
        if options.token {
            let tls = options.tls.then(|| tls::Server::new(&dir)).transpose()?;
            token::start(realm, options.user.clone(), &dir.join("token.pem"), tls)?;
        } else if let Some(user) = &options.user {
            // Cost 4 is the least that bcrypt knows: this guards nothing.
            let hash = bcrypt::hash(&user.password, 4).context("hash a password")?;
            fs::write(dir.join("htpasswd"), format!("{}:{hash}\n", user.name))?;
        }
        fs::write(dir.join("config.yml"), config(&dir, port, realm, &options))?;
        let daemon = spawn(sandbox, &dir)?;
        let mut registry = Self {
            dir,
            port,
            options,
            daemon,
        };
        registry.wait_up()?;
        Ok(registry)
    }

    /// Ends the registry (as an outage), keeping its content.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(self) -> Result<Stopped> {
        let (dir, port, options) = (self.dir, self.port, self.options);
        self.daemon.stop()?;
        Ok(Stopped { dir, port, options })
    }

    fn wait_up(&mut self) -> Result<()> {
        let (port, daemon) = (self.port, &mut self.daemon);
        wait::until("the registry to listen", Duration::from_secs(20), || {
            daemon.still_runs()?;
            TcpStream::connect(("127.0.0.1", port)).context("connect")
        })
        .with_context(|| format!("the end of its log:\n{}", self.daemon.log_tail()))?;
        Ok(())
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its host and port, as references begin: `127.0.0.1:5000`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A reference to something in it.
    pub fn reference(&self, name_and_tag: &str) -> String {
        format!("{}/{name_and_tag}", self.host())
    }

    /// The private CA's certificate, PEM; exists with [`Options::tls`].
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// A certificate that the private CA has signed for a client, and its key.
    pub fn client(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("client.pem"), self.dir.join("client.key"))
    }

    /// Writes a docker `config.json` with the user's credentials for a host (this registry's, or a proxy's before it).
    ///
    /// # Errors
    /// When there is no user, or the file cannot be written.
    pub fn docker_config(&self, host: &str) -> Result<PathBuf> {
        let user = self
            .options
            .user
            .as_ref()
            .context("this registry has no user")?;
        let auth = user.encoded();
        let path = self.dir.join("docker-config.json");
        let text = serde_json::json!({ "auths": { host: { "auth": auth } } }).to_string();
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// The file that holds a blob (`sha256:...`), for tests that damage one at rest.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.storage()
            .join("blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// The folder below which it keeps blobs and repositories.
    pub fn storage(&self) -> PathBuf {
        self.dir.join("data/docker/registry/v2")
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        self.daemon.log_tail()
    }
}

/// A registry that has ended.
#[derive(Debug)]
pub struct Stopped {
    dir: PathBuf,
    port: u16,
    options: Options,
}

impl Stopped {
    /// Starts it again, on the same port with the same content.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn start(self, sandbox: &Sandbox) -> Result<Registry> {
        let daemon = spawn(sandbox, &self.dir)?;
        let mut registry = Registry {
            dir: self.dir,
            port: self.port,
            options: self.options,
            daemon,
        };
        registry.wait_up()?;
        Ok(registry)
    }
}

fn spawn(sandbox: &Sandbox, dir: &Path) -> Result<Daemon> {
    let mut command = Command::new(sandbox.parts().registry());
    command
        .arg("serve")
        .arg(dir.join("config.yml"))
        .env("OTEL_TRACES_EXPORTER", "none");
    Daemon::spawn("docker-registry", &mut command, &dir.join("log"))
}

fn config(dir: &Path, port: u16, realm: u16, options: &Options) -> String {
    let r = dir.display();
    let mut text = format!(
        "version: 0.1\n\
         log: {{ level: info }}\n\
         storage:\n  filesystem: {{ rootdirectory: '{r}/data' }}\n  delete: {{ enabled: true }}\n\
         http:\n  addr: 0.0.0.0:{port}\n"
    );
    if options.tls {
        text.push_str(&format!(
            "  tls:\n    certificate: '{r}/server.pem'\n    key: '{r}/server.key'\n"
        ));
        if options.client_certificate {
            text.push_str(&format!("    clientcas: ['{r}/ca.pem']\n"));
        }
    }
    if let Some(origin) = &options.mirror_of {
        text.push_str(&format!("proxy: {{ remoteurl: '{origin}' }}\n"));
    }
    if options.token {
        let scheme = if options.tls { "https" } else { "http" };
        text.push_str(&format!(
            "auth:\n  token: {{ realm: '{scheme}://127.0.0.1:{realm}/token', service: {}, issuer: {}, \
             rootcertbundle: '{r}/token.pem' }}\n",
            token::SERVICE,
            token::ISSUER
        ));
    } else if options.user.is_some() {
        text.push_str(&format!(
            "auth:\n  htpasswd: {{ realm: test, path: '{r}/htpasswd' }}\n"
        ));
    }
    text
}

/// Writes `ca.pem`, `server.pem` and `server.key`, `client.pem` and `client.key`.
fn write_certificates(dir: &Path) -> Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "kata-manager test CA");
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    fs::write(dir.join("ca.pem"), ca.pem())?;
    let server = ["127.0.0.1", "localhost", OUTSIDE, NAME];
    for (file, names) in [("server", &server[..]), ("client", &["node.test"])] {
        let key = KeyPair::generate()?;
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let signed = CertificateParams::new(names)?.signed_by(&key, &ca)?;
        fs::write(dir.join(format!("{file}.pem")), signed.pem())?;
        fs::write(dir.join(format!("{file}.key")), key.serialize_pem())?;
    }
    Ok(())
}
