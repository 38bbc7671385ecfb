//! Whom we trust, what we show, and what a failed handshake means to a person.
//!
//! The system's certificates are those of rustls-native-certs: `SSL_CERT_FILE` and `SSL_CERT_DIR` replace its usual places.

use std::error::Error as StdError;
use std::io;

use reqwest::{Certificate, Identity};
use rustls::{AlertDescription, CertificateError};

use super::options::ClientCertificate;
use super::{Error, Result};

/// The certificates of a PEM text; they are seen to be usable.
pub(super) fn certificates(pem: Option<&[u8]>) -> Result<Vec<Certificate>> {
    let Some(pem) = pem else {
        return Ok(Vec::new());
    };
    let wrong = |problem: &str, source| Error::Ca {
        problem: problem.to_owned(),
        source,
    };
    let all = Certificate::from_pem_bundle(pem)
        .map_err(|source| wrong("it cannot be read", Some(source)))?;
    if all.is_empty() {
        return Err(wrong("there is no certificate in it", None));
    }
    // The content of each certificate is looked at only by a client that trusts it.
    reqwest::Client::builder()
        .tls_certs_only(all.iter().cloned())
        .build()
        .map_err(|source| wrong("a certificate in it is damaged", Some(source)))?;
    Ok(all)
}

/// A certificate of ours with its key; they are seen to fit.
pub(super) fn identity(own: Option<&ClientCertificate>) -> Result<Option<Identity>> {
    let Some(own) = own else {
        return Ok(None);
    };
    let wrong = |source| Error::ClientCertificate { source };
    let pem = [&own.certificate[..], b"\n", &own.key[..]].concat();
    let identity = Identity::from_pem(&pem).map_err(wrong)?;
    reqwest::Client::builder()
        .tls_certs_only([])
        .identity(identity.clone())
        .build()
        .map_err(wrong)?;
    Ok(Some(identity))
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
