//! That the harness's own parts work for real, before anything is built on them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Flavour, Instance, Options, Version};
use km_tests_e2e::km::Km;
use km_tests_e2e::proxy::{Fault, Proxy};
use km_tests_e2e::registry::{self, Registry, User};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::{guest, images, process, provider, qemu};

pub(crate) const TESTS: &[Test] = &[
    ("nothing_of_the_machine_shows", nothing_of_the_machine_shows),
    (
        "disks_fill_up_and_are_read_only",
        disks_fill_up_and_are_read_only,
    ),
    ("containerd_1_6_runs_a_pod", |s| {
        containerd(s, &Options::new(Version::V1_6), "1.6.")
    }),
    ("containerd_1_7_runs_a_pod", |s| {
        containerd(s, &Options::new(Version::V1_7), "1.7.")
    }),
    ("containerd_2_x_runs_a_pod", |s| {
        containerd(s, &Options::new(Version::V2), "2.")
    }),
    ("containerd_2_x_runs_a_pod_with_a_version_2_file", |s| {
        let options = Options::new(Version::V2).flavour(Flavour::Version2);
        containerd(s, &options, "2.")
    }),
    ("containerd_may_not_come_back", containerd_may_not_come_back),
    ("registry_plain", |s| {
        push_and_pull(s, registry::Options::default())
    }),
    ("registry_tls", |s| {
        let tls = true;
        let options = registry::Options::default();
        push_and_pull(s, registry::Options { tls, ..options })
    }),
    ("registry_basic_auth", |s| {
        let user = Some(user());
        let options = registry::Options::default();
        push_and_pull(s, registry::Options { user, ..options })
    }),
    ("registry_bearer_token", |s| {
        let (user, token) = (Some(user()), true);
        let options = registry::Options::default();
        push_and_pull(
            s,
            registry::Options {
                user,
                token,
                ..options
            },
        )
    }),
    ("registry_bearer_token_for_everyone", |s| {
        let token = true;
        let options = registry::Options::default();
        push_and_pull(s, registry::Options { token, ..options })
    }),
    ("proxy_fails_to_order", proxy_fails_to_order),
    ("provider_is_real", provider_is_real),
    ("guest_boots", guest_boots),
    ("kill_after_a_state_change", kill_after_a_state_change),
];

fn user() -> User {
    User {
        name: "platform".to_owned(),
        password: "correct horse".to_owned(),
    }
}

fn nothing_of_the_machine_shows(_: &Sandbox) -> Result<()> {
    let run: Vec<_> = std::fs::read_dir("/run")?.flatten().collect();
    ensure!(
        run.iter().all(|entry| ["km", "containerd", "runc", "nri"]
            .iter()
            .any(|&n| entry.file_name() == n)),
        "/run holds what no test put there: {run:?}"
    );
    ensure!(std::process::id() < 1000, "the process IDs are not our own");
    Ok(())
}

fn disks_fill_up_and_are_read_only(sandbox: &Sandbox) -> Result<()> {
    let disk = sandbox.small_disk("disk", 1)?;
    let full = std::fs::write(disk.join("file"), vec![1; 2 << 20]);
    ensure!(full.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull));
    let guard = sandbox.read_only(&disk)?;
    let refused = std::fs::write(disk.join("other"), "");
    ensure!(refused.is_err_and(|error| error.kind() == std::io::ErrorKind::ReadOnlyFilesystem));
    drop(guard);
    std::fs::write(disk.join("other"), "")?;
    Ok(())
}

fn containerd(sandbox: &Sandbox, options: &Options, version: &str) -> Result<()> {
    let options = options.clone().handler("demo", "io.containerd.runc.v2");
    let instance = Instance::start(sandbox, &options)?;
    let cri = instance.cri();
    let is = cri.version()?;
    ensure!(
        is.starts_with(version),
        "the version is {is}, not {version}"
    );
    ensure!(cri.handlers()? == ["demo", "runc"]);

    let pod = cri.run_pod("demo", images::BUSYBOX, &["/bin/sleep", "1000"])?;
    instance.restart()?;
    ensure!(instance.restarts()? == 1);
    let said = cri.exec(&pod.container, &["/bin/echo", "still", "here"])?;
    ensure!(said.stdout == "still here\n", "after a restart: {said:?}");
    cri.remove_sandbox(&pod.sandbox)?;

    let refused = cri.run_sandbox("nobody", &Default::default());
    let error = format!("{:#}", refused.err().context("an unknown handler ran")?);
    ensure!(error.contains("no runtime for \"nobody\""), "{error}");
    Ok(())
}

