//! The edit and the dry run against a real containerd's own reading (`containerd config dump`), for every prepared
//! configuration that this containerd accepts. Needs no running daemon:
//!
//! `KM_TEST_CONTAINERD=/path/to/containerd cargo test -p km-containerd-config --test real_dump -- --ignored`

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare files and run programs plainly"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use km_containerd_config::edit::{Document, Edited, SetOptions, remove_all, set_handlers};
use km_containerd_config::live::{LiveHandler, LiveHandlers};
use km_containerd_config::transaction::{BoxError, Change, Daemon, Journal, Outcome, Owed, run};
use km_containerd_config::{ContainerdVersion, Handler};

/// A containerd that is never started: what it would have live is what it dumps.
struct Dumped {
    binary: PathBuf,
    config: PathBuf,
    live: Mutex<LiveHandlers>,
}

impl Dumped {
    fn dumped(&self, config: &Path) -> Result<String, BoxError> {
        let mut command = Command::new(&self.binary);
        if config.exists() {
            command.arg("--config").arg(config).args(["config", "dump"]);
        } else {
            command.args(["config", "default"]);
        }
        let output = command.output()?;
        if output.status.success() {
            return Ok(String::from_utf8(output.stdout)?);
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    }
}

impl Daemon for Dumped {
    async fn restart(&self) -> Result<(), BoxError> {
        let document = Document::parse(&self.dumped(&self.config)?)?;
        let handlers = document.handlers().into_iter().map(|handler| {
            let read = Handler::from_settings(&handler.name, &handler.settings);
            let live = LiveHandler {
                runtime_type: Some(read.runtime_type),
                config_path: Some(read.config_path.unwrap_or_default()),
                ..LiveHandler::default()
            };
            (handler.name, live)
        });
        *self.live.lock().unwrap() = LiveHandlers(handlers.collect());
        Ok(())
    }

    async fn handlers(&self) -> Result<LiveHandlers, BoxError> {
        Ok(self.live.lock().unwrap().clone())
    }

