//! modules.alias and pci.ids.

use std::collections::BTreeSet;

use km_vfio::{alias, ids};

pub(crate) fn run(bytes: &[u8]) {
    let _ = alias::best_module(
        bytes,
        "pci:v000010DEd00002331sv000010DEsd00001626bc03sc02i00",
    );
    let _ = ids::Names::parse(bytes, &BTreeSet::new());
    let _ = ids::model(&String::from_utf8_lossy(bytes));
}