fn containerd_may_not_come_back(sandbox: &Sandbox) -> Result<()> {
    let instance = Instance::start(sandbox, &Options::new(Version::V1_7))?;
    instance.refuse_to_start(Some("a test says so"))?;
    let error = format!("{:#}", instance.restart().err().context("it came back")?);
    ensure!(error.contains("a test says so"), "{error}");
    ensure!(instance.cri().version().is_err(), "it still answers");
    instance.refuse_to_start(None)?;
    instance.start_again()?;

    let good = std::fs::read(instance.config())?;
    std::fs::write(instance.config(), "version = \"no number\"\n")?;
    let error = format!("{:#}", instance.restart().err().context("it came back")?);
    ensure!(error.contains("ended as soon as it was started"), "{error}");
    std::fs::write(instance.config(), good)?;
    instance.start_again()
}

fn oras(sandbox: &Sandbox, words: &[&str]) -> Result<process::Finished> {
    let mut command = Command::new(sandbox.parts().oras());
    command.args(words);
    process::run(&mut command, Duration::from_secs(30))
}

/// Pushes and pulls a file with oras, which is nobody's part in this repository.
fn push_and_pull(sandbox: &Sandbox, options: registry::Options) -> Result<()> {
    let registry = Registry::start(sandbox, options.clone())?;
    let folder = sandbox.folder("oras")?;
    let content = b"a file in a registry";
    std::fs::write(folder.join("file"), content)?;
    let reference = registry.reference("kata/guest:v1");
    let ca = registry.ca().display().to_string();
    let mut access = if options.tls {
        vec!["--ca-file".to_owned(), ca]
    } else {
        vec!["--plain-http".to_owned()]
    };
    if options.tls {
        let refused = oras(sandbox, &["manifest", "fetch", &reference])?;
        ensure!(
            refused.stderr.contains("certificate"),
            "a stranger's certificate was taken: {refused}"
        );
    }
    if options.user.is_some() || options.token {
        let refused = get(&registry.host(), "/v2/")?;
        let scheme = if options.token { "Bearer" } else { "Basic" };
        ensure!(refused.head.contains(scheme), "{}", refused.head);
        ensure!(
            refused.head.starts_with("HTTP/1.1 401 "),
            "a stranger came in"
        );
    }
    if options.user.is_some() {
        let config = registry.docker_config(&registry.host())?;
        access.extend(["--registry-config".to_owned(), config.display().to_string()]);
    }
    let access: Vec<&str> = access.iter().map(String::as_str).collect();
    let pushed = format!("{}:text/plain", folder.join("file").display());
    let push = [
        &["push", "--disable-path-validation"],
        &access[..],
        &[&reference, &pushed],
    ];
    oras(sandbox, &push.concat())?.success()?;
    ensure!(std::fs::read(registry.blob_file(&images::sha256(content)))? == content);

    let registry = registry.stop()?.start(sandbox)?;
    let target = folder.join("out").display().to_string();
    let pull = [
        &["pull", "--allow-path-traversal", "-o", &target],
        &access[..],
        &[&reference],
    ];
    std::fs::remove_file(folder.join("file"))?;
    oras(sandbox, &pull.concat())?
        .success()
        .with_context(|| registry.log_tail())?;
    Ok(())
}

struct Response {
    head: String,
    body: Vec<u8>,
}

/// An HTTP response, as it comes, however short.
fn get(host: &str, path: &str) -> Result<Response> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let end = bytes
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .context("no whole head")?;
    let body = bytes.split_off(end + 4);
    Ok(Response {
        head: String::from_utf8(bytes)?,
        body,
    })
}

