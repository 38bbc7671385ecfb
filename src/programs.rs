//! Our programs on the host: the shim in a folder of its version, a link for each handler that stays the same over upgrades, the settings
//! that the shim finds by the link's name, and the program that stands in QEMU's place, which is the same file by another name.
//!
//! containerd writes down the path of each running sandbox's shim and gives the sandbox up when that file is gone. So it is told the
//! link, which is swapped by rename; a version's folder is never changed, and goes only when nothing can need it any more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use km_artifacts::Generation;
use km_artifacts::digest::Digest;
use km_containerd_config::{ContainerdVersion, Handler};
use km_host::claims::{Claims, Found};
use km_host::{HostPath, atomic, process};
use km_shim::launch::{self, Launch, Mode};
use km_shim::settings::{self, Companions, Settings};
use km_shim::table::Containerd;
use serde::{Deserialize, Serialize};

use crate::config::{self, Config, LaunchMode, RuntimeClass};
use crate::failure::{Failure, Kind};
use crate::node::Node;
use crate::plan::diff;
use crate::{kata, wanted};

/// The folder of our programs on the host.
const DIR: &str = "/opt/kata-manager";

/// The folder of the links that containerd is told.
pub(crate) const BIN: &str = "/opt/kata-manager/bin";

/// The folder of the versions.
const LIBEXEC: &str = "/opt/kata-manager/libexec";

/// The shim's file, beside kata-manager's own and in a version's folder.
const SHIM: &str = "containerd-shim-kata-qemu-nvidia-gpu-v2";

/// Where the shim is that is installed unless told otherwise, seen from the folder of kata-manager's own program.
const BESIDE: &str = "../libexec/kata-manager";

/// The largest program that is installed, in bytes.
const LIMIT: u64 = 64 << 20;

/// The file in which containerd writes down a sandbox's shim (containerd, core/runtime/v2/shim_load.go).
const RECORDED: &str = "shim-binary-path";

/// The shim to install.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    bytes: Vec<u8>,
    /// Its version's folder: this program's version, and what tells two builds of it apart.
    version: String,
    /// Whether these very bytes are in it.
    there: bool,
}

/// What of ours is on the host, and what is wanted.
#[derive(Debug)]
pub(crate) struct SeenPrograms {
    /// What has to change; nothing when all is right.
    pub(crate) change: Option<Change>,
    /// What a person should know.
    pub(crate) warnings: Vec<String>,
    program: Option<Program>,
    settings: Vec<(HostPath, Vec<u8>)>,
    stale: Vec<HostPath>,
}

/// A change of the programs, as a plan shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Change {
    /// The version that comes, where it is not there yet.
    pub(crate) version: Option<String>,
    /// Links that are made or moved.
    pub(crate) links: Vec<String>,
    /// Settings that are written: the file, and its changed lines.
    pub(crate) settings: Vec<(String, String)>,
    /// Links and settings of handlers that are configured no more.
    pub(crate) removed: Vec<String>,
}

impl Change {
    /// The change as it stands in a plan.
    pub(crate) fn write_text(&self, out: &mut String) -> std::fmt::Result {
        use std::fmt::Write as _;
        if let Some(version) = &self.version {
            writeln!(
                out,
                "  + shim {version}\n      in {LIBEXEC}; running pods keep theirs"
            )?;
        }
        for link in &self.links {
            writeln!(out, "  ~ {link}")?;
        }
        for (path, diff) in &self.settings {
            writeln!(out, "  ~ {path}")?;
            let lines = diff.lines();
            let mut lines =
                lines.filter(|line| !line.starts_with("--- ") && !line.starts_with("+++ "));
            lines.try_for_each(|line| writeln!(out, "      {line}"))?;
        }
        self.removed
            .iter()
            .try_for_each(|path| writeln!(out, "  - {path}"))
    }
}

/// The shim that is to be installed, and whether the configuration names it.
fn place(config: &Config) -> Result<PathBuf> {
    if let Some(named) = &config.shim.program {
        return Ok(named.clone());
    }
    let me = std::env::current_exe().context("find this program")?;
    Ok(me
        .parent()
        .unwrap_or(Path::new("/"))
        .join(BESIDE)
        .join(SHIM))
}

/// Whether there is a shim to install.
pub(crate) fn available(config: &Config) -> bool {
    config.shim.program.is_some() || place(config).is_ok_and(|path| path.exists())
}

