//! The transaction against a containerd in memory that reads the real file, as far as handlers go.

mod crash;
mod steps;

use std::collections::VecDeque;
use std::fs;
use std::sync::Mutex;

use super::*;
use crate::edit::{SetOptions, remove_all, set_handlers};

/// What the containerd does at its next restart.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Restarted {
    /// Starts with the file as it is.
    Well,
    /// The service manager reports a failure, and it is down.
    Fails,
    /// It comes up, but never answers: its CRI plugin did not load.
    Silent,
    /// The restart never ends.
    Hangs,
}

/// A containerd: its configuration is read at a restart and at no other time.
struct Fake {
    config: PathBuf,
    live: Mutex<Option<LiveHandlers>>,
    next: Mutex<VecDeque<Restarted>>,
    dumps: Mutex<bool>,
    /// Appended to what is dumped, or in its place if it begins with `=`.
    dump_edit: Mutex<String>,
    calls: Mutex<Vec<String>>,
}

impl Fake {
    fn read(&self) -> LiveHandlers {
        let text = fs::read_to_string(&self.config).unwrap_or_default();
        let found = crate::edit::Document::parse(&text).unwrap().handlers();
        let tables = found
            .into_iter()
            .filter(|handler| handler.owner != crate::edit::Owner::Adopted);
        let runtimes: serde_json::Map<_, _> = tables
            .map(|handler| {
                let report = serde_json::json!({
                    "runtimeType": handler.settings["runtime_type"],
                    "options": handler.settings.get("options"),
                });
                (handler.name, report)
            })
            .collect();
        LiveHandlers::from_cri_config(
            &serde_json::json!({ "containerd": { "runtimes": runtimes } }),
        )
    }

    fn called(&self, call: &str) {
        self.calls.lock().unwrap().push(call.to_owned());
    }

    fn restarts(&self) -> usize {
        let calls = self.calls.lock().unwrap();
        calls.iter().filter(|call| *call == "restart").count()
    }
}

impl Daemon for Fake {
    async fn restart(&self) -> Result<(), BoxError> {
        self.called("restart");
        let next = self.next.lock().unwrap().pop_front();
        match next.unwrap_or(Restarted::Well) {
            Restarted::Well => *self.live.lock().unwrap() = Some(self.read()),
            Restarted::Silent => *self.live.lock().unwrap() = None,
            Restarted::Fails => {
                *self.live.lock().unwrap() = None;
                return Err("job failed".into());
            }
            Restarted::Hangs => std::future::pending().await,
        }
        Ok(())
    }

    async fn handlers(&self) -> Result<LiveHandlers, BoxError> {
        let live = self.live.lock().unwrap().clone();
        live.ok_or_else(|| "unknown service runtime.v1.RuntimeService".into())
    }

    async fn dump(&self, config: &Path) -> Result<Option<String>, BoxError> {
        self.called("dump");
        if !*self.dumps.lock().unwrap() {
            return Ok(None);
        }
        let text = fs::read_to_string(config).unwrap_or_default();
        let edit = self.dump_edit.lock().unwrap().clone();
        match edit.strip_prefix('=') {
            Some("refuse") => Err("invalid plugin config".into()),
            Some(other) if config != self.config => Ok(Some(other.to_owned())),
            _ => Ok(Some(text)),
        }
    }
}

/// A journal that can be told to fail at its nth call.
#[derive(Default)]
struct Book {
    owed: Option<Owed>,
    entries: Vec<String>,
    fail_at: Option<usize>,
}

impl Book {
    fn enter(&mut self, entry: &str) -> Result<(), BoxError> {
        if self.fail_at == Some(self.entries.len()) {
            return Err("disk full".into());
        }
        self.entries.push(entry.to_owned());
        Ok(())
    }
}

impl Journal for Book {
    fn restoration_owed(&mut self, owed: &Owed) -> Result<(), BoxError> {
        self.enter("restoration")?;
        self.owed = Some(owed.clone());
        Ok(())
    }

    fn restart_owed(&mut self, owed: &Owed) -> Result<(), BoxError> {
        self.enter("restart")?;
        self.owed = Some(owed.clone());
        Ok(())
    }

    fn settled(&mut self) -> Result<(), BoxError> {
        self.enter("settled")?;
        self.owed = None;
        Ok(())
    }
}

struct Node {
    dir: tempfile::TempDir,
    fake: Fake,
    book: Book,
}

const BEFORE: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n";

fn handler(name: &str) -> Handler {
    Handler {
        name: name.into(),
        runtime_type: "io.containerd.kata.v2".into(),
        config_path: Some(format!("/opt/{name}.toml")),
        ..Handler::default()
    }
}

impl Node {
    fn new(before: Option<&str>) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("etc/containerd/config.toml");
        if let Some(text) = before {
            fs::create_dir_all(config.parent().unwrap()).unwrap();
            fs::write(&config, text).unwrap();
        }
        let fake = Fake {
            config,
            live: Mutex::new(None),
            next: Mutex::default(),
            dumps: Mutex::new(true),
            dump_edit: Mutex::default(),
            calls: Mutex::default(),
        };
        *fake.live.lock().unwrap() = Some(fake.read());
        Node {
            dir,
            fake,
            book: Book::default(),
        }
    }

    fn restarts_will(&self, next: &[Restarted]) {
        *self.fake.next.lock().unwrap() = next.iter().copied().collect();
    }

    fn text(&self) -> Option<String> {
        fs::read_to_string(&self.fake.config).ok()
    }

    fn change(&self, edited: &Edited, want_live: Vec<Handler>) -> Change {
        Change::from_edit(
            self.fake.config.clone(),
            self.text().map(String::into_bytes),
            edited,
            want_live,
            self.dir.path().join("state/config.toml.backup"),
        )
    }

    fn set(&self, wanted: &[Handler]) -> Change {
        let text = self.text();
        let options = SetOptions {
            absent: text.is_none(),
            assume_version: 3,
            ..SetOptions::default()
        };
        let edited = set_handlers(&text.unwrap_or_default(), wanted, &options).unwrap();
        self.change(&edited, wanted.to_vec())
    }

    fn remove(&self) -> Change {
        let edited = remove_all(&self.text().unwrap(), &[]).unwrap();
        self.change(&edited, Vec::new())
    }

    async fn run(&mut self, change: &Change) -> Result<Outcome, TransactionError> {
        run(change, &self.fake, &mut self.book, &mut |_| {}).await
    }

    async fn resume(&mut self) -> Result<Resumed, TransactionError> {
        let owed = self.book.owed.clone().unwrap();
        resume(&owed, &self.fake, &mut self.book, &mut |_| {}).await
    }

    fn is_as_before(&self) {
        assert_eq!(self.text().as_deref(), Some(BEFORE));
        assert_eq!(self.live(), Some(vec!["runc".to_owned()]));
        self.nothing_beside();
    }

    fn nothing_beside(&self) {
        let folder = self.fake.config.parent().unwrap();
        let files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|f| f.unwrap().file_name())
            .collect();
        assert_eq!(files, ["config.toml"]);
    }

    fn live(&self) -> Option<Vec<String>> {
        let live = self.fake.live.lock().unwrap();
        live.as_ref().map(LiveHandlers::names)
    }
}

/// An error with everything that it tells.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(source) = at {
        text = format!("{text}: {source}");
        at = source.source();
    }
    text
}
