//! The classes, and what each needs of a Kata installation.
//!
//! Names and files are those of Kata Containers 4.1 (`tools/packaging/kata-deploy`, `src/runtime/Makefile`).

use serde::Serialize;

/// The patterns of annotations that containerd hands to the sandbox. It hands on no others: Kata's own, and the documented
/// `cdi.k8s.io/gpu`.
pub const POD_ANNOTATIONS: [&str; 2] = ["io.katacontainers.*", "cdi.k8s.io/*"];

/// A Kata installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    /// The folder that it is in; kata-deploy's is [`Provider::DEFAULT_PREFIX`].
    pub prefix: String,
    /// Which of Kata's runtimes is used.
    pub runtime: Runtime,
}

/// One of Kata's runtimes. They read the same configuration file with different keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Runtime {
    /// `src/runtime`, in Go.
    #[default]
    Go,
    /// `src/runtime-rs`, in Rust.
    Rust,
}

impl Provider {
    /// Where kata-deploy installs, and what the paths in published configurations begin with.
    pub const DEFAULT_PREFIX: &str = "/opt/kata";

    /// A path below the prefix.
    /// A path below the prefix.
    pub fn path(&self, relative: &str) -> String {
        format!("{}/{relative}", self.prefix.trim_end_matches('/'))
    }
}

impl Default for Provider {
    fn default() -> Provider {
        Provider {
            prefix: Provider::DEFAULT_PREFIX.to_owned(),
            runtime: Runtime::Go,
        }
    }
}

/// What encrypts the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Tee {
    /// Nothing.
    None,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX.
    Tdx,
}

/// A class of the catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ClassKind {
    /// Its name, and its handler's.
    pub name: &'static str,
    /// What encrypts its guests.
    pub tee: Tee,
    /// Its QEMU, relative to the provider's prefix.
    pub qemu: &'static str,
    /// Its firmware, relative to the provider's prefix.
    pub firmware: &'static str,
}

/// A file that a class needs on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequiredFile {
    /// In words.
    pub what: &'static str,
    /// Where.
    pub path: String,
    /// Whether it is a program.
    pub executable: bool,
}

const CATALOGUE: [ClassKind; 3] = [
    ClassKind {
        name: "kata-qemu-nvidia-gpu",
        tee: Tee::None,
        qemu: "bin/qemu-system-x86_64",
        firmware: "share/ovmf/OVMF.fd",
    },
    ClassKind {
        name: "kata-qemu-nvidia-gpu-snp",
        tee: Tee::Snp,
        qemu: "bin/qemu-system-x86_64-snp-experimental",
        firmware: "share/ovmf/AMDSEV.fd",
    },
    ClassKind {
        name: "kata-qemu-nvidia-gpu-tdx",
        tee: Tee::Tdx,
        qemu: "bin/qemu-system-x86_64-tdx-experimental",
        firmware: "share/ovmf/OVMF.inteltdx.fd",
    },
];

/// Kata's containerd shims, relative to the prefix (tools/packaging/kata-deploy/binary/src, system.rs).
const SHIM: &str = "bin/containerd-shim-kata-v2";
const SHIM_RUST: &str = "runtime-rs/bin/containerd-shim-kata-v2";

/// All classes.
pub fn catalogue() -> &'static [ClassKind] {
    &CATALOGUE
}

/// The class of a name.
pub fn find(name: &str) -> Option<&'static ClassKind> {
    CATALOGUE.iter().find(|kind| kind.name == name)
}

impl ClassKind {
    /// Kata's shim, which its handler starts.
    pub fn shim(&self, provider: &Provider) -> String {
        provider.path(match provider.runtime {
            Runtime::Go => SHIM,
            Runtime::Rust => SHIM_RUST,
        })
    }

    /// What must be on the host before the class can work.
    pub fn required_files(&self, provider: &Provider) -> Vec<RequiredFile> {
        vec![
            RequiredFile {
                what: "Kata's shim",
                path: self.shim(provider),
                executable: true,
            },
            RequiredFile {
                what: "QEMU",
                path: provider.path(self.qemu),
                executable: true,
            },
            RequiredFile {
                what: "the firmware",
                path: provider.path(self.firmware),
                executable: false,
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_names_its_own_files_below_the_prefix() {
        let provider = Provider {
            prefix: "/usr/lib/kata/".to_owned(),
            runtime: Runtime::Rust,
        };
        for kind in catalogue() {
            assert_eq!(find(kind.name), Some(kind));
            let files = kind.required_files(&provider);
            assert!(
                files.iter().all(
                    |file| file.path.starts_with("/usr/lib/kata/") && !file.path.contains("//")
                )
            );
        }
        let paths = |name: &str| {
            find(name).unwrap().required_files(&provider)[1]
                .path
                .clone()
        };
        assert_ne!(
            paths("kata-qemu-nvidia-gpu"),
            paths("kata-qemu-nvidia-gpu-snp")
        );
        assert_eq!(find("kata-qemu"), None);
    }
}
