//! `runtimeclasses`: print Kubernetes RuntimeClass objects.

use anyhow::Result;
use serde_json::json;

use super::Global;
use crate::config::RuntimeClass;
use crate::failure::{Failure, Kind};
use crate::output::{self, Format};
use crate::wanted;

#[derive(Debug, clap::Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Print the RuntimeClass of each configured class, for "kubectl apply -f -".
    Print {
        /// Only these classes.
        classes: Vec<String>,
    },
}

pub(super) fn run(global: &Global, Command::Print { classes }: &Command) -> Result<()> {
    let (config, _) = crate::config::load(&global.config)?;
    let known = |name: &String| {
        config
            .runtime_classes
            .iter()
            .any(|class| class.name == *name)
    };
    if let Some(unknown) = classes.iter().find(|name| !known(name)) {
        let message = format!(
            "the class {unknown:?} is not in {}",
            global.config.display()
        );
        return Err(Failure::new(Kind::Configuration, message).into());
    }
    let wanted = config
        .runtime_classes
        .iter()
        .filter(|class| classes.is_empty() || classes.contains(&class.name));
    let manifests: Vec<_> = wanted.map(manifest).collect();
    if global.output == Format::Json {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": manifests });
        return output::to_stdout(&format!("{list:#}\n"));
    }
    let documents: Vec<String> = manifests.iter().map(km_runtimeclasses::to_yaml).collect();
    output::to_stdout(&documents.join("---\n"))
}

fn manifest(class: &RuntimeClass) -> serde_json::Value {
    km_runtimeclasses::runtime_class_manifest(
        &class.name,
        class.handler(),
        wanted::class_kind(class),
        &class.node_selector,
        None,
    )
}
