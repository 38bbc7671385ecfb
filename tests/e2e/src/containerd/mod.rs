//! A real containerd with a folder of its own: root, state, socket, configuration. Any number run side by side.

mod config;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cri::Cri;
use crate::sandbox::Sandbox;
use crate::{images, process, wait};

const CONTROL: &str = include_str!("control.sh");

/// Start to CRI answering took under 0.8 s in measurements on a busy machine.
const UP: Duration = Duration::from_secs(30);

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 1.6, from Debian bookworm.
    V1_6,
    /// 1.7, from Debian trixie.
    V1_7,
    /// 2.x, from Debian forky, which moves: ask [`Cri::version`] which it is.
    V2,
}

impl Version {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2];

    /// The group of [`crate::parts`] that has it.
    pub fn group(self) -> &'static str {
        match self {
            Self::V1_6 => "containerd-1.6",
            Self::V1_7 => "containerd-1.7",
            Self::V2 => "containerd-2.x",
        }
    }

    /// The newest configuration format that it reads.
    pub fn flavour(self) -> Flavour {
        match self {
            Self::V1_6 | Self::V1_7 => Flavour::Version2,
            Self::V2 => Flavour::Version3,
        }
    }
}

/// The format of the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// `version = 2`: 1.6, 1.7, and 2.x as Debian packages it.
    Version2,
    /// `version = 3`: 2.x.
    Version3,
}

/// How a containerd is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which containerd.
    pub version: Version,
    /// The format of its configuration file.
    pub flavour: Flavour,
    /// Runtime handlers besides `runc`: name and runtime type.
    pub handlers: Vec<(String, String)>,
    /// Folders at the front of its PATH, where it looks for shims.
    pub path: Vec<PathBuf>,
}

impl Options {
    /// A containerd with its own newest configuration format and no handler but `runc`.
    pub fn new(version: Version) -> Self {
        Self {
            version,
            flavour: version.flavour(),
            handlers: Vec::new(),
            path: Vec::new(),
        }
    }

    /// With the configuration file in another format.
    #[must_use]
    pub fn flavour(mut self, flavour: Flavour) -> Self {
        self.flavour = flavour;
        self
    }

    /// With one more handler.
    #[must_use]
    pub fn handler(mut self, name: &str, runtime_type: &str) -> Self {
        self.handlers
            .push((name.to_owned(), runtime_type.to_owned()));
        self
    }

    /// With one more folder to look for shims in.
    #[must_use]
    pub fn path(mut self, folder: &Path) -> Self {
        self.path.push(folder.to_owned());
        self
    }
}

/// A running containerd. Dropping it stops it; its pods end with the sandbox.
#[derive(Debug)]
pub struct Instance {
    dir: PathBuf,
    ctr: PathBuf,
    cri: Cri,
}

impl Instance {
    /// Starts a containerd, waits until its CRI answers, and imports [`images::PAUSE`] and [`images::BUSYBOX`].
    ///
    /// # Errors
    /// With the end of its log, when it does not come up in 30 seconds.
    pub fn start(sandbox: &Sandbox, options: &Options) -> Result<Self> {
        let instance = Self::prepare(sandbox, options)?;
        instance.control("start")?;
        instance.wait_up()?;
        instance.import(sandbox)?;
        Ok(instance)
    }

