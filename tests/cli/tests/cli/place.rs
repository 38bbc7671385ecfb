//! The binary, and a place to run it in: a configuration and the root of a host.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A configuration with two classes.
pub(crate) const GPU: &str = "artifactsDir: /opt/artifacts
runtimeClasses:
- name: kata-qemu-nvidia-gpu
  nodeSelector:
    example.com/gpu: present
  artifacts:
    url: registry.example/kata/guest:v1
    pullSecret: \"\"
- name: kata-qemu-nvidia-gpu-snp
  artifacts:
    url: registry.example/kata/guest:v1-snp
";

/// The program under test.
pub(crate) fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("KM_BIN") {
        return PathBuf::from(path);
    }
    // This program is target/PROFILE/deps/cli-HASH.
    let me = std::env::current_exe().unwrap();
    let path = me.parent().unwrap().parent().unwrap().join("kata-manager");
    assert!(
        path.is_file(),
        "{} is not there: `cargo build -p kata-manager` first, or set KM_BIN",
        path.display()
    );
    path
}

/// A folder with a `config.yaml` (none when `config` is `None`), and an empty root of a host.
pub(crate) struct Place {
    dir: TempDir,
}

/// What a run said.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "exit code: {}", self.code)?;
        write!(f, "--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }
}

impl Place {
    pub(crate) fn new(config: Option<&str>) -> Place {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir_all(dir.path().join("root/etc/containerd")).unwrap();
        if let Some(text) = config {
            std::fs::write(dir.path().join("config.yaml"), text).unwrap();
        }
        Place { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs with this place's configuration and root, and nothing of ours in the environment. Paths of the place are replaced.
    pub(crate) fn run(&self, words: &[&str]) -> Said {
        self.run_with(&[], words)
    }

    /// As [`Place::run`], with these variables too.
    pub(crate) fn run_with(
        &self,
        variables: &[(&str, &str)],
        words: &[impl AsRef<std::ffi::OsStr>],
    ) -> Said {
        let output = Command::new(binary())
            .args(words)
            .env_clear()
            .envs(variables.iter().copied())
            .env("PATH", "/usr/bin:/bin")
            .env("KATA_MANAGER_CONFIG", self.path().join("config.yaml"))
            .env("KATA_MANAGER_HOST_ROOT", self.path().join("root"))
            .output()
            .unwrap();
        let place = self.path().display().to_string();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&place, "[PLACE]");
        Said {
            code: output.status.code().unwrap(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// What lies in the place, so that a test can see that nothing was made.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path.clone());
                }
                found.push(path.strip_prefix(self.path()).unwrap().to_owned());
            }
        }
        found.sort();
        found
    }
}

/// A place whose root shows a machine.
pub(crate) fn machine(machine: &km_tests_sysfs::Machine) -> Place {
    let place = Place::new(Some(""));
    machine.write(&place.path().join("root"));
    place
}
