//! One launch from beginning to end: the sandbox's claim by the machine's name, the handler's settings by the claim, a decision,
//! and QEMU by execve(2), which keeps the process, its descriptors and its environment.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use km_host::claims::{CLAIMS_DIR, Claim, Claims, Found};
use km_host::{HostPath, Root};
use km_vfio::{Address, Inventory};

use super::argv::Argv;
use super::check::{self, Wanted};
use super::generation::Generation;
use super::inject::{self, Injected};
use super::view::View;
use super::{Mode, Refused, tune};
use crate::said::chain;
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
    let claim = claim(root, &sandbox)?;
    let settings = by_handler(root, &claim.handler)?;
    let own = Generation::load(root, &settings, claim.generation)?;
    let qemu = own.map(|own| own.qemu).or_else(|| settings.qemu.clone());
    let qemu = qemu.ok_or_else(|| format!("the settings of {} name no QEMU", claim.handler))?;
    let words =
        launch(root, argv, &claim, &settings).map_err(|refused| told(&sandbox, &refused))?;
    Ok((qemu, words))
}

fn told(sandbox: &str, refused: &Refused) -> String {
    let sandbox: String = sandbox.chars().take(76).collect();
    format!("the launch of sandbox {sandbox:?} is refused: {refused}")
}

/// What the sandbox was given. Our shim leaves a claim for each one, also for one without devices: without it, nothing says what a
/// launch may have.
fn claim(root: &Root, sandbox: &str) -> Result<Claim, String> {
    let claims = Claims::open(root).map_err(|error| chain(&error))?;
    match claims.get(sandbox).map_err(|error| chain(&error))? {
        None => Err(format!(
            "sandbox {sandbox} has no claim in {CLAIMS_DIR}, so it was not started by kata-manager's shim and what it was given is not \
             known; `kata-manager apply` puts the shim before this Kata's"
        )),
        Some(Found::Unreadable { path, problem }) => Err(format!(
            "the claim of this sandbox, {}, cannot be read: {problem}",
            path.display()
        )),
        Some(Found::Claim(claim)) if !claims.is_alive(&claim) => Err(format!(
            "the claim of sandbox {} is of one that lives no more",
            claim.sandbox
        )),
        Some(Found::Claim(claim)) => Ok(claim),
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
