//! Serves all resources and keeps the kubelet told: the loop that holds observer, sockets and registrations together.
//!
//! A kubelet that starts removes every socket in its folder, makes its own anew, and waits for plugins to register. So a new
//! `kubelet.sock` means: sockets back into their places, and register. A stream of lists that ends without that is a kubelet that has
//! dropped us: register again after a while.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use km_cdi::devices::{Backend, Naming};
use km_cdi::names::Class;
use km_host::{HostPath, Root};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::transport::Endpoint;

use crate::api;
use crate::api::registration_client::RegistrationClient;
use crate::conflict::{self, socket_name};
use crate::error::Error;
use crate::folder::{Changed, Folder};
use crate::observer::{Observer, Watched, chain};
use crate::server::Served;
use crate::service::{self, Listening, Service};
use crate::snapshot::Snapshot;

/// How long the kubelet may take to answer a registration.
const DEADLINE: Duration = Duration::from_secs(5);

/// Between looks for a folder that is not there yet.
const FOLDER: Duration = Duration::from_secs(1);

/// The first pause after a registration that failed, and the longest: each is twice the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How long a kubelet may take from a registration, or from the end of a stream, to the next stream.
const PATIENCE: Duration = Duration::from_secs(10);
const DROPPED: Duration = Duration::from_secs(1);

/// How long connections have to end when the plugin does.
const END: Duration = Duration::from_secs(1);

/// What the plugin needs to know.
#[derive(Debug)]
pub struct Settings {
    /// The host.
    pub root: Root,
    /// How classes are named.
    pub naming: Naming,
    /// Which nodes give a device to a virtual machine; `None`: what the host offers.
    pub backend: Option<Backend>,
    /// The kubelet's folder, `/var/lib/kubelet`.
    pub kubelet: HostPath,
    /// The folder of CDI specs.
    pub cdi: HostPath,
    /// The lock that CDI specs are written under.
    pub lock: HostPath,
    /// How long to wait for that lock at the start.
    pub lock_timeout: Duration,
    /// Between two probes of known devices.
    pub probe: Duration,
    /// Between two readings of the whole bus when nothing is seen to change.
    pub sweep: Duration,
}

/// Serves until `stop` is ready; then removes the sockets.
///
/// # Errors
/// [`Error`], when it cannot start, or the operating system ends it. A kubelet that is not there or refuses is no error: it is tried
/// again.
pub async fn serve(settings: Settings, stop: impl Future<Output = ()>) -> Result<(), Error> {
    let root = Arc::new(settings.root);
    let path = settings.kubelet.join(api::FOLDER);
    let watched = Watched {
        root: Arc::clone(&root),
        naming: settings.naming,
        backend: settings.backend,
        cdi: settings.cdi,
        lock: settings.lock,
        probe: settings.probe,
        sweep: settings.sweep,
    };
    let free = |classes: &BTreeSet<Class>| {
        // A folder that is not there has nobody in it.
        let Ok(folder) = Folder::open(&root, &path) else {
            return Ok(());
        };
        let mut classes = classes.iter();
        classes.try_for_each(|class| is_free(&root, &folder, class))
    };
    let (observer, snapshots) = Observer::start(watched, settings.lock_timeout, free)?;
    let (listeners, heard) = mpsc::unbounded_channel();
    let mut plugin = Plugin {
        root,
        path,
        folder: None,
        snapshots,
        resources: BTreeMap::new(),
        listeners,
        heard,
    };
    let ended = tokio::select! {
        ended = plugin.run() => ended,
        () = stop => Ok(()),
    };
    plugin.stop().await;
    observer.stop();
    ended
}

/// A resource that is served.
#[derive(Debug, Default)]
struct Resource {
    served: Option<Served>,
    /// How many streams of lists there are: the kubelet has one.
    streams: usize,
    /// When to register; `None` while that is done.
    due: Option<Instant>,
    /// Whether to register although there is a stream.
    forced: bool,
    pause: Duration,
    /// When to look for another plugin that serves it, and the pause after that.
    look: Option<(Instant, Duration)>,
    /// The sockets of those that have been named.
    named: BTreeSet<String>,
}

impl Resource {
    /// Registers after a while, whatever streams there are.
    fn due_after(&mut self, after: Duration) {
        self.due = Some(Instant::now() + after);
        self.forced = true;
        self.pause = FIRST_PAUSE;
    }

    /// Looks for another plugin now; for a while where a socket is silent, as it is there before its plugin listens on it.
    fn look_for_others(&mut self) {
        self.look = Some((Instant::now(), FIRST_PAUSE));
    }
}

