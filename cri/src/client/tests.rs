//! The client against a server on a real socket: what each way of not answering becomes.

use std::os::unix::net::UnixListener as StdListener;

use super::*;
use crate::fake::{Fake, Manner, recorded};
use crate::{Code, SandboxFilter, SandboxState};

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(20);

fn answering() -> Manner {
    Manner::Answer(Box::new(recorded("2.1")))
}

#[tokio::test]
async fn version_and_status_are_read() {
    let fake = Fake::start(answering());
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    assert_eq!(
        client.version().await.unwrap(),
        Version {
            runtime_name: "containerd".to_owned(),
            runtime_version: "v2.1.4".to_owned()
        }
    );
    assert!(
        client
            .status()
            .await
            .unwrap()
            .handlers
            .contains_key("kata-qemu-nvidia-gpu")
    );
    assert!(client.sandboxes().await.unwrap().is_empty());
}

#[tokio::test]
async fn no_socket_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("c.sock");
    let error = Client::connect(&socket, LONG).await.unwrap_err();
    let Error::NotRunning { why, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(why.kind(), io::ErrorKind::NotFound);
    assert!(error.is_transient());
    assert!(
        error.to_string().contains("there is no such socket")
            && error.to_string().contains("c.sock")
    );
}

#[tokio::test]
async fn a_socket_left_behind_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("c.sock");
    drop(StdListener::bind(&socket).unwrap());
    let error = Client::connect(&socket, LONG).await.unwrap_err();
    let Error::NotRunning { why, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(why.kind(), io::ErrorKind::ConnectionRefused);
    assert!(error.to_string().contains("nothing listens"));
}

#[tokio::test]
async fn containerd_without_its_cri_plugin_is_told_from_no_containerd() {
    let fake = Fake::start(Manner::NoCri);
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    let error = client.status().await.unwrap_err();
    let Error::NoCri { message, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(message, "unknown service runtime.v1.RuntimeService");
    assert!(!error.is_transient());
    assert!(error.to_string().contains("/etc/containerd/config.toml"));
    let error = Client::wait_for_status(&fake.socket(), LONG, LONG)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NoCri { .. }), "{error:?}");
}

#[tokio::test]
async fn a_call_without_answer_ends_at_its_deadline() {
    let fake = Fake::start(Manner::Hang);
    let client = Client::connect(&fake.socket(), SHORT).await.unwrap();
    let error = client.status().await.unwrap_err();
    let Error::Timeout { call, after, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!((*call, *after), ("Status", SHORT));
    assert!(error.is_transient());
}

#[tokio::test]
async fn a_listener_that_says_nothing_ends_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("c.sock");
    let _mute = StdListener::bind(&socket).unwrap();
    let client = Client::connect(&socket, SHORT).await.unwrap();
    assert!(matches!(
        client.version().await.unwrap_err(),
        Error::Timeout { .. }
    ));
}

#[tokio::test]
async fn a_refusal_keeps_code_and_message() {
    let fake = Fake::start(Manner::Fail(tonic::Status::failed_precondition(
        "no runtime for \"X\" is configured",
    )));
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    let error = client.sandboxes().await.unwrap_err();
    let Error::Rpc {
        call,
        code,
        message,
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!((*call, *code), ("ListPodSandbox", Code::FailedPrecondition));
    assert_eq!(message, "no runtime for \"X\" is configured");
    assert!(!error.is_transient() && !error.is_not_found());
}

#[tokio::test]
async fn an_unknown_method_is_not_a_missing_plugin() {
    let fake = Fake::start(Manner::Fail(tonic::Status::unimplemented(
        "unknown method Status for service X",
    )));
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    assert!(matches!(
        client.status().await.unwrap_err(),
        Error::Rpc {
            code: Code::Unimplemented,
            ..
        }
    ));
}

#[tokio::test]
async fn waiting_outlasts_a_start() {
    let fake = Fake::start(Manner::Starting {
        calls: 3,
        then: Box::new(recorded("1.7")),
    });
    let status = Client::wait_for_status(&fake.socket(), LONG, LONG)
        .await
        .unwrap();
    assert_eq!(status.default_handler.as_deref(), Some("runc"));
    assert_eq!(fake.seen().calls, 4);
}

#[tokio::test]
async fn waiting_ends_with_the_last_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = Client::wait_for_status(&dir.path().join("c.sock"), LONG, SHORT)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error:?}");
}

#[tokio::test]
async fn a_client_survives_a_restart_of_containerd() {
    let mut fake = Fake::start(answering());
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    client.version().await.unwrap();
    fake.stop().await;
    let error = client.version().await.unwrap_err();
    assert!(
        matches!(error, Error::Disconnected { .. } | Error::NotRunning { .. }),
        "{error:?}"
    );
    let error = client.version().await.unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error:?}");
    fake.start_again(answering());
    client.version().await.unwrap();
}

#[tokio::test]
async fn an_end_in_the_middle_of_a_call_is_a_disconnect() {
    let mut fake = Fake::start(Manner::Hang);
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    let call = tokio::spawn(async move { client.status().await });
    while fake.seen().calls == 0 {
        tokio::task::yield_now().await;
    }
    fake.stop().await;
    let error = call.await.unwrap().unwrap_err();
    assert!(
        matches!(error, Error::Disconnected { call: "Status", .. }),
        "{error:?}"
    );
    assert!(error.is_transient());
}

#[tokio::test]
async fn a_filter_goes_over_the_wire() {
    let fake = Fake::start(answering());
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    let filter = SandboxFilter {
        id: Some("ab".to_owned()),
        state: Some(SandboxState::NotReady),
        labels: [("k".to_owned(), "v".to_owned())].into(),
    };
    client.sandboxes_where(&filter).await.unwrap();
    let sent = fake.seen().filter.take().unwrap();
    assert_eq!(
        (sent.id.as_str(), sent.label_selector),
        ("ab", filter.labels)
    );
    assert_eq!(
        sent.state.unwrap().state(),
        wire::PodSandboxState::SandboxNotready
    );
}
