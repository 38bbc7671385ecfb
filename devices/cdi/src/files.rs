//! A folder of CDI specs: what lies in it, what would have to change, and the change. Files of others are read and never touched.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use km_host::{Error, HostPath, Root, atomic};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use serde::Serialize;

use crate::devices::Found;
use crate::spec::{self, Entry, Spec, SpecError};

/// How the first line of each file of ours begins. An annotation in the spec would do as well, but annotations are of CDI 0.6.0,
/// and readers of 0.5.0, which is what NVIDIA's programs write and containerd 1.7.0 reads, refuse what they do not know.
pub const MARK: &str = "# Written by kata-manager";

/// The most files of a folder that are looked at. A machine has one or two.
const ENTRIES: usize = 1000;

/// The mode of a spec. It holds nothing secret: containerd, the kubelet's plugins and people read it.
const MODE: u32 = 0o644;

/// How the name of a temporary file ends ([`km_host::atomic`]).
const LEFTOVER: &str = ".kata-manager.tmp";

/// A spec in a folder.
#[derive(Debug)]
pub struct File {
    /// Where it is, as the host sees it.
    pub path: HostPath,
    /// Whether this program wrote it.
    pub ours: bool,
    /// What is in it, or why that is no spec.
    pub spec: Result<Spec, SpecError>,
    /// The bytes, when they could be read.
    bytes: Vec<u8>,
}

impl File {
    /// Reads one file.
    ///
    /// # Errors
    /// When it is not there, or this program has no descriptor or memory left. One that is no file, or cannot be read otherwise, is a spec
    /// that is none.
    pub fn read(root: &Root, path: &HostPath) -> Result<File, Error> {
        let itself = root.open(path.as_path(), OFlags::RDONLY | OFlags::NOFOLLOW);
        let errno = itself.as_ref().err().and_then(Errno::from_io_error);
        // Opening a link that is not to be followed gives ELOOP (open(2), `O_NOFOLLOW`).
        let is_link = errno == Some(Errno::LOOP);
        let opened = match (itself, errno) {
            (Err(error), Some(Errno::NOENT | Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
                return Err(Error::io("open", path.as_path())(error));
            }
            (Err(_), _) if is_link => root.open(path.as_path(), OFlags::RDONLY),
            (itself, _) => itself,
        };
        // One byte more than is allowed, so that the reader of the spec sees that it is too long.
        let bytes = opened.and_then(|file| km_host::read_regular(file, spec::LIMIT as u64 + 1));
        let (bytes, spec) = match bytes {
            Ok(bytes) => {
                let spec = Spec::parse(&bytes);
                (bytes, spec)
            }
            Err(error) => (Vec::new(), Err(SpecError::Unreadable(error.to_string()))),
        };
        Ok(File {
            path: path.clone(),
            ours: !is_link && bytes.starts_with(MARK.as_bytes()),
            spec,
            bytes,
        })
    }
}

/// The names in a folder that can be printed, sorted; `None` when it is not there.
fn list(root: &Root, dir: &HostPath) -> Result<Option<BTreeSet<String>>, Error> {
    let names = || -> std::io::Result<BTreeSet<String>> {
        let fd = root.open(dir.as_path(), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = BTreeSet::new();
        for entry in rustix::fs::Dir::new(fd)?.take(ENTRIES) {
            let entry = entry?;
            if entry.file_type() != FileType::Directory
                && let Ok(name) = entry.file_name().to_str()
                && !name.chars().any(char::is_control)
            {
                names.insert(name.to_owned());
            }
        }
        Ok(names)
    };
    match names() {
        Ok(names) => Ok(Some(names)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("list", dir.as_path())(error)),
    }
}

/// Reads the specs of a folder, sorted by name: what ends in `.json` or `.yaml` and is no folder, as CDI's own library does. A
/// folder that is not there has none.
///
/// # Errors
/// When it is there and cannot be listed.
pub fn observe(root: &Root, dir: &HostPath) -> Result<Vec<File>, Error> {
    let mut files = Vec::new();
    for name in list(root, dir)?.unwrap_or_default() {
        if !name.ends_with(".json") && !name.ends_with(".yaml") {
            continue;
        }
        match File::read(root, &dir.join(&name)) {
            Ok(file) => files.push(file),
            // It went away since.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(files)
}

/// A change of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "camelCase")]
pub enum Step {
    /// A spec is made or written anew.
    Write {
        /// Where.
        path: HostPath,
        /// Whether no file is there yet.
        new: bool,
        /// How many devices it lists, each counted once.
        devices: usize,
        /// What it will hold.
        text: String,
    },
    /// A spec of ours goes: it has no devices any more.
    Remove {
        /// Where.
        path: HostPath,
    },
}

/// Why a folder is not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Somebody else's file has the name of ours.
    #[error(
        "{path} was not written by kata-manager: another program, such as NVIDIA's Sandbox Device Plugin, serves these devices; stop it and remove the file, or give another alias"
    )]
    Foreign {
        /// The file.
        path: HostPath,
    },
    /// Somebody else's file in the same folder lists a device of ours: CDI would give neither of the two.
    #[error(
        "{path} lists {device} too, and CDI gives a device that two files of a folder list to nobody; remove it there, or give another alias"
    )]
    Twice {
        /// The file.
        path: HostPath,
        /// The device, such as `nvidia.com/pgpu=0`.
        device: String,
    },
}

