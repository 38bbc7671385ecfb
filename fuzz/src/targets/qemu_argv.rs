//! QEMU's arguments, as whoever starts a sandbox may bring it about that Kata writes them: one word a line.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use km_host::claims::Device;
use km_shim::launch::argv::{Argv, Keyed};
use km_shim::launch::check::{self, Wanted};
use km_shim::launch::inject::{self, Injected};
use km_shim::launch::tune;
use km_shim::launch::view::View;
use km_topology::{Flavor, Kata, Version};

const GIVEN: &str = "0000:21:00.0";

pub(crate) fn run(bytes: &[u8]) {
    let words = bytes.split(|byte| *byte == b'\n');
    let words: Vec<OsString> = words.map(|word| OsString::from_vec(word.to_vec())).collect();
    let argv = Argv::parse(words.clone());
    assert_eq!(argv.words, words, "arguments stay as they are");
    for word in words.iter().filter_map(|word| word.to_str()) {
        if Keyed::parse(word, "driver").is_ok() {
            let changed = Keyed::with(word, "driver", "iommufd", "x,y").expect("it was read");
            let read = Keyed::parse(&changed, "driver").expect("what is written is read");
            assert_eq!(read.get("iommufd"), Some("x,y"), "{word:?} became {changed:?}");
        }
    }
    let view = View::of(&argv);
    let devices = [Device {
        address: GIVEN.to_owned(),
        class: 0x03_0200,
        iommu_group: Some(1),
        ..Device::default()
    }];
    let guarded = BTreeSet::from([GIVEN.parse().expect("an address")]);
    for flavor in [Flavor::Go, Flavor::Rust] {
        let wanted = Wanted {
            devices: &devices,
            confidential: false,
            kata: Kata {
                flavor,
                version: Version::new(4, 1),
            },
            guarded: &guarded,
        };
        let nothing = Wanted {
            devices: &[],
            ..wanted.clone()
        };
        // What is right for a sandbox that has the device is wrong for one that has none.
        if check::check(&view, &wanted).is_ok() {
            assert!(view.vfio().any(|device| device.host().is_ok()));
            assert!(check::check(&view, &nothing).is_err());
            if let Ok(words) = tune::tune(&argv, &view, &wanted, Some(1)) {
                let again = Argv::parse(words);
                assert_eq!(check::check(&View::of(&again), &wanted), Ok(()));
            }
        }
        if let Ok(Injected::Added(plan)) = inject::inject(&view, &wanted) {
            let after = Argv::parse(inject::add(&argv, &plan));
            assert!(View::of(&after).vfio().count() > view.vfio().count());
        }
    }
}