    async fn dump(&self, config: &Path) -> Result<Option<String>, BoxError> {
        self.dumped(config).map(Some)
    }
}

struct NoJournal;

impl Journal for NoJournal {
    fn restoration_owed(&mut self, _: &Owed) -> Result<(), BoxError> {
        Ok(())
    }
    fn restart_owed(&mut self, _: &Owed) -> Result<(), BoxError> {
        Ok(())
    }
    fn settled(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

fn change(daemon: &Dumped, edited: &Edited, want_live: &[Handler]) -> Change {
    Change::from_edit(
        daemon.config.clone(),
        fs::read(&daemon.config).ok(),
        edited,
        want_live.to_vec(),
        daemon.config.with_extension("backup"),
    )
}

fn wanted(version: ContainerdVersion) -> Vec<Handler> {
    let handler = Handler {
        name: "km-gpu".into(),
        runtime_type: "io.containerd.km-gpu.v2".into(),
        runtime_path: Some("/opt/kata-manager/bin/shim".into()),
        config_path: Some("/opt/classes/km-gpu/configuration.toml".into()),
        pod_annotations: vec!["io.katacontainers.*".into(), "cdi.k8s.io/*".into()],
        container_annotations: vec!["io.katacontainers.*".into()],
        privileged_without_host_devices: true,
        snapshotter: None,
    };
    let plain = Handler {
        name: "km.demo".into(),
        runtime_type: "io.containerd.runc.v2".into(),
        ..Handler::default()
    };
    [handler, plain]
        .iter()
        .map(|handler| handler.for_version(version))
        .collect()
}

async fn there_and_back(daemon: &Dumped, name: &str, version: ContainerdVersion) {
    let before = fs::read_to_string(&daemon.config).ok();
    let text = before.clone().unwrap_or_default();
    let options = SetOptions {
        assume_version: version.config_version(),
        absent: before.is_none(),
        ..SetOptions::default()
    };
    let wanted = wanted(version);
    let edited = set_handlers(&text, &wanted, &options).unwrap();
    let step = change(daemon, &edited, &wanted);
    let outcome = run(&step, daemon, &mut NoJournal, &mut |_| {}).await;
    if ["nydus", "stargz"].contains(&name) && version.major >= 2 {
        // 2.1 migrates the snapshotter settings of a version 2 file only if the file names a handler.
        let refused = outcome.unwrap_err().to_string();
        assert!(
            refused.contains("disable_snapshot_annotations (true -> false)"),
            "{refused}"
        );
        return;
    }
    assert!(matches!(outcome, Ok(Outcome::Live { .. })), "{outcome:#?}");
    let undone = remove_all(&edited.text, &[]).unwrap();
    let step = change(daemon, &undone, &[]);
    let outcome = run(&step, daemon, &mut NoJournal, &mut |_| {}).await;
    assert!(matches!(outcome, Ok(Outcome::Live { .. })), "{outcome:#?}");
    assert_eq!(fs::read_to_string(&daemon.config).ok(), before);
}

/// containerd 1.6 reads version 3 as if it were version 2, and finds none of its tables.
fn says_version_3(config: &Path) -> bool {
    let text = fs::read_to_string(config).unwrap();
    Document::parse(&text).unwrap().version() == Some(3)
}

#[tokio::test]
#[ignore = "needs KM_TEST_CONTAINERD, the path of a containerd binary"]
async fn every_configuration_that_this_containerd_reads_is_edited_and_given_back() {
    let binary = PathBuf::from(std::env::var_os("KM_TEST_CONTAINERD").expect("KM_TEST_CONTAINERD"));
    let printed = Command::new(&binary).arg("--version").output().unwrap();
    let version: ContainerdVersion = String::from_utf8_lossy(&printed.stdout).parse().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let daemon = Dumped {
        binary,
        config: dir.path().join("config.toml"),
        live: Mutex::default(),
    };
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut done = Vec::new();
    for entry in fs::read_dir(fixtures).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        fs::copy(&path, &daemon.config).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        match daemon.restart().await {
            Err(error) => println!(
                "{version} does not read {name}: {}",
                error.to_string().trim()
            ),
            Ok(()) if version.major < 2 && says_version_3(&daemon.config) => {}
            Ok(()) => {
                println!("{version} reads {name}");
                there_and_back(&daemon, &name, version).await;
                done.push(name);
            }
        }
    }
    fs::remove_file(&daemon.config).unwrap();
    daemon.restart().await.unwrap();
    there_and_back(&daemon, "", version).await;
    assert!(done.len() > 8, "{version} read only {done:?}");
}

/// Trees of imports: our reading of which handlers are in force is containerd's own.
#[tokio::test]
#[ignore = "needs KM_TEST_CONTAINERD, the path of a containerd binary"]
async fn imports_are_read_as_this_containerd_reads_them() {
    use km_containerd_config::effective::Effective;
    use km_host::{HostPath, Root};

    let binary = PathBuf::from(std::env::var_os("KM_TEST_CONTAINERD").expect("KM_TEST_CONTAINERD"));
    let printed = Command::new(&binary).arg("--version").output().unwrap();
    let version: ContainerdVersion = String::from_utf8_lossy(&printed.stdout).parse().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let r = dir.path().display().to_string();
    let table = |plugin: &str, name: &str| {
        format!("[plugins.\"{plugin}\".containerd.runtimes.{name}]\nruntime_type = \"x.y.v1\"\n")
    };
    let old = |name| table("io.containerd.grpc.v1.cri", name);
    let new = |name| table("io.containerd.cri.v1.runtime", name);
    let write = |path: &str, text: String| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("d/2.toml", format!("version = 2\n{}", old("two")));
    write(
        "d/1.toml",
        format!(
            "version = 2\nimports = ['../e.toml', '1.toml']\n{}",
            old("one")
        ),
    );
    write(
        "e.toml",
        format!("imports = ['{r}/main.toml']\n{}", old("e")),
    );
    write("n/3.toml", format!("version = 3\n{}", new("three")));
    write(
        "plain.toml",
        "version = 2\n[debug]\nlevel = 'info'\n".to_owned(),
    );
    let mut mains = vec![
        format!("version = 2\nimports = ['{r}/d/*.toml']\n{}", old("main")),
        format!(
            "version = 2\nimports = ['e.toml', '{r}/plain.toml']\n{}",
            old("main")
        ),
        format!(
            "version = 2\nimports = ['./d/../plain.toml']\n{}",
            old("main")
        ),
        format!("version = 2\nimports = ['d/*.toml']\n{}", old("main")),
        format!(
            "version = 2\nimports = ['{r}/d/[12].toml*']\n{}",
            old("main")
        ),
    ];
    if version.major >= 2 {
        mains.push(format!(
            "version = 3\nimports = ['{r}/n/*', '{r}/n/3.toml']\n{}",
            new("main")
        ));
        mains.push(format!(
            "version = 3\nimports = ['{r}/d/*.toml']\n{}",
            new("main")
        ));
        mains.push(format!(
            "version = 2\nimports = ['{r}/n/*.toml']\n{}",
            old("main")
        ));
        mains.push(format!(
            "version = 3\nimports = ['{r}/gone.toml', '{r}/n/3.toml']\n{}",
            new("main")
        ));
    }
    for main in mains {
        write("main.toml", main.clone());
        let path = dir.path().join("main.toml");
        let daemon = Dumped {
            binary: binary.clone(),
            config: path.clone(),
            live: Mutex::default(),
        };
        let dumped = Document::parse(&daemon.dumped(&path).unwrap()).unwrap();
        let mut theirs: Vec<String> = dumped.handlers().into_iter().map(|h| h.name).collect();
        theirs.retain(|name| name != "runc");
        theirs.sort();
        let root = Root::new("/").unwrap();
        let effective = Effective::load(&root, &HostPath::new(&path).unwrap(), version).unwrap();
        let ours: Vec<String> = effective.handlers().into_iter().map(|h| h.name).collect();
        if effective.missing.is_empty() {
            assert_eq!(ours, theirs, "{version} with\n{main}");
        } else {
            // The reading ends there: what is told as missing is why.
            assert_eq!(theirs, ["main"], "{version} with\n{main}");
        }
    }
}
