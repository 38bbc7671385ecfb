//! The demo: one machine goes from nothing to live Kata runtime handlers and back, with real programs, and says what it does.
//!
//! `make demo` runs it. It needs root; everything happens in namespaces and a work folder that are gone afterwards, also when
//! it is interrupted.

#![expect(
    clippy::disallowed_methods,
    reason = "the demo prepares its files and starts its programs plainly, outside any host root"
)]

mod transcript;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use km_tests_e2e::containerd::{Instance, Options, Version};
use km_tests_e2e::km::{Km, SHIM};
use km_tests_e2e::registry::{self, Registry};
use km_tests_e2e::sandbox::{self, Entered, Sandbox, Shown};
use km_tests_e2e::{guest, images, provider, qemu};
use transcript::Transcript;

/// The groups of parts that the demo needs: containerd 1.7 for its shim, which stands in for Kata's.
const PARTS: &[&str] = &[
    "containerd-1.7",
    "containerd-2.x",
    "tools",
    "qemu",
    "firmware",
    "kernel",
];

/// The production classes, and the artifact of each.
const CLASSES: [(&str, &str); 3] = [
    ("kata-qemu-nvidia-gpu", "kata/guest:v1"),
    ("kata-qemu-nvidia-gpu-snp", "kata/guest-confidential:v1"),
    ("kata-qemu-nvidia-gpu-tdx", "kata/guest-confidential:v1"),
];

/// The class that runs pods by runc, so that the demo can start one where no Kata is installed.
const DEMO_CLASS: &str = "demo";

/// Where `apply` puts programs, and the links to them that containerd is told.
const PROGRAMS: &str = "/opt/kata-manager";

