//! The device plugin on prepared machines, towards a stand-in of the kubelet. A prepared machine raises no events of the kernel: what
//! changes is seen by probes, within the same two seconds. The events are tested in the node in a box.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::km::Km;
use km_tests_e2e::kubelet::{Allocated, Kubelet, Resource};
use km_tests_e2e::process::{Daemon, memory};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use km_tests_e2e::wait;
use km_tests_sysfs::{Machine, shapes};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};
use serde_json::json;

use super::node::SOON;

pub(crate) const TESTS: &[Test] = &[
    ("lists_prefers_and_allocates", lists_prefers_and_allocates),
    ("tells_the_truth_in_time", tells_the_truth_in_time),
    ("comes_back_with_the_kubelet", comes_back_with_the_kubelet),
    ("names_who_serves_already", names_who_serves_already),
    ("one_server_for_each_resource", one_server_for_each_resource),
    (
        "nothing_is_left_of_reconnects",
        nothing_is_left_of_reconnects,
    ),
];

const GPUS: &str = "nvidia.com/pgpu";
const SWITCHES: &str = "nvidia.com/nvswitch";

/// How soon the kubelet must know.
const IN_TIME: Duration = Duration::from_secs(2);

/// A machine, a kubelet, and the plugin between them.
struct Site {
    machine: PathBuf,
    kubelet: Kubelet,
    plugin: Daemon,
    log: PathBuf,
}

impl Site {
    fn start(sandbox: &Sandbox, machine: &Machine, words: &[&str]) -> Result<Self> {
        let folder = sandbox.folder("plugin")?;
        machine.write(&folder);
        machine.write_nodes(&folder);
        let mut kubelet = Kubelet::new(&kubelet_dir(&folder), &folder.join("kubelet.log"))?;
        kubelet.start()?;
        let log = folder.join("plugin.log");
        let plugin = Daemon::spawn("device-plugin", &mut command(&folder, words)?, &log)?;
        Ok(Self {
            machine: folder,
            kubelet,
            plugin,
            log,
        })
    }

    /// Waits until a resource is as it should be, for `deadline` from now.
    fn until(
        &mut self,
        what: &str,
        deadline: Duration,
        name: &str,
        is: impl Fn(&Resource) -> bool,
    ) -> Result<Resource> {
        let kubelet = &mut self.kubelet;
        let plugin = &mut self.plugin;
        let found = wait::until(what, deadline, || {
            plugin.still_runs()?;
            let resource = kubelet.resource(name)?;
            ensure!(is(&resource), "it is {resource:?}");
            Ok(resource)
        });
        found.with_context(|| format!("the plugin said:\n{}", self.plugin.log_tail()))
    }

    /// Waits for the first list.
    fn listed(&mut self, name: &str, count: usize) -> Result<Resource> {
        self.until("the first list", SOON, name, |one| {
            one.connected && one.devices.len() == count
        })
    }

    fn device(&self, address: &str) -> PathBuf {
        self.machine.join("sys/bus/pci/devices").join(address)
    }

    /// How long it takes from now until a device's health is told.
    fn told(&mut self, what: &str, address: &str, healthy: bool) -> Result<Duration> {
        let started = Instant::now();
        self.until(what, SOON, GPUS, |one| {
            let mut devices = one.devices.iter();
            devices.any(|device| device.id == address && device.healthy == healthy)
        })?;
        Ok(started.elapsed())
    }

    /// A change after which a device cannot be given out, and what brings it back: each must be told in time.
    fn out_and_back(
        &mut self,
        what: &str,
        address: &str,
        mut out: impl FnMut() -> Result<()>,
        mut back: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        wait::in_time(what, IN_TIME, || {
            out()?;
            let gone = self.told("its loss", address, false)?;
            back(self)?;
            let there = self.told("its return", address, true)?;
            Ok(gone.max(there))
        })
    }

