//! The kinds of device that can be emulated, and what is fixed for each. Knows no socket and no register behaviour.
//!
//! Device IDs and names are those of the PCI ID database (pci.ids), BAR layouts those that `lspci -v` shows of the real cards.
//! Real cards come with many subsystem IDs; one of them is here.

use serde::{Deserialize, Serialize};

/// NVIDIA's vendor ID.
pub const NVIDIA: u16 = 0x10de;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Model {
    /// GH100 \[H100 PCIe\], a 3D controller.
    H100Pcie,
    /// GH100 \[H100 SXM5 80GB\], a 3D controller.
    H100Sxm,
    /// GB100 \[B200\], a 3D controller.
    B200,
    /// GH100 \[H100 NVSwitch\], a bridge of the class "other".
    Nvswitch,
    /// The audio function that display-capable GPUs carry beside function 0.
    Audio,
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its index in the header: 0 to 5. A 64-bit register takes the next index too.
    pub index: u8,
    /// Bytes, a power of two.
    pub size: u64,
    /// 64-bit and prefetchable; otherwise 32-bit and neither.
    pub wide: bool,
}

/// What is fixed for a kind of device.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// PCI device ID; the vendor is [`NVIDIA`].
    pub device: u16,
    /// Subsystem device ID; the subsystem vendor is [`NVIDIA`].
    pub subsystem: u16,
    /// Class, subclass and programming interface, as one 24-bit number.
    pub class: u32,
    /// Base address registers.
    pub bars: &'static [Bar],
    /// MSI-X vectors.
    pub vectors: u16,
    /// The register at BAR 0 offset 0 that names the chip. The NVSwitch's is that of LS10.
    pub boot0: Option<u32>,
}

const fn wide(index: u8, size: u64) -> Bar {
    Bar {
        index,
        size,
        wide: true,
    }
}

static HOPPER: [Bar; 3] = [wide(0, 16 * MIB), wide(2, 128 * GIB), wide(4, 32 * MIB)];
static BLACKWELL: [Bar; 3] = [wide(0, 64 * MIB), wide(2, 256 * GIB), wide(4, 32 * MIB)];
static SWITCH: [Bar; 1] = [wide(0, 32 * MIB)];

impl Model {
    /// Every model.
    pub const ALL: [Self; 5] = [
        Self::H100Pcie,
        Self::H100Sxm,
        Self::B200,
        Self::Nvswitch,
        Self::Audio,
    ];

    /// What is fixed for this kind.
    pub fn facts(self) -> Facts {
        match self {
            Self::H100Pcie => Facts {
                device: 0x2331,
                subsystem: 0x1626,
                class: 0x03_0200,
                bars: &HOPPER,
                vectors: 6,
                boot0: Some(0x1800_00a1),
            },
            Self::H100Sxm => Facts {
                device: 0x2330,
                subsystem: 0x16c1,
                class: 0x03_0200,
                bars: &HOPPER,
                vectors: 6,
                boot0: Some(0x1800_00a1),
            },
            Self::B200 => Facts {
                device: 0x2901,
                subsystem: 0x1999,
                class: 0x03_0200,
                bars: &BLACKWELL,
                vectors: 6,
                boot0: Some(0x1a00_00a1),
            },
            Self::Nvswitch => Facts {
                device: 0x22a3,
                subsystem: 0x1796,
                class: 0x06_8000,
                bars: &SWITCH,
                vectors: 6,
                boot0: Some(0x0070_00a1),
            },
            Self::Audio => Facts {
                device: 0x22bb,
                subsystem: 0x1626,
                class: 0x04_0300,
                bars: &[Bar {
                    index: 0,
                    size: 16 * KIB,
                    wide: false,
                }],
                vectors: 0,
                boot0: None,
            },
        }
    }
}
