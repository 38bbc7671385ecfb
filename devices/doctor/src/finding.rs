//! What a check says: its name, its state, its words, its evidence and what to do. Plain data.

use std::fmt::Display;

use serde::{Serialize, Serializer};

/// The longest value of an evidence that is kept, in characters.
const VALUE: usize = 300;

macro_rules! checks {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $title:literal;)*) => {
        /// A check, by what it is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Check { $($(#[$doc])* $name,)* }

        impl Check {
            /// All checks, in the order in which they are told.
            pub const ALL: &[Check] = &[$(Check::$name),*];

            /// Its name, for people and machines.
            pub fn name(self) -> &'static str {
                match self { $(Check::$name => $word,)* }
            }

            /// What it asks, in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Check::$name => $title,)* }
            }
        }
    };
}

checks! {
    /// The machine has the devices that are wanted, and they answer.
    Devices = "devices", "GPUs are there and answer";
    /// The processor and the kernel can run virtual machines.
    Kvm = "kvm", "Virtual machines can run";
    /// The IOMMU is on.
    Iommu = "iommu", "The IOMMU is on";
    /// No port keeps devices from having groups of their own.
    Acs = "acs", "PCIe ports isolate devices (ACS)";
    /// No group is shared with a device of somebody else.
    Groups = "groups", "IOMMU groups are not shared";
    /// Every BAR has an address.
    BarSpace = "bar-space", "BARs have addresses";
    /// The kernel has VFIO.
    VfioModules = "vfio-modules", "The kernel has VFIO";
    /// The kernel has iommufd, where it is needed.
    Iommufd = "iommufd", "The kernel has iommufd";
    /// No driver of the host has a wanted device.
    Drivers = "drivers", "VFIO has the devices";
    /// The host can talk to guests.
    VhostVsock = "vhost-vsock", "Kata can talk to its guests (vhost-vsock)";
    /// Guests can have a fast network.
    VhostNet = "vhost-net", "Guests get a network from the kernel (vhost-net)";
    /// Guest memory can be pinned.
    Memlock = "memlock", "Guest memory can be pinned";
    /// AMD SEV-SNP is on, where a class asks for it.
    SevSnp = "sev-snp", "AMD SEV-SNP is on";
    /// Intel TDX is on, where a class asks for it.
    Tdx = "tdx", "Intel TDX is on";
    /// Kata can ask the kubelet for a pod's devices.
    PodResources = "pod-resources", "The kubelet tells a pod's devices";
    /// The kubelet waits long enough.
    KubeletTimeout = "kubelet-timeout", "The kubelet waits for large guests";
    /// containerd injects CDI devices.
    ContainerdCdi = "containerd-cdi", "containerd injects CDI devices";
    /// Kata is there, whole and new enough.
    Kata = "kata", "Kata is there and new enough";
    /// NVIDIA's device plugin does not serve the same devices.
    NvidiaPlugin = "nvidia-plugin", "No other plugin serves these devices";
    /// Nobody else has registered our handlers.
    Handlers = "handlers", "No one else has our handlers";
}

impl Serialize for Check {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It works, or works for some; somebody should look.
    Warning,
    /// A GPU cannot be passed through because of it.
    Failed,
    /// It could not be found out. That is no failure, and no success.
    CouldNotCheck,
    /// It does not matter on this host.
    NotApplicable,
}

impl State {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Failed => "failed",
            State::CouldNotCheck => "could not check",
            State::NotApplicable => "not applicable",
        }
    }
}

/// What a file said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// The file, or whoever else was asked.
    pub source: String,
    /// What it said, made printable and cut where it is long.
    pub value: String,
}

/// What a check says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which one.
    pub check: Check,
    /// How it stands.
    pub state: State,
    /// Why, in a sentence or two.
    pub message: String,
    /// What that rests on.
    pub evidence: Vec<Evidence>,
    /// What to do, each a command or a sentence; nothing where all is well.
    pub fix: Vec<String>,
}

impl Finding {
    pub(crate) fn new(check: Check, state: State, message: impl Into<String>) -> Finding {
        Finding {
            check,
            state,
            message: km_vfio::printable(&message.into()),
            evidence: Vec::new(),
            fix: Vec::new(),
        }
    }

    pub(crate) fn ok(check: Check, message: impl Into<String>) -> Finding {
        Finding::new(check, State::Ok, message)
    }

    pub(crate) fn warning(check: Check, message: impl Into<String>) -> Finding {
        Finding::new(check, State::Warning, message)
    }

    pub(crate) fn failed(check: Check, message: impl Into<String>) -> Finding {
        Finding::new(check, State::Failed, message)
    }

    pub(crate) fn not_applicable(check: Check, message: impl Into<String>) -> Finding {
        Finding::new(check, State::NotApplicable, message)
    }

    /// It could not be found out, for this reason.
    pub(crate) fn unknown(check: Check, reason: impl Display) -> Finding {
        Finding::new(check, State::CouldNotCheck, reason.to_string())
    }

    /// With what a file said.
    pub(crate) fn seen(mut self, source: impl Into<String>, value: impl Display) -> Finding {
        let value: String = value.to_string().chars().take(VALUE).collect();
        self.evidence.push(Evidence {
            source: km_vfio::printable(&source.into()),
            value: km_vfio::printable(value.trim()),
        });
        self
    }

    /// With something to do.
    pub(crate) fn fix(mut self, what: impl Into<String>) -> Finding {
        self.fix.push(km_vfio::printable(&what.into()));
        self
    }
}
