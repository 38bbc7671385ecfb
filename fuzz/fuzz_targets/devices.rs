//! modules.alias and pci.ids.
#![no_main]

use std::collections::BTreeSet;

use km_vfio::{alias, ids};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = alias::best_module(
        bytes,
        "pci:v000010DEd00002331sv000010DEsd00001626bc03sc02i00",
    );
    let _ = ids::Names::parse(bytes, &BTreeSet::new());
    let _ = ids::model(&String::from_utf8_lossy(bytes));
});
