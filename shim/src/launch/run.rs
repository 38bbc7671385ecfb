//! One launch from beginning to end: the sandbox's claim by the machine's name, the handler's settings by the claim, a decision,
//! and QEMU by execve(2), which keeps the process, its descriptors and its environment.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use km_host::claims::{Claim, Claims, Found};
use km_host::{HostPath, Root};
use km_vfio::{Address, Inventory};

use super::argv::Argv;
use super::check::{self, Wanted};
use super::inject::{self, Injected};
use super::view::View;
use super::{Mode, Refused, tune};
use crate::settings::{self, Settings};

/// Where the host's root is mounted, for containers and tests; `/` when it is not set.
const HOST_ROOT: &str = "KATA_MANAGER_HOST_ROOT";

/// The most handlers that are looked at.
const HANDLERS: usize = 64;

/// Becomes QEMU. It comes back only when the launch is refused, which has been said on standard error: Kata puts that into the pod's
/// event.
pub fn run(argv: &[OsString]) -> ExitCode {
    let Err(why) = become_qemu(argv);
    // Nobody is left to tell when this fails.
    let _ = writeln!(io::stderr(), "kata-manager-qemu: {why}");
    ExitCode::FAILURE
}

fn become_qemu(argv: &[OsString]) -> Result<Infallible, String> {
    let root = std::env::var_os(HOST_ROOT).unwrap_or_else(|| "/".into());
    let root = Root::new(&root).map_err(|error| chain(&error))?;
    let argv = Argv::parse(argv.get(1..).unwrap_or_default().to_vec());
    let (qemu, words) = decide(&root, argv)?;
    let path = match root.is_slash() {
        true => qemu.as_path().to_owned(),
        false => root.resolve(&qemu).map_err(|error| chain(&error))?,
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "this process becomes the program: nothing is started"
    )]
    let mut command = std::process::Command::new(&path);
    let error = command.args(words).exec();
    Err(format!("cannot run {qemu}: {error}"))
}

/// Which QEMU, with which arguments.
fn decide(root: &Root, argv: Argv) -> Result<(HostPath, Vec<OsString>), String> {
    // A question such as -version is no sandbox's.
    let Some(sandbox) = argv.sandbox().map(str::to_owned) else {
        let first = qemus(root)?.into_iter().next();
        return Ok((first.ok_or_else(no_qemu)?, argv.words));
    };
    match claim(root, &sandbox)? {
        Some(claim) => {
            let settings = by_handler(root, &claim.handler)?;
            let qemu = settings.qemu.clone();
            let qemu =
                qemu.ok_or_else(|| format!("the settings of {} name no QEMU", claim.handler))?;
            let words = launch(root, argv, &claim, &settings)
                .map_err(|refused| told(&sandbox, &refused))?;
            Ok((qemu, words))
        }
        None => {
            unclaimed(root, &argv).map_err(|refused| told(&sandbox, &refused))?;
            Ok((only_qemu(root)?, argv.words))
        }
    }
}

fn told(sandbox: &str, refused: &Refused) -> String {
    let sandbox: String = sandbox.chars().take(76).collect();
    format!("the launch of sandbox {sandbox:?} is refused: {refused}")
}

fn claim(root: &Root, sandbox: &str) -> Result<Option<Claim>, String> {
    let claims = Claims::open(root).map_err(|error| chain(&error))?;
    match claims.get(sandbox).map_err(|error| chain(&error))? {
        None => Ok(None),
        Some(Found::Unreadable { path, problem }) => Err(format!(
            "the claim of this sandbox, {}, cannot be read: {problem}",
            path.display()
        )),
        Some(Found::Claim(claim)) if !claims.is_alive(&claim) => Err(format!(
            "the claim of sandbox {} is of one that lives no more",
            claim.sandbox
        )),
        Some(Found::Claim(claim)) => Ok(Some(claim)),
    }
}

/// The arguments of a claimed sandbox, or why it is not launched.
fn launch(
    root: &Root,
    argv: Argv,
    claim: &Claim,
    settings: &Settings,
) -> Result<Vec<OsString>, Refused> {
    let view = View::of(&argv);
    let guarded = guarded(root, &view)?;
    let wanted = Wanted {
        devices: &claim.devices,
        confidential: settings.confidential,
        kata: settings.kata,
        guarded: &guarded,
    };
    let argv = match settings.launch.mode {
        Mode::Inject => match inject::inject(&view, &wanted)? {
            Injected::Nothing => argv,
            Injected::Added(plan) => Argv::parse(inject::add(&argv, &plan)),
        },
        Mode::Check | Mode::Tune => argv,
    };
    check::check(&View::of(&argv), &wanted)?;
    if settings.launch.mode == Mode::Tune {
        let view = View::of(&argv);
        let words = tune::tune(&argv, &view, &wanted, settings.launch.clique)?;
        let tuned = Argv::parse(words);
        check::check(&View::of(&tuned), &wanted)?;
        return Ok(tuned.words);
    }
    Ok(argv.words)
}

/// A sandbox without a claim may be launched when it has none of the node's guarded devices.
fn unclaimed(root: &Root, argv: &Argv) -> Result<(), Refused> {
    let view = View::of(argv);
    let guarded = guarded(root, &view)?;
    let wanted = Wanted {
        devices: &[],
        confidential: false,
        kata: km_topology::Kata {
            flavor: km_topology::Flavor::Go,
            version: km_topology::Version::new(4, 1),
        },
        guarded: &guarded,
    };
    if view.vfio().next().is_none() && view.unclear.is_empty() {
        return Ok(());
    }
    check::check(&view, &wanted)?;
    match view.unclear.is_empty() {
        true => Ok(()),
        false => Err(Refused(view.unclear)),
    }
}

/// The functions that nobody may have without a claim. The bus is looked at only where a device of the host is launched.
fn guarded(root: &Root, view: &View) -> Result<BTreeSet<Address>, Refused> {
    if view.vfio().next().is_none() {
        return Ok(BTreeSet::new());
    }
    let inventory = Inventory::observe(root).map_err(|error| {
        Refused::because(format!("cannot look at the PCI bus: {}", chain(&error)))
    })?;
    Ok(inventory.functions.iter().map(|one| one.address).collect())
}

fn by_handler(root: &Root, handler: &str) -> Result<Settings, String> {
    settings::load(root, handler).map_err(|error| error.to_string())
}

/// The QEMU of all handlers, where they have one and the same.
fn only_qemu(root: &Root) -> Result<HostPath, String> {
    let found = qemus(root)?;
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(no_qemu()),
        several => Err(format!(
            "this sandbox has no claim, so it is not known which of {} is its QEMU: start it through containerd, with the shim that \
             `kata-manager apply` registered",
            several
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        )),
    }
}

fn no_qemu() -> String {
    format!(
        "no handler in {} names a QEMU: `kata-manager apply` writes them",
        settings::DIR
    )
}

/// Each QEMU that a handler has, once, in the handlers' order.
fn qemus(root: &Root) -> Result<Vec<HostPath>, String> {
    let all = settings::list(root).map_err(|error| chain(&error))?;
    let mut found: Vec<HostPath> = Vec::new();
    for handler in all.iter().take(HANDLERS) {
        let qemu = by_handler(root, handler)?.qemu;
        found.extend(qemu.filter(|qemu| !found.contains(qemu)));
    }
    Ok(found)
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