/// Whether a handler names a link of ours.
pub(crate) fn is_ours(handler: &Handler) -> bool {
    let path = handler
        .runtime_path
        .as_ref()
        .unwrap_or(&handler.runtime_type);
    path.starts_with(BIN)
}

/// The shims behind ours that cannot be run, and why.
pub(crate) fn missing(node: &Node) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    // Files of the provider have been looked at already.
    let named = node.config.runtime_classes.iter();
    for class in named.filter(|class| available(&node.config) && fronts(class)) {
        let Some(path) = &class.inner_shim else {
            continue;
        };
        if let Some(problem) = crate::observe::lacks(node, path, true)? {
            missing.push(format!(
                "{path}, the innerShim of {}, {problem}: install it, or name another",
                class.name
            ));
        }
    }
    Ok(missing)
}

/// Finds the shim that is to be installed; `None` where none came with this program, and handlers name Kata's own.
fn find(node: &Node) -> Result<Option<Program>> {
    let config = &node.config;
    let named = config.shim.program.is_some();
    let path = place(config)?;
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => {
            return Ok(None);
        }
        Err(error) => {
            let message = format!("cannot read the shim {} (shim.program)", path.display());
            return Err(Failure::because(Kind::Configuration, message, error).into());
        }
    };
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, LIMIT), &mut bytes)
        .map_err(km_host::Error::io("read", &path))?;
    let has = |version: &str| -> Result<bool> {
        let shim = HostPath::new(LIBEXEC)?.join(version).join(SHIM);
        Ok(read(node, &shim)?.as_deref() == Some(&*bytes))
    };
    // Bytes are compared, and times and sizes not believed. Only what is new is hashed, which takes ten times as long.
    if let Some(version) = linked(node)?
        && has(&version)?
    {
        let there = true;
        return Ok(Some(Program {
            bytes,
            version,
            there,
        }));
    }
    let digest = Digest::of(&bytes).to_string();
    let digest = digest.rsplit(':').next().unwrap_or_default();
    let version = format!("{}-{}", env!("CARGO_PKG_VERSION"), &digest[..12]);
    let there = has(&version)?;
    Ok(Some(Program {
        bytes,
        version,
        there,
    }))
}

/// The version that the launcher's link leads to.
fn linked(node: &Node) -> Result<Option<String>> {
    let link = std::fs::read_link(at(node, &launcher_link()?)?).ok();
    let version = link
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::file_name);
    Ok(version.and_then(|name| name.to_str()).map(str::to_owned))
}

/// Whether our shim stands before a class's own: a class of the catalogue whose shim nobody set otherwise, or one that says so.
pub(crate) fn fronts(class: &RuntimeClass) -> bool {
    let set = class.handler_settings.runtime_path.is_some();
    !set && (class.inner_shim.is_some() || wanted::class_kind(class).is_some())
}

/// The link that containerd is told for a handler.
pub(crate) fn link(handler: &str) -> String {
    format!("{BIN}/containerd-shim-{handler}-v2")
}

/// The program that Kata is to start in place of a class's QEMU; `None` where Kata starts QEMU itself. It refuses what has no claim, so
/// it stands only behind our shim, which leaves one for each sandbox.
pub(crate) fn launcher(config: &Config, class: &RuntimeClass) -> Result<Option<HostPath>> {
    let stands = class.launch().mode != LaunchMode::None && can_launch(config, class);
    Ok(stands.then(launcher_link).transpose()?)
}

/// Whether our shim is there to leave the claims that the launcher asks for.
fn can_launch(config: &Config, class: &RuntimeClass) -> bool {
    wanted::class_kind(class).is_some() && fronts(class) && available(config)
}

/// Refuses to go back to a generation that names the launcher where nobody would leave claims: no pod of it would start.
pub(crate) fn refuse_unlaunchable(config: &Config, generation: &Generation) -> Result<(), Failure> {
    let manifest = &generation.manifest;
    let mut derived = manifest.derived.iter();
    let launched = derived.any(|one| one.path == launch::generation::FILE);
    let mut classes = config.runtime_classes.iter();
    let class = classes.find(|class| class.name == manifest.class);
    match class {
        Some(class) if launched && !can_launch(config, class) => Err(Failure::refused(format!(
            "generation {} of {} starts QEMU through {}, which asks for claims of our shim, and that does not stand before Kata's now: bring the shim back (shim.program; no handlerSettings.runtimePath), or choose another generation",
            generation.number(),
            class.name,
            launch::PROGRAM
        ))),
        _ => Ok(()),
    }
}