#[derive(Debug)]
struct Plugin {
    root: Arc<Root>,
    path: HostPath,
    folder: Option<Folder>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    resources: BTreeMap<Class, Resource>,
    listeners: mpsc::UnboundedSender<(Class, Listening)>,
    heard: mpsc::UnboundedReceiver<(Class, Listening)>,
}

enum Event {
    Devices,
    Folder(Changed),
    Stream(Class, Listening),
    Due,
}

impl Plugin {
    async fn run(&mut self) -> Result<(), Error> {
        loop {
            self.open_folder().await;
            self.new_resources();
            self.name_others();
            self.register_due().await?;
            match self.next().await? {
                Event::Devices => {}
                Event::Folder(changed) => self.folder_changed(&changed),
                Event::Stream(class, what) => self.stream_changed(&class, what),
                Event::Due => {}
            }
        }
    }

    /// Waits until the kubelet's folder is there.
    async fn open_folder(&mut self) {
        if self.folder.is_some() {
            return;
        }
        let mut told = false;
        while self.folder.is_none() {
            match Folder::open(&self.root, &self.path) {
                Ok(folder) => self.folder = Some(folder),
                Err(error) => {
                    if !told {
                        tracing::warn!(
                            "cannot watch {} ({error}): waiting for the kubelet to make it",
                            self.path
                        );
                        told = true;
                    }
                    sleep(FOLDER).await;
                }
            }
        }
        self.all_due(Duration::ZERO);
        for resource in self.resources.values_mut() {
            resource.named.clear();
            resource.look_for_others();
        }
    }

