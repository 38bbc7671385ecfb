//! The kubelet's folder for plugins' sockets: what is in it, and what changes in it. It decides nothing.
//!
//! Paths go through the folder's descriptor (`/proc/self/fd/<n>/<name>`), so that they stay inside the host's root and are short
//! enough for a socket, wherever that root is (unix(7): 108 bytes).

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use km_host::{HostPath, Root};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The most names of the folder that are looked at. A node has a handful of plugins.
const ENTRIES: usize = 1000;

/// What tells one file from another under the same name: device and inode.
pub(crate) type Identity = (u64, u64);

/// The folder, watched.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    watch: AsyncFd<OwnedFd>,
    /// The number of the watch on the folder above.
    above: i32,
    /// Where it is, as the host sees it.
    pub(crate) path: HostPath,
}

/// What has changed in the folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// Names that are new, or new files under old names.
    pub(crate) came: BTreeSet<String>,
    /// Names that are gone, or were for a while.
    pub(crate) went: BTreeSet<String>,
    /// Whether events were lost, so that anything may have happened.
    pub(crate) lost: bool,
    /// Whether the folder itself is gone.
    pub(crate) itself: bool,
}

impl Folder {
    /// Opens and watches it.
    pub(crate) fn open(root: &Root, path: &HostPath) -> io::Result<Folder> {
        let fd = root.open(path.as_path(), OFlags::PATH | OFlags::DIRECTORY)?;
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let events =
            WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE | WatchFlags::MOVED_FROM;
        inotify::add_watch(&watch, by_descriptor(&fd), events | WatchFlags::ONLYDIR)?;
        // The descriptor keeps the folder from telling that it is gone; the folder above tells.
        let above = path.parent().unwrap_or_else(|| path.clone());
        let above = root.open(above.as_path(), OFlags::PATH | OFlags::DIRECTORY)?;
        let above =
            inotify::add_watch(&watch, by_descriptor(&above), events | WatchFlags::ONLYDIR)?;
        #[expect(
            deprecated,
            reason = "what took its place is unsafe, and asks for what an OwnedFd gives: it owns its descriptor and keeps it open"
        )]
        let watch = AsyncFd::with_interest(watch, Interest::READABLE)?;
        Ok(Folder {
            watch,
            above,
            fd,
            path: path.clone(),
        })
    }

    /// The path by which this process reaches a name in it.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        by_descriptor(&self.fd).join(name)
    }

    /// Its path of a name, as the host sees it.
    pub(crate) fn shown(&self, name: &str) -> String {
        self.path.join(name).to_string()
    }

    /// Waits for a change. Safe to be dropped and called again.
    pub(crate) async fn changed(&self) -> io::Result<Changed> {
        loop {
            let mut ready = self.watch.readable().await?;
            let changed = self.drain()?;
            ready.clear_ready();
            if changed != Changed::default() {
                return Ok(changed);
            }
        }
    }

    fn drain(&self) -> io::Result<Changed> {
        let mut changed = Changed::default();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.watch.get_ref(), &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(changed),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let flags = event.events();
            changed.lost |= flags.contains(ReadFlags::QUEUE_OVERFLOW);
            let Some(name) = event.file_name().and_then(|name| name.to_str().ok()) else {
                continue;
            };
            if event.wd() == self.above {
                changed.itself |= self.path.as_path().file_name() == Some(name.as_ref());
            } else if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                changed.came.insert(name.to_owned());
            } else if flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
                changed.went.insert(name.to_owned());
            }
        }
    }

    /// Which file has a name; `None` when there is none.
    pub(crate) fn identity(&self, name: &str) -> Option<Identity> {
        let stat = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }

    /// Removes a name; one that is not there is no error.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The names of the sockets in it, by their ending.
    pub(crate) fn sockets(&self) -> Vec<String> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(dir) =
            rustix::fs::openat(&self.fd, ".", flags, Mode::empty()).and_then(rustix::fs::Dir::new)
        else {
            return Vec::new();
        };
        let names = dir.take(ENTRIES).map_while(Result::ok);
        names
            .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned))
            .filter(|name| name.ends_with(".sock"))
            .collect()
    }
}

fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_comes_and_goes_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        let path = HostPath::new("/plugins").unwrap();
        assert!(Folder::open(&root, &path).is_err());
        let real = dir.path().join("plugins");
        std::fs::create_dir(&real).unwrap();
        let folder = Folder::open(&root, &path).unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(20), folder.changed()).await;
        assert!(quiet.is_err());
        let socket = tokio::net::UnixListener::bind(folder.at("a.sock")).unwrap();
        assert!(real.join("a.sock").exists());
        assert!(folder.changed().await.unwrap().came.contains("a.sock"));
        assert_eq!(folder.sockets(), ["a.sock"]);
        let identity = folder.identity("a.sock");
        assert!(identity.is_some() && folder.identity("b.sock").is_none());
        drop(socket);
        folder.remove("a.sock").unwrap();
        folder.remove("a.sock").unwrap();
        assert!(folder.changed().await.unwrap().went.contains("a.sock"));
        std::fs::remove_dir(&real).unwrap();
        let gone = tokio::time::timeout(Duration::from_secs(10), folder.changed()).await;
        assert!(gone.unwrap().unwrap().itself);
    }
}
