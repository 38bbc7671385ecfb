//! Claims: which sandbox uses which generation and which devices, `/run/kata-manager/sandboxes/<id>.json`.
//!
//! A claim is made by the shim before the sandbox starts and is on a tmpfs, so it is gone after a reboot. It is never trusted
//! alone: a shim may have been killed, and a node may have lost power while `/run` was kept by a container. Whoever reads
//! claims asks [`Claims::is_alive`] and drops the dead ones under the lock.
//!
//! It must not know what a generation or a device is: they are data here.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::lock::{Lock, LockError};
use crate::{Error, HostPath, Root, atomic};

/// The folder of the claims, on the host.
pub const CLAIMS_DIR: &str = "/run/kata-manager/sandboxes";

/// The format of a claim; a reader treats a newer one as alive and touches nothing of it.
const FORMAT: u32 = 1;

/// The largest claim that is read, in bytes: a sandbox has tens of devices, not thousands.
const LARGEST: u64 = 256 * 1024;

/// The most that is read of a file in `/proc`, in bytes. A process's stat has some three hundred.
const PROC: u64 = 4096;

/// The lock's name in the folder.
const LOCK: &str = ".lock";

/// The longest sandbox id. containerd's identifiers have at most 76 characters (containerd, pkg/identifiers/validate.go).
const ID_MAX: usize = 76;

/// What a sandbox uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    /// Version of this format: 1.
    pub format: u32,
    /// The sandbox's id in containerd.
    pub sandbox: String,
    /// containerd's namespace, `k8s.io` for pods.
    pub namespace: String,
    /// The runtime handler.
    pub handler: String,
    /// The runtime class whose generation it booted.
    pub class: String,
    /// The number of that generation.
    pub generation: u64,
    /// The functions that it is given, by address; companions included.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// The sandbox's bundle, which containerd removes with it.
    pub bundle: HostPath,
    /// Who made the claim, and became the shim's starter.
    pub process: Starter,
}

/// A PCI function that a sandbox is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Its address, such as `0000:41:00.0`.
    pub address: String,
    /// Class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// Its NUMA node on the host; `None` where the firmware tells none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u16>,
    /// Its IOMMU group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// Its VFIO character device's name (`vfio0`), where it is given away by that and not by its group's node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdev: Option<String>,
}

/// A process that is told from a later one with its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Starter {
    /// Its number on the host.
    pub pid: u32,
    /// When it was started, in clock ticks after boot (proc_pid_stat(5), field 22).
    pub started: u64,
    /// The boot that this was in (`/proc/sys/kernel/random/boot_id`, proc(5)).
    pub boot: String,
}

/// What was found under a claim's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A claim.
    Claim(Claim),
    /// A file that cannot be read as one. Who collects or unbinds must not go on as if it were not there.
    Unreadable {
        /// The file, as this process sees it.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// The claims of a host.
#[derive(Debug)]
pub struct Claims<'a> {
    root: &'a Root,
    dir: PathBuf,
}

impl<'a> Claims<'a> {
    /// The claims below a host's root. Nothing is created or read.
    ///
    /// # Errors
    /// When the folder cannot be resolved inside the root.
    pub fn open(root: &'a Root) -> Result<Claims<'a>, Error> {
        let dir = HostPath::new(CLAIMS_DIR).map_err(|error| {
            Error::io("name", CLAIMS_DIR)(io::Error::new(io::ErrorKind::InvalidInput, error))
        })?;
        Ok(Claims {
            root,
            dir: root.resolve(&dir)?,
        })
    }

    /// This process, as a claim names it.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn starter(&self) -> Result<Starter, Error> {
        let pid = std::process::id();
        let stat = self.proc(&format!("{pid}/stat"));
        let gone = || io::Error::new(io::ErrorKind::InvalidData, "it does not tell a start time");
        let text = read_proc(&stat).map_err(Error::io("read", &stat))?;
        Ok(Starter {
            pid,
            started: start_time(&text).ok_or_else(|| Error::io("read", &stat)(gone()))?,
            boot: self.boot()?,
        })
    }