/// The link that Kata is told in place of QEMU.
fn launcher_link() -> Result<HostPath, km_host::PathError> {
    Ok(HostPath::new(BIN)?.join(launch::PROGRAM))
}

/// The shim behind ours.
pub(crate) fn inner(config: &Config, class: &RuntimeClass) -> Option<HostPath> {
    let kata = || {
        let kind = wanted::class_kind(class)?;
        HostPath::new(kind.shim(&wanted::provider(config))).ok()
    };
    class.inner_shim.clone().or_else(kata)
}

/// Looks at what is there, and says what has to change.
pub(crate) fn observe(node: &Node, version: ContainerdVersion) -> Result<SeenPrograms> {
    let mut seen = SeenPrograms {
        change: None,
        warnings: Vec::new(),
        program: find(node)?,
        settings: Vec::new(),
        stale: Vec::new(),
    };
    let mut change = Change {
        version: None,
        links: Vec::new(),
        settings: Vec::new(),
        removed: Vec::new(),
    };
    let mut ours = BTreeSet::new();
    if let Some(program) = &seen.program {
        let classes = node.config.runtime_classes.iter().filter(|one| fronts(one));
        let classes: Vec<&RuntimeClass> = classes.collect();
        if !classes.is_empty() {
            let found = kata::find(&node.root, &node.config.provider)?;
            seen.warnings.extend(found.warning(&node.config.provider));
            let folder = version_dir(program)?;
            if !program.there || !is_one_file(node, &folder)? {
                change.version = Some(program.version.clone());
            }
            let place = launcher_link()?;
            if !leads(node, &place, &target(program, launch::PROGRAM))? {
                change.links.push(place.to_string());
            }
            ours.insert(place);
            for class in classes {
                let Some(settings) = settings_of(&node.config, class, &found, version) else {
                    continue;
                };
                let place = HostPath::new(link(class.handler()))?;
                if !leads(node, &place, &target(program, SHIM))? {
                    change.links.push(place.to_string());
                }
                ours.insert(place);
                let path = HostPath::new(settings::DIR)?.join(settings::file_name(class.handler()));
                let bytes = settings.render()?;
                let there = read(node, &path)?;
                if there.as_deref() != Some(&bytes) {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let before = text(&there.unwrap_or_default());
                    change
                        .settings
                        .push((path.to_string(), diff(&before, &text(&bytes))));
                }
                ours.insert(path.clone());
                seen.settings.push((path, bytes));
            }
        }
    }
    for dir in [BIN, settings::DIR] {
        let dir = HostPath::new(dir)?;
        let there = names(node, &dir)?.into_iter();
        let there = there.filter(|name| {
            let link = settings::handler_of(name).is_some() || name == launch::PROGRAM;
            link || name.ends_with(".json")
        });
        let there = there.map(|name| dir.join(name));
        seen.stale.extend(there.filter(|path| !ours.contains(path)));
    }
    let held = recorded(node)?;
    // A handler's link and settings stay until its last sandbox has ended, and so do the launcher and every version.
    let launcher = launcher_link()?;
    seen.stale.retain(|path| {
        let needed =
            |(_, handler, _): &(String, String, PathBuf)| *path == launcher || is_of(path, handler);
        !held.iter().any(needed)
    });
    if held.is_empty() {
        seen.stale
            .extend(unused_versions(node, seen.program.as_ref())?);
    }
    change.removed = seen.stale.iter().map(ToString::to_string).collect();
    let nothing = change.version.is_none()
        && change.links.is_empty()
        && change.settings.is_empty()
        && change.removed.is_empty();
    seen.change = (!nothing).then_some(change);
    Ok(seen)
}

