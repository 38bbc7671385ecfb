//! What others know, handed in as data: containerd, Kata, handlers of others, CDI specs of others. And what is wanted.

use km_vfio::Address;

use crate::fact::Fact;

/// What is wanted of the host.
#[derive(Clone, Debug, Default)]
pub struct Wants {
    /// The devices that are to be passed through; none named means every GPU and NVSwitch.
    pub devices: Vec<Address>,
    /// The configured classes whose guests AMD SEV-SNP encrypts.
    pub snp: Vec<String>,
    /// The configured classes whose guests Intel TDX encrypts.
    pub tdx: Vec<String>,
}

impl Wants {
    /// Whether a class has confidential guests.
    pub fn is_confidential(&self) -> bool {
        !self.snp.is_empty() || !self.tdx.is_empty()
    }
}

/// What runs on the host besides the kernel.
#[derive(Clone, Debug)]
pub struct Software {
    /// containerd, or why it does not answer.
    pub containerd: Result<Containerd, String>,
    /// Kata.
    pub kata: Kata,
    /// The handlers that somebody else registered in containerd under names of ours, or why that is not known.
    pub handlers: Result<Vec<Handler>, String>,
    /// The CDI specs that somebody else wrote for devices of ours, or why that is not known.
    pub specs: Result<Vec<Spec>, String>,
}

/// containerd, as it answers over CRI.
#[derive(Clone, Debug)]
pub struct Containerd {
    /// Its version.
    pub version: String,
    /// Whether it injects CDI devices; `None` where it has no such setting.
    pub enable_cdi: Option<bool>,
    /// The folders that it reads specs from.
    pub spec_dirs: Vec<String>,
    /// Whether the folder of our specs is among them.
    pub reads_ours: bool,
}

/// A Kata installation.
#[derive(Clone, Debug)]
pub struct Kata {
    /// Its folder.
    pub prefix: String,
    /// Its version, `4.1.0`.
    pub version: Fact<String>,
    /// The shims that are there, by their paths: the one in Go and the one in Rust (runtime-rs).
    pub shims: Vec<String>,
    /// What the configured classes need and is not there, each a sentence; or why that is not known.
    pub missing: Result<Vec<String>, String>,
}

/// A handler of somebody else.
#[derive(Clone, Debug)]
pub struct Handler {
    /// Its name.
    pub name: String,
    /// Who registered it.
    pub who: String,
    /// In which file.
    pub file: String,
}

/// A CDI spec of somebody else.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its file.
    pub file: String,
    /// Its kind, which is the resource's name.
    pub kind: String,
}
