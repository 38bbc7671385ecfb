//! The emulator's settings file: YAML, and strict. Turns text into checked [`Device`]s; opens nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{Bar, Facts, Model};
use crate::registers::MSIX_PENDING;

/// The largest file that is read, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// MSI-X vectors that one function can have at most here: the table then fills the 64 KiB below the pending bits.
pub const MAX_VECTORS: u16 = 2048;

/// The settings file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    /// Where the control socket goes; none is made when it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,
    /// The functions to serve.
    pub devices: Vec<Device>,
}

/// One function to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// What the journal and the control socket call it.
    pub name: String,
    /// Where its vfio-user socket goes. QEMU needs an absolute path.
    pub socket: PathBuf,
    /// All that is particular to this function.
    pub function: Function,
}

/// What one function is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Function {
    /// The kind of device.
    pub model: Model,
    /// Sizes that replace the model's, by BAR index.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bars: BTreeMap<u8, Size>,
    /// MSI-X vectors instead of the model's; 0 leaves the capability out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub msix_vectors: Option<u16>,
    /// Whether it can reset itself (FLR).
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub function_level_reset: bool,
    /// Whether it starts dead: see [`crate::control`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub dead: bool,
}

fn yes() -> bool {
    true
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_false(value: &bool) -> bool {
    !value
}

/// A number of bytes, written as `16KiB`, `32MiB` or `128GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

const UNITS: [(&str, u32); 3] = [("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("size {text:?} is no number with KiB, MiB or GiB, such as 16MiB");
        let (number, shift) = UNITS
            .iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
            .ok_or_else(wrong)?;
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(wrong)?;
        Ok(Self(bytes))
    }
}

impl From<Size> for String {
    fn from(Size(bytes): Size) -> Self {
        let (unit, shift) = UNITS
            .into_iter()
            .find(|(_, shift)| bytes.trailing_zeros() >= *shift && bytes != 0)
            .unwrap_or(("KiB", 10));
        format!("{}{unit}", bytes >> shift)
    }
}

/// Why settings are refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is larger than [`MAX_BYTES`].
    #[error("the settings are {0} bytes long; at most {MAX_BYTES} are read")]
    TooLong(usize),
    /// It is no YAML, or has an unknown or a missing key.
    #[error("the settings cannot be read: {0}")]
    Yaml(#[from] Box<serde_saphyr::Error>),
    /// There is nothing to serve.
    #[error("the settings name no device")]
    Empty,
    /// Two devices have one name or one socket.
    #[error("device {0:?}: another device has this name or socket already")]
    Twice(String),
    /// A name that the control socket could not carry.
    #[error("device {0:?}: a name is 1 to 32 letters, digits and hyphens")]
    Name(String),
    /// A relative socket path.
    #[error("device {0:?}: the socket's path must be absolute, as QEMU needs it")]
    Relative(String),
    /// A BAR that the model does not have.
    #[error("device {0:?}: its model has no BAR {1}")]
    NoBar(String, u8),
    /// A size that is no power of two, or out of bounds.
    #[error("device {0:?}: BAR {1} is {2} bytes; it must be a power of two from {3} to {4}")]
    BarSize(String, u8, u64, u64, u64),
    /// More vectors than fit.
    #[error("device {0:?}: {1} MSI-X vectors; at most {2} fit in its BAR 0")]
    Vectors(String, u16, u16),
}

/// Reads and checks settings.
///
/// # Errors
/// When they are not YAML of this form, or describe what no PCI function can be. See [`Error`].
pub fn parse(text: &str) -> Result<Settings, Error> {
    if text.len() > MAX_BYTES {
        return Err(Error::TooLong(text.len()));
    }
    let settings: Settings = serde_saphyr::from_str(text).map_err(Box::new)?;
    check(&settings)?;
    Ok(settings)
}

fn check(settings: &Settings) -> Result<(), Error> {
    if settings.devices.is_empty() {
        return Err(Error::Empty);
    }
    let mut names = BTreeSet::new();
    let mut sockets: BTreeSet<_> = settings.control.iter().collect();
    for device in &settings.devices {
        if !is_name(&device.name) {
            return Err(Error::Name(device.name.clone()));
        }
        if !device.socket.is_absolute() {
            return Err(Error::Relative(device.name.clone()));
        }
        if !names.insert(&device.name) || !sockets.insert(&device.socket) {
            return Err(Error::Twice(device.name.clone()));
        }
        device.function.check(&device.name)?;
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    (1..=32).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

impl Function {
    /// A function that is as its model is.
    pub fn new(model: Model) -> Self {
        Self {
            model,
            bars: BTreeMap::new(),
            msix_vectors: None,
            function_level_reset: true,
            dead: false,
        }
    }

    /// What is fixed for its model.
    pub fn facts(&self) -> Facts {
        self.model.facts()
    }

    /// Its base address registers, with the sizes that it really has.
    pub fn bars(&self) -> Vec<Bar> {
        let sized = |bar: &Bar| Bar {
            size: self.bars.get(&bar.index).map_or(bar.size, |size| size.0),
            ..*bar
        };
        self.facts().bars.iter().map(sized).collect()
    }

    /// Its MSI-X vectors.
    pub fn vectors(&self) -> u16 {
        self.msix_vectors.unwrap_or(self.facts().vectors)
    }

    /// Checks what a file may have changed of the model; `name` is for the error.
    ///
    /// # Errors
    /// When no PCI function can be so.
    pub fn check(&self, name: &str) -> Result<(), Error> {
        let bars = self.bars();
        for index in self.bars.keys() {
            if !bars.iter().any(|bar| bar.index == *index) {
                return Err(Error::NoBar(name.to_owned(), *index));
            }
        }
        for bar in &bars {
            // A page is the least that can be handed to a virtual machine; 2^39 is what an emulated processor can address.
            let (least, most) = if bar.wide { (12, 39) } else { (12, 31) };
            let (least, most) = (1_u64 << least, 1_u64 << most);
            if !bar.size.is_power_of_two() || !(least..=most).contains(&bar.size) {
                let (index, size) = (bar.index, bar.size);
                return Err(Error::BarSize(name.to_owned(), index, size, least, most));
            }
        }
        // The pending bits, after the table, are the last thing that needs room: 8 bytes for each 64 vectors.
        let room = bars.first().map_or(0, |bar| bar.size);
        let pending = u64::from(MSIX_PENDING) + u64::from(MAX_VECTORS) / 8;
        let fit = if room >= pending { MAX_VECTORS } else { 0 };
        if self.vectors() > fit {
            return Err(Error::Vectors(name.to_owned(), self.vectors(), fit));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
control: /run/box/control.sock
devices:
- name: gpu0
  socket: /run/box/gpu0.sock
  function:
    model: h100-pcie
    bars: {2: 256MiB}
    msixVectors: 2
";

    #[test]
    fn settings_are_read_and_override_the_model() {
        let settings = parse(GOOD).unwrap();
        let function = &settings.devices[0].function;
        let sizes: Vec<u64> = function.bars().iter().map(|bar| bar.size).collect();
        assert_eq!(sizes, [16 << 20, 256 << 20, 32 << 20]);
        assert_eq!(function.vectors(), 2);
        assert!(function.function_level_reset);
    }

    #[test]
    fn settings_survive_being_written_and_read() {
        let settings = parse(GOOD).unwrap();
        let text = serde_saphyr::to_string(&settings).unwrap();
        assert_eq!(parse(&text).unwrap(), settings);
    }

    #[test]
    fn every_model_is_fine_as_it_is() {
        for model in Model::ALL {
            Function::new(model).check("it").unwrap();
        }
    }

    #[test]
    fn wrong_settings_say_what_is_wrong() {
        for (from, to, says) in [
            ("model: h100-pcie", "model: h100", "h100"),
            ("msixVectors", "msixVector", "msixVector"),
            ("256MiB", "256MB", "256MB"),
            ("256MiB", "3MiB", "power of two"),
            ("{2:", "{3:", "no BAR 3"),
            ("msixVectors: 2", "msixVectors: 2049", "at most 2048"),
            ("name: gpu0", "name: gpu 0", "letters, digits"),
            ("socket: /", "socket: ", "absolute"),
            ("gpu0.sock", "control.sock", "already"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(says), "{to}: {error}");
        }
        assert!(matches!(parse("devices: []"), Err(Error::Empty)));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn sizes_survive_being_written_and_read(shift in 10_u32..50) {
            let size = Size(1 << shift);
            assert_eq!(Size::try_from(String::from(size)), Ok(size));
        }
    }
}
