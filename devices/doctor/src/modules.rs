//! Kernel modules: which are loaded, and which the kernel's package has. Must not load any.

use std::collections::BTreeMap;

use crate::fact::{Fact, Found, Reader};

/// The modules that checks ask for.
const WANTED: [&str; 7] = [
    "iommufd",
    "kvm_amd",
    "kvm_intel",
    "vfio_iommu_type1",
    "vfio_pci",
    "vhost_net",
    "vhost_vsock",
];

/// The most of `modules.dep` that is read, in bytes. Debian's for 6.12 has less than 1 MiB.
const LIMIT: usize = 16 << 20;

/// Whether the kernel has a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Loaded, or part of the kernel itself.
    Loaded,
    /// Installed, and not loaded yet.
    Installed,
    /// Not installed for the running kernel.
    Missing,
    /// That could not be found out.
    Unknown(String),
}

/// The kernel's modules, as far as checks ask for them.
#[derive(Clone, Debug)]
pub struct Modules {
    /// The kernel's release.
    pub release: Fact<String>,
    all: BTreeMap<&'static str, (String, Presence)>,
}

impl Modules {
    pub(crate) fn observe(reader: Reader<'_>) -> Modules {
        let release = reader.attribute("/proc/sys/kernel/osrelease");
        let lists = match release.get() {
            Some(release) if is_release(release) => ["modules.dep", "modules.builtin"]
                .map(|name| reader.text(&format!("/lib/modules/{release}/{name}"), LIMIT)),
            _ => {
                let reason = "the kernel's release is not known".to_owned();
                [0, 1].map(|_| Fact::new("/lib/modules", Found::Unknown(reason.clone())))
            }
        };
        let all = WANTED.iter().map(|name| {
            let folder = format!("/sys/module/{name}");
            (*name, presence(reader, name, folder, &lists))
        });
        Modules {
            all: all.collect(),
            release,
        }
    }

    /// Whether the kernel has a module, and the file that says so.
    pub fn get(&self, name: &str) -> (&str, Presence) {
        match self.all.get(name) {
            Some((source, presence)) => (source, presence.clone()),
            None => ("/sys/module", Presence::Unknown("not looked at".to_owned())),
        }
    }
}

fn presence(
    reader: Reader<'_>,
    name: &str,
    folder: String,
    lists: &[Fact<String>; 2],
) -> (String, Presence) {
    if reader.names(&folder).get().is_some() {
        return (folder, Presence::Loaded);
    }
    let [installed, built_in] = lists;
    if built_in.get().is_some_and(|text| lists_module(text, name)) {
        return (built_in.source.clone(), Presence::Loaded);
    }
    let presence = match &installed.found {
        Found::Is(text) if lists_module(text, name) => Presence::Installed,
        // A file that lists no module at all is none of the kernel's.
        Found::Is(text) if !text.contains(".ko") => {
            Presence::Unknown(format!("{} lists no modules", installed.source))
        }
        Found::Is(_) => Presence::Missing,
        Found::Absent => Presence::Unknown(format!("{} is not there", installed.source)),
        Found::Unknown(reason) => Presence::Unknown(format!("{}: {reason}", installed.source)),
    };
    (installed.source.clone(), presence)
}

/// Whether `modules.dep` (`kernel/.../vfio-pci.ko.zst: ...`) or `modules.builtin` (`kernel/.../vfio-pci.ko`) has a module
/// (modules.dep(5)). In file names `-` and `_` mean the same.
fn lists_module(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split_once(".ko")
            .is_some_and(|(stem, _)| stem.replace('-', "_") == name)
    })
}

/// Whether a text can be a kernel's release, and so a part of a path.
fn is_release(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+~".contains(&byte);
    !text.is_empty() && text.len() < 128 && !text.starts_with('.') && text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_whatever_they_are_packed_with() {
        let text = "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/drivers/vfio/vfio.ko.zst\nkernel/x/vhost_vsock.ko:\n";
        assert!(lists_module(text, "vfio_pci") && lists_module(text, "vhost_vsock"));
        // What another one needs is not what is there.
        assert!(!lists_module(text, "vfio") && !lists_module(text, "vhost"));
        assert!(is_release("6.12.0-rc1+deb13-amd64") && !is_release("../../etc"));
    }
}