fn proxy_fails_to_order(sandbox: &Sandbox) -> Result<()> {
    let registry = Registry::start(sandbox, registry::Options::default())?;
    let proxy = Proxy::start(sandbox, registry.port())?;
    let folder = sandbox.folder("oras")?;
    let content: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let file = folder.join("file").display().to_string();
    std::fs::write(&file, &content)?;
    let reference = proxy.reference("kata/guest:v1");
    let words = [
        "push",
        "--plain-http",
        "--disable-path-validation",
        &reference,
        &file,
    ];
    oras(sandbox, &words)?
        .success()
        .context("push through the proxy")?;
    ensure!(
        proxy
            .take_requests()
            .iter()
            .any(|request| request.method == "PUT")
    );

    let path = format!("/v2/kata/guest/blobs/{}", images::sha256(&content));
    let fetch = || get(&proxy.host(), &path);
    ensure!(fetch()?.body == content);
    ensure!(proxy.take_requests().len() == 1, "one request, one line");

    proxy.rule("/blobs/", Fault::Truncate(1000), 1);
    ensure!(fetch()?.body == content[..1000]);
    proxy.rule("/blobs/", Fault::Corrupt(7), 1);
    let corrupt = fetch()?.body;
    ensure!(corrupt[7] == !content[7] && corrupt[8..] == content[8..]);
    proxy.rule("/blobs/", Fault::Reset(1000), 1);
    let reset = fetch().err().context("no reset came")?;
    let reset = reset.downcast::<std::io::Error>()?;
    ensure!(
        reset.kind() == std::io::ErrorKind::ConnectionReset,
        "{reset}"
    );
    proxy.rule("/blobs/", Fault::Status(503), 1);
    ensure!(fetch()?.head.starts_with("HTTP/1.1 503 "));
    proxy.rule("/blobs/", Fault::Stall(1000, Duration::from_millis(300)), 1);
    let started = std::time::Instant::now();
    ensure!(fetch()?.body == content, "whole after a stall");
    ensure!(started.elapsed() >= Duration::from_millis(300));
    ensure!(fetch()?.body == content, "used-up rules do nothing");
    Ok(())
}

fn provider_is_real(sandbox: &Sandbox) -> Result<()> {
    let prefix = provider::assemble(sandbox.parts(), &sandbox.folder("kata")?)?;
    let mut qemu = Command::new(prefix.join("bin/qemu-system-x86_64-snp-experimental"));
    let said = process::run(qemu.arg("--version"), Duration::from_secs(20))?.success()?;
    ensure!(said.stdout.starts_with("QEMU emulator version"), "{said}");
    let mode = std::fs::metadata(prefix.join("bin/containerd-shim-kata-v2"))?
        .permissions()
        .mode();
    ensure!(mode & 0o111 == 0o111, "the shim has mode {mode:o}");
    for firmware in ["OVMF.fd", "AMDSEV.fd", "OVMF.inteltdx.fd"] {
        let bytes = std::fs::read(prefix.join("share/ovmf").join(firmware))?;
        // UEFI PI specification, volume 3: a firmware volume's header has its signature at offset 40.
        ensure!(
            bytes.get(40..44) == Some(b"_FVH") || bytes.windows(4).any(|four| four == b"_FVH"),
            "{firmware} holds no firmware volume"
        );
    }
    Ok(())
}

fn guest_boots(sandbox: &Sandbox) -> Result<()> {
    let folder = sandbox.folder("guest")?;
    guest::build(sandbox.parts(), &folder, "v1")?;
    let boot = qemu::boot(
        &sandbox.parts().qemu(),
        &folder.join(guest::KERNEL),
        &folder.join(guest::INITRD),
        &guest::alive("v1"),
        Duration::from_secs(120),
    )?;
    ensure!(
        boot.console.contains("Linux 6."),
        "no kernel's name: {}",
        boot.console
    );
    Ok(())
}

/// Strikes busybox's mkdir in place of kata-manager: three folders are three changes.
fn kill_after_a_state_change(sandbox: &Sandbox) -> Result<()> {
    let busybox = Km::at(&sandbox.parts().busybox());
    for n in 1..=4 {
        let folder = sandbox.folder("changes")?;
        let names = ["1", "2", "3"].map(|name| folder.join(name).display().to_string());
        let words = ["mkdir", &names[0], &names[1], &names[2]];
        let killed = busybox.killed_after(sandbox, &words, n)?;
        ensure!(killed == (n <= 3), "asked to kill after {n} of 3 changes");
        let made = std::fs::read_dir(&folder)?.count();
        ensure!(made == n.min(3), "{made} changes, the kill was after {n}");
    }
    let folder = sandbox.folder("changes")?.join("one").display().to_string();
    let (finished, changes) = busybox.traced(sandbox, &["mkdir", &folder])?;
    finished.success()?;
    ensure!(
        changes.len() == 1 && changes[0].contains(&folder),
        "{changes:?}"
    );
    Ok(())
}
