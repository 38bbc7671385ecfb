//! One call from beginning to end: settings by our name, preparing where it is a sandbox's `start`, then the inner shim.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use km_host::{Error, HostPath, Root};

use crate::call::{self, Start};
use crate::prepare::{self, Prepared};
use crate::record::{self, Level};
use crate::said::chain;
use crate::settings::{self, Settings, SettingsError};

/// Where the host's root is mounted, for containers and tests; `/` when it is not set.
const HOST_ROOT: &str = "KATA_MANAGER_HOST_ROOT";

/// What a refused start exits with: 3, as kata-manager itself (refused), and 1 when the inner shim cannot be run.
const REFUSED: u8 = 3;

/// Does what `argv` asks for. It comes back only when the inner shim is not run; that has been said on standard error, which
/// containerd hands on to the kubelet.
pub fn run(argv: &[OsString]) -> ExitCode {
    let Err(refused) = become_inner(argv);
    // Nobody is left to tell when this fails.
    let _ = writeln!(io::stderr(), "kata-manager: {refused}");
    ExitCode::from(REFUSED)
}

/// Why the inner shim is not run.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("{0}")]
    Host(String),
    #[error("cannot run {path}, the shim behind this handler: {why}")]
    Exec { path: PathBuf, why: io::Error },
}

fn become_inner(argv: &[OsString]) -> Result<Infallible, Refused> {
    let program = argv.first().and_then(|name| name.to_str());
    let program = program.unwrap_or_default();
    let root = std::env::var_os(HOST_ROOT).unwrap_or_else(|| "/".into());
    let root = Root::new(&root).map_err(|error| Refused::Host(chain(&error)))?;
    let found = load(&root, program);
    match (found, call::parse(argv)) {
        (Ok(settings), Some(start)) => start_sandbox(&root, &settings, &start, argv),
        (Ok(settings), None) => exec(&root, &settings.inner_shim, argv),
        (Err(error), Some(_)) => Err(error.into()),
        // A sandbox that outlives its handler's settings must still come to its end.
        (Err(_), None) => {
            let inner = HostPath::new(settings::DEFAULT_INNER);
            exec(
                &root,
                &inner.map_err(|error| Refused::Host(error.to_string()))?,
                argv,
            )
        }
    }
}

fn start_sandbox(
    root: &Root,
    settings: &Settings,
    start: &Start,
    argv: &[OsString],
) -> Result<Infallible, Refused> {
    let prepare = || {
        let dir = std::env::current_dir().map_err(Error::io("find", "the bundle"))?;
        prepare::prepare(root, settings, start, &dir)
    };
    match prepare() {
        Ok(None) => {}
        Ok(Some(prepared)) => {
            record::say(root, Level::Info, &start.id, &words(settings, &prepared))
        }
        Err(error) => {
            let why = chain(&error);
            record::say(root, Level::Error, &start.id, &why);
            return Err(Refused::Host(why));
        }
    }
    let Err(refused) = exec(root, &settings.inner_shim, argv);
    prepare::take_back(root, start);
    record::say(root, Level::Error, &start.id, &refused.to_string());
    Err(refused)
}

fn words(settings: &Settings, prepared: &Prepared) -> String {
    let pod = prepared.pod.as_ref();
    let pod = pod.map_or_else(String::new, |(namespace, name)| {
        format!("pod {namespace}/{name}, ")
    });
    let devices = &prepared.decision.devices;
    let devices: Vec<&str> = devices
        .iter()
        .map(|device| device.address.as_str())
        .collect();
    format!(
        "{pod}handler {}, {} devices [{}], {} nodes written",
        settings.handler,
        devices.len(),
        devices.join(" "),
        prepared.decision.write.len()
    )
}

/// Becomes a program, with our arguments, environment, folder and descriptors.
fn exec(root: &Root, inner: &HostPath, argv: &[OsString]) -> Result<Infallible, Refused> {
    let path = match root.is_slash() {
        true => inner.as_path().to_owned(),
        false => root
            .resolve(inner)
            .map_err(|error| Refused::Host(chain(&error)))?,
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "this process becomes the program: nothing is started"
    )]
    let mut command = std::process::Command::new(&path);
    command.args(argv.get(1..).unwrap_or_default());
    if let Some(name) = argv.first() {
        command.arg0(name);
    }
    let why = command.exec();
    Err(Refused::Exec { path, why })
}

fn load(root: &Root, program: &str) -> Result<Settings, SettingsError> {
    let handler = settings::handler_of(program)
        .ok_or_else(|| SettingsError::Name(program.chars().take(100).collect()))?;
    settings::load(root, handler)
}
