//! Basic authentication and bearer tokens, and who gets to see them.

use super::*;

/// "bob:s3cret" in base64.
const BASIC: &str = "Basic Ym9iOnMzY3JldA==";

fn bob(server: &Server) -> Credentials {
    Credentials::basic(&server.host(), "bob", "s3cret")
}

fn digest_reply() -> Reply {
    Reply::ok("").header("Docker-Content-Digest", Digest::of(b"m"))
}

fn bearer(seen: &Seen, extra: &str) -> Reply {
    let host = seen.header("host").unwrap();
    let challenge = format!(r#"Bearer realm="http://{host}/token?a=b",service="reg &co"{extra}"#);
    Reply::new(401).header("WWW-Authenticate", challenge)
}

/// A registry that wants `token`, and is its own token server.
fn with_tokens(seen: &Seen, token: &str) -> Reply {
    if seen.path.starts_with("/token") {
        return Reply::ok(format!(r#"{{"token":"{token}","expires_in":300}}"#));
    }
    if seen.header("authorization") == Some(&format!("Bearer {token}")) {
        return digest_reply();
    }
    bearer(seen, "")
}

#[tokio::test]
async fn name_and_password_cost_no_second_request() {
    let server = Server::start(|seen, _| match seen.header("authorization") {
        Some(BASIC) => digest_reply(),
        _ => Reply::new(401).header("WWW-Authenticate", "Basic realm=\"r\""),
    })
    .await;
    let digest = client_with(bob(&server))
        .digest(&reference(&server))
        .await
        .unwrap();
    assert_eq!(digest, Digest::of(b"m"));
    assert_eq!(server.lines(), [format!("HEAD {MANIFEST}")]);
}

#[tokio::test]
async fn refused_credentials_end_at_once_and_are_not_shown() {
    let server = Server::start(|_, _| {
        Reply::new(401)
            .header("WWW-Authenticate", "Basic realm=\"r\"")
            .body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"go\u001b[2Jaway"}]}"#)
    })
    .await;
    let client = client_with(bob(&server));
    let error = client
        .resolve(&reference(&server), &amd64())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert_eq!(server.seen().len(), 1);
    let text = whole(&error);
    for part in [
        "UNAUTHORIZED: go [2Jaway",
        &format!("auths.{:?}", server.host()),
    ] {
        assert!(text.contains(part), "{text}");
    }
    for shown in [text, format!("{error:?}"), format!("{client:?}")] {
        assert!(
            !shown.contains("s3cret") && !shown.contains("Ym9i"),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn without_credentials_the_place_for_them_is_told() {
    let server =
        Server::start(|_, _| Reply::new(401).header("WWW-Authenticate", "Basic realm=r")).await;
    let text = whole(&client().digest(&reference(&server)).await.unwrap_err());
    assert!(
        text.contains("no credentials are known") && text.contains(&server.host()),
        "{text}"
    );
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn credentials_are_only_for_their_own_registry() {
    let server = Server::start(|_, _| digest_reply()).await;
    let others = Credentials::basic("127.0.0.1:1", "bob", "s3cret");
    client_with(others)
        .digest(&reference(&server))
        .await
        .unwrap();
    assert_eq!(server.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_once() {
    let server = Server::start(|seen, _| with_tokens(seen, "t1")).await;
    let client = client();
    for _ in 0..2 {
        client.digest(&reference(&server)).await.unwrap();
    }
    let head = format!("HEAD {MANIFEST}");
    let token = "GET /token?a=b&scope=repository%3Ateam%2Fkata%3Apull&service=reg+%26co".to_owned();
    assert_eq!(server.lines(), [head.clone(), token, head.clone(), head]);
    assert_eq!(server.seen()[1].header("authorization"), None);
}

#[tokio::test]
async fn the_token_server_gets_name_and_password_and_the_registry_the_token() {
    let server = Server::start(|seen, _| with_tokens(seen, "t1")).await;
    client_with(bob(&server))
        .digest(&reference(&server))
        .await
        .unwrap();
    let sent: Vec<_> = server
        .seen()
        .iter()
        .map(|s| s.header("authorization").map(str::to_owned))
        .collect();
    assert_eq!(
        sent,
        [
            Some(BASIC.to_owned()),
            Some(BASIC.to_owned()),
            Some("Bearer t1".to_owned())
        ]
    );
}

#[tokio::test]
async fn an_identity_token_is_exchanged_in_a_form() {
    let server = Server::start(|seen, _| {
        if seen.path.starts_with("/token") {
            assert_eq!(seen.method, "POST");
            return Reply::ok(r#"{"access_token":"t2"}"#);
        }
        with_tokens(seen, "t2")
    })
    .await;
    let config = format!(
        r#"{{"auths":{{"{}":{{"identitytoken":"id &1"}}}}}}"#,
        server.host()
    );
    let credentials = Credentials::from_docker_config(config.as_bytes()).unwrap();
    client_with(credentials)
        .digest(&reference(&server))
        .await
        .unwrap();
    let seen = server.seen();
    assert_eq!(seen.len(), 3);
    assert_eq!(
        String::from_utf8_lossy(&seen[1].body),
        "scope=repository%3Ateam%2Fkata%3Apull&service=reg+%26co&grant_type=refresh_token&client_id=kata-manager&refresh_token=id+%261"
    );
    assert_eq!(seen[0].header("authorization"), None);
}

#[tokio::test]
async fn a_token_that_is_no_longer_taken_is_replaced() {
    let server =
        Server::start(|seen, number| with_tokens(seen, if number < 3 { "t1" } else { "t2" })).await;
    let client = client();
    client.digest(&reference(&server)).await.unwrap();
    client.digest(&reference(&server)).await.unwrap();
    let seen = server.seen();
    let sent: Vec<_> = seen
        .iter()
        .map(|s| s.header("authorization").unwrap_or("-"))
        .collect();
    assert_eq!(sent, ["-", "-", "Bearer t1", "Bearer t1", "-", "Bearer t2"]);
}

#[tokio::test]
async fn a_registry_that_takes_no_token_is_left_after_one() {
    let server = Server::start(|seen, _| match seen.path.starts_with("/token") {
        true => Reply::ok(r#"{"token":"t"}"#),
        false => bearer(seen, ",error=\"insufficient_scope\""),
    })
    .await;
    let error = client().digest(&reference(&server)).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn the_scope_of_a_registry_with_other_names_is_asked_for() {
    let server = Server::start(|seen, _| match seen.path.starts_with("/token") {
        true => Reply::ok(r#"{"token":"t"}"#),
        false if seen.header("authorization").is_some() => digest_reply(),
        false => bearer(seen, r#",scope="repository:remote/kata:pull""#),
    })
    .await;
    client().digest(&reference(&server)).await.unwrap();
    assert!(server.lines()[1].contains("scope=repository%3Aremote%2Fkata%3Apull&"));
}

#[tokio::test]
async fn token_servers_may_fail_too() {
    let cases: [(Reply, usize, &str); 7] = [
        (Reply::ok("no json"), 2, "not the JSON of a token"),
        (Reply::ok("{}"), 2, "no usable token"),
        (Reply::ok(r#"{"token":"a\r\nX: y"}"#), 2, "no usable token"),
        (Reply::ok(r#"{"token":""}"#), 2, "no usable token"),
        (
            Reply::ok(vec![b' '; 1 << 20]).end(End::Endless),
            2,
            "larger than 1048576 bytes",
        ),
        (Reply::new(403), 2, "does not let us"),
        (Reply::new(503), 6, "answered 503"),
    ];
    for (reply, requests, expected) in cases {
        let server = Server::start(move |seen, _| match seen.path.starts_with("/token") {
            true => reply.clone(),
            false => bearer(seen, ""),
        })
        .await;
        let text = whole(&client().digest(&reference(&server)).await.unwrap_err());
        assert!(text.contains(expected), "{text}");
        assert_eq!(server.seen().len(), requests, "{expected}");
    }
}

#[tokio::test]
async fn odd_challenges_are_a_refusal_and_no_panic() {
    for challenge in [
        "Bearer realm=\"not a url\"",
        "Bearer realm=\"ftp://h/x\"",
        "Bearer realm=\"http://u:p@h/x\"",
        "Bearer realm=\"file:///etc/passwd\"",
        "Bearer",
        "\"",
        "Negotiate",
    ] {
        let server =
            Server::start(move |_, _| Reply::new(401).header("WWW-Authenticate", challenge)).await;
        let error = client_with(bob(&server))
            .digest(&reference(&server))
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::Unauthorized { .. } | Error::Protocol { .. }),
            "{challenge}: {error:?}"
        );
        assert_eq!(server.seen().len(), 1, "{challenge}");
    }
}
