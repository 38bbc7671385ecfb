//! Reads the verbose `Status` answer of containerd 1.6 to 2.x: readiness, and the runtime handlers that it uses now.
//!
//! The CRI says nothing of the verbose part. containerd puts its CRI configuration there as JSON under `info["config"]`,
//! with key spellings that differ from key to key and between releases (`runtimeType`, `PodAnnotations`,
//! `privileged_without_host_devices`). Keys are therefore found without regard to case and underscores.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::wire;

const CALL: &str = "Status";

/// containerd's readiness and live configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// Whether containerd accepts pods at all.
    pub runtime_ready: Condition,
    /// Whether it can give pods a network. Pods on the host's network need none.
    pub network_ready: Condition,
    /// Every other condition, for example 1.7's and later's deprecation warnings.
    pub conditions: Vec<Condition>,
    /// The handler of pods that name none.
    pub default_handler: Option<String>,
    /// The runtime handlers that are live, by name.
    pub handlers: BTreeMap<String, LiveHandler>,
    /// The handler names that containerd lists in the CRI's own field: 2.0 and later do, earlier ones list none.
    /// The default handler is also listed under the empty name.
    pub advertised: Vec<String>,
    /// Whether containerd injects CDI devices; `None` when its configuration has no such setting (1.6, which never does).
    pub enable_cdi: Option<bool>,
    /// The folders that containerd reads CDI specs from, as it sees them; empty where it knows of none.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// containerd's whole CRI configuration, without the registry part, which can hold passwords.
    pub config: Value,
}

/// One thing that containerd reports to be so or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// `RuntimeReady`, `NetworkReady`, or a name of containerd's own.
    pub kind: String,
    /// Whether it is so.
    pub status: bool,
    /// A word for why; often empty when it is so.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// A runtime handler as containerd uses it now. Its configuration file may say something else since.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveHandler {
    /// For example `io.containerd.kata.v2`, or a shim's absolute path.
    pub runtime_type: String,
    /// The shim's path, when set. containerd 1.6 shows it and ignores it.
    pub runtime_path: Option<PathBuf>,
    /// Patterns of the pod annotations that reach the sandbox.
    pub pod_annotations: Vec<String>,
    /// Patterns of the container annotations that reach the container.
    pub container_annotations: Vec<String>,
    /// Whether a privileged container is kept from getting every device of the host.
    pub privileged_without_host_devices: bool,
    /// `ConfigPath` of the handler's options, when set: Kata's configuration file.
    pub config_path: Option<PathBuf>,
    /// The handler's own snapshotter, when set (1.7 and later).
    pub snapshotter: Option<String>,
}

impl Status {
    /// Reads a verbose answer.
    ///
    /// # Errors
    /// [`Error::Malformed`], naming the place.
    pub(crate) fn from_wire(answer: wire::StatusResponse) -> Result<Status, Error> {
        let mut conditions: Vec<Condition> = answer
            .status
            .unwrap_or_default()
            .conditions
            .into_iter()
            .map(Condition::from)
            .collect();
        let runtime_ready = take_condition(&mut conditions, "RuntimeReady")?;
        let network_ready = take_condition(&mut conditions, "NetworkReady")?;
        let mut config = read_config(&answer.info)?;
        let containerd = Table::root(&config).table("containerd")?;
        let handlers = containerd.table("runtimes")?.entries(LiveHandler::read)?;
        let root = Table::root(&config);
        let (default_handler, enable_cdi) = (
            containerd.string("default_runtime_name")?,
            root.boolean("enable_cdi")?,
        );
        let cdi_spec_dirs = root
            .strings("cdi_spec_dirs")?
            .into_iter()
            .map(PathBuf::from)
            .collect();
        config.retain(|key, _| !same_key(key, "registry"));
        Ok(Status {
            runtime_ready,
            network_ready,
            conditions,
            default_handler,
            handlers,
            advertised: answer
                .runtime_handlers
                .into_iter()
                .map(|handler| handler.name)
                .collect(),
            enable_cdi,
            cdi_spec_dirs,
            config: Value::Object(config),
        })
    }
}

impl From<wire::RuntimeCondition> for Condition {
    fn from(from: wire::RuntimeCondition) -> Condition {
        Condition {
            kind: from.r#type,
            status: from.status,
            reason: from.reason,
            message: from.message,
        }
    }
}

