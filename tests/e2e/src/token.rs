//! A token server, as registries such as nvcr.io have one: gives out the bearer tokens that a real registry then checks.
//!
//! Protocol: the Distribution project's "Token Authentication Specification"; tokens are JSON Web Tokens (RFC 7519) signed
//! with ES256 (RFC 7518), with the certificate of the key in their `x5c` header.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use crate::http::{self, Request};
use crate::registry::User;
use crate::tls;

/// The name of the registry in its tokens.
pub(crate) const SERVICE: &str = "test-registry";
/// The name of the token server in its tokens.
pub(crate) const ISSUER: &str = "test-token-server";

struct Server {
    key: EcdsaKeyPair,
    certificate: String,
    user: Option<User>,
}

/// Starts a token server on a port of 127.0.0.1 and writes its certificate, which the registry trusts, to `certificate`.
/// With a user it wants that user's basic credentials, else it gives everyone what is asked. Its threads end with the program.
pub(crate) fn start(
    port: u16,
    user: Option<User>,
    certificate: &Path,
    tls: Option<tls::Server>,
) -> Result<()> {
    let pair = KeyPair::generate().context("make a key")?;
    let signed = CertificateParams::new(vec![ISSUER.to_owned()])?.self_signed(&pair)?;
    fs::write(certificate, signed.pem())
        .with_context(|| format!("write {}", certificate.display()))?;
    let server = Arc::new(Server {
        key: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pair.serialize_der())
            .context("take the key for signatures")?,
        certificate: BASE64_STANDARD.encode(signed.der()),
        user,
    });
    let listener = TcpListener::bind(("127.0.0.1", port))
        .with_context(|| format!("listen on 127.0.0.1:{port}"))?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (server, tls) = (Arc::clone(&server), tls.clone());
            // A connection that breaks is the client's to notice.
            thread::spawn(move || match tls {
                Some(tls) => drop(tls.accept(client).and_then(|client| server.serve(client))),
                None => drop(server.serve(client)),
            });
        }
    });
    Ok(())
}

impl Server {
    fn serve(&self, mut client: impl Read + Write) -> io::Result<()> {
        let (head, _) = http::read_head(&mut client)?;
        let (status, body) = match Request::parse(&head) {
            Some(request) if request.method == "GET" => self.answer(&request),
            _ => ("405 Method Not Allowed", json!({})),
        };
        let body = body.to_string();
        write!(
            client,
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        client.flush()
    }

    fn answer(&self, request: &Request) -> (&'static str, Value) {
        let wanted = self.user.as_ref().map(User::basic);
        if wanted.is_some() && request.header("Authorization") != wanted.as_deref() {
            return ("401 Unauthorized", json!({ "details": "who are you?" }));
        }
        match self.token(&request.query("scope")) {
            Ok(token) => ("200 OK", json!({ "token": token, "expires_in": 300 })),
            Err(error) => (
                "500 Internal Server Error",
                json!({ "details": error.to_string() }),
            ),
        }
    }

    /// A token for scopes such as `repository:kata/guest:pull,push`, or several of them with spaces between.
    fn token(&self, scopes: &[String]) -> Result<String> {
        let access: Vec<Value> = scopes
            .iter()
            .flat_map(|scope| scope.split(' '))
            .filter_map(|scope| {
                let (kind, rest) = scope.split_once(':')?;
                let (name, actions) = rest.rsplit_once(':')?;
                let actions: Vec<&str> = actions.split(',').collect();
                Some(json!({ "type": kind, "name": name, "actions": actions }))
            })
            .collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.certificate] });
        let claims = json!({
            "iss": ISSUER, "sub": "test", "aud": SERVICE, "jti": "test",
            "nbf": now - 10, "iat": now, "exp": now + 300, "access": access,
        });
        let signed = format!(
            "{}.{}",
            BASE64_URL_SAFE_NO_PAD.encode(header.to_string()),
            BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let signature = self
            .key
            .sign(&SystemRandom::new(), signed.as_bytes())
            .context("sign a token")?;
        let signature = BASE64_URL_SAFE_NO_PAD.encode(signature.as_ref());
        Ok(format!("{signed}.{signature}"))
    }
}
