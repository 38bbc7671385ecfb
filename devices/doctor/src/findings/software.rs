//! containerd, Kata, and who else does the same work on this host.

use km_vfio::Kind;

use super::{Case, list};
use crate::fact::Found;
use crate::finding::{Check, Finding, State};

/// The first Kata that asks the kubelet for a pod's devices and attaches them before the guest starts.
const ASKS: [u64; 2] = [3, 24];

/// The first Kata that does not take an NVSwitch for a bridge (kata-containers#13540).
const SWITCHES: [u64; 2] = [4, 1];

pub(super) fn containerd_cdi(case: Case<'_>) -> Finding {
    let check = Check::ContainerdCdi;
    let containerd = match &case.software.containerd {
        Ok(containerd) => containerd,
        Err(reason) => {
            return Finding::unknown(check, format!("containerd could not be asked: {reason}"))
                .fix("Start containerd, or name its socket in containerd.socket.");
        }
    };
    let version = &containerd.version;
    let seen = |finding: Finding| {
        let enabled = containerd
            .enable_cdi
            .map_or("no such setting".to_owned(), |on| on.to_string());
        finding.seen(
            "containerd, over CRI",
            format!(
                "version {version}, enable_cdi: {enabled}, cdi_spec_dirs: {}",
                list(&containerd.spec_dirs)
            ),
        )
    };
    // Kata that asks the kubelet reads the specs itself.
    let (state, note) = match version_of(case) {
        Some(kata) if kata >= ASKS => (
            State::Warning,
            "Kata reads the specs itself, so GPUs reach their guests all the same.",
        ),
        _ => (
            State::Failed,
            "A container starts without its device, and without an error.",
        ),
    };
    match containerd.enable_cdi {
        None => seen(Finding::new(check, state, format!("containerd {version} cannot inject CDI devices. {note}")))
            .fix("Use containerd 1.7 or later; NVIDIA has tested 2.1."),
        Some(false) => seen(Finding::new(check, state, format!("containerd {version} does not inject CDI devices. {note}")))
            .fix("Set containerd.enableCdi: true in the configuration, and run: kata-manager apply. Where somebody set enable_cdi = false in containerd's own file, change it there."),
        Some(true) if !containerd.reads_ours => seen(Finding::new(
            check,
            state,
            format!("containerd {version} injects CDI devices, but reads specs from other folders than ours. {note}"),
        ))
        .fix("Set containerd.cdiSpecDirs or devices.cdiDir, so that they meet."),
        Some(true) => seen(Finding::ok(check, format!("containerd {version} injects CDI devices."))),
    }
}

fn version_of(case: Case<'_>) -> Option<[u64; 2]> {
    let text = case.software.kata.version.get()?;
    let mut parts = text
        .trim()
        .split(['.', '-', '+', '~'])
        .map(|part| part.parse().ok());
    Some([parts.next()??, parts.next()??])
}

pub(super) fn kata(case: Case<'_>) -> Finding {
    let check = Check::Kata;
    let kata = &case.software.kata;
    let install = "Install Kata (kata-deploy, or its static archive) there, or name its folder in provider.prefix.";
    if kata.shims.is_empty() {
        return Finding::failed(check, format!("Kata is not in {}.", kata.prefix))
            .seen(
                &kata.prefix,
                "no containerd-shim-kata-v2 in bin or runtime-rs/bin",
            )
            .fix(install);
    }
    let missing = match &kata.missing {
        Ok(missing) => missing,
        Err(reason) => {
            return Finding::unknown(
                check,
                format!(
                    "Whether the configured classes have their files could not be seen: {reason}"
                ),
            );
        }
    };
    if !missing.is_empty() {
        let finding = Finding::failed(check, "A configured class needs a file that is not there.");
        return missing
            .iter()
            .fold(finding, |finding, what| finding.seen(&kata.prefix, what))
            .fix(install);
    }
    let fact = &kata.version;
    let shims = list(&kata.shims);
    let Some(version) = version_of(case) else {
        let reason = match &fact.found {
            Found::Absent => format!("{} is not there", fact.source),
            Found::Unknown(reason) => format!("{}: {reason}", fact.source),
            Found::Is(text) => format!("{} is no version: {text:?}", fact.source),
        };
        return Finding::unknown(
            check,
            format!("Kata is there, and its version is not known. {reason}"),
        )
        .seen(&kata.prefix, shims);
    };
    let text = fact.get().cloned().unwrap_or_default();
    let seen = |finding: Finding| finding.seen(&fact.source, &text).seen(&kata.prefix, &shims);
    let switches = case
        .wanted()
        .iter()
        .any(|function| function.kind == Kind::NvSwitch);
    if version < ASKS {
        return seen(Finding::warning(
            check,
            format!("Kata {text} does not ask the kubelet for a pod's devices: pods must name them by annotation."),
        ))
        .fix("Use Kata 3.24 or later, with Kubernetes 1.34 or later.");
    }
    if switches && version < SWITCHES {
        return seen(Finding::warning(
            check,
            format!("Kata {text} takes NVSwitches for bridges and leaves them out of guests."),
        ))
        .fix("Use Kata 4.1 or later.");
    }
    seen(Finding::ok(check, format!("Kata {text}.")))
}

