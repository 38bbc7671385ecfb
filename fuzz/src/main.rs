//! The fuzz targets; `KM_FUZZ_TARGET` says which one runs. libFuzzer has the arguments, and `main`.
#![no_main]

mod targets {
    pub(crate) mod bundle;
    pub(crate) mod cdi;
    pub(crate) mod containerd_edit;
    pub(crate) mod containerd_imports;
    pub(crate) mod credentials;
    pub(crate) mod devices;
    pub(crate) mod flatten;
    pub(crate) mod hosts_toml;
    pub(crate) mod index;
    pub(crate) mod kata_configuration;
    pub(crate) mod manifest;
    pub(crate) mod plugin;
    pub(crate) mod podresources;
    pub(crate) mod qemu_argv;
    pub(crate) mod reference;
    pub(crate) mod signatures;
    pub(crate) mod sysfs;
    pub(crate) mod unpack;
}

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("bundle", targets::bundle::run),
    ("cdi", targets::cdi::run),
    ("containerd_edit", targets::containerd_edit::run),
    ("containerd_imports", targets::containerd_imports::run),
    ("credentials", targets::credentials::run),
    ("devices", targets::devices::run),
    ("flatten", targets::flatten::run),
    ("hosts_toml", targets::hosts_toml::run),
    ("index", targets::index::run),
    ("kata_configuration", targets::kata_configuration::run),
    ("manifest", targets::manifest::run),
    ("plugin", targets::plugin::run),
    ("podresources", targets::podresources::run),
    ("qemu_argv", targets::qemu_argv::run),
    ("reference", targets::reference::run),
    ("signatures", targets::signatures::run),
    ("sysfs", targets::sysfs::run),
    ("unpack", targets::unpack::run),
];

fn chosen() -> Target {
    let name = std::env::var("KM_FUZZ_TARGET").unwrap_or_default();
    match TARGETS.iter().find(|(known, _)| *known == name) {
        Some((_, target)) => *target,
        None => panic!(
            "KM_FUZZ_TARGET={name}: there are {:?}",
            TARGETS.iter().map(|(known, _)| known).collect::<Vec<_>>()
        ),
    }
}

fuzz_target!(|bytes: &[u8]| {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    CHOSEN.get_or_init(chosen)(bytes);
});