/// What has to change so that the folder lists the devices that were found, and no others of ours.
///
/// # Errors
/// All reasons why it cannot be so without touching files of others.
pub fn plan(dir: &HostPath, files: &[File], found: &Found) -> Result<Vec<Step>, Vec<Conflict>> {
    let mut steps = Vec::new();
    let mut conflicts = Vec::new();
    let mut wanted = BTreeSet::new();
    for (class, devices) in found.by_class() {
        let path = dir.join(class.file());
        let text = spec::render(class, &devices);
        match files.iter().find(|file| file.path == path) {
            Some(file) if !file.ours => conflicts.push(Conflict::Foreign { path: path.clone() }),
            Some(file) if file.bytes == text.as_bytes() => {}
            there => steps.push(Step::Write {
                path: path.clone(),
                new: there.is_none(),
                devices: devices.len(),
                text,
            }),
        }
        let names: BTreeSet<String> = devices.iter().flat_map(|device| device.names()).collect();
        conflicts.extend(twice(files, &path, &class.kind(), &names));
        wanted.insert(path);
    }
    let stale = files
        .iter()
        .filter(|file| file.ours && !wanted.contains(&file.path));
    steps.extend(stale.map(|file| Step::Remove {
        path: file.path.clone(),
    }));
    match conflicts.is_empty() {
        true => Ok(steps),
        false => Err(conflicts),
    }
}

/// The first device of these that each foreign file lists under the same kind.
fn twice<'a>(
    files: &'a [File],
    ours: &'a HostPath,
    kind: &'a str,
    names: &'a BTreeSet<String>,
) -> impl Iterator<Item = Conflict> + 'a {
    let others = files
        .iter()
        .filter(move |file| !file.ours && file.path != *ours);
    others.filter_map(move |file| {
        let spec = file.spec.as_ref().ok().filter(|spec| spec.kind == kind)?;
        let device = spec
            .devices
            .iter()
            .find(|device| names.contains(&device.name))?;
        Some(Conflict::Twice {
            path: file.path.clone(),
            device: format!("{kind}={}", device.name),
        })
    })
}

/// Carries steps out; makes the folder when something is written and it is not there. Each file is all or nothing.
///
/// # Errors
/// When a step fails; those before it stay done, and the same plan can be made again.
pub fn apply(root: &Root, steps: &[Step]) -> Result<(), Error> {
    for step in steps {
        match step {
            Step::Write { path, text, .. } => {
                let target = root.resolve(path)?;
                if let Some(folder) = target.parent() {
                    atomic::create_dir_all(folder, 0o755)?;
                }
                atomic::write(&target, text.as_bytes(), MODE)?;
            }
            Step::Remove { path } => remove(root, path)?,
        }
    }
    Ok(())
}

fn remove(root: &Root, path: &HostPath) -> Result<(), Error> {
    let target = root.resolve(path)?;
    atomic::remove_file(&target)?;
    atomic::remove_leftover(&target)
}

/// The files of ours in a folder.
///
/// # Errors
/// When it is there and cannot be listed.
pub fn ours(root: &Root, dir: &HostPath) -> Result<Vec<HostPath>, Error> {
    let files = observe(root, dir)?.into_iter().filter(|file| file.ours);
    Ok(files.map(|file| file.path).collect())
}