pub(super) fn nvidia_plugin(case: Case<'_>) -> Finding {
    let check = Check::NvidiaPlugin;
    let kubelet = &case.host.kubelet;
    let plugins = &case.host.nvidia_plugins;
    // NVIDIA/sandbox-device-plugin names its socket sandbox-<resource>.sock.
    let sockets = kubelet.plugins.get().into_iter().flatten();
    let sockets = sockets.filter(|name| name.starts_with("sandbox-") && name.ends_with(".sock"));
    let sockets: Vec<&String> = sockets.collect();
    let numbers = plugins.get().cloned().unwrap_or_default();
    let specs = case.software.specs.as_deref().unwrap_or_default();
    if sockets.is_empty() && numbers.is_empty() && specs.is_empty() {
        let unknown = kubelet.plugins.unknown().or_else(|| plugins.unknown());
        return match (&unknown, &case.software.specs) {
            (Some(reason), _) | (None, Err(reason)) => Finding::unknown(check, reason.clone()),
            (None, Ok(_)) => Finding::ok(
                check,
                "NVIDIA's Sandbox Device Plugin is not here, and no one else has specs of these devices.",
            ),
        };
    }
    let mut finding = Finding::warning(
        check,
        "Somebody else gives the same devices away, such as NVIDIA's Sandbox Device Plugin: two of them cannot serve one resource.",
    );
    for name in sockets {
        finding = finding.seen(&kubelet.plugins.source, name);
    }
    for number in numbers {
        finding = finding.seen("/proc", format!("process {number}"));
    }
    for spec in specs {
        finding = finding.seen(&spec.file, format!("kind {}", spec.kind));
    }
    finding
        .fix("Let one of them do it. Off the node with the other: kubectl label node NODE nvidia.com/gpu.deploy.kata-sandbox-device-plugin=false nvidia.com/gpu.deploy.sandbox-device-plugin=false --overwrite; then remove the files that it left.")
        .fix("Or give another class to ours: devices.gpuAlias.")
}

pub(super) fn handlers(case: Case<'_>) -> Finding {
    let check = Check::Handlers;
    match &case.software.handlers {
        Err(reason) => Finding::unknown(
            check,
            format!("containerd's configuration could not be read: {reason}"),
        ),
        Ok(handlers) => match handlers.first() {
            None => Finding::ok(
                check,
                "No handler of a configured class is somebody else's.",
            ),
            Some(first) => {
                let finding = Finding::warning(
                    check,
                    format!(
                        "{} has registered {}, and a handler can only be one's: apply refuses it.",
                        first.who, first.name
                    ),
                );
                handlers
                    .iter()
                    .fold(finding, |finding, handler| {
                        finding.seen(&handler.file, format!("{} by {}", handler.name, handler.who))
                    })
                    .fix("Give the class another name in its \"handler\", or take theirs over with: kata-manager apply --adopt")
            }
        },
    }
}
