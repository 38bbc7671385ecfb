//! Whom we trust, what we show, and what a failed handshake means to a person.
//!
//! The system's certificates are where rustls-native-certs looks: `SSL_CERT_FILE` and `SSL_CERT_DIR` replace its usual places.
//! They lie in hundreds of files, and reading them takes longer than all the rest of a run that finds nothing to do. So they
//! are read when a server comes that the certificates handed in do not vouch for: first the one file that holds them all, and
//! the folders when that does not do.

use std::env;
use std::error::Error as StdError;
use std::io;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore,
    SignatureScheme,
};
use rustls_native_certs::{CertificateResult, load_certs_from_paths, load_native_certs};

use super::options::{ClientCertificate, ClientOptions};
use super::{Error, Result};

/// What replaces the system's usual places (OpenSSL, SSL_CTX_set_default_verify_paths(3)).
const REPLACED_BY: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// The only protocol that is spoken (RFC 7301, and IANA's list of ALPN protocol IDs).
const HTTP_1_1: &[u8] = b"http/1.1";

/// What a parser said.
type Cause = Box<dyn StdError + Send + Sync>;

/// How TLS is spoken: whom we trust, and who we are.
#[derive(Debug)]
pub(super) struct Tls {
    trust: Arc<Trust>,
    own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Tls {
    /// Reads the certificates in the options; they are seen to be usable.
    ///
    /// # Errors
    /// [`Error::Ca`] and [`Error::ClientCertificate`].
    pub(super) fn new(options: &ClientOptions) -> Result<Tls> {
        let provider = CryptoProvider::get_default().cloned();
        let provider = provider.unwrap_or_else(|| Arc::new(aws_lc_rs::default_provider()));
        let given = given(options.ca_pem.as_deref(), &provider)?;
        let own = options.client_certificate.as_ref().map(own).transpose()?;
        let tls = Tls {
            trust: Arc::new(Trust::new(provider, given)),
            own,
        };
        if tls.own.is_some() {
            // That the key is the certificate's is seen only here.
            tls.config(false)?;
        }
        Ok(tls)
    }

    /// For an HTTP client; with `any_certificate` it does not care who the server is.
    ///
    /// # Errors
    /// [`Error::ClientCertificate`] when ours does not fit its key.
    pub(super) fn config(&self, any_certificate: bool) -> Result<ClientConfig> {
        let unusable = |source: rustls::Error| Error::ClientCertificate {
            source: source.into(),
        };
        let verifier = match any_certificate {
            true => Arc::new(self.trust.in_anyone()),
            false => Arc::clone(&self.trust),
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&verifier.provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.own {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain.clone(), key.clone_key())
                .map_err(unusable)?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![HTTP_1_1.to_vec()];
        Ok(config)
    }
}

/// Verifies by the certificates of a PEM text.
fn given(
    pem: Option<&[u8]>,
    provider: &Arc<CryptoProvider>,
) -> Result<Option<Arc<WebPkiServerVerifier>>> {
    let Some(pem) = pem else {
        return Ok(None);
    };
    let wrong = |problem: &str, source: Option<Cause>| Error::Ca {
        problem: problem.to_owned(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate =
            certificate.map_err(|source| wrong("it cannot be read", Some(source.into())))?;
        roots
            .add(certificate)
            .map_err(|source| wrong("a certificate in it is damaged", Some(source.into())))?;
    }
    match verifier(roots, provider) {
        Some(verifier) => Ok(Some(verifier)),
        None => Err(wrong("there is no certificate in it", None)),
    }
}

/// A certificate of ours with its key.
fn own(own: &ClientCertificate) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let wrong = |source: Cause| Error::ClientCertificate { source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&own.certificate).collect();
    let chain = chain.map_err(|error| wrong(error.into()))?;
    if chain.is_empty() {
        return Err(wrong("there is no certificate".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(&own.key).map_err(|error| wrong(error.into()))?;
    Ok((chain, key))
}

/// None without certificates.
fn verifier(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Option<Arc<WebPkiServerVerifier>> {
    let roots = Arc::new(roots);
    let builder = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider));
    builder.build().ok()
}

/// Certificates that are read when they are needed.
#[derive(Debug)]
struct Later {
    read: fn() -> CertificateResult,
    verifier: OnceLock<Option<Arc<WebPkiServerVerifier>>>,
}

impl Later {
    fn new(read: fn() -> CertificateResult) -> Later {
        Later {
            read,
            verifier: OnceLock::new(),
        }
    }

    fn get(&self, provider: &Arc<CryptoProvider>) -> Option<&Arc<WebPkiServerVerifier>> {
        let make = || {
            let read = (self.read)();
            for error in read.errors {
                tracing::debug!(%error, "a certificate of the system cannot be read");
            }
            let mut roots = RootCertStore::empty();
            let (usable, unusable) = roots.add_parsable_certificates(read.certs);
            tracing::debug!(usable, unusable, "certificates of the system");
            verifier(roots, provider)
        };
        self.verifier.get_or_init(make).as_ref()
    }
}

/// The one file, unless the environment names other places.
fn system_file() -> CertificateResult {
    if REPLACED_BY.iter().any(|name| env::var_os(name).is_some()) {
        return load_native_certs();
    }
    load_certs_from_paths(openssl_probe::probe().cert_file.as_deref(), None)
}

/// Verifies servers.
#[derive(Debug)]
struct Trust {
    provider: Arc<CryptoProvider>,
    /// None takes whoever comes; what comes has a digest.
    roots: Option<Roots>,
}

/// The certificates that were handed in, and the system's.
#[derive(Debug)]
struct Roots {
    given: Option<Arc<WebPkiServerVerifier>>,
    /// The last of them knows all.
    system: [Later; 2],
}

impl Trust {
    fn new(provider: Arc<CryptoProvider>, given: Option<Arc<WebPkiServerVerifier>>) -> Trust {
        let system = [Later::new(system_file), Later::new(load_native_certs)];
        Trust {
            provider,
            roots: Some(Roots { given, system }),
        }
    }

    fn in_anyone(&self) -> Trust {
        Trust {
            provider: Arc::clone(&self.provider),
            roots: None,
        }
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(roots) = &self.roots else {
            return Ok(ServerCertVerified::assertion());
        };
        let system = roots.system.iter().map(|later| later.get(&self.provider));
        let given = std::iter::once(roots.given.as_ref());
        let mut refused = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        for verifier in given.chain(system).flatten() {
            match verifier.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
                Ok(verified) => return Ok(verified),
                // That one knows nothing of it is worth less than what is wrong with it.
                Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {}
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

/// What helps.
pub(super) fn hint(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(problem) => certificate_hint(problem),
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::AccessDenied,
        ) => {
            "it asks for a certificate of ours: give one that it accepts, and its key, as the registry client certificate"
        }
        rustls::Error::InvalidMessage(_) => {
            "it does not seem to speak TLS; if that is intended, list it as a plain HTTP registry"
        }
        _ => "check its TLS settings",
    }
}

fn certificate_hint(problem: &CertificateError) -> &'static str {
    use CertificateError as E;
    match problem {
        E::Expired | E::ExpiredContext { .. } => {
            "its certificate has expired: have it renewed, or check this machine's clock"
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "its certificate is not valid yet: check this machine's clock"
        }
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "its certificate is for another name: use the name that the certificate has, or have it issued for this one"
        }
        E::Revoked => "its certificate was revoked: have it replaced",
        _ => {
            "if its certificate is from a private authority, give that authority's certificate as the registry CA"
        }
    }
}

/// The first error of type `T` among an error and its causes. An `io::Error` hides the error that it was made from.
pub(super) fn find<'a, T: StdError + 'static>(
    error: &'a (dyn StdError + 'static),
) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

    use super::*;

    type Authority = CertifiedIssuer<'static, KeyPair>;

    fn authority(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn server(of: &Authority, name: &str) -> CertificateDer<'static> {
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        params.signed_by(&key, of).unwrap().der().clone()
    }

    fn nothing() -> CertificateResult {
        CertificateResult::default()
    }

    fn never() -> CertificateResult {
        panic!("nobody needs the system's certificates");
    }

    /// One that is in the folders and not in the file.
    fn of_the_system() -> &'static Authority {
        static MADE: OnceLock<Authority> = OnceLock::new();
        MADE.get_or_init(|| authority("system"))
    }

