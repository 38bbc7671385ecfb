//! Watches the devices, on a thread of its own: a read of a device's configuration space waits in the kernel while the device is reset,
//! and the kubelet's questions must not wait with it.
//!
//! The thread sleeps until the kernel tells of a device, a VFIO node comes or goes, or the time for a probe has come: nothing else wakes
//! it, and nothing else in this crate has a timer while the kubelet is content. A probe is a few small reads for each known device, as not everything is told: no event says that a device has fallen off the bus. Only when a
//! probe sees that functions, drivers or nodes are others than before, or after a long time, the whole bus is read anew. When it was,
//! the CDI specs are brought up to date before anything is published.

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use km_cdi::devices::{self, Backend, Found, Naming};
use km_cdi::files::{self, Step};
use km_cdi::names::Class;
use km_host::lock::{Lock, LockError};
use km_host::{HostPath, Root};
use km_vfio::{Address, Inventory};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::OFlags;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::sync::watch;

use crate::error::Error;
use crate::probe::{self, Fingerprint};
use crate::snapshot::Snapshot;
use crate::tracker::{Look, Tracker};
use crate::uevent::{Heard, Uevents};

/// Events come in bursts: after the first, the others are awaited for this long before anything is read.
const BURST: Duration = Duration::from_millis(20);

/// What the observer is told.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) root: Arc<Root>,
    pub(crate) naming: Naming,
    pub(crate) backend: Option<Backend>,
    pub(crate) cdi: HostPath,
    pub(crate) lock: HostPath,
    pub(crate) probe: Duration,
    pub(crate) sweep: Duration,
}

/// The thread. [`Observer::stop`] ends it.
#[derive(Debug)]
pub(crate) struct Observer {
    thread: JoinHandle<()>,
    stop: Arc<OwnedFd>,
}

struct Eyes {
    watched: Watched,
    tracker: Tracker,
    fingerprint: Fingerprint,
    swept: Instant,
    found: Found,
    /// Whether the CDI specs list what was found last.
    cdi: bool,
    uevents: Option<Uevents>,
    nodes: Option<OwnedFd>,
}

impl Observer {
    /// Looks for the first time, writes the CDI specs, and starts to watch. `wait` is for another kata-manager to finish; `check` is
    /// asked before anything is written whether these classes may be served.
    pub(crate) fn start(
        watched: Watched,
        wait: Duration,
        check: impl FnOnce(&BTreeSet<Class>) -> Result<(), Error>,
    ) -> Result<(Observer, watch::Receiver<Arc<Snapshot>>), Error> {
        let mut eyes = Eyes::open(watched);
        eyes.inventory()?;
        let devices = eyes.found.devices.iter();
        check(&devices.map(|device| device.class.clone()).collect())?;
        eyes.write_cdi(wait)?;
        let snapshot = eyes.look(&[]);
        say(&Snapshot::default(), &snapshot);
        let (publish, snapshots) = watch::channel(Arc::new(snapshot));
        let system = |errno: Errno| Error::system("make a descriptor for events")(errno.into());
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(system)?;
        let stop = Arc::new(stop);
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("observer".to_owned())
            .spawn(move || eyes.watch(&told, &publish))
            .map_err(Error::system("start a thread"))?;
        Ok((Observer { thread, stop }, snapshots))
    }

    /// Ends the thread, and waits for it unless it waits in the kernel itself.
    pub(crate) fn stop(self) {
        // It is read by the thread alone, which ends then; a full counter would have ended it already.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        let patience = Instant::now() + Duration::from_secs(1);
        while !self.thread.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.thread.is_finished() && self.thread.join().is_err() {
            tracing::error!("the observer of the devices has failed");
        }
    }
}

impl Eyes {
    fn open(watched: Watched) -> Eyes {
        let uevents = match Uevents::open() {
            Ok(uevents) => Some(uevents),
            Err(error) => {
                tracing::warn!(
                    "cannot listen to the kernel's events about devices ({error}): changes are seen by probes alone"
                );
                None
            }
        };
        let nodes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok();
        Eyes {
            watched,
            tracker: Tracker::default(),
            fingerprint: Fingerprint::default(),
            swept: Instant::now(),
            found: Found::default(),
            cdi: false,
            uevents,
            nodes,
        }
    }

    /// Reads the whole bus. What a fingerprint has besides drivers is taken before: what changes meanwhile is seen by the next probe.
    fn inventory(&mut self) -> Result<(), Error> {
        let root = &self.watched.root;
        let told = self.watched.backend;
        let backend = told.unwrap_or_else(|| Backend::observe(root));
        let before = Fingerprint::take(root, &[]);
        let inventory = Inventory::observe(root)?;
        let found = devices::find(&inventory, &self.watched.naming, backend);
        self.tracker.learn(&inventory, &found);
        self.say_left_out(&found);
        self.cdi &= self.found == found;
        self.found = found;
        let functions = inventory.functions.into_iter();
        let drivers = functions.map(|one| (one.address, one.driver)).collect();
        self.fingerprint = Fingerprint { drivers, ..before };
        self.swept = Instant::now();
        self.watch_nodes();
        Ok(())
    }

    /// Says of each GPU and NVSwitch that the kubelet is not told of why it is not, when that is new.
    fn say_left_out(&self, found: &Found) {
        let news = found.left_out.iter().filter(|left| {
            !self.tracker.knows(left.address) && !self.found.left_out.contains(left)
        });
        for left in news {
            tracing::warn!(
                "{} {} is not offered: {}",
                left.address,
                left.model,
                left.reason
            );
        }
    }