/// Removes every file of ours in a folder, with what a killed write left there, and gives the paths of the files. The folder stays:
/// it belongs to the host.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_ours(root: &Root, dir: &HostPath) -> Result<Vec<HostPath>, Error> {
    let paths = ours(root, dir)?;
    for path in &paths {
        remove(root, path)?;
    }
    // A write that was killed before its file was there has left the temporary file alone.
    for name in list(root, dir)?.unwrap_or_default() {
        let written = name
            .strip_prefix('.')
            .and_then(|name| name.strip_suffix(LEFTOVER));
        if let Some(name) = written.filter(|name| name.starts_with(crate::VENDOR)) {
            atomic::remove_leftover(&root.resolve(dir)?.join(name))?;
        }
    }
    Ok(paths)
}

/// The nodes of a device that the host does not have, as far as that can be told.
pub fn missing<'a>(root: &Root, device: &'a Entry) -> Vec<&'a str> {
    let absent = |node: &&str| {
        root.open(Path::new(node), OFlags::PATH)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    };
    device.host_nodes().filter(absent).collect()
}

/// A device that several files of one folder list; CDI's own library gives it to nobody then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Doubled {
    /// The device, such as `nvidia.com/pgpu=0`.
    pub device: String,
    /// The files that list it.
    pub files: Vec<HostPath>,
}

