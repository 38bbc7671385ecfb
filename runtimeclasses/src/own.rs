//! A user's own settings for Kata, judged before they go into a generation. Data in, data out.

use toml_edit::{Document, DocumentMut, Item, TableLike};

/// What a user's file is put under in a generation: Kata reads it after ours, and the user's files keep their own order.
pub const OWN_PREFIX: &str = "config.d/70-user-";

/// Keys of `[hypervisor.*]` that are ours where launches are looked at: another QEMU would not be.
const LAUNCHER_KEYS: [&str; 2] = ["path", "valid_hypervisor_paths"];

/// Why a user's file cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// It is no TOML.
    #[error("is no valid TOML")]
    Parse(#[source] Box<toml_edit::TomlError>),
    /// A key stands where Kata has tables alone.
    #[error(
        "has {0} outside a table: Kata's settings are in tables such as [hypervisor.qemu] and [runtime]"
    )]
    Outside(String),
    /// A key is set that says how QEMU is launched.
    #[error(
        "sets {0}, which says that launches of QEMU are checked first: leave it out, or set launch.mode of the class to \"none\""
    )]
    Launcher(String),
    /// A key has another type than Kata wants.
    #[error("has {key} as {found}, and Kata wants {wanted} there")]
    Type {
        /// The key, with its tables.
        key: String,
        /// What it is.
        found: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
}

/// Judges a user's file beside the drop-in of ours that it is read after. `launched` says whether that names the launcher.
///
/// # Errors
/// What Kata could not read, or would not start for, as far as the drop-in tells; and what would go round the launcher.
pub fn check_own(text: &str, drop_in: &str, launched: bool) -> Result<(), OwnError> {
    let parse = |source| OwnError::Parse(Box::new(source));
    let own = Document::parse(text).map_err(parse)?;
    let outside = own.iter().find(|(_, item)| item.as_table_like().is_none());
    if let Some((key, _)) = outside {
        return Err(OwnError::Outside(named(key)));
    }
    let hypervisors = own.get("hypervisor").and_then(Item::as_table_like);
    for (kind, item) in hypervisors.into_iter().flat_map(TableLike::iter) {
        let taken = LAUNCHER_KEYS.iter().find(|key| {
            let table = item.as_table_like();
            launched && table.is_some_and(|table| table.contains_key(key))
        });
        if let Some(key) = taken {
            return Err(OwnError::Launcher(format!(
                "hypervisor.{}.{key}",
                named(kind)
            )));
        }
    }
    let ours: DocumentMut = drop_in.parse().map_err(parse)?;
    same_types(&*own, &*ours, "")
}

/// Whether what both set is of one type. Ours is three tables deep, so this may call itself.
fn same_types(own: &dyn TableLike, ours: &dyn TableLike, prefix: &str) -> Result<(), OwnError> {
    for (key, wanted) in ours.iter() {
        let Some(found) = own.get(key) else {
            continue;
        };
        let at = format!("{prefix}{key}");
        match (found.as_table_like(), wanted.as_table_like()) {
            (Some(found), Some(wanted)) => same_types(found, wanted, &format!("{at}."))?,
            (None, None) if found.type_name() == wanted.type_name() => {}
            _ => {
                return Err(OwnError::Type {
                    key: at,
                    found: found.type_name(),
                    wanted: wanted.type_name(),
                });
            }
        }
    }
    Ok(())
}

/// A key as a message can have it.
fn named(key: &str) -> String {
    key.chars()
        .take(64)
        .collect::<String>()
        .escape_debug()
        .to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DROP_IN: &str = "[hypervisor.qemu]\npath = \"/l\"\npcie_root_port = 8\nenable_numa = false\n[runtime]\nvfio_mode = \"x\"\n";

    #[test]
    fn what_kata_can_read_is_taken() {
        for text in [
            "",
            "# nothing\n",
            "[hypervisor.qemu]\nkernel_params = \"a=b\"\npcie_root_port = 4\n",
            "hypervisor = {qemu = {default_memory = 1}}\n",
            "[runtime]\nsandbox_cgroup_only = true\n[new.table]\nx = 1\n",
            "hypervisor.qemu.enable_numa = true\n",
        ] {
            check_own(text, DROP_IN, true).unwrap();
        }
        check_own("[hypervisor.qemu]\npath = \"/q\"\n", DROP_IN, false).unwrap();
    }

    #[test]
    fn what_kata_would_not_start_for_is_refused() {
        for (text, said) in [
            ("[hypervisor", "no valid TOML"),
            ("a = 1\n", "has a outside a table"),
            ("hypervisor = 1\n", "hypervisor outside a table"),
            ("[runtime]\nx = 1\n[runtime]\n", "no valid TOML"),
            (
                "[hypervisor.qemu]\npath = \"/q\"\n",
                "sets hypervisor.qemu.path",
            ),
            (
                "hypervisor.\"q\\u001b\".path = 1\n",
                "sets hypervisor.q\\u{1b}.path",
            ),
            (
                "[hypervisor.clh]\nvalid_hypervisor_paths = []\n",
                "sets hypervisor.clh.valid_hypervisor_paths",
            ),
            (
                "[hypervisor.qemu]\npcie_root_port = \"8\"\n",
                "has hypervisor.qemu.pcie_root_port as string, and Kata wants integer",
            ),
            ("[runtime.vfio_mode]\n", "has runtime.vfio_mode as table"),
            ("[hypervisor]\nqemu = 1\n", "has hypervisor.qemu as integer"),
        ] {
            let error = check_own(text, DROP_IN, true).unwrap_err();
            assert!(error.to_string().contains(said), "{text:?}: {error}");
        }
        let deep = format!("a = {}{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(check_own(&deep, DROP_IN, true).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics_or_goes_round_the_launcher(text in "(\\[?(hypervisor|runtime|qemu|path|a)\\]?[.=\n\"{} 1]{0,3}){0,8}") {
            if check_own(&text, DROP_IN, true).is_ok() {
                let own: DocumentMut = text.parse().unwrap();
                let qemu = own.get("hypervisor").and_then(|item| item.get("qemu"));
                prop_assert!(qemu.and_then(|qemu| qemu.get("path")).is_none());
            }
        }
    }
}