impl LiveHandler {
    fn read(table: &Table<'_>) -> Result<LiveHandler, Error> {
        Ok(LiveHandler {
            runtime_type: table.string("runtime_type")?.unwrap_or_default(),
            runtime_path: table.string("runtime_path")?.map(PathBuf::from),
            pod_annotations: table.strings("pod_annotations")?,
            container_annotations: table.strings("container_annotations")?,
            privileged_without_host_devices: table
                .boolean("privileged_without_host_devices")?
                .unwrap_or(false),
            config_path: table
                .table("options")?
                .string("ConfigPath")?
                .map(PathBuf::from),
            snapshotter: table.string("snapshotter")?,
        })
    }
}

/// The CRI says that these two conditions are always there.
fn take_condition(conditions: &mut Vec<Condition>, kind: &str) -> Result<Condition, Error> {
    match conditions
        .iter()
        .position(|condition| condition.kind == kind)
    {
        Some(at) => Ok(conditions.remove(at)),
        None => Err(malformed(format!("it has no condition {kind}"))),
    }
}

fn read_config(info: &BTreeMap<String, String>) -> Result<Map<String, Value>, Error> {
    let text = info.get("config").ok_or_else(|| {
        malformed("its verbose part has no \"config\"; is this containerd? No other runtime shows its handlers".to_owned())
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(config)) => Ok(config),
        Ok(other) => Err(malformed(format!(
            "info[\"config\"] is {}, not an object",
            kind(&other)
        ))),
        Err(error) => Err(malformed(format!("info[\"config\"] is not JSON: {error}"))),
    }
}

/// An object inside the configuration, with the path to it for messages. What is absent or null reads as empty.
struct Table<'a> {
    path: String,
    fields: Option<&'a Map<String, Value>>,
}

impl<'a> Table<'a> {
    fn root(fields: &'a Map<String, Value>) -> Table<'a> {
        Table {
            path: "config".to_owned(),
            fields: Some(fields),
        }
    }

    /// The value of a key, whatever its case and underscores; an exact match wins.
    fn get(&self, key: &str) -> Option<&'a Value> {
        let fields = self.fields?;
        let loose = || {
            fields
                .iter()
                .find(|(other, _)| same_key(other, key))
                .map(|(_, value)| value)
        };
        fields
            .get(key)
            .or_else(loose)
            .filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, value: &Value, want: &str) -> Error {
        malformed(format!(
            "{}.{key} is {}, not {want}",
            self.path,
            kind(value)
        ))
    }

    fn table(&self, key: &str) -> Result<Table<'a>, Error> {
        let fields = match self.get(key) {
            None => None,
            Some(Value::Object(fields)) => Some(fields),
            Some(other) => return Err(self.wrong(key, other, "an object")),
        };
        Ok(Table {
            path: format!("{}.{key}", self.path),
            fields,
        })
    }

    /// Reads every entry, which must be objects.
    fn entries<T>(
        &self,
        read: impl Fn(&Table<'a>) -> Result<T, Error>,
    ) -> Result<BTreeMap<String, T>, Error> {
        let mut all = BTreeMap::new();
        for (name, value) in self.fields.into_iter().flatten() {
            let Value::Object(fields) = value else {
                return Err(self.wrong(name, value, "an object"));
            };
            let table = Table {
                path: format!("{}.{name}", self.path),
                fields: Some(fields),
            };
            all.insert(name.clone(), read(&table)?);
        }
        Ok(all)
    }

    /// A text; containerd writes an unset one as "".
    fn string(&self, key: &str) -> Result<Option<String>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<String>, Error> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| {
                    item.as_str()
                        .map(str::to_owned)
                        .ok_or_else(|| self.wrong(key, item, "a list of strings"))
                })
                .collect(),
            Some(other) => Err(self.wrong(key, other, "a list of strings")),
        }
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }
}

fn same_key(one: &str, other: &str) -> bool {
    let letters = |key: &str| {
        key.chars()
            .filter(|c| *c != '_')
            .flat_map(char::to_lowercase)
            .collect::<String>()
    };
    letters(one) == letters(other)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn malformed(what: String) -> Error {
    Error::Malformed { call: CALL, what }
}

#[cfg(test)]
mod tests;