    fn folders() -> CertificateResult {
        let mut found = CertificateResult::default();
        found.certs.push(of_the_system().der().clone());
        found
    }

    fn trust(given: Option<&Authority>, system: [fn() -> CertificateResult; 2]) -> Trust {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let pem = given.map(|authority| authority.pem());
        let given = super::given(pem.as_deref().map(str::as_bytes), &provider).unwrap();
        let system = system.map(Later::new);
        Trust {
            provider,
            roots: Some(Roots { given, system }),
        }
    }

    fn verify(trust: &Trust, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let name = ServerName::try_from("registry.test").unwrap();
        let verified = trust.verify_server_cert(certificate, &[], &name, &[], UnixTime::now());
        verified.map(drop)
    }

    #[test]
    fn the_system_s_certificates_are_not_read_when_those_handed_in_do() {
        let ours = authority("ours");
        let trust = trust(Some(&ours), [never, never]);
        verify(&trust, &server(&ours, "registry.test")).unwrap();
    }

    #[test]
    fn those_handed_in_are_trusted_besides_the_system_s() {
        let system = server(of_the_system(), "registry.test");
        verify(&trust(Some(&authority("ours")), [folders, never]), &system).unwrap();
        verify(
            &trust(Some(&authority("ours")), [nothing, folders]),
            &system,
        )
        .unwrap();
        verify(&trust(None, [nothing, folders]), &system).unwrap();
    }

    #[test]
    fn whom_nobody_vouches_for_is_refused_and_what_is_wrong_is_told() {
        let (ours, theirs) = (authority("ours"), authority("theirs"));
        let trust = trust(Some(&ours), [nothing, folders]);
        let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let refused = |certificate| verify(&trust, &certificate).unwrap_err();
        assert_eq!(refused(server(&theirs, "registry.test")), unknown);
        let other_name = refused(server(&ours, "other.test"));
        let hint = hint(&other_name);
        assert!(hint.contains("for another name"), "{other_name}: {hint}");
        verify(&trust.in_anyone(), &server(&theirs, "registry.test")).unwrap();
    }

    #[test]
    fn a_certificate_of_ours_must_fit_its_key() {
        let certificate = |own: &KeyPair| {
            let params = CertificateParams::new(vec!["us".to_owned()]).unwrap();
            params.self_signed(own).unwrap().pem().into_bytes()
        };
        let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let with = |certificate: Vec<u8>, key: Vec<u8>| {
            Tls::new(&ClientOptions {
                client_certificate: Some(ClientCertificate { certificate, key }),
                ..ClientOptions::default()
            })
        };
        let key = one.serialize_pem().into_bytes();
        with(certificate(&one), key.clone()).unwrap();
        for wrong in [certificate(&other), b"nothing".to_vec()] {
            let error = with(wrong, key.clone()).unwrap_err();
            assert!(
                matches!(error, Error::ClientCertificate { .. }),
                "{error:?}"
            );
        }
        with(certificate(&one), b"nothing".to_vec()).unwrap_err();
    }
}
