//! Configurations that import one another, read by each version's rules.

use std::collections::BTreeMap;

use km_containerd_config::ContainerdVersion;
use km_containerd_config::effective::{Effective, Files};
use km_host::HostPath;

/// The parts of the input, as files of one folder.
struct Parts(BTreeMap<String, Vec<u8>>);

const FOLDER: &str = "/etc/containerd";

impl Files for Parts {
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error> {
        let name = path.as_str().strip_prefix("/etc/containerd/");
        Ok(name.and_then(|name| self.0.get(name)).cloned())
    }

    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error> {
        let here = folder.as_str() == FOLDER;
        Ok(self.0.keys().filter(|_| here).cloned().collect())
    }
}

pub(crate) fn run(bytes: &[u8]) {
    let parts = bytes.split(|byte| *byte == 0).enumerate().take(8);
    let name = |number| match number {
        0 => "config.toml".to_owned(),
        number => format!("{number}.toml"),
    };
    let files = Parts(parts.map(|(at, text)| (name(at), text.to_vec())).collect());
    let main = HostPath::new("/etc/containerd/config.toml").expect("a path");
    for version in ["1.6.20", "1.7.24", "2.1.9"] {
        let version: ContainerdVersion = version.parse().expect("a version");
        if let Ok(read) = Effective::load(&files, &main, version) {
            let _ = (
                read.handlers(),
                read.owners(),
                read.merged(),
                read.replaces_main().is_some(),
                read.other_versions().len(),
            );
        }
    }
}