fn settings_of(
    config: &Config,
    class: &RuntimeClass,
    found: &kata::Found,
    version: ContainerdVersion,
) -> Option<Settings> {
    let kind = wanted::class_kind(class);
    let provider = wanted::provider(config);
    let qemu = kind.map(|kind| provider.path(kind.qemu));
    Some(Settings {
        handler: class.handler().to_owned(),
        class: class.name.clone(),
        inner_shim: inner(config, class)?,
        qemu: qemu.and_then(|path| HostPath::new(path).ok()),
        confidential: kind.is_some_and(|kind| kind.tee != km_runtimeclasses::Tee::None),
        kata: found.kata,
        containerd: match (version.major, version.minor) {
            (0 | 1, ..=6) => Containerd::V1_6,
            (0 | 1, _) => Containerd::V1_7,
            _ => Containerd::V2,
        },
        class_link: Some(config.artifacts_dir.join(&class.name)),
        kubelet_socket: config.shim.kubelet_socket.clone(),
        kubelet_timeout_ms: config.shim.kubelet_timeout_milliseconds,
        companions: match config.shim.companions {
            config::Companions::Refuse => Companions::Refuse,
            config::Companions::Add => Companions::Add,
        },
        launch: launch_of(class),
    })
}

fn launch_of(class: &RuntimeClass) -> Launch {
    let config::Launch { mode, clique } = class.launch();
    Launch {
        mode: match mode {
            LaunchMode::Check | LaunchMode::None => Mode::Check,
            LaunchMode::Inject => Mode::Inject,
            LaunchMode::Tune => Mode::Tune,
        },
        clique,
    }
}

/// Brings the programs that handlers and generations are about to name. Before containerd is told of them, and Kata.
pub(crate) fn install(node: &Node, seen: &SeenPrograms) -> Result<()> {
    let (Some(change), Some(program)) = (&seen.change, &seen.program) else {
        return Ok(());
    };
    if change.version.is_some() {
        let folder = at(node, &version_dir(program)?)?;
        atomic::create_dir_all(&folder, 0o755)?;
        let shim = folder.join(SHIM);
        atomic::write(&shim, &program.bytes, 0o755)?;
        // By this name Kata starts it: it follows links, so the file itself has it.
        atomic::hard_link(&shim, &folder.join(launch::PROGRAM))?;
    }
    // Settings first: a shim that is found finds them.
    for (path, bytes) in &seen.settings {
        if change
            .settings
            .iter()
            .any(|(changed, _)| *changed == path.as_str())
        {
            write(node, path, bytes)?;
        }
    }
    let launcher = launcher_link()?;
    for link in &change.links {
        let link = HostPath::new(link)?;
        let name = match link == launcher {
            true => launch::PROGRAM,
            false => SHIM,
        };
        let link = at(node, &link)?;
        if let Some(folder) = link.parent() {
            atomic::create_dir_all(folder, 0o755)?;
        }
        atomic::symlink(&target(program, name), &link)?;
    }
    Ok(())
}

/// Removes what no handler names any more and no sandbox needs. After containerd has been told.
pub(crate) fn clean(node: &Node, seen: &SeenPrograms) -> Result<()> {
    let libexec = HostPath::new(LIBEXEC)?;
    for path in &seen.stale {
        match path.parent().as_ref() == Some(&libexec) {
            true => remove_version(node, path)?,
            false => atomic::remove_file(&at(node, path)?)?,
        }
    }
    Ok(())
}

/// Whether a link or settings are a handler's.
fn is_of(path: &HostPath, handler: &str) -> bool {
    let name = path.as_path().file_name();
    name.is_some_and(|name| name == &*settings::file_name(handler))
        || path.as_str() == link(handler)
}

/// Versions other than the one to install that no process has open.
fn unused_versions(node: &Node, current: Option<&Program>) -> Result<Vec<HostPath>> {
    let libexec = HostPath::new(LIBEXEC)?;
    let mut unused = Vec::new();
    for version in names(node, &libexec)? {
        let folder = libexec.join(&version);
        if current.is_none_or(|program| program.version != version)
            && process::holders(&node.root, &at(node, &folder)?)?.is_empty()
        {
            unused.push(folder);
        }
    }
    Ok(unused)
}

fn remove_version(node: &Node, folder: &HostPath) -> Result<()> {
    let ours = at(node, folder)?;
    for name in names(node, folder)? {
        atomic::remove_file(&ours.join(name))?;
    }
    atomic::remove_dir_if_empty(&ours)?;
    Ok(())
}

