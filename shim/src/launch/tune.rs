//! Properties for devices that are there: one iommufd object for all, so that the guest's memory is mapped and pinned once, and a
//! clique for GPUs of legacy groups. Neither moves a device. Data in, data out.

use std::collections::BTreeSet;
use std::ffi::OsString;

use super::Refused;
use super::argv::{Argv, Keyed};
use super::check::Wanted;
use super::view::View;

/// The largest clique (QEMU, hw/vfio/pci-quirks.c: four bits).
const CLIQUE_MAX: u8 = 15;

/// The command line with its devices tuned; unchanged where nothing is to gain.
///
/// # Errors
/// For a confidential guest, for a clique that is none, or a value that cannot be changed.
pub fn tune(
    argv: &Argv,
    view: &View,
    wanted: &Wanted<'_>,
    clique: Option<u8>,
) -> Result<Vec<OsString>, Refused> {
    if wanted.confidential {
        return Err(Refused::because(
            "a confidential guest's devices are not tuned, which would change its measurement: use `check`",
        ));
    }
    if let Some(clique) = clique.filter(|clique| *clique > CLIQUE_MAX) {
        return Err(Refused::because(format!(
            "{clique} is no clique: they are 0 to {CLIQUE_MAX}"
        )));
    }
    let mut words = argv.words.clone();
    let dropped = share(view, &mut words)?;
    if let Some(clique) = clique {
        cliques(view, wanted, clique, &mut words)?;
    }
    let kept = words
        .into_iter()
        .enumerate()
        .filter(|(at, _)| !dropped.contains(at))
        .map(|(_, word)| word);
    Ok(kept.collect())
}

/// Gives each device the first iommufd object. Returns the places of the arguments that are not needed any more.
fn share(view: &View, words: &mut [OsString]) -> Result<BTreeSet<usize>, Refused> {
    let mut dropped = BTreeSet::new();
    let users: Vec<_> = view
        .vfio()
        .filter_map(|device| Some((device, device.keyed.get("iommufd")?)))
        .collect();
    // The object must be made by QEMU on its own: one with a descriptor of Kata's is left alone.
    let used = |id: &str| users.iter().any(|(_, object)| *object == id);
    let objects: Vec<_> = view.iommufd.iter().filter(|(id, _)| used(id)).collect();
    let Some(((first, _), others)) = objects.split_first() else {
        return Ok(dropped);
    };
    for at in objects.iter().map(|(_, at)| *at) {
        let value = words
            .get(at)
            .and_then(|word| word.to_str())
            .unwrap_or_default();
        let with_fd = Keyed::parse(value, "qom-type").is_ok_and(|keyed| keyed.get("fd").is_some());
        if with_fd {
            return Ok(BTreeSet::new());
        }
    }
    for (device, object) in &users {
        if object != first {
            set(words, device.at, "iommufd", first)?;
        }
    }
    for (_, at) in others {
        dropped.extend([at - 1, *at]);
    }
    Ok(dropped)
}

/// A clique for each GPU that goes through a legacy group, if there are several: iommufd maps no peer's memory
/// (QEMU, docs/devel/vfio-iommufd.rst).
fn cliques(
    view: &View,
    wanted: &Wanted<'_>,
    clique: u8,
    words: &mut [OsString],
) -> Result<(), Refused> {
    let is_gpu = |device: &&super::view::Device| {
        let address = device.host().ok();
        wanted.devices.iter().any(|one| {
            matches!(one.class >> 8, 0x0300 | 0x0302) && one.address.parse().ok() == address
        })
    };
    let gpus: Vec<_> = view
        .vfio()
        .filter(|device| device.keyed.get("iommufd").is_none())
        .filter(is_gpu)
        .collect();
    if gpus.len() < 2 {
        return Ok(());
    }
    for gpu in gpus {
        if gpu.keyed.get("x-nv-gpudirect-clique").is_none() {
            set(words, gpu.at, "x-nv-gpudirect-clique", &clique.to_string())?;
        }
    }
    Ok(())
}

fn set(words: &mut [OsString], at: usize, key: &str, value: &str) -> Result<(), Refused> {
    let Some(word) = words.get_mut(at) else {
        return Ok(());
    };
    let text = word.to_str().unwrap_or_default();
    let changed = Keyed::with(text, "driver", key, value).map_err(Refused::because)?;
    *word = changed.into();
    Ok(())
}
