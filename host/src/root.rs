//! The host's root directory, and paths below it.

use std::fmt;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::Error;

/// An absolute, normalised path as the host sees it: no `.`, no `..`, no double slashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPath(PathBuf);

/// Why a text is no [`HostPath`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    /// The path does not begin with `/`.
    #[error("{0:?} is not an absolute path: begin it with /")]
    NotAbsolute(String),
    /// The path has a `..`, whose meaning depends on links.
    #[error("{0:?} has a \"..\" in it: write the path out")]
    Parent(String),
    /// The path is not UTF-8 or has a control character, so it cannot be written into configuration files.
    #[error("{0:?} has a character that configuration files cannot carry")]
    Unprintable(String),
}

impl HostPath {
    /// Checks and normalises a path.
    ///
    /// # Errors
    /// [`PathError`] if it is relative, has a `..`, is not UTF-8 or has control characters.
    pub fn new(path: impl AsRef<Path>) -> Result<HostPath, PathError> {
        let path = path.as_ref();
        let shown = path.display().to_string();
        if path
            .to_str()
            .is_none_or(|text| text.chars().any(char::is_control))
        {
            return Err(PathError::Unprintable(shown));
        }
        if !path.is_absolute() {
            return Err(PathError::NotAbsolute(shown));
        }
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(PathError::Parent(shown));
        }
        Ok(HostPath(path.components().collect()))
    }

    /// The path itself, to be written into the host's files.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The path as text; a `HostPath` is always UTF-8.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// A path below this one. Leading `/` and `..` in `relative` are dropped rather than obeyed.
    pub fn join(&self, relative: impl AsRef<Path>) -> HostPath {
        let mut path = self.0.clone();
        path.extend(
            relative
                .as_ref()
                .components()
                .filter_map(|part| match part {
                    Component::Normal(name) => Some(name),
                    _ => None,
                }),
        );
        HostPath(path)
    }

    /// The folder that this path is in; `None` for `/`.
    pub fn parent(&self) -> Option<HostPath> {
        self.0.parent().map(|parent| HostPath(parent.to_owned()))
    }
}

impl fmt::Display for HostPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for HostPath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<HostPath, PathError> {
        HostPath::new(text)
    }
}

impl TryFrom<String> for HostPath {
    type Error = PathError;

    fn try_from(text: String) -> Result<HostPath, PathError> {
        HostPath::new(text)
    }
}

impl From<HostPath> for String {
    fn from(path: HostPath) -> String {
        path.as_str().to_owned()
    }
}

/// How often a path is walked anew when a rename somewhere made the kernel unsure of a `..` in it (openat2(2), `EAGAIN`).
const RACES: usize = 100;

/// The host's root directory.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    fd: OwnedFd,
}

impl Root {
    /// Opens a root: `/`, or the folder where the host's root is mounted.
    ///
    /// # Errors
    /// When the folder cannot be opened.
    pub fn new(path: impl AsRef<Path>) -> Result<Root, Error> {
        let path = path.as_ref();
        let path = path
            .canonicalize()
            .map_err(Error::io("open host root", path))?;
        let fd = rustix::fs::open(
            &path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(Error::io("open host root", &path))?;
        Ok(Root { path, fd })
    }

    /// Whether the host's root is this process's own.
    pub fn is_slash(&self) -> bool {
        self.path == Path::new("/")
    }

    /// The folder where the host's root is, as this process sees it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where this process finds a path of the host. Symlinks are followed as the host would follow them, never out of the
    /// root (openat2(2), `RESOLVE_IN_ROOT`). A tail that does not exist yet is kept as it is.
    ///
    /// # Errors
    /// When the path cannot be walked for another reason than absence.
    pub fn resolve(&self, path: &HostPath) -> Result<PathBuf, Error> {
        let mut head = path.as_path();
        let mut missing = Vec::new();
        loop {
            if let Some(mut found) = self.find(head)? {
                found.extend(missing.iter().rev());
                return Ok(found);
            }
            let (Some(parent), Some(name)) = (head.parent(), head.file_name()) else {
                return Err(Error::io("resolve", path.as_path())(Errno::NOENT));
            };
            missing.push(name.to_owned());
            head = parent;
        }
    }

    /// Where something is, by its absolute path; `None` when it does not exist.
    fn find(&self, path: &Path) -> Result<Option<PathBuf>, Error> {
        // Without a link on the way it is where its name says, and the kernel need not be asked, which takes longer than all the rest.
        let opened = match self.open_beneath(path, OFlags::PATH, ResolveFlags::NO_SYMLINKS) {
            Ok(_) => return Ok(Some(self.path.iter().chain(path.iter().skip(1)).collect())),
            Err(Errno::LOOP) => self.open_beneath(path, OFlags::PATH, ResolveFlags::empty()),
            failed => failed,
        };
        match opened {
            Ok(fd) => {
                let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
                let found = std::fs::read_link(link).map_err(Error::io("resolve", path))?;
                Ok(Some(found))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::io("resolve", path)(errno)),
        }
    }

    /// Opens a path of the host, without waiting for the other end of a pipe. Symlinks are followed as the host would follow
    /// them, never out of the root; `flags` come on top of `O_CLOEXEC`, and `O_NONBLOCK` and `O_NOCTTY` where they mean something.
    ///
    /// # Errors
    /// The system's answer.
    pub fn open(&self, path: &Path, flags: OFlags) -> std::io::Result<OwnedFd> {
        let extra = if flags.contains(OFlags::PATH) {
            OFlags::empty()
        } else {
            OFlags::NONBLOCK | OFlags::NOCTTY
        };
        Ok(self.open_beneath(path, flags | extra, ResolveFlags::empty())?)
    }

    /// Reads a regular file of the host, of at most `limit` bytes; anything else is not waited for. Symlinks are followed as in [`open`](Root::open).
    ///
    /// # Errors
    /// The system's answer; [`InvalidInput`](std::io::ErrorKind::InvalidInput) for what is no regular file, and
    /// [`FileTooLarge`](std::io::ErrorKind::FileTooLarge) for what has more bytes.
    pub fn read(&self, path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
        let bytes = read_regular(self.open(path, OFlags::RDONLY)?, limit.saturating_add(1))?;
        if bytes.len() as u64 > limit {
            let what = format!("it has more than {limit} bytes");
            return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, what));
        }
        Ok(bytes)
    }

    /// The host's name for a path of ours; `None` if the path is not below the root.
    pub fn host_path(&self, ours: &Path) -> Option<HostPath> {
        let relative = ours.strip_prefix(&self.path).ok()?;
        HostPath::new(Path::new("/").join(relative)).ok()
    }

    /// `how` comes on top of `RESOLVE_IN_ROOT`.
    fn open_beneath(
        &self,
        path: &Path,
        flags: OFlags,
        how: ResolveFlags,
    ) -> Result<OwnedFd, Errno> {
        for _ in 0..RACES {
            let result = rustix::fs::openat2(
                &self.fd,
                relative(path),
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | how,
            );
            if !matches!(result, Err(Errno::AGAIN)) {
                return result;
            }
        }
        Err(Errno::AGAIN)
    }
}