    /// Watches the folders of VFIO's nodes; they may come later. To add one again changes nothing.
    fn watch_nodes(&self) {
        let Some(nodes) = &self.nodes else { return };
        for folder in ["/dev/vfio", "/dev/vfio/devices"] {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            if let Ok(fd) = self.watched.root.open(folder.as_ref(), flags) {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let events = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
                // Probes look at the nodes too.
                let _ = inotify::add_watch(nodes, path, events);
            }
        }
    }

    /// Brings the CDI specs up to date.
    fn write_cdi(&mut self, wait: Duration) -> Result<(), Error> {
        let root = &self.watched.root;
        let plan = || -> Result<Vec<Step>, Error> {
            let there = files::observe(root, &self.watched.cdi)?;
            files::plan(&self.watched.cdi, &there, &self.found).map_err(Error::Cdi)
        };
        if !plan()?.is_empty() {
            let path = root.resolve(&self.watched.lock)?;
            if let Some(folder) = path.parent() {
                km_host::atomic::create_dir_all(folder, 0o755)?;
            }
            let _lock = Lock::acquire(&path, wait)?;
            let steps = plan()?;
            files::apply(root, &steps)?;
            for step in &steps {
                match step {
                    Step::Write { path, devices, .. } => {
                        tracing::info!("wrote {path}: {devices} devices");
                    }
                    Step::Remove { path } => tracing::info!("removed {path}: it has no devices"),
                }
            }
        }
        self.cdi = true;
        Ok(())
    }

    /// Looks at the known devices and judges them.
    fn look(&mut self, recovered: &[Address]) -> Snapshot {
        let root = &self.watched.root;
        let functions = self.tracker.functions().into_iter();
        let nodes = self.tracker.nodes().into_iter();
        let look = Look {
            functions: functions
                .map(|address| (address, probe::function(root, address)))
                .collect(),
            missing: nodes
                .filter(|node| !probe::exists(root, node))
                .map(str::to_owned)
                .collect(),
        };
        let mut snapshot = self.tracker.judge(&look, recovered);
        if self.cdi {
            let classes = self.found.devices.iter();
            snapshot.cdi = classes.map(|device| device.class.clone()).collect();
        }
        snapshot
    }

    fn watch(mut self, stop: &OwnedFd, publish: &watch::Sender<Arc<Snapshot>>) {
        loop {
            let heard = match self.wait(stop) {
                Ok(Some(heard)) => heard,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!("cannot wait for events about devices: {error}");
                    return;
                }
            };
            let now = self.fingerprint.again(&self.watched.root);
            let due = self.swept.elapsed() >= self.watched.sweep;
            if now != self.fingerprint || due {
                match self.inventory() {
                    // Somebody may have removed a spec since.
                    Ok(()) => self.cdi &= !due,
                    Err(error) => {
                        tracing::warn!("cannot look at the PCI bus: {}", chain(&error));
                    }
                }
            }
            if !self.cdi {
                match self.write_cdi(Duration::ZERO) {
                    Ok(()) => {}
                    // It is tried again with the next probe.
                    Err(Error::Lock(LockError::Held { .. })) => {}
                    Err(error) => self.cdi_failed(&error, due, publish),
                }
            }
            let snapshot = self.look(&heard.recovered);
            publish.send_if_modified(|last| {
                let changed = **last != snapshot;
                if changed {
                    say(last, &snapshot);
                    *last = Arc::new(snapshot);
                }
                changed
            });
        }
    }

    /// Says so once, and then with each sweep.
    fn cdi_failed(&self, error: &Error, due: bool, publish: &watch::Sender<Arc<Snapshot>>) {
        if due || !publish.borrow().cdi.is_empty() {
            tracing::error!(
                "{}; devices are given out without CDI names until this is settled",
                chain(error)
            );
        }
    }

    /// Waits for an event or the next probe; `None` when it is time to end.
    fn wait(&self, stop: &OwnedFd) -> io::Result<Option<Heard>> {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        let events = [
            self.uevents.as_ref().map(AsFd::as_fd),
            self.nodes.as_ref().map(AsFd::as_fd),
        ];
        fds.extend(
            events
                .iter()
                .flatten()
                .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)),
        );
        let until = Instant::now() + self.watched.probe;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut fds, Some(&timeout)) {
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
                Ok(0) => return Ok(Some(Heard::default())),
                Ok(_) => {}
            }
            if fds[0].revents().contains(PollFlags::IN) {
                return Ok(None);
            }
            let heard = self.hear()?;
            if heard.look {
                std::thread::sleep(BURST);
                let mut more = self.hear()?;
                more.recovered.extend(heard.recovered);
                return Ok(Some(more));
            }
        }
    }

    fn hear(&self) -> io::Result<Heard> {
        let mut heard = match &self.uevents {
            Some(uevents) => uevents.drain()?,
            None => Heard::default(),
        };
        if let Some(nodes) = &self.nodes {
            let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
            let mut reader = inotify::Reader::new(nodes, &mut buffer);
            while reader.next().is_ok() {
                heard.look = true;
            }
        }
        Ok(heard)
    }
}

/// Says what is new about each device.
fn say(last: &Snapshot, now: &Snapshot) {
    for (class, devices) in &now.classes {
        for device in devices {
            let before = last.device(class, device.id);
            let id = device.id;
            match (before, device.causes.first()) {
                (Some(before), _) if before.causes == device.causes => {}
                (None, None) => tracing::info!("{class}: {id} is new"),
                (Some(_), None) => tracing::info!("{class}: {id} is healthy again"),
                (_, Some(cause)) => tracing::warn!("{class}: {id} is unhealthy: {cause}"),
            }
        }
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_said = cause.to_string();
        if !said.contains(&cause_said) {
            said.push_str(": ");
            said.push_str(&cause_said);
        }
        next = cause.source();
    }
    said
}