/// The devices that several of these files, which lie in one folder, list.
pub fn doubled(files: &[File]) -> Vec<Doubled> {
    let mut by_device: BTreeMap<String, Vec<HostPath>> = BTreeMap::new();
    for file in files {
        for device in file.spec.iter().flat_map(Spec::qualified) {
            by_device.entry(device).or_default().push(file.path.clone());
        }
    }
    let doubled = by_device.into_iter().filter(|(_, files)| files.len() > 1);
    doubled
        .map(|(device, files)| Doubled { device, files })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use km_tests_sysfs::{Machine, shapes};
    use km_vfio::Inventory;
    use rustix::fs::Mode;

    use super::*;
    use crate::devices::{Backend, Naming, find};

    struct Place {
        folder: tempfile::TempDir,
        root: Root,
        dir: HostPath,
    }

    impl Place {
        fn new() -> Place {
            let folder = tempfile::tempdir().unwrap();
            let root = Root::new(folder.path()).unwrap();
            let dir = HostPath::new(crate::DIR).unwrap();
            Place { folder, root, dir }
        }

        fn found(machine: &Machine, gpu: &str) -> Found {
            let folder = tempfile::tempdir().unwrap();
            machine.write(folder.path());
            let inventory = Inventory::observe(&Root::new(folder.path()).unwrap()).unwrap();
            find(
                &inventory,
                &Naming::new(gpu, "nvswitch").unwrap(),
                Backend::Group,
            )
        }

        fn plan(&self, found: &Found) -> Result<Vec<Step>, Vec<Conflict>> {
            plan(&self.dir, &observe(&self.root, &self.dir).unwrap(), found)
        }

        fn bring(&self, found: &Found) -> usize {
            let steps = self.plan(found).unwrap();
            apply(&self.root, &steps).unwrap();
            assert_eq!(self.plan(found), Ok(Vec::new()), "a second time");
            steps.len()
        }

        fn put(&self, name: &str, text: &str) {
            let dir = self.folder.path().join("var/run/cdi");
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(name), text).unwrap();
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.folder.path().join("var/run/cdi")).unwrap();
            let name = |entry: std::io::Result<fs::DirEntry>| {
                entry.unwrap().file_name().into_string().unwrap()
            };
            let mut names: Vec<String> = entries.map(name).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn files_come_and_go_with_devices() {
        let place = Place::new();
        let all = Place::found(&shapes::eight_gpus(), "pgpu");
        assert_eq!(place.bring(&all), 2);
        assert_eq!(
            place.names(),
            ["nvidia.com-nvswitch.yaml", "nvidia.com-pgpu.yaml"]
        );
        let models = Place::found(&shapes::eight_gpus(), "");
        assert_eq!(place.bring(&models), 2);
        assert_eq!(
            place.names(),
            [
                "nvidia.com-GH100_H100_SXM5_80GB.yaml",
                "nvidia.com-nvswitch.yaml"
            ]
        );
        assert_eq!(place.bring(&Found::default()), 2);
        assert_eq!(place.names(), [""; 0]);
    }

    #[test]
    fn nothing_is_made_for_no_devices() {
        let place = Place::new();
        assert_eq!(place.bring(&Found::default()), 0);
        assert!(!place.folder.path().join("var").exists());
    }

    #[test]
    fn files_of_others_stay() {
        let place = Place::new();
        let foreign = "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices: []\n";
        place.put("nvidia.com-pgpu.yaml", foreign);
        place.put("nvidia.com-other.yaml", foreign);
        place.put("note.txt", MARK);
        let all = Place::found(&shapes::eight_gpus(), "pgpu");
        let path = place.dir.join("nvidia.com-pgpu.yaml");
        assert_eq!(place.plan(&all), Err(vec![Conflict::Foreign { path }]));
        assert_eq!(remove_ours(&place.root, &place.dir).unwrap(), []);
        assert_eq!(place.names().len(), 3);
    }

    #[test]
    fn a_device_that_another_file_lists_is_a_conflict() {
        let place = Place::new();
        let edits = "containerEdits: {env: [A=b]}";
        place.put("x.json", "{");
        place.put(
            "x.yaml",
            &format!(
                "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices: [{{name: \"7\", {edits}}}]\n"
            ),
        );
        let conflicts = place
            .plan(&Place::found(&shapes::eight_gpus(), "pgpu"))
            .unwrap_err();
        assert!(
            conflicts[0]
                .to_string()
                .contains("x.yaml lists nvidia.com/pgpu=7 too"),
            "{conflicts:?}"
        );
        assert_eq!(place.bring(&Place::found(&shapes::eight_gpus(), "gpus")), 2);
    }

    #[test]
    fn a_link_with_our_mark_is_not_ours() {
        let place = Place::new();
        place.put("real.txt", MARK);
        let dir = place.folder.path().join("var/run/cdi");
        std::os::unix::fs::symlink("real.txt", dir.join("nvidia.com-pgpu.yaml")).unwrap();
        let all = Place::found(&shapes::eight_gpus(), "pgpu");
        assert!(matches!(
            place.plan(&all).unwrap_err()[..],
            [Conflict::Foreign { .. }]
        ));
    }

    #[test]
    fn odd_entries_end_nothing() {
        let place = Place::new();
        place.put("a.yaml", &"x".repeat(spec::LIMIT + 1));
        let dir = place.folder.path().join("var/run/cdi");
        fs::create_dir(dir.join("folder.yaml")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join("dangling.json")).unwrap();
        let pipe = dir.join("pipe.yaml");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.join("s.json"),
            FileType::Socket,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let files = observe(&place.root, &place.dir).unwrap();
        assert_eq!(files.len(), 4);
        assert!(files.iter().all(|file| !file.ours && file.spec.is_err()));
    }

    #[test]
    fn a_link_to_a_spec_is_read() {
        let place = Place::new();
        place.bring(&Place::found(&shapes::eight_gpus(), "pgpu"));
        let dir = place.folder.path().join("var/run/cdi");
        std::os::unix::fs::symlink("nvidia.com-pgpu.yaml", dir.join("x.yaml")).unwrap();
        let files = observe(&place.root, &place.dir).unwrap();
        let named = |name| {
            files
                .iter()
                .find(|file| file.path.as_path().ends_with(name))
        };
        let (real, link) = (
            named("nvidia.com-pgpu.yaml").unwrap(),
            named("x.yaml").unwrap(),
        );
        assert!(real.ours && !link.ours);
        assert_eq!(real.spec.as_ref().unwrap(), link.spec.as_ref().unwrap());
    }

    #[test]
    fn uninstalling_takes_ours_with_what_a_kill_left() {
        let place = Place::new();
        place.bring(&Place::found(&shapes::eight_gpus(), "pgpu"));
        place.put(".nvidia.com-pgpu.yaml.kata-manager.tmp", "half");
        place.put(".nvidia.com-never.yaml.kata-manager.tmp", "half");
        place.put("vendor.com-net.yaml", "");
        assert_eq!(remove_ours(&place.root, &place.dir).unwrap().len(), 2);
        assert_eq!(place.names(), ["vendor.com-net.yaml"]);
    }
}
