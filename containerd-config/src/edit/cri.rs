//! Settings of the CRI plugin itself (`enable_cdi`, `cdi_spec_dirs`) that somebody needs and nobody set: put in, and taken out.
//!
//! They stand between two comment lines of ours, right below the header of the plugin's table, or with a header of their own
//! at the end of a text that has none. A value that is there already is never changed.

use serde_json::Value;

use super::compose::{assignment, line_break, plugin, quoted};
use super::document::{Document, Of};
use super::error::EditError;
use super::marks::{BEGIN_SETTINGS, END};
use super::verify;
use crate::handler::Settings;

/// Adds those of `wanted` that the CRI plugin's table of this text does not have.
///
/// # Errors
/// [`EditError`] says what stands in the way, and where.
pub fn add_cri_settings(text: &str, wanted: &Settings, version: u32) -> Result<String, EditError> {
    let document = Document::parse(text)?;
    let plugin = plugin(document.version().unwrap_or(version));
    let table = document
        .tree
        .get("plugins")
        .and_then(|plugins| plugins.get(plugin));
    let lacks = |key: &String| table.is_none_or(|table| table.get(key).is_none());
    let missing: Settings = wanted
        .iter()
        .filter(|(key, _)| lacks(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if missing.is_empty() {
        return Ok(text.to_owned());
    }
    let eol = line_break(text);
    let mut block = format!("{BEGIN_SETTINGS}{eol}");
    let header = document
        .sections
        .iter()
        .find(|section| section.of == Of::Plugin(plugin));
    let mut at = text.len();
    let mut joint = "";
    match header {
        Some(section) => {
            let next = text[section.start..].find('\n');
            at = next.map_or(text.len(), |next| section.start + next + 1);
        }
        None => block.push_str(&format!("[plugins.{}]{eol}", quoted(plugin))),
    }
    if at == text.len() && !text.is_empty() && !text.ends_with('\n') {
        joint = eol;
    }
    for (key, value) in &missing {
        block.push_str(&assignment(key, value));
        block.push_str(eol);
    }
    let result = format!("{}{joint}{block}{END}{eol}{}", &text[..at], &text[at..]);
    check(&document, &result, &missing, plugin, text)?;
    Ok(result)
}

/// The settings are there, nothing else differs, and taking them out again gives back the bytes.
fn check(
    before: &Document,
    result: &str,
    added: &Settings,
    plugin: &str,
    text: &str,
) -> Result<(), EditError> {
    let after = Document::parse(result).map_err(|_| EditError::NotExtendable {
        line: 1,
        key: plugin.to_owned(),
        what: "is not written as a table with a header",
        wanted: format!("plugins.{plugin:?}"),
    })?;
    let mut wanted = before.tree.clone();
    let plugins = wanted
        .entry("plugins")
        .or_insert_with(|| Value::Object(Settings::new()));
    if let Some(plugins) = plugins.as_object_mut() {
        let table = plugins
            .entry(plugin)
            .or_insert_with(|| Value::Object(Settings::new()));
        if let Some(table) = table.as_object_mut() {
            table.extend(added.clone());
        }
    }
    verify::same_but_for(
        &wanted,
        &after.tree,
        &[],
        "after adding settings of the CRI plugin",
    )?;
    // A line break that the text lacked stays when the settings go: the block says nothing of it, so it is not made.
    if text.is_empty() || text.ends_with('\n') {
        let back = remove_cri_settings(result)?;
        if back != text {
            return Err(EditError::NotAsMeant {
                what: "removing settings of the CRI plugin would not give back the same bytes"
                    .to_owned(),
            });
        }
    }
    Ok(())
}

/// Takes our settings of the CRI plugin out again.
///
/// # Errors
/// When the text is no TOML, or would not be without them.
pub fn remove_cri_settings(text: &str) -> Result<String, EditError> {
    let document = Document::parse(text)?;
    let Some(block) = &document.marks.settings else {
        return Ok(text.to_owned());
    };
    if block.end.is_empty() {
        return Err(EditError::HalfBlock {
            line: text[..block.begin.start].matches('\n').count() + 1,
        });
    }
    let result = format!("{}{}", &text[..block.begin.start], &text[block.end.end..]);
    Document::parse(&result).map_err(|error| EditError::NotAsMeant {
        what: format!("without settings of the CRI plugin it cannot be read: {error}"),
    })?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Settings {
        let json = serde_json::json!({ "enable_cdi": true, "cdi_spec_dirs": ["/etc/cdi", "/var/run/cdi"] });
        json.as_object().unwrap().clone()
    }

    #[test]
    fn settings_go_in_where_nobody_set_them_and_out_again() {
        let header = "[plugins.\"io.containerd.grpc.v1.cri\"]";
        for text in [
            "version = 2\n".to_owned(),
            format!("version = 2\r\n  {header} # CRI\r\n    sandbox_image = 'x'\r\n"),
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = 'x'\n"
                .to_owned(),
            format!("version = 2\n{header}\n[other]\n"),
        ] {
            let added = add_cri_settings(&text, &wanted(), 2).unwrap();
            let tree = Document::parse(&added).unwrap().tree;
            assert_eq!(
                tree["plugins"]["io.containerd.grpc.v1.cri"]["enable_cdi"],
                true
            );
            assert_eq!(remove_cri_settings(&added).unwrap(), text);
            assert_eq!(add_cri_settings(&added, &wanted(), 2).unwrap(), added);
        }
        let own = format!("version = 2\n{header}\nenable_cdi = false\ncdi_spec_dirs = []\n");
        assert_eq!(add_cri_settings(&own, &wanted(), 2).unwrap(), own);
        let inline = "version = 2\nplugins = { 'io.containerd.grpc.v1.cri' = {} }\n";
        assert!(matches!(
            add_cri_settings(inline, &wanted(), 2),
            Err(EditError::NotExtendable { .. })
        ));
    }
}
