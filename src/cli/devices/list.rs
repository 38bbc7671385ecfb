//! `devices list`.

use anyhow::Result;
use km_host::Root;
use km_vfio::{Function, Kind};
use serde_json::json;

use super::Looked;
use crate::cli::Global;
use crate::draw;
use crate::output;

pub(super) fn run(global: &Global) -> Result<()> {
    let looked = Looked::at(&Root::new(&global.host_root)?)?;
    let inventory = &looked.inventory;
    let body = json!({
        "devices": looked.shown(),
        "groups": inventory.groups,
        "functionsOnTheBus": inventory.scanned,
        "processesUnseen": looked.users.unseen,
    });
    output::result(global.output, "Devices", body, &text(&looked))
}

fn text(looked: &Looked) -> String {
    let inventory = &looked.inventory;
    if inventory.functions.is_empty() {
        return format!(
            "No NVIDIA GPU or NVSwitch among {} PCI functions.\n",
            inventory.scanned
        );
    }
    let mut rows = vec![
        [
            "ADDRESS", "DEVICE", "ID", "DRIVER", "GROUP", "NUMA", "LINK", "STATE",
        ]
        .map(str::to_owned),
    ];
    for (lead, companions) in inventory.by_primary() {
        rows.push(row(looked, lead, ""));
        let last = companions.len();
        for (at, companion) in companions.into_iter().enumerate() {
            let branch = if at + 1 == last { "└ " } else { "├ " };
            rows.push(row(looked, companion, branch));
        }
    }
    let mut text = output::table(&rows);
    if looked.users.unseen > 0 {
        text.push_str(&format!(
            "The open files of {} processes could not be seen: run as root to see every user.\n",
            looked.users.unseen
        ));
    }
    text
}

fn row(looked: &Looked, function: &Function, branch: &str) -> [String; 8] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let label = match function.kind {
        Kind::Gpu | Kind::NvSwitch => function.label(),
        kind => format!("{branch}{}", kind.word()),
    };
    [
        function.address.to_string(),
        draw::shortened(&label, 26),
        format!("{:04x}:{:04x}", function.vendor, function.device),
        draw::shortened(&or_dash(function.driver.clone()), 20),
        or_dash(function.iommu_group.map(|id| id.to_string())),
        or_dash(function.numa_node.map(|node| node.to_string())),
        or_dash(function.link.as_ref().map(draw::link)),
        draw::state(&looked.inventory, &looked.users, function).text,
    ]
}