    async fn next(&mut self) -> Result<Event, Error> {
        let resources = self.resources.values();
        let due = resources.flat_map(|one| [one.due, one.look.map(|(at, _)| at)]);
        let due = due.flatten().min();
        let until = async move {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let Some(folder) = &self.folder else {
            return Ok(Event::Due);
        };
        tokio::select! {
            changed = self.snapshots.changed() => match changed {
                Ok(()) => Ok(Event::Devices),
                Err(_) => Err(Error::System {
                    what: "watch the devices".to_owned(),
                    source: std::io::Error::other("the observer has ended"),
                }),
            },
            changed = folder.changed() => changed
                .map(Event::Folder)
                .map_err(Error::system(format!("watch {}", folder.path))),
            Some((class, what)) = self.heard.recv() => Ok(Event::Stream(class, what)),
            () = until => Ok(Event::Due),
        }
    }

    /// Begins with resources that were not there before. Another plugin that is there first keeps us from starting; from then on it is
    /// only named.
    fn new_resources(&mut self) {
        let Some(folder) = &self.folder else { return };
        let snapshot = self.snapshots.borrow_and_update().clone();
        for class in snapshot.classes.keys() {
            if self.resources.contains_key(class) {
                continue;
            }
            let mut new = Resource::default();
            new.due_after(Duration::ZERO);
            match is_free(&self.root, folder, class) {
                Ok(()) => new.look_for_others(),
                Err(error) => tracing::error!("{error}"),
            }
            self.resources.insert(class.clone(), new);
        }
    }

    /// Names who else serves a resource, where somebody may have come.
    fn name_others(&mut self) {
        let Some(folder) = &self.folder else { return };
        for (class, resource) in &mut self.resources {
            let Some((_, pause)) = resource.look.filter(|(at, _)| *at <= Instant::now()) else {
                continue;
            };
            let others = conflict::find(folder, class, true);
            for socket in others.served {
                if resource.named.contains(&socket) {
                    continue;
                }
                let other = conflict::behind(&self.root, folder, class, &socket);
                tracing::error!(
                    "{} is served by {other} too: the kubelet gives it to whoever registered last; stop one of the two",
                    class.kind()
                );
                resource.named.insert(socket);
            }
            let again = others.silent && pause <= LONGEST_PAUSE;
            resource.look = again.then(|| (Instant::now() + pause, pause * 2));
        }
    }

    fn all_due(&mut self, after: Duration) {
        for resource in self.resources.values_mut() {
            resource.due_after(after);
        }
    }

    fn folder_changed(&mut self, changed: &Changed) {
        if changed.itself {
            self.folder = None;
            return;
        }
        if changed.lost || changed.came.contains(api::KUBELET_SOCKET) {
            tracing::info!("the kubelet has started: registering");
            self.all_due(Duration::ZERO);
        }
        let Some(folder) = &self.folder else { return };
        for (class, resource) in &mut self.resources {
            let mine = socket_name(class);
            let lost = resource
                .served
                .as_ref()
                .is_some_and(|served| !served.in_place(folder));
            if changed.went.contains(&mine) && lost && !resource.forced {
                // Usually a kubelet that starts: its own socket comes next.
                resource.due_after(DROPPED);
            }
            for name in changed.went.union(&changed.came) {
                resource.named.remove(name);
            }
            let others = |name: &String| *name != mine && conflict::is_for(name, class);
            if changed.lost || changed.came.iter().any(others) {
                resource.look_for_others();
            }
        }
    }

    fn stream_changed(&mut self, class: &Class, what: Listening) {
        let Some(resource) = self.resources.get_mut(class) else {
            return;
        };
        match what {
            Listening::Began => resource.streams += 1,
            Listening::Ended => resource.streams = resource.streams.saturating_sub(1),
        }
        if resource.streams == 0 && resource.due.is_none() {
            resource.due = Some(Instant::now() + DROPPED);
            resource.pause = FIRST_PAUSE;
        }
    }

    /// Registers what is due.
    async fn register_due(&mut self) -> Result<(), Error> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        for (class, resource) in &mut self.resources {
            if resource.due.is_none_or(|due| due > Instant::now()) {
                continue;
            }
            resource.due = None;
            if resource.streams > 0 && !resource.forced {
                continue;
            }
            let service = Service {
                class: class.clone(),
                snapshots: self.snapshots.clone(),
                stop: watch::channel(false).1,
                listeners: self.listeners.clone(),
            };
            serve_socket(folder, resource, service).await?;
            if folder.identity(api::KUBELET_SOCKET).is_none() {
                // Its coming is told by the folder.
                continue;
            }
            match register(folder, class).await {
                Ok(()) => {
                    tracing::info!("registered {}", class.kind());
                    resource.forced = false;
                    resource.pause = FIRST_PAUSE;
                    // By then there is a stream, or the kubelet could not connect.
                    resource.due = Some(Instant::now() + PATIENCE);
                }
                Err(problem) => {
                    // A kubelet that starts has its socket before it listens on it.
                    if resource.pause > DROPPED {
                        tracing::warn!(
                            "cannot register {} with the kubelet, trying again in {} s: {problem}",
                            class.kind(),
                            resource.pause.as_secs()
                        );
                    }
                    resource.due = Some(Instant::now() + resource.pause);
                    resource.pause = (resource.pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        Ok(())
    }

    async fn stop(&mut self) {
        let Some(folder) = self.folder.take() else {
            return;
        };
        for resource in self.resources.values_mut() {
            if let Some(served) = resource.served.take() {
                served.stop(&folder, END).await;
            }
        }
    }
}

/// That nobody serves a class.
fn is_free(root: &Root, folder: &Folder, class: &Class) -> Result<(), Error> {
    match conflict::find(folder, class, false).served.first() {
        None => Ok(()),
        Some(socket) => Err(Error::Served {
            resource: class.kind(),
            other: conflict::behind(root, folder, class, socket),
        }),
    }
}

/// Puts the socket into its place, unless it is there.
async fn serve_socket(
    folder: &Folder,
    resource: &mut Resource,
    service: Service,
) -> Result<(), Error> {
    if resource
        .served
        .as_ref()
        .is_some_and(|served| served.in_place(folder))
    {
        return Ok(());
    }
    if let Some(old) = resource.served.take() {
        old.stop(folder, Duration::ZERO).await;
    }
    let name = socket_name(&service.class);
    let what = format!("serve {}", folder.shown(&name));
    let served = Served::start(folder, &name, service).map_err(Error::system(what))?;
    resource.served = Some(served);
    Ok(())
}

/// Announces a resource to the kubelet.
async fn register(folder: &Folder, class: &Class) -> Result<(), String> {
    let socket = folder.at(api::KUBELET_SOCKET);
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let call = async {
        // The address is never resolved: it is only what HTTP/2 calls the authority.
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel.map_err(|error| chain(&error))?;
        let request = api::RegisterRequest {
            version: api::VERSION.to_owned(),
            endpoint: socket_name(class),
            resource_name: class.kind(),
            options: Some(service::options()),
        };
        let answer = RegistrationClient::new(channel).register(request).await;
        answer.map_err(|status| status.message().to_owned())?;
        Ok(())
    };
    match timeout(DEADLINE, call).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}
