//! What Kata reads: the configuration that containerd's handler names, and the files of `config.d` beside it, in the order of their
//! names (kata-containers 4.1, src/runtime/pkg/katautils/config.go).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim::protos::protobuf::CodedInputStream;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use serde_json::Value;
use toml::{Table, Value as Setting};

/// What containerd hands a handler's options on as (containerd, api/types/runtimeoptions/v1/api.proto).
const OPTIONS: &str = "runtimeoptions.v1.Options";

/// `config_path` there: field 2, a string.
const CONFIG_PATH: u32 = (2 << 3) | 2;

/// What is in no Kata's configuration: what a guest within a guest needs, and what a test has go wrong.
const NESTED: &str = "/etc/km-inner-shim.json";

/// Which of Kata's runtimes it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    /// `src/runtime`, in Go.
    Go,
    /// `src/runtime-rs`.
    Rust,
}

/// The settings.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// `[hypervisor.qemu] path`, with links followed: Kata starts what it finds.
    pub(crate) qemu: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: String,
    /// The guest's initrd.
    pub(crate) initrd: String,
    /// The kernel's parameters.
    pub(crate) append: String,
    /// The guest's memory in MiB.
    pub(crate) memory: i64,
    /// The least number of root ports.
    pub(crate) ports: usize,
    /// Whether devices are attached before the guest starts; never otherwise.
    pub(crate) cold_plug: bool,
    /// Whether the guest has the host's NUMA nodes.
    pub(crate) numa: bool,
    /// More properties of each device of the host, with a comma in front; empty for none.
    pub(crate) properties: String,
    /// The bus of every device of the host, instead of its port: what no Kata does.
    pub(crate) bus: Option<String>,
    /// Whose arguments it writes.
    pub(crate) runtime: Runtime,
}

impl Settings {
    /// Reads what the handler's options lead to.
    pub(crate) fn load(options: Option<&Any>) -> Result<Self> {
        let options = options.context("containerd gave no options of the handler")?;
        let config = config_path(options)?;
        let settings = merged(Path::new(&config))?;
        let qemu = settings
            .get("hypervisor")
            .and_then(|all| all.get("qemu"))
            .with_context(|| format!("{config} has no [hypervisor.qemu]"))?;
        let missing = |key: &str| format!("{config} has no {key} in [hypervisor.qemu]");
        let text = |key: &str| -> Result<String> {
            let found = qemu.get(key).and_then(Setting::as_str);
            Ok(found.with_context(|| missing(key))?.to_owned())
        };
        let number = |key: &str| -> Result<i64> {
            let found = qemu.get(key).and_then(Setting::as_integer);
            found.with_context(|| missing(key))
        };
        let cold_plug = match text("cold_plug_vfio")?.as_str() {
            "root-port" => true,
            "no-port" => false,
            other => bail!("cold_plug_vfio is {other}, which is not known here"),
        };
        let numa = qemu.get("enable_numa").and_then(Setting::as_bool);
        let path = text("path")?;
        let nested = nested()?;
        let properties = nested("properties");
        let runtime = match nested("runtime").as_deref() {
            Some("go") => Runtime::Go,
            Some("rust") => Runtime::Rust,
            other => bail!("{NESTED} has the runtime {other:?}"),
        };
        Ok(Self {
            qemu: fs::canonicalize(&path).with_context(|| format!("find {path}"))?,
            kernel: text("kernel")?,
            initrd: text("initrd")?,
            append: text("kernel_params")?,
            memory: number("default_memory")?,
            ports: usize::try_from(number("pcie_root_port")?)?,
            cold_plug,
            numa: numa.unwrap_or(false),
            properties: properties.with_context(|| format!("{NESTED} has no properties"))?,
            bus: nested("bus"),
            runtime,
        })
    }
}

fn config_path(options: &Any) -> Result<String> {
    ensure!(
        options.type_url.ends_with(OPTIONS),
        "the handler's options are {}",
        options.type_url
    );
    let mut input = CodedInputStream::from_bytes(&options.value);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            CONFIG_PATH => return Ok(input.read_string()?),
            _ => containerd_shim::protos::protobuf::rt::skip_field_for_tag(tag, &mut input)?,
        }
    }
    bail!("the handler's options name no configuration")
}

fn merged(config: &Path) -> Result<Table> {
    let read = |path: &Path| -> Result<Table> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        text.parse()
            .with_context(|| format!("read {}", path.display()))
    };
    let mut all = read(config)?;
    // Beside what the name leads to, as Kata resolves it first.
    let config = fs::canonicalize(config)?;
    let folder = config.parent().context("a folder")?.join("config.d");
    let mut files: Vec<PathBuf> = match fs::read_dir(&folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("list {}", folder.display())),
    };
    files.sort();
    for file in files {
        merge(&mut all, read(&file)?);
    }
    Ok(all)
}

/// Tables are merged; all else is replaced.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Setting::Table(old)), Setting::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// What a key of [`NESTED`] says, if it is there.
fn nested() -> Result<impl Fn(&str) -> Option<String>> {
    let text = fs::read_to_string(NESTED).with_context(|| format!("read {NESTED}"))?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("read {NESTED}"))?;
    Ok(move |key: &str| Some(value.get(key)?.as_str()?.to_owned()))
}
