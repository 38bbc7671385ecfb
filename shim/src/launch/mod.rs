//! `kata-manager-qemu`: stands where Kata expects QEMU, holds the arguments of the launch against what its sandbox claimed, and
//! becomes QEMU.
//!
//! - [`argv`]: QEMU's command line, as far as it concerns devices.
//! - [`view`]: the devices, ports and objects in it.
//! - [`check`]: is what was claimed there, once, where it belongs, and nothing else?
//! - [`inject`]: ports and devices for a Kata that attaches none.
//! - [`generation`]: the QEMU that a generation means.
//! - [`tune`]: properties for devices that are there.
//!
//! All of these are data in, data out, but for [`generation`], which reads its file. Only [`run`] looks at the node and becomes a program.
//!
//! It must not know who started the sandbox, or how its devices were chosen: the claim says which they are.

pub mod argv;
pub mod check;
pub mod generation;
pub mod inject;
mod run;
pub mod tune;
pub mod view;

use std::ffi::OsString;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use run::run;

/// What the program is called where it stands in QEMU's place.
pub const PROGRAM: &str = "kata-manager-qemu";

/// Whether a program was started by that name. Kata follows links before it starts QEMU (`ResolvePath` in
/// src/runtime/pkg/katautils/config.go; `resolve_path!` in src/libs/kata-types/src/config/hypervisor/qemu.rs), so the file itself must have it.
pub fn is_called(argv: &[OsString]) -> bool {
    let name = argv
        .first()
        .and_then(|program| Path::new(program).file_name());
    name.is_some_and(|name| name == PROGRAM)
}

/// What is done with a launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// It is checked, and refused when something is wrong.
    #[default]
    Check,
    /// Devices that Kata did not attach are added; then it is checked.
    Inject,
    /// It is checked, and devices get properties that Kata cannot give them.
    Tune,
}

/// Settings of launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Launch {
    /// What is done.
    #[serde(default)]
    pub mode: Mode,
    /// The clique that `tune` puts GPUs of legacy groups into, 0 to 15, so that the guest's driver tries peer-to-peer between them
    /// (QEMU, hw/vfio/pci-quirks.c). Whether the host's switches can do that is for the user to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clique: Option<u8>,
}

/// A launch that is not made: everything that is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct Refused(pub Vec<String>);

impl Refused {
    /// With one reason.
    pub fn because(reason: impl Into<String>) -> Refused {
        Refused(vec![reason.into()])
    }
}