    /// Makes a claim. It appears whole or not at all, and never takes the place of another.
    ///
    /// # Errors
    /// When the sandbox has a claim already ([`io::ErrorKind::AlreadyExists`]), its id is not usable as a name, or the disk
    /// fails.
    pub fn create(&self, claim: &Claim) -> Result<(), Error> {
        let path = self.path(&claim.sandbox)?;
        atomic::create_dir_all(&self.dir, 0o755)?;
        let bytes = serde_json::to_vec_pretty(claim)
            .map_err(|error| Error::io("encode", &path)(io::Error::from(error)))?;
        let temp = self
            .dir
            .join(format!(".{}.{}", claim.sandbox, std::process::id()));
        let made = write_new(&temp, &bytes)
            .and_then(|()| fs::hard_link(&temp, &path).map_err(Error::io("create", &path)));
        atomic::remove_file(&temp)?;
        made
    }

    /// Keeps everybody else from making or dropping claims until the lock is let go. Whoever looks whether a device is free and then
    /// claims it holds this.
    ///
    /// # Errors
    /// When somebody else holds it for as long as `wait`, or the folder cannot be made.
    pub fn lock(&self, wait: Duration) -> Result<Lock, LockError> {
        atomic::create_dir_all(&self.dir, 0o755)?;
        Lock::acquire(&self.dir.join(LOCK), wait)
    }

    /// Drops claims whose sandboxes live no more, and what a killed maker left; gives those that live. The lock must be held.
    ///
    /// # Errors
    /// When the folder cannot be listed or a file not removed.
    pub fn sweep(&self) -> Result<Vec<Found>, Error> {
        let mut living = Vec::new();
        let (claims, leftovers) = self.names()?;
        for found in claims.iter().filter_map(|name| self.read(name)) {
            match &found {
                Found::Claim(claim) if !self.is_alive(claim) => self.remove(&claim.sandbox)?,
                _ => living.push(found),
            }
        }
        for name in leftovers {
            atomic::remove_file(&self.dir.join(name))?;
        }
        Ok(living)
    }

    /// All claims, alive or not, in the order of their sandboxes' ids.
    ///
    /// # Errors
    /// When the folder cannot be listed; an absent one has none.
    pub fn list(&self) -> Result<Vec<Found>, Error> {
        let (claims, _) = self.names()?;
        Ok(claims.iter().filter_map(|name| self.read(name)).collect())
    }

