//! `config`: check the configuration file, or print its JSON Schema.

use anyhow::{Context as _, Result};
use serde_json::json;

use super::Global;
use crate::config::Config;
use crate::output;

#[derive(Debug, clap::Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Check the configuration file, and the files of keys, certificates and credentials that it names.
    Check,
    /// Print the JSON Schema of the configuration file.
    Schema,
}

pub(super) fn run(global: &Global, command: &Command) -> Result<()> {
    match command {
        Command::Check => {
            let node = global.node()?;
            // Made of the files that registry.* names, and asked nothing.
            node.registry()?;
            let names: Vec<&str> = node
                .config
                .runtime_classes
                .iter()
                .map(|class| class.name.as_str())
                .collect();
            let text = format!(
                "{} is right: {} classes ({})\n",
                global.config.display(),
                names.len(),
                names.join(", ")
            );
            output::result(
                global.output,
                "ConfigCheck",
                json!({ "classes": names }),
                &text,
            )
        }
        Command::Schema => {
            let schema = serde_json::to_string_pretty(&schemars::schema_for!(Config))
                .context("build the schema")?;
            output::to_stdout(&format!("{schema}\n"))
        }
    }
}
