//! Registries with TLS: whom we trust, and that TLS is not given up on the way.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// A certificate for 127.0.0.1 in PEM, and the server's settings.
fn certificate() -> (Vec<u8>, Arc<rustls::ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (made.cert.pem().into_bytes(), Arc::new(config))
}

fn over_tls(server: &Server, ca_pem: Option<Vec<u8>>) -> ClientOptions {
    ClientOptions {
        ca_pem,
        https: vec![server.host()],
        credentials: Credentials::basic(&server.host(), "bob", "s3cret"),
        ..options()
    }
}

#[tokio::test]
async fn a_private_authority_is_trusted_when_it_is_handed_in() {
    let (pem, config) = certificate();
    let server = Server::start_tls(config, |_, _| {
        Reply::ok("").header("Docker-Content-Digest", Digest::of(b"m"))
    })
    .await;
    let error = Client::new(over_tls(&server, None))
        .unwrap()
        .digest(&reference(&server))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    assert!(whole(&error).contains("registry CA"), "{}", whole(&error));
    assert_eq!(server.seen().len(), 0);
    let client = Client::new(over_tls(&server, Some(pem))).unwrap();
    client.digest(&reference(&server)).await.unwrap();
}

#[tokio::test]
async fn certificates_that_are_none_are_told_at_once() {
    let damaged = b"-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n";
    let cut = b"-----BEGIN CERTIFICATE-----\nYWJj\n";
    for pem in [&b""[..], b"nothing", damaged, cut] {
        let error = Client::new(ClientOptions {
            ca_pem: Some(pem.to_vec()),
            ..options()
        })
        .unwrap_err();
        assert!(
            matches!(error, Error::Ca { .. }) && error.is_configuration(),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_server_without_tls_is_recognised() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let plain = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let greeting = stream.read_u8().await.unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
        greeting
    });
    let client = Client::new(ClientOptions {
        https: vec![host.clone()],
        ..options()
    });
    let reference: Reference = format!("{host}/a:b").parse().unwrap();
    let error = client.unwrap().digest(&reference).await.unwrap_err();
    // A TLS handshake record (RFC 8446, 5.1).
    assert_eq!(plain.await.unwrap(), 22);
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("list it as a plain HTTP registry"),
        "{error}"
    );
}

#[tokio::test]
async fn tls_is_not_given_up_by_a_redirect() {
    let (pem, config) = certificate();
    let server = Server::start_tls(config, |_, _| {
        Reply::new(307).header("Location", "http://storage.example/x")
    })
    .await;
    let client = Client::new(over_tls(&server, Some(pem))).unwrap();
    let error = client.digest(&reference(&server)).await.unwrap_err();
    assert!(matches!(error, Error::Redirect { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("storage.example is asked without TLS"),
        "{error}"
    );
}

#[tokio::test]
async fn tls_is_not_given_up_for_a_token() {
    let (pem, config) = certificate();
    let plain = Server::start(|_, _| Reply::ok(r#"{"token":"t"}"#)).await;
    let realm = format!("Bearer realm=\"http://{}/token\"", plain.host());
    let server = Server::start_tls(config, move |_, _| {
        Reply::new(401).header("WWW-Authenticate", &realm)
    })
    .await;
    let client = Client::new(over_tls(&server, Some(pem))).unwrap();
    let error = client.digest(&reference(&server)).await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    assert_eq!(plain.seen().len(), 0);
}