    /// What is listed, in time, after the kubelet has started anew.
    fn listed_again_in_time(
        &mut self,
        mut start: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<Resource> {
        wait::in_time("to be listed again", IN_TIME, || {
            start(self)?;
            let started = Instant::now();
            self.until("the list", SOON, GPUS, |one| one.connected && one.lists > 0)?;
            Ok(started.elapsed())
        })?;
        self.kubelet.resource(GPUS)
    }

    fn said(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }
}

fn kubelet_dir(folder: &Path) -> PathBuf {
    folder.join("var/lib/kubelet")
}

fn command(folder: &Path, words: &[&str]) -> Result<std::process::Command> {
    let km = Km::find()?.env("KATA_MANAGER_HOST_ROOT", folder);
    Ok(km.command(&[&["device-plugin"], words].concat()))
}

fn lists_prefers_and_allocates(sandbox: &Sandbox) -> Result<()> {
    let mut site = Site::start(sandbox, &shapes::eight_gpus(), &[])?;
    let switches = site.listed(SWITCHES, 4)?;
    ensure!(switches.healthy().len() == 4, "{switches:?}");
    let gpus = site.listed(GPUS, 8)?;
    ensure!(gpus.endpoint == "km-pgpu.sock" && gpus.prefers, "{gpus:?}");
    let numa: Vec<i64> = gpus
        .devices
        .iter()
        .flat_map(|gpu| gpu.numa.clone())
        .collect();
    ensure!(numa == [0, 0, 0, 0, 1, 1, 1, 1], "{gpus:?}");
    let ids: Vec<String> = gpus.devices.iter().map(|gpu| gpu.id.clone()).collect();
    // Two a switch, four a node.
    ensure!(site.kubelet.prefer(GPUS, 2)? == ids[..2]);
    ensure!(site.kubelet.prefer(GPUS, 4)? == ids[..4]);
    let spec = fs::read_to_string(site.machine.join("var/run/cdi/nvidia.com-pgpu.yaml"))?;
    let first = site.kubelet.allocate(GPUS, "first", &[], 2)?;
    ensure!(first.ids == ids[..2], "{first:?}");
    for (id, name) in first.ids.iter().zip(&first.cdi) {
        ensure!(
            *name == format!("{GPUS}={id}") && spec.contains(&format!("\"{id}\"")),
            "{first:?}\n{spec}"
        );
    }
    ensure!(
        first.nodes.len() == 3,
        "two groups and the container: {first:?}"
    );
    for node in &first.nodes {
        ensure!(
            node.host == node.container && node.permissions == "rw",
            "{node:?}"
        );
        ensure!(
            site.machine.join(&node.host[1..]).exists() && spec.contains(&node.host),
            "{node:?}"
        );
    }
    // What is left of the first node is no longer four; the second is.
    let second = site.kubelet.allocate(GPUS, "second", &[], 4)?;
    ensure!(second.ids == ids[4..], "{second:?}");
    pods_are_told(&site, &first)?;
    let said = site.said()?;
    ensure!(
        said.contains("preferred 4 of 6 free") && said.contains("a whole NVSwitch partition"),
        "{said}"
    );
    let wrong = site.kubelet.allocate(GPUS, "third", &["12"], 0);
    ensure!(wrong.is_err_and(|error| format!("{error:#}").contains("has no device")));
    site.plugin.stop()?;
    let left = super::node::names(&kubelet_dir(&site.machine).join("device-plugins"))?;
    ensure!(left == ["kubelet.sock"], "after its end there is {left:?}");
    Ok(())
}

/// PodResources says the same, under the same IDs: that is how a runtime finds the devices of a pod.
fn pods_are_told(site: &Site, first: &Allocated) -> Result<()> {
    let socket = kubelet_dir(&site.machine).join("pod-resources/kubelet.sock");
    let client = km_podresources::Client::connect(&socket, SOON)?;
    let pod = client.get("default", "first")?;
    let given = &pod.containers[0].devices[0];
    ensure!(
        given.resource == GPUS && given.ids == first.ids && given.numa_nodes == [0],
        "{pod:?}"
    );
    let all = client.list()?;
    ensure!(all.len() == 2, "{all:?}");
    let allocatable = client.allocatable()?;
    ensure!(allocatable.len() == 12, "{allocatable:?}");
    ensure!(client.get("default", "third").is_err());
    Ok(())
}

fn tells_the_truth_in_time(sandbox: &Sandbox) -> Result<()> {
    let mut machine = shapes::eight_gpus();
    let errors = |count| format!("DLP {count}\nTOTAL_ERR_FATAL {count}\n");
    for device in machine
        .devices
        .iter_mut()
        .filter(|device| device.vfio.is_some())
    {
        device
            .attributes
            .push(("aer_dev_fatal".to_owned(), errors(0)));
    }
    let mut site = Site::start(sandbox, &machine, &[])?;
    let gpus = site.listed(GPUS, 8)?;
    ensure!(gpus.healthy().len() == 8, "{gpus:?}");
    let address = gpus.devices[3].id.clone();
    let device = site.device(&address);
    let spec = site.machine.join("var/run/cdi/nvidia.com-pgpu.yaml");
    let in_spec = || Ok::<_, anyhow::Error>(fs::read_to_string(&spec)?.contains(&address));

    let link = device.join("driver");
    let driver = fs::read_link(&link)?;
    let unbind = || Ok(fs::remove_file(&link)?);
    let bind = || Ok(symlink(&driver, &link)?);
    site.out_and_back("no driver", &address, unbind, |site| {
        ensure!(!in_spec()?, "CDI still lists it");
        let refused = site.kubelet.allocate(GPUS, "pod", &[&address], 0);
        ensure!(refused.is_err_and(|error| format!("{error:#}").contains("has no driver")));
        bind()
    })?;
    ensure!(in_spec()?, "CDI does not list it");

    let config = device.join("config");
    let alive = fs::read(&config)?;
    let die = || Ok(fs::write(&config, [0xff; 64])?);
    site.out_and_back("death", &address, die, |_| Ok(fs::write(&config, &alive)?))?;

    let group = fs::read_link(device.join("iommu_group"))?;
    let group = group.file_name().context("a group has a name")?;
    let node = site.machine.join("dev/vfio").join(group);
    let remove = || Ok(fs::remove_file(&node)?);
    site.out_and_back("no node", &address, remove, |_| Ok(fs::write(&node, "")?))?;

    let mut count = 0;
    let fail = || {
        count += 1;
        Ok(fs::write(device.join("aer_dev_fatal"), errors(count))?)
    };
    site.out_and_back("a fatal error", &address, fail, |site| {
        unbind()?;
        wait::until_true("the plugin to see it unbound", SOON, || {
            let said = site.said().unwrap_or_default();
            let last = said.lines().last().unwrap_or_default();
            last.contains("no driver")
        })?;
        bind()
    })?;

    let target = fs::read_link(&device)?;
    let unplug = |at: &Path| Ok(fs::remove_file(at)?);
    site.out_and_back(
        "unplugging",
        &address,
        || unplug(&device),
        |_| {
            ensure!(!in_spec()?, "CDI still lists it");
            Ok(symlink(&target, &device)?)
        },
    )?;

    // A card that was not there before: a copy of one of the others, in a group of its own.
    let mut other = shapes::one_gpu().devices.remove(1).vfio(99).group(99);
    other.address = "0001:01:00.0".to_owned();
    fs::write(site.machine.join("dev/vfio/99"), "")?;
    Machine::new(vec![other]).write(&site.machine);
    site.told("another one", "0001:01:00.0", true)?;
    let another = site.device("0001:01:00.0");
    let target = fs::read_link(&another)?;
    site.out_and_back(
        "unplugging another",
        "0001:01:00.0",
        || unplug(&another),
        |_| Ok(symlink(&target, &another)?),
    )?;
    let gpus = site.kubelet.resource(GPUS)?;
    ensure!(
        gpus.devices.len() == 9 && gpus.healthy().len() == 9,
        "{gpus:?}"
    );
    ensure!(gpus.registrations == 1, "{gpus:?}");
    Ok(())
}

fn comes_back_with_the_kubelet(sandbox: &Sandbox) -> Result<()> {
    let mut site = Site::start(sandbox, &shapes::two_models(), &[])?;
    site.listed(GPUS, 1)?;
    // A kubelet that starts removes all sockets.
    let again = site.listed_again_in_time(|site| site.kubelet.start())?;
    ensure!(
        again.registrations == 1 && again.healthy().len() == 1,
        "{again:?}"
    );
    // One that is away for a while.
    let socket = kubelet_dir(&site.machine).join("device-plugins/kubelet.sock");
    site.listed_again_in_time(|site| {
        site.kubelet.ask(&json!({ "stop": {} }))?;
        fs::remove_file(&socket)?;
        site.kubelet.start()
    })?;
    // Its own socket is removed by somebody.
    fs::remove_file(kubelet_dir(&site.machine).join("device-plugins/km-pgpu.sock"))?;
    site.until("to be registered anew", SOON, GPUS, |one| {
        one.connected && one.registrations == 2
    })?;
    site.plugin.stop()
}

fn names_who_serves_already(sandbox: &Sandbox) -> Result<()> {
    let folder = sandbox.folder("plugin")?;
    let machine = shapes::two_models();
    machine.write(&folder);
    machine.write_nodes(&folder);
    let plugins = kubelet_dir(&folder).join("device-plugins");
    fs::create_dir_all(&plugins)?;
    let theirs = UnixListener::bind(plugins.join("sandbox-pgpu.sock"))?;
    let km = Km::find()?.env("KATA_MANAGER_HOST_ROOT", &folder);
    let refused = km.expect(&["device-plugin"], 3)?;
    let named =
        "NVIDIA's Sandbox Device Plugin at /var/lib/kubelet/device-plugins/sandbox-pgpu.sock";
    ensure!(refused.stderr.contains(named), "{refused}");
    drop(theirs);
    // One that comes later is named, and left alone.
    fs::remove_file(plugins.join("sandbox-pgpu.sock"))?;
    let mut kubelet = Kubelet::new(&kubelet_dir(&folder), &folder.join("kubelet.log"))?;
    kubelet.start()?;
    let log = folder.join("plugin.log");
    let mut plugin = Daemon::spawn("device-plugin", &mut command(&folder, &[])?, &log)?;
    wait::until("the first list", SOON, || {
        plugin.still_runs()?;
        ensure!(kubelet.resource(GPUS)?.connected);
        Ok(())
    })?;
    let theirs = net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    net::bind(
        &theirs,
        &SocketAddrUnix::new(plugins.join("sandbox-pgpu.sock"))?,
    )?;
    // Nobody listens there before the plugin has seen it: its own socket, which is taken away after that, is back.
    fs::remove_file(plugins.join("km-pgpu.sock"))?;
    wait::until_true("a socket of its own again", SOON, || {
        plugins.join("km-pgpu.sock").exists()
    })?;
    net::listen(&theirs, 1)?;
    wait::until_true("the conflict in the log", SOON, || {
        plugin.log_tail().contains("sandbox-pgpu.sock too")
    })?;
    // A second one of ours is refused as well.
    let second = km.expect(&["device-plugin"], 3)?;
    ensure!(second.stderr.contains("served already"), "{second}");
    plugin.still_runs()
}

fn one_server_for_each_resource(sandbox: &Sandbox) -> Result<()> {
    let mut machine = shapes::two_models();
    machine.devices[3].driver = Some("vfio-pci".to_owned());
    machine.devices[3].vfio = Some(1);
    let mut site = Site::start(sandbox, &machine, &[])?;
    let both = site.listed(GPUS, 2)?;
    ensure!(
        both.healthy().len() == 2 && both.registrations == 1,
        "{both:?}"
    );
    drop(site);
    let mut site = Site::start(sandbox, &machine, &["--gpu-alias", ""])?;
    for name in ["nvidia.com/GH100_H100_PCIE", "nvidia.com/AD102GL_L40"] {
        site.listed(name, 1)?;
    }
    ensure!(site.kubelet.resource(GPUS).is_err());
    Ok(())
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    /// Without what is mapped from files: of that the kernel drops and reads again as it likes.
    memory: u64,
}

impl Held {
    fn by(pid: u32) -> Result<Self> {
        let entries =
            |name| Ok::<_, std::io::Error>(fs::read_dir(format!("/proc/{pid}/{name}"))?.count());
        Ok(Self {
            descriptors: entries("fd")?,
            threads: entries("task")?,
            memory: memory(pid, "RssAnon")?,
        })
    }
}

/// The kubelet starts anew again and again; `KM_PLUGIN_RECONNECTS` says how often, 100 times otherwise. A task that were left behind of
/// each connection would have its buffers of some kibibytes: of 10,000, much more memory than may be taken here.
#[expect(clippy::print_stdout, reason = "a measurement is to be seen")]
fn nothing_is_left_of_reconnects(sandbox: &Sandbox) -> Result<()> {
    let times: u32 = match std::env::var("KM_PLUGIN_RECONNECTS") {
        Ok(times) => times.parse().context("KM_PLUGIN_RECONNECTS")?,
        Err(_) => 100,
    };
    let mut site = Site::start(sandbox, &shapes::two_models(), &["--log", "error"])?;
    site.listed(GPUS, 1)?;
    let mut restarts = |times: u32| {
        let command = json!({ "restarts": { "resources": [GPUS], "times": times } });
        site.kubelet
            .ask_for(&command, Duration::from_secs(60 + u64::from(times)))
    };
    // Buffers and the allocator's pools grow at first.
    restarts(20)?;
    let pid = site.plugin.pid();
    let before = Held::by(pid)?;
    restarts(times)?;
    let after = wait::until("what old connections held to be given back", SOON, || {
        let now = Held::by(pid)?;
        ensure!(
            now.descriptors <= before.descriptors && now.threads <= before.threads,
            "before {times} restarts {before:?}, then {now:?}"
        );
        Ok(now)
    })?;
    ensure!(
        after.memory < before.memory + (1 << 20),
        "before {times} restarts {before:?}, then {after:?}"
    );
    if times > 100 {
        println!("before {times} restarts of the kubelet {before:?}, then {after:?}");
    }
    Ok(())
}
