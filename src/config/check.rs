//! What a configuration must keep to that its types cannot say. Reads no file.

use std::collections::{BTreeMap, BTreeSet};

use super::hint::{line_of, nearest};
use super::{Config, LaunchMode, RATE_LIMIT_MIN, RestartMode, RuntimeClass, Verify, VerifyPolicy};
use crate::failure::{Failure, Kind};

pub(super) fn check(text: &str, config: &Config) -> Result<(), Failure> {
    let bad = |message: String| Err(Failure::new(Kind::Configuration, message));
    if let Some(rate) = config.registry.rate_limit
        && rate < RATE_LIMIT_MIN
    {
        return bad(format!(
            "registry.rateLimit is {rate} bytes a second; it must be {RATE_LIMIT_MIN} or more"
        ));
    }
    let devices = &config.devices;
    if let Err(error) = km_cdi::devices::Naming::new(&devices.gpu_alias, &devices.nvswitch_alias) {
        return bad(format!(
            "devices.gpuAlias or devices.nvswitchAlias: {error}"
        ));
    }
    let mut names = BTreeSet::new();
    let mut handlers = BTreeMap::new();
    check_verify(config, None, "verify")?;
    for class in &config.runtime_classes {
        let own = class.artifacts.as_ref();
        if let Some(own) = own.and_then(|artifacts| artifacts.verify.as_ref()) {
            check_verify(
                config,
                Some(own),
                &format!("artifacts.verify of the class {:?}", class.name),
            )?;
        }
        let name = &class.name;
        let in_image = own.is_some_and(|artifacts| artifacts.image_folder.is_some());
        let own = own.and_then(|artifacts| artifacts.verify.as_ref());
        if in_image && config.signing_keys(own).is_some() {
            // A signature of an image says nothing of a part of it, once the rest is gone.
            return bad(format!(
                "{}the class {name:?} has an artifacts.imageFolder, and signatures are demanded of it: they are of whole images, and cannot be verified again for a folder; publish the folder as a signed artifact, or pin the image by its digest and set the class's artifacts.verify.policy to \"none\"",
                line_of(text, name, 1)
            ));
        }
        if let Err(error) = km_artifacts::check_class(name) {
            return Err(Failure::because(
                Kind::Configuration,
                format!(
                    "{}the class name {name:?} cannot be used",
                    line_of(text, name, 1)
                ),
                error,
            ));
        }
        if !names.insert(name) {
            return bad(format!(
                "{}the class {name:?} is there twice: each class needs a name of its own",
                line_of(text, name, 2)
            ));
        }
        if let Some(other) = handlers.insert(class.handler().to_owned(), name) {
            return bad(format!(
                "the classes {other:?} and {name:?} have the same handler {:?}: give one of them another \"handler\"",
                class.handler()
            ));
        }
        check_kind(text, class)?;
        check_launch(text, class)?;
    }
    if config.registry.client_certificate_file.is_some()
        != config.registry.client_key_file.is_some()
    {
        return bad("registry.clientCertificateFile and registry.clientKeyFile belong together: give both or neither".to_owned());
    }
    if config.containerd.restart.mode == RestartMode::Command
        && config.containerd.restart.command.is_empty()
    {
        return bad("containerd.restart.mode is \"command\", and containerd.restart.command is empty: give the program and its arguments".to_owned());
    }
    Ok(())
}

fn check_verify(config: &Config, own: Option<&Verify>, setting: &str) -> Result<(), Failure> {
    let verify = own.unwrap_or(&config.verify);
    let problem = match verify.policy {
        VerifyPolicy::None if own.is_some() && !verify.keys.is_empty() => {
            "lists keys, and its policy \"none\" asks nobody: set policy to \"key\", or leave the keys out"
        }
        VerifyPolicy::Key if config.signing_keys(own).is_some_and(<[_]>::is_empty) => {
            "has policy \"key\" and no keys: list the files with your public keys"
        }
        _ => return Ok(()),
    };
    Err(Failure::new(
        Kind::Configuration,
        format!("{setting} {problem}"),
    ))
}

fn check_kind(text: &str, class: &RuntimeClass) -> Result<(), Failure> {
    let known: Vec<&str> = km_runtimeclasses::catalogue()
        .iter()
        .map(|kind| kind.name)
        .collect();
    let name = &class.name;
    let bad = |message: String| {
        Err(Failure::new(
            Kind::Configuration,
            format!("{}{message}", line_of(text, name, 1)),
        ))
    };
    let wanted = class.like.as_deref().unwrap_or(name);
    let is_known = km_runtimeclasses::find(wanted).is_some();
    let hint = nearest(wanted, &known)
        .map(|near| format!(" (did you mean {near:?}?)"))
        .unwrap_or_default();
    match (&class.runtime_type, &class.artifacts) {
        (Some(_), _) if class.like.is_some() => bad(format!(
            "the class {name:?} has both \"like\" and \"runtimeType\": keep one of them"
        )),
        (Some(_), _) => Ok(()),
        (None, _) if !is_known => bad(format!(
            "the class {wanted:?} is not in the catalogue{hint}: use one of {}, or set \"like\" to one of them, or give a \"runtimeType\"",
            known.join(", ")
        )),
        (None, None) => bad(format!(
            "the class {name:?} has no artifacts.url: say which guest artifact it boots"
        )),
        (None, Some(_)) => Ok(()),
    }
}

/// The largest clique (QEMU, hw/vfio/pci-quirks.c: four bits).
const CLIQUE_MAX: u8 = 15;

fn check_launch(text: &str, class: &RuntimeClass) -> Result<(), Failure> {
    let Some(launch) = class.launch else {
        return Ok(());
    };
    let name = &class.name;
    let kind = crate::wanted::class_kind(class);
    let confidential = kind.is_some_and(|kind| kind.tee != km_runtimeclasses::Tee::None);
    let problem = match (launch.mode, launch.clique) {
        (LaunchMode::Inject | LaunchMode::Tune, _) if confidential => {
            "its guests are confidential, and other arguments would change what they are measured as: use \"check\""
        }
        (mode, _) if mode != LaunchMode::None && kind.is_none() => {
            "it has a runtimeType, and so no QEMU of Kata's: leave launch out"
        }
        (mode, _) if mode != LaunchMode::None && class.handler_settings.runtime_path.is_some() => {
            "its handlerSettings.runtimePath puts another shim in the place of ours, without which nothing says what a launch must have: leave one of them out"
        }
        (LaunchMode::Tune, Some(clique)) if clique > CLIQUE_MAX => "launch.clique is 0 to 15",
        (LaunchMode::Check | LaunchMode::Inject | LaunchMode::None, Some(_)) => {
            "launch.clique goes with mode \"tune\" alone"
        }
        _ => return Ok(()),
    };
    Err(Failure::new(
        Kind::Configuration,
        format!(
            "{}the class {name:?} cannot have this launch: {problem}",
            line_of(text, name, 1)
        ),
    ))
}