/// The sandboxes that have claims and live: each with its handler, and its shim as containerd has written it down.
fn recorded(node: &Node) -> Result<Vec<(String, String, PathBuf)>> {
    let claims = Claims::open(&node.root)?;
    let mut found = Vec::new();
    for claim in claims.list()? {
        let Found::Claim(claim) = claim else { continue };
        if !claims.is_alive(&claim) {
            continue;
        }
        let path = read(node, &claim.bundle.join(RECORDED))?;
        let path = match path {
            Some(bytes) => PathBuf::from(String::from_utf8_lossy(&bytes).trim().to_owned()),
            // containerd 1.6 writes none down, and looks the handler's up again.
            None => PathBuf::from(link(&claim.handler)),
        };
        found.push((claim.sandbox, claim.handler, path));
    }
    Ok(found)
}

/// Takes everything off the host again, unless a sandbox still needs it; gives what was removed, and what stays and why.
pub(crate) fn remove(node: &Node) -> Result<(Vec<String>, Vec<String>)> {
    let (bin, libexec, handlers) = (
        HostPath::new(BIN)?,
        HostPath::new(LIBEXEC)?,
        HostPath::new(settings::DIR)?,
    );
    let held = recorded(node)?;
    if !held.is_empty() && !names(node, &bin)?.is_empty() {
        let held = held.iter();
        let stays = held.map(|(sandbox, _, path)| {
            format!(
                "{} is the shim of sandbox {sandbox}, which runs",
                path.display()
            )
        });
        return Ok((Vec::new(), stays.collect()));
    }
    let mut removed = Vec::new();
    for dir in [&bin, &handlers] {
        for name in names(node, dir)? {
            let path = dir.join(name);
            atomic::remove_file(&at(node, &path)?)?;
            removed.push(path.to_string());
        }
        atomic::remove_dir_if_empty(&at(node, dir)?)?;
    }
    for version in names(node, &libexec)? {
        let folder = libexec.join(version);
        remove_version(node, &folder)?;
        removed.push(folder.to_string());
    }
    for dir in [libexec, HostPath::new(DIR)?] {
        atomic::remove_dir_if_empty(&at(node, &dir)?)?;
    }
    Ok((removed, Vec::new()))
}

fn version_dir(program: &Program) -> Result<HostPath> {
    Ok(HostPath::new(LIBEXEC)?.join(&program.version))
}

/// Where a link in [`BIN`] leads: to a file of the version's folder.
fn target(program: &Program, file: &str) -> PathBuf {
    Path::new("../libexec").join(&program.version).join(file)
}

fn leads(node: &Node, link: &HostPath, target: &Path) -> Result<bool> {
    Ok(std::fs::read_link(at(node, link)?).is_ok_and(|found| found == target))
}

/// Whether the shim and the launcher of a version are one file.
fn is_one_file(node: &Node, folder: &HostPath) -> Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let id = |name: &str| -> Result<Option<(u64, u64)>> {
        let meta = std::fs::symlink_metadata(at(node, &folder.join(name))?);
        Ok(meta.ok().map(|meta| (meta.dev(), meta.ino())))
    };
    let shim = id(SHIM)?;
    Ok(shim.is_some() && shim == id(launch::PROGRAM)?)
}

/// Where this process finds a path of the host, the last part of which may be a link that is not followed.
fn at(node: &Node, path: &HostPath) -> Result<PathBuf> {
    let resolved = match (path.parent(), path.as_path().file_name()) {
        (Some(parent), Some(name)) => node.root.resolve(&parent)?.join(name),
        _ => node.root.resolve(path)?,
    };
    Ok(resolved)
}

fn read(node: &Node, path: &HostPath) -> Result<Option<Vec<u8>>> {
    crate::observe::read(&node.root.resolve(path)?)
}

fn write(node: &Node, path: &HostPath, bytes: &[u8]) -> Result<()> {
    let path = node.root.resolve(path)?;
    if let Some(folder) = path.parent() {
        atomic::create_dir_all(folder, 0o755)?;
    }
    Ok(atomic::write(&path, bytes, 0o644)?)
}

/// The names in a folder, sorted; none when it is not there.
pub(crate) fn names(node: &Node, dir: &HostPath) -> Result<Vec<String>> {
    let ours = node.root.resolve(dir)?;
    let entries = match std::fs::read_dir(&ours) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(km_host::Error::io("list", &ours)(error).into()),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(km_host::Error::io("list", &ours))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
