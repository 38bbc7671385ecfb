//! Redirects: where they may lead, and what goes along.

use super::*;

fn bob(server: &Server) -> Credentials {
    Credentials::basic(&server.host(), "bob", "s3cret")
}

#[tokio::test]
async fn another_host_gets_the_request_and_never_the_credentials() {
    let storage = Server::start(|_, _| Reply::ok(KERNEL)).await;
    let to = format!("http://{}/bucket?signature=hush", storage.host());
    let server = Server::start(move |_, _| Reply::new(307).header("Location", &to)).await;
    let (result, sink) = fetch_kernel(&client_with(bob(&server)), &server).await;
    result.unwrap();
    assert_eq!(sink.bytes, KERNEL);
    assert!(server.seen()[0].header("authorization").is_some());
    assert_eq!(storage.lines(), ["GET /bucket?signature=hush"]);
    assert_eq!(storage.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn the_same_host_still_knows_us() {
    let server = Server::start(|seen, _| match seen.path.as_str() {
        "/elsewhere" => Reply::ok(KERNEL),
        _ => Reply::new(302).header("Location", "/elsewhere"),
    })
    .await;
    fetch_kernel(&client_with(bob(&server)), &server)
        .await
        .0
        .unwrap();
    assert!(server.seen()[1].header("authorization").is_some());
}

#[tokio::test]
async fn a_request_that_comes_back_from_another_host_is_a_strangers() {
    let other = Server::start(|seen, _| {
        let back = seen.path.strip_prefix("/to/").unwrap();
        Reply::new(307).header("Location", format!("http://{back}/back"))
    })
    .await;
    let through = other.host();
    let server = Server::start(move |seen, _| match seen.path.as_str() {
        "/back" => Reply::ok(KERNEL),
        _ => {
            let own = seen.header("host").unwrap();
            Reply::new(307).header("Location", format!("http://{through}/to/{own}"))
        }
    })
    .await;
    fetch_kernel(&client_with(bob(&server)), &server)
        .await
        .0
        .unwrap();
    assert_eq!(server.seen()[1].header("authorization"), None);
}

#[tokio::test]
async fn a_challenge_from_another_host_is_not_answered() {
    let thief = Server::start(|seen, _| {
        let own = seen.header("host").unwrap();
        Reply::new(401).header(
            "WWW-Authenticate",
            format!("Bearer realm=\"http://{own}/token\", Basic realm=x"),
        )
    })
    .await;
    let to = format!("http://{}/x", thief.host());
    let server = Server::start(move |_, _| Reply::new(307).header("Location", &to)).await;
    let (result, _) = fetch_kernel(&client_with(bob(&server)), &server).await;
    let error = result.unwrap_err();
    assert!(
        matches!(error, Error::Status { status: 401, .. }),
        "{error:?}"
    );
    assert!(
        thief
            .seen()
            .iter()
            .all(|s| s.header("authorization").is_none() && s.path == "/x")
    );
}

#[tokio::test]
async fn a_token_server_that_redirects_keeps_the_credentials_to_itself() {
    let thief = Server::start(|_, _| Reply::ok(r#"{"token":"t"}"#)).await;
    let to = format!("http://{}/token", thief.host());
    let server = Server::start(move |seen, _| {
        let own = seen.header("host").unwrap();
        match seen.path.starts_with("/token") {
            true => Reply::new(307).header("Location", &to),
            false if seen.header("authorization") == Some("Bearer t") => Reply::ok(KERNEL),
            false => Reply::new(401).header(
                "WWW-Authenticate",
                format!("Bearer realm=\"http://{own}/token\""),
            ),
        }
    })
    .await;
    fetch_kernel(&client_with(bob(&server)), &server)
        .await
        .0
        .unwrap();
    assert_eq!(thief.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn circles_and_nonsense_end() {
    let server = Server::start(|_, _| Reply::new(307).header("Location", "/again")).await;
    let (result, _) = fetch_kernel(&client(), &server).await;
    assert!(matches!(result, Err(Error::Redirect { .. })), "{result:?}");
    assert_eq!(server.seen().len(), 6);
    for location in ["", "file:///etc/passwd", "http://", "javascript:x"] {
        let server = Server::start(move |_, _| Reply::new(307).header("Location", location)).await;
        let (result, _) = fetch_kernel(&client(), &server).await;
        assert!(
            matches!(result, Err(Error::Redirect { .. })),
            "{location}: {result:?}"
        );
    }
}

#[tokio::test]
async fn a_signature_in_a_storage_url_is_not_shown() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("http://{}/x?signature=hush", listener.local_addr().unwrap());
    drop(listener);
    let server = Server::start(move |_, _| Reply::new(307).header("Location", &to)).await;
    let (result, _) = fetch_kernel(&client(), &server).await;
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(!format!("{error:?}{}", whole(&error)).contains("hush"));
}