    /// Makes the folder with configuration and control program, and starts nothing.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn prepare(sandbox: &Sandbox, options: &Options) -> Result<Self> {
        let dir = sandbox.folder(options.version.group())?;
        let programs = sandbox.parts().containerd_dir(options.version.group());
        fs::create_dir_all(dir.join("etc/conf.d"))?;
        fs::write(dir.join("etc/config.toml"), config::text(&dir, options))
            .with_context(|| format!("write {}/etc/config.toml", dir.display()))?;
        let path: Vec<String> = options
            .path
            .iter()
            .cloned()
            .chain([sandbox.parts().runc_dir(), programs.clone()])
            .map(|folder| folder.display().to_string())
            .chain(["/usr/sbin:/usr/bin:/sbin:/bin".to_owned()])
            .collect();
        let environment = format!(
            "path='{}'\ncontainerd='{}'\nlog_level=debug\n",
            path.join(":"),
            programs.join("containerd").display()
        );
        fs::write(dir.join("environment"), environment)?;
        let control = dir.join("control");
        fs::write(&control, CONTROL)?;
        fs::set_permissions(&control, Permissions::from_mode(0o755))?;
        Ok(Self {
            cri: Cri::new(&dir.join("containerd.sock"))?,
            ctr: programs.join("ctr"),
            dir,
        })
    }

    fn import(&self, sandbox: &Sandbox) -> Result<()> {
        let folder = sandbox.folder("images")?;
        for archive in images::write(sandbox.parts(), &folder)? {
            self.ctr(&["images", "import", &archive.display().to_string()])?;
        }
        // The CRI plugin learns of an import by an event.
        wait::until("the imported images in CRI", UP, || {
            for image in [images::PAUSE, images::BUSYBOX] {
                anyhow::ensure!(self.cri.has_image(image)?, "{image} is not there");
            }
            Ok(())
        })
    }

    /// Runs `ctr` in CRI's namespace.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn ctr(&self, args: &[&str]) -> Result<process::Finished> {
        let mut command = Command::new(&self.ctr);
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", "k8s.io"])
            .args(args);
        process::run(&mut command, Duration::from_secs(60))?
            .success()
            .with_context(|| format!("ctr {}", args.join(" ")))
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its configuration file. The folder holds nothing else but an empty `conf.d`, which the file imports.
    pub fn config(&self) -> PathBuf {
        self.dir.join("etc/config.toml")
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// A CRI client of it.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// The command that restarts it, for kata-manager's `containerd.restart.command`. It counts: see [`Self::restarts`].
    pub fn restart_command(&self) -> Vec<String> {
        vec![
            self.dir.join("control").display().to_string(),
            "restart".to_owned(),
        ]
    }

    /// How often [`Self::restart_command`] was run.
    ///
    /// # Errors
    /// When the count cannot be read.
    pub fn restarts(&self) -> Result<usize> {
        match fs::read_to_string(self.dir.join("restarts")) {
            Ok(text) => Ok(text.lines().count()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error).context("read the count of restarts"),
        }
    }

    /// Makes every later start fail with this reason, or (`None`) work again.
    ///
    /// # Errors
    /// When the mark cannot be written or removed.
    pub fn refuse_to_start(&self, reason: Option<&str>) -> Result<()> {
        let mark = self.dir.join("refuse-to-start");
        match reason {
            Some(reason) => fs::write(&mark, reason)?,
            None => fs::remove_file(&mark)?,
        }
        Ok(())
    }

    /// Restarts it (SIGTERM, then start) and waits until its CRI answers. Pods survive, as on a host.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&self) -> Result<()> {
        self.control("restart")?;
        self.wait_up()
    }

    /// Stops it; its pods go on.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&self) -> Result<()> {
        self.control("stop")
    }

    /// Starts it again after [`Self::stop`], and waits until its CRI answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&self) -> Result<()> {
        self.control("start")?;
        self.wait_up()
    }

    fn control(&self, verb: &str) -> Result<()> {
        process::run(
            Command::new(self.dir.join("control")).arg(verb),
            Duration::from_secs(40),
        )?
        .success()
        .with_context(|| format!("{verb} the containerd in {}", self.dir.display()))?;
        Ok(())
    }

    /// Waits until its CRI answers.
    ///
    /// # Errors
    /// With the end of its log, after 30 seconds.
    pub fn wait_up(&self) -> Result<()> {
        wait::until("containerd's CRI to answer", UP, || self.cri.version())
            .with_context(|| format!("the end of its log:\n{}", self.log_tail()))?;
        Ok(())
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        process::tail(&self.dir.join("log"), 30)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // A failure harms nobody: everything ends with the sandbox.
        drop(self.stop());
    }
}