/// Reads the first bytes of a regular file, `most` of them.
///
/// # Errors
/// The system's answer; [`InvalidInput`](std::io::ErrorKind::InvalidInput) for what is no regular file.
pub fn read_regular(file: OwnedFd, most: u64) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::from(file);
    let meta = file.metadata()?;
    if !meta.is_file() {
        let what = "it is no regular file";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
    }
    // One more than its size lets the end be seen without a larger buffer.
    let size = usize::try_from(meta.len().min(most)).unwrap_or(0);
    let mut bytes = Vec::with_capacity(size.saturating_add(1));
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A path of the host, as openat2(2) takes it below the root.
fn relative(path: &Path) -> &Path {
    let relative = path.strip_prefix("/").unwrap_or(path);
    if relative.as_os_str().is_empty() {
        return Path::new(".");
    }
    relative
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_are_normalised_or_refused() {
        assert_eq!(HostPath::new("//a/./b//c/").unwrap().as_str(), "/a/b/c");
        assert!(matches!(
            HostPath::new("a/b"),
            Err(PathError::NotAbsolute(_))
        ));
        assert!(matches!(
            HostPath::new("/a/../b"),
            Err(PathError::Parent(_))
        ));
        assert!(matches!(
            HostPath::new("/a\nb"),
            Err(PathError::Unprintable(_))
        ));
        assert_eq!(
            HostPath::new("/a").unwrap().join("/../x/y").as_str(),
            "/a/x/y"
        );
    }

    #[test]
    fn a_file_is_read_whole_or_refused() {
        use std::io::ErrorKind;
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        let read = |path: &str, limit| root.read(Path::new(path), limit).map_err(|e| e.kind());
        std::fs::write(dir.path().join("five"), "12345").unwrap();
        assert_eq!(read("/five", 5).unwrap(), b"12345");
        assert_eq!(read("/five", 4), Err(ErrorKind::FileTooLarge));
        assert_eq!(read("/none", 5), Err(ErrorKind::NotFound));
        assert_eq!(read("/", 5), Err(ErrorKind::InvalidInput));
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("pipe"), Mode::RWXU).unwrap();
        assert_eq!(read("/pipe", 5), Err(ErrorKind::InvalidInput));
        symlink("/five", dir.path().join("link")).unwrap();
        assert_eq!(read("/link", u64::MAX).unwrap(), b"12345");
    }

    #[test]
    fn links_are_followed_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("data/etc")).unwrap();
        symlink("/data/etc", dir.path().join("etc")).unwrap();
        symlink("../../../../outside", dir.path().join("data/escape")).unwrap();
        let root = Root::new(dir.path()).unwrap();
        let base = dir.path().canonicalize().unwrap();

        let config = root
            .resolve(&HostPath::new("/etc/containerd/config.toml").unwrap())
            .unwrap();
        assert_eq!(config, base.join("data/etc/containerd/config.toml"));
        assert_eq!(
            root.host_path(&config).unwrap().as_str(),
            "/data/etc/containerd/config.toml"
        );

        for (path, found) in [
            ("/etc", "data/etc"),
            ("/data/etc/none", "data/etc/none"),
            ("/data", "data"),
            ("/", ""),
        ] {
            let resolved = root.resolve(&HostPath::new(path).unwrap()).unwrap();
            assert_eq!(
                resolved.as_os_str(),
                base.join(found).components().as_path()
            );
        }
        symlink("none", dir.path().join("data/dangling")).unwrap();
        let dangling = HostPath::new("/data/dangling").unwrap();
        assert_eq!(root.resolve(&dangling).unwrap(), base.join("data/dangling"));
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(root.resolve(&HostPath::new("/loop/x").unwrap()).is_err());

        let escape = root
            .resolve(&HostPath::new("/data/escape/file").unwrap())
            .unwrap();
        assert!(escape.starts_with(&base), "{escape:?}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_path_or_an_error(text in "\\PC*") {
            if let Ok(path) = HostPath::new(&text) {
                prop_assert!(path.as_path().is_absolute());
                prop_assert_eq!(HostPath::new(path.as_path()).unwrap(), path);
            }
        }
    }
}