    /// The names of the claims, in order, and of those that were being written.
    fn names(&self) -> Result<(Vec<String>, Vec<OsString>), Error> {
        let (mut claims, mut leftovers) = (Vec::new(), Vec::new());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // Its buffer grows with the folder. The standard library's begins with 32 KiB, which each start of a sandbox would pay for.
        let entries = match rustix::fs::open(&self.dir, flags, Mode::empty()).and_then(Dir::new) {
            Ok(entries) => entries,
            Err(Errno::NOENT) => return Ok((claims, leftovers)),
            Err(errno) => return Err(Error::io("list", &self.dir)(errno)),
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &self.dir))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name.as_bytes().starts_with(b".") {
                let leftover = ![".", "..", LOCK].iter().any(|known| name == *known);
                leftovers.extend(leftover.then(|| name.to_owned()));
                continue;
            }
            let name = name.to_string_lossy().into_owned();
            claims.extend(name.ends_with(".json").then_some(name));
        }
        claims.sort();
        Ok((claims, leftovers))
    }

    /// What is found under a sandbox's name; `None` where it has no claim.
    ///
    /// # Errors
    /// When its id is not usable as a name.
    pub fn get(&self, sandbox: &str) -> Result<Option<Found>, Error> {
        self.path(sandbox)?;
        Ok(self.read(&format!("{sandbox}.json")))
    }

    /// Whether a claim's sandbox still lives: it was made in this boot, and its bundle is there or its maker runs.
    pub fn is_alive(&self, claim: &Claim) -> bool {
        if claim.format > FORMAT {
            return true;
        }
        if self.boot().is_ok_and(|boot| boot != claim.process.boot) {
            return false;
        }
        let bundle = self.root.resolve(&claim.bundle);
        if bundle.is_ok_and(|bundle| bundle.symlink_metadata().is_ok()) {
            return true;
        }
        read_proc(&self.proc(&format!("{}/stat", claim.process.pid)))
            .is_ok_and(|stat| start_time(&stat) == Some(claim.process.started))
    }

    /// Removes a claim; an absent one is fine. Under the lock, and when [`Claims::is_alive`] says no.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, sandbox: &str) -> Result<(), Error> {
        atomic::remove_file(&self.path(sandbox)?)
    }

    fn read(&self, name: &str) -> Option<Found> {
        let path = self.dir.join(name);
        let unreadable = |problem: String| {
            Some(Found::Unreadable {
                path: path.clone(),
                problem,
            })
        };
        let mut bytes = Vec::new();
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&path);
        match opened.and_then(|file: File| file.take(LARGEST + 1).read_to_end(&mut bytes)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => return unreadable(error.to_string()),
            Ok(_) if bytes.len() as u64 > LARGEST => {
                return unreadable(format!("it has more than {LARGEST} bytes"));
            }
            Ok(_) => {}
        }
        match serde_json::from_slice::<Claim>(&bytes) {
            Ok(claim) if format!("{}.json", claim.sandbox) == name => Some(Found::Claim(claim)),
            Ok(claim) => unreadable(format!("it is of sandbox {:?}", claim.sandbox)),
            Err(error) => unreadable(error.to_string()),
        }
    }

    fn path(&self, sandbox: &str) -> Result<PathBuf, Error> {
        let path = self.dir.join(format!("{sandbox}.json"));
        let usable = !sandbox.is_empty()
            && sandbox.len() <= ID_MAX
            && !sandbox.starts_with('.')
            && sandbox
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
        if usable {
            return Ok(path);
        }
        Err(Error::io("name", path)(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the sandbox's id is none of containerd's",
        )))
    }

    fn boot(&self) -> Result<String, Error> {
        let path = self.proc("sys/kernel/random/boot_id");
        let text = read_proc(&path).map_err(Error::io("read", &path))?;
        Ok(text.trim().to_owned())
    }

    fn proc(&self, name: &str) -> PathBuf {
        self.root.path().join("proc").join(name)
    }
}

/// Reads a file whose size the kernel does not tell, at once: a reader that does not know it begins with some bytes and doubles them.
fn read_proc(path: &Path) -> io::Result<String> {
    let mut text = String::with_capacity(1024);
    File::open(path)?.take(PROC).read_to_string(&mut text)?;
    Ok(text)
}