fn main() -> Result<ExitCode> {
    match sandbox::enter(PARTS)? {
        Entered::Left(code) => Ok(code),
        Entered::Unavailable(reason) => bail!("this machine cannot run the demo: {reason}"),
        Entered::Inside(sandbox) => Ok(play(sandbox)),
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a program")]
fn play(sandbox: Sandbox) -> ExitCode {
    let started = Instant::now();
    let played = Demo::prepare(sandbox).and_then(|mut demo| {
        demo.publish()?;
        demo.apply()?;
        demo.prove()?;
        demo.uninstall()?;
        let seconds = started.elapsed().as_secs();
        demo.say
            .why(&format!("All of it took {seconds} s; nothing is left."))
    });
    match played {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The node on which the demo plays.
struct Demo {
    say: Transcript,
    sandbox: Sandbox,
    km: Km,
    registry: Registry,
    containerd: Instance,
    prefix: PathBuf,
    /// `config.toml` as it was before kata-manager came.
    before: PathBuf,
    /// The handlers' settings are in here.
    _settings: Shown,
}

impl Demo {
    /// Starts the node's own programs and writes kata-manager's configuration.
    fn prepare(sandbox: Sandbox) -> Result<Self> {
        let mut say = Transcript;
        say.why("The real programs come from Debian: unpacked in a folder, pinned by digest, not installed.")?;
        say.shown("hack/parts")?;
        say.output(&versions(&sandbox)?)?;

        say.why("A private registry and a private containerd, in namespaces of their own.")?;
        let registry = Registry::start(&sandbox, registry::Options::default())?;
        say.shown("docker-registry serve /run/km/registry/config.yml &")?;
        let containerd = Instance::start(&sandbox, &Options::new(Version::V2))?;
        say.shown(&format!("{}/control start", containerd.dir().display()))?;
        say.output(&format!(
            "containerd {} answers CRI; its handlers: {}",
            containerd.cri().version()?,
            containerd.cri().handlers()?.join(", ")
        ))?;
        let before = sandbox.folder("before")?.join("config.toml");
        fs::copy(containerd.config(), &before).context("keep containerd's configuration")?;

        say.why(
            "What a Kata installation would put under /opt/kata, from Debian's real QEMU and OVMF.",
        )?;
        let prefix = provider::assemble(sandbox.parts(), &sandbox.folder("kata")?)?;
        let (bin, ovmf) = (prefix.join("bin"), prefix.join("share/ovmf"));
        say.run(Command::new("ls").arg(&bin).arg(ovmf))?;
        say.run(Command::new("cat").arg(bin.join("README")))?;

        // Programs and settings have fixed places; the machine's own stay as they are.
        sandbox.cover("/opt".as_ref())?;
        let settings = sandbox.make("/etc/kata-manager".as_ref())?;
        let km = Km::find()?;
        let shim = km.shim()?;
        let installed = sandbox.folder("libexec")?.join(SHIM);
        fs::copy(&shim, &installed).with_context(|| format!("copy {}", shim.display()))?;
        let config = write_config(&sandbox, &registry, &containerd, &prefix, &installed)?;
        let km = km.env("KATA_MANAGER_CONFIG", config);
        Ok(Self {
            say,
            sandbox,
            km,
            registry,
            containerd,
            prefix,
            before,
            _settings: settings,
        })
    }

    fn kata_manager(&mut self, words: &[&str]) -> Result<String> {
        Ok(self.say.run(&mut self.km.command(words))?.stdout)
    }

    /// Builds two guests and pushes them, as a platform team would.
    fn publish(&mut self) -> Result<()> {
        self.say.why(
            "Two guests: Debian's real cloud kernel, and an initrd that says which generation it is.\n\
             One comes with a Kata configuration of its own, one without.",
        )?;
        let plain = self.sandbox.folder("guest")?;
        guest::build(self.sandbox.parts(), &plain, "v1")?;
        let confidential = self.sandbox.folder("guest-confidential")?;
        guest::build(self.sandbox.parts(), &confidential, "v1-confidential")?;
        guest::add_configuration(&confidential)?;
        self.say.run(
            Command::new("ls")
                .args(["-sh1"])
                .args([&plain, &confidential]),
        )?;

        self.say
            .why("A platform team publishes them as OCI artifacts.")?;
        for (folder, name) in [
            (plain, "kata/guest:v1"),
            (confidential, "kata/guest-confidential:v1"),
        ] {
            let reference = self.registry.reference(name);
            let folder = folder.display().to_string();
            self.kata_manager(&["artifacts", "push", &folder, &reference])?;
        }
        Ok(())
    }

    /// The node's own part: see what would happen, have it happen, see that it holds.
    fn apply(&mut self) -> Result<()> {
        let config = self.sandbox.work().join("config.yaml");
        self.say
            .why("The configuration of NVIDIA's Kata Manager, with our additions below.")?;
        self.say.run(Command::new("cat").arg(&config))?;
        self.say
            .shown(&format!("export KATA_MANAGER_CONFIG={}", config.display()))?;

        self.say
            .why("What would change on this node? Nothing is touched yet.")?;
        self.kata_manager(&["plan"])?;
        self.say.why("Change it.")?;
        self.kata_manager(&["apply"])?;
        let restarts = self.containerd.restarts()?;
        ensure!(restarts == 1, "containerd was restarted {restarts} times");
        self.say.why("How does the node stand?")?;
        self.kata_manager(&["status"])?;
        self.say
            .why("A second apply finds nothing to do: no write, no restart, no download.")?;
        self.kata_manager(&["apply"])?;
        let restarts = self.containerd.restarts()?;
        ensure!(restarts == 1, "the second apply restarted containerd");
        self.say.output(&format!(
            "(containerd was restarted {restarts} time in all)"
        ))
    }

    /// Asks the other programs, not kata-manager, whether it is true.
    fn prove(&mut self) -> Result<()> {
        self.say
            .why("containerd itself, over CRI: which handlers are in force?")?;
        self.say
            .shown("CRI Status(verbose) | .containerd.runtimes")?;
        let config = self.containerd.cri().config()?;
        let runtimes = &config["containerd"]["runtimes"];
        let wanted = CLASSES.iter().map(|(name, _)| *name).chain([DEMO_CLASS]);
        for name in wanted {
            let kind = runtimes[name]["runtimeType"]
                .as_str()
                .with_context(|| format!("containerd does not know the handler {name}"))?;
            let line = format!("{name:<26} {kind}  {}", runtimes[name]["options"]);
            self.say.output(&line)?;
        }

        self.say.why(
            "A pod on the demo class, started through CRI as kubelet would. Our shim checks the sandbox's devices (here it\n\
             has none) and becomes runc's; for the production classes it becomes Kata's, which is not installed here.",
        )?;
        self.say.shown(&format!(
            "CRI RunPodSandbox(handler={DEMO_CLASS}), CreateContainer, StartContainer, ExecSync(echo)"
        ))?;
        let said = self
            .containerd
            .cri()
            .prove_handler(DEMO_CLASS, images::BUSYBOX)?;
        self.say.output(&said)?;
        self.say
            .run(Command::new("find").args([PROGRAMS, "-type", "f,l", "-printf", "%P %l\\n"]))?;

        let artifacts = self.sandbox.work().join("artifacts");
        self.say.why(
            "The Kata configurations that the handlers name: paths lead to an immutable generation and to the\n\
             provider, whether the artifact brought a configuration (snp) or not (gpu).",
        )?;
        let configurations = [CLASSES[0].0, CLASSES[1].0]
            .map(|class| artifacts.join(class).join(guest::CONFIGURATION));
        self.say.run(
            Command::new("grep")
                .args(["-hE", "^(path|kernel|initrd|image|firmware) "])
                .args(configurations),
        )?;

        self.say.why(
            "The installed generation's kernel and initrd are what was built: boot them in a real QEMU\n\
             (software emulation, no /dev/kvm needed).",
        )?;
        let class = artifacts.join(CLASSES[0].0);
        let (kernel, initrd) = (class.join(guest::KERNEL), class.join(guest::INITRD));
        self.say
            .run(Command::new("readlink").arg("-v").arg(&class))?;
        let qemu = self.prefix.join("bin/qemu-system-x86_64");
        self.say.shown(&format!(
            "qemu-system-x86_64 -accel tcg ... -kernel {} -initrd {}",
            kernel.display(),
            initrd.display()
        ))?;
        let line = guest::alive("v1");
        let boot = qemu::boot(&qemu, &kernel, &initrd, &line, Duration::from_secs(120))?;
        self.say.output(&boot.line)?;
        self.say.output(&format!(
            "(booted and off in {:.1} s)",
            boot.took.as_secs_f64()
        ))
    }

    /// Takes everything off again, and shows that it is off.
    fn uninstall(&mut self) -> Result<()> {
        self.say.why("Take it all off again.")?;
        self.kata_manager(&["uninstall"])?;
        self.say
            .why("containerd's configuration is byte for byte what it was, and in force.")?;
        let after = self.containerd.config();
        self.say
            .run(Command::new("cmp").arg(&self.before).arg(&after))
            .context("containerd's configuration differs from what it was")?;
        self.say
            .run(Command::new("sha256sum").args([&self.before, &after]))?;
        self.containerd.wait_up()?;
        let handlers = self.containerd.cri().handlers()?.join(", ");
        self.say
            .shown("CRI Status(verbose) | .containerd.runtimes")?;
        self.say.output(&handlers)?;
        ensure!(handlers == "runc", "handlers are left: {handlers}");
        Ok(())
    }
}

/// The versions of the programs that matter, from `parts.lock`.
fn versions(sandbox: &Sandbox) -> Result<String> {
    const SHOWN: &[(&str, &str)] = &[
        ("containerd-2.x", "containerd"),
        ("tools", "runc"),
        ("tools", "docker-registry"),
        ("tools", "busybox-static"),
        ("qemu", "qemu-system-x86"),
        ("firmware", "ovmf-"),
        ("kernel", "linux-image-"),
    ];
    let path = sandbox.parts().dir().join("parts.lock");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let lines = text.lines().filter_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [group, suite, package, version, digest, ..] = words[..] else {
            return None;
        };
        SHOWN
            .iter()
            .any(|(g, p)| group == *g && package.starts_with(p))
            .then(|| {
                format!(
                    "{package} {version} ({suite}, sha256 {}…)",
                    digest.get(..12).unwrap_or(digest)
                )
            })
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Writes `config.yaml` and gives its path.
fn write_config(
    sandbox: &Sandbox,
    registry: &Registry,
    containerd: &Instance,
    prefix: &Path,
    shim: &Path,
) -> Result<PathBuf> {
    let work = sandbox.work().display();
    let inner = prefix.join("bin/containerd-shim-kata-v2");
    let mut text = format!("artifactsDir: {work}/artifacts\nruntimeClasses:\n");
    for (name, artifact) in CLASSES {
        let url = registry.reference(artifact);
        text.push_str(&format!("- name: {name}\n  artifacts:\n    url: {url}\n"));
    }
    let url = registry.reference(CLASSES[0].1);
    text.push_str(&format!(
        "- name: {DEMO_CLASS}\n  runtimeType: io.containerd.runc.v2\n  innerShim: {inner}\n  \
         artifacts:\n    url: {url}\n\
         provider:\n  prefix: {prefix}\n  version: \"4.1\"\n\
         shim:\n  program: {shim}\n  kubeletSocket: {work}/no-kubelet.sock\n\
         containerd:\n  config: {config}\n  socket: {socket}\n  \
         restart:\n    mode: command\n    command: {command:?}\n",
        inner = inner.display(),
        prefix = prefix.display(),
        shim = shim.display(),
        config = containerd.config().display(),
        socket = containerd.socket().display(),
        command = containerd.restart_command(),
    ));
    let path = sandbox.work().join("config.yaml");
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
