//! A pod's whole life against a server on a real socket: what is sent, and what is read back.

use std::time::UNIX_EPOCH;

use super::*;
use crate::SandboxState;
use crate::fake::{Fake, Manner, recorded};
use crate::images::Credentials;

const LONG: Duration = Duration::from_secs(20);

async fn start() -> (Fake, Client) {
    let fake = Fake::start(Manner::Answer(Box::new(recorded("2.1"))));
    let client = Client::connect(&fake.socket(), LONG).await.unwrap();
    (fake, client)
}

fn pair(key: &str, value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(key.to_owned(), value.to_owned())])
}

fn sandbox() -> SandboxSpec {
    SandboxSpec {
        name: "gpu".to_owned(),
        namespace: "default".to_owned(),
        uid: "u-1".to_owned(),
        handler: "kata-qemu-nvidia-gpu".to_owned(),
        log_directory: Some("/var/log/pods/p".into()),
        labels: pair("app", "test"),
        annotations: pair("io.katacontainers.config.hypervisor.default_memory", "4096"),
        host_network: true,
        cgroup_parent: Some("/kata".to_owned()),
        ..SandboxSpec::default()
    }
}

fn container() -> ContainerSpec {
    ContainerSpec {
        name: "main".to_owned(),
        image: "localhost/test/busybox:1".to_owned(),
        command: vec!["/bin/sh".to_owned()],
        env: vec![("A".to_owned(), "b".to_owned())],
        mounts: vec![Mount {
            host_path: "/h".into(),
            container_path: "/c".into(),
            readonly: true,
        }],
        devices: vec![Device {
            host_path: "/dev/vfio/42".into(),
            container_path: "/dev/vfio/42".into(),
            permissions: "rw".to_owned(),
        }],
        cdi_devices: vec!["nvidia.com/pgpu=0000:41:00.0".to_owned()],
        log_path: Some("main.log".into()),
        ..ContainerSpec::default()
    }
}

#[tokio::test]
async fn a_sandbox_is_run_listed_and_removed() {
    let (fake, client) = start().await;
    let id = client.run_sandbox(&sandbox()).await.unwrap();

    let sent = fake.seen().sandbox.clone().unwrap();
    assert_eq!(sent.runtime_handler, "kata-qemu-nvidia-gpu");
    let config = sent.config.unwrap();
    assert_eq!(config.log_directory, "/var/log/pods/p");
    let linux = config.linux.unwrap();
    assert_eq!(linux.cgroup_parent, "/kata");
    let options = linux.security_context.unwrap().namespace_options.unwrap();
    assert_eq!(options.network(), wire::NamespaceMode::Node);

    let want = Sandbox {
        id: "pod".to_owned(),
        name: "gpu".to_owned(),
        namespace: "default".to_owned(),
        uid: "u-1".to_owned(),
        handler: "kata-qemu-nvidia-gpu".to_owned(),
        state: SandboxState::Ready,
        created_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        labels: sandbox().labels,
        annotations: sandbox().annotations,
    };
    assert_eq!(
        client.sandboxes().await.unwrap(),
        std::slice::from_ref(&want)
    );
    let status = client.sandbox_status(&id).await.unwrap();
    assert_eq!((status.sandbox, status.ip.as_str()), (want, "10.0.0.7"));
    assert_eq!(
        (&status.info["info"]["pid"], &status.info["note"]),
        (&42.into(), &"not JSON".into())
    );

    client.stop_sandbox(&id).await.unwrap();
    client.remove_sandbox(&id).await.unwrap();
    assert!(client.sandboxes().await.unwrap().is_empty());
    assert!(client.sandbox_status(&id).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_container_is_created_started_entered_and_removed() {
    let (fake, client) = start().await;
    let pod = client.run_sandbox(&sandbox()).await.unwrap();
    let id = client
        .create_container(&pod, &container(), &sandbox())
        .await
        .unwrap();

    let sent = fake.seen().container.clone().unwrap();
    assert_eq!(
        (sent.pod_sandbox_id.as_str(), sent.sandbox_config),
        ("pod", Some(sandbox().to_wire()))
    );
    let config = sent.config.unwrap();
    assert_eq!(config.cdi_devices[0].name, "nvidia.com/pgpu=0000:41:00.0");
    assert_eq!(
        (config.envs[0].key.as_str(), config.envs[0].value.as_slice()),
        ("A", b"b".as_slice())
    );
    assert_eq!(
        (
            config.mounts[0].container_path.as_str(),
            config.mounts[0].readonly
        ),
        ("/c", true)
    );
    assert_eq!(
        (
            config.devices[0].host_path.as_str(),
            config.log_path.as_str()
        ),
        ("/dev/vfio/42", "main.log")
    );

    client.start_container(&id).await.unwrap();
    let listed = client.containers(&pod).await.unwrap();
    assert_eq!(
        (listed[0].name.as_str(), listed[0].state),
        ("main", ContainerState::Running)
    );

    let out = client
        .exec_sync(&id, &["echo", "hi"], Duration::from_millis(1500))
        .await
        .unwrap();
    assert_eq!(
        out,
        ExecOutput {
            stdout: b"echo hi".to_vec(),
            stderr: b"oops".to_vec(),
            exit_code: 7
        }
    );
    assert_eq!(fake.seen().exec.as_ref().unwrap().timeout, 2);

    client
        .stop_container(&id, Duration::from_secs(3))
        .await
        .unwrap();
    assert_eq!(fake.seen().stop.as_ref().unwrap().timeout, 3);
    let status = client.container_status(&id).await.unwrap();
    assert_eq!(
        (status.state, status.exit_code, status.finished_at),
        (ContainerState::Exited, 3, None)
    );
    assert_eq!(
        status.started_at,
        Some(UNIX_EPOCH + Duration::new(1_700_000_000, 1))
    );
    client.remove_container(&id).await.unwrap();
    assert!(client.containers(&pod).await.unwrap().is_empty());
}

#[tokio::test]
async fn images_are_listed_found_and_pulled() {
    let (fake, client) = start().await;
    assert_eq!(client.list_images().await.unwrap()[0].size, 1234);
    assert!(
        client
            .image("localhost/test/busybox:1")
            .await
            .unwrap()
            .is_some()
    );
    assert!(
        client
            .image("localhost/test/other:1")
            .await
            .unwrap()
            .is_none()
    );
    let who = Credentials {
        username: "me".to_owned(),
        password: "secret".to_owned(),
    };
    assert!(!format!("{who:?}").contains("secret"));
    assert_eq!(
        client
            .pull_image("registry.example/a:1", Some(&who))
            .await
            .unwrap(),
        "sha256:11"
    );
    let sent = fake.seen().pull.take().unwrap();
    assert!(!format!("{sent:?}").contains("secret"));
    assert_eq!(sent.auth.unwrap().password, "secret");
}

#[test]
fn durations_round_up_and_saturate() {
    assert_eq!(seconds(Duration::ZERO), 0);
    assert_eq!(seconds(Duration::from_nanos(1)), 1);
    assert_eq!(seconds(Duration::MAX), i64::MAX);
}

#[test]
fn a_time_before_1970_is_refused() {
    let error = time("ListPodSandbox", "x", -1).unwrap_err();
    assert!(error.to_string().contains("before 1970"), "{error}");
    assert_eq!(
        time("ListPodSandbox", "x", i64::MAX).unwrap(),
        UNIX_EPOCH + Duration::from_nanos(i64::MAX as u64)
    );
}