/// Field 22 of a process's stat; the name before it may hold anything, so it is skipped from its last parenthesis.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after) = stat.rsplit_once(')')?;
    after.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::io::Write as _;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)
        .map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> (tempfile::TempDir, Claims<'static>) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("proc/sys/kernel/random/boot_id", "this-boot\n"),
            (
                "proc/41/stat",
                "41 (a) b)) S 1 41 41 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 9 9\n",
            ),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = Box::leak(Box::new(Root::new(dir.path()).unwrap()));
        (dir, Claims::open(root).unwrap())
    }

    fn claim(sandbox: &str) -> Claim {
        Claim {
            format: 1,
            sandbox: sandbox.to_owned(),
            namespace: "k8s.io".to_owned(),
            handler: "kata-qemu-nvidia-gpu".to_owned(),
            class: "kata-qemu-nvidia-gpu".to_owned(),
            generation: 3,
            devices: vec![Device {
                address: "0000:41:00.0".to_owned(),
                class: 0x03_0200,
                numa_node: Some(1),
                iommu_group: Some(40),
                cdev: None,
            }],
            bundle: HostPath::new("/run/containerd/bundle").unwrap(),
            process: Starter {
                pid: 41,
                started: 777,
                boot: "this-boot".to_owned(),
            },
        }
    }

    #[test]
    fn a_claim_is_exclusive_and_leaves_no_other_file() {
        let (dir, claims) = host();
        assert_eq!(claims.list().unwrap(), []);
        claims.create(&claim("a")).unwrap();
        let mut other = claim("a");
        other.generation = 4;
        let error = claims.create(&other).unwrap_err();
        assert!(error.to_string().contains("a.json"), "{error}");
        assert_eq!(claims.list().unwrap(), [Found::Claim(claim("a"))]);
        assert_eq!(claims.get("a").unwrap(), Some(Found::Claim(claim("a"))));
        assert_eq!(claims.get("b").unwrap(), None);
        let folder = dir.path().join("run/kata-manager/sandboxes");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        claims.remove("a").unwrap();
        claims.remove("a").unwrap();
        assert_eq!(claims.list().unwrap(), []);
    }

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        let (_dir, claims) = host();
        for id in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".hidden",
            "a\0",
            &"x".repeat(77),
        ] {
            assert!(claims.create(&claim(id)).is_err(), "{id:?}");
            assert!(claims.remove(id).is_err(), "{id:?}");
            assert!(claims.get(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn a_claim_lives_with_its_bundle_or_its_maker_in_this_boot() {
        let (dir, claims) = host();
        assert!(claims.is_alive(&claim("a")), "the maker runs");
        let mut gone = claim("a");
        gone.process.started = 778;
        assert!(!claims.is_alive(&gone), "another process with its number");
        fs::create_dir_all(dir.path().join("run/containerd/bundle")).unwrap();
        assert!(claims.is_alive(&gone), "the bundle is there");
        gone.process.boot = "an earlier boot".to_owned();
        assert!(!claims.is_alive(&gone));
        gone.format = 2;
        assert!(
            claims.is_alive(&gone),
            "a newer format is not ours to judge"
        );
    }

    #[test]
    fn what_is_no_claim_is_told_and_never_followed() {
        let (dir, claims) = host();
        claims.create(&claim("good")).unwrap();
        let folder = dir.path().join("run/kata-manager/sandboxes");
        fs::write(folder.join("bad.json"), "{").unwrap();
        fs::write(folder.join("big.json"), vec![b' '; 300 * 1024]).unwrap();
        fs::copy(folder.join("good.json"), folder.join("other.json")).unwrap();
        std::os::unix::fs::symlink("good.json", folder.join("link.json")).unwrap();
        fs::write(folder.join(".half.1"), "{").unwrap();
        let found = claims.list().unwrap();
        let unreadable: Vec<_> = found
            .iter()
            .filter_map(|found| match found {
                Found::Unreadable { path, .. } => path.file_name()?.to_str(),
                Found::Claim(_) => None,
            })
            .collect();
        assert_eq!(
            unreadable,
            ["bad.json", "big.json", "link.json", "other.json"]
        );
        assert_eq!(found.len(), 5);
    }

    #[test]
    fn sweeping_drops_the_dead_and_leaves_the_rest() {
        let (dir, claims) = host();
        let lock = claims.lock(Duration::ZERO).unwrap();
        assert!(claims.lock(Duration::ZERO).is_err());
        let mut dead = claim("dead");
        dead.process.boot = "an earlier boot".to_owned();
        claims.create(&dead).unwrap();
        claims.create(&claim("alive")).unwrap();
        let folder = dir.path().join("run/kata-manager/sandboxes");
        fs::write(folder.join("odd.json"), "{").unwrap();
        fs::write(folder.join(".dead.77"), "{").unwrap();
        let living = claims.sweep().unwrap();
        assert_eq!(living[0], Found::Claim(claim("alive")));
        assert!(matches!(living[1..], [Found::Unreadable { .. }]));
        let mut names: Vec<_> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [".lock", "alive.json", "odd.json"]);
        drop(lock);
        drop(claims.lock(Duration::ZERO).unwrap());
    }

    #[test]
    fn this_process_can_claim() {
        let root = Root::new("/").unwrap();
        let claims = Claims::open(&root).unwrap();
        let mut mine = claim("a");
        mine.process = claims.starter().unwrap();
        mine.bundle = HostPath::new("/nonexistent").unwrap();
        assert!(claims.is_alive(&mine));
    }
}
