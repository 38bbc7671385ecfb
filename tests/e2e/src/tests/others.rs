//! What other people have on the node: folders under a class's name, handlers, and time of their processors.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::process;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::node::{DEMO, Node, SOON, Stamped};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_displaced_folder_comes_back",
        a_displaced_folder_comes_back,
    ),
    ("a_foreign_handler_1_7", |s| {
        a_foreign_handler(s, Version::V1_7)
    }),
    ("a_foreign_handler_2_x", |s| {
        a_foreign_handler(s, Version::V2)
    }),
    (
        "a_handler_in_an_imported_file",
        a_handler_in_an_imported_file,
    ),
    (
        "a_configuration_behind_a_link",
        a_configuration_behind_a_link,
    ),
    ("restarts_are_somebody_elses", restarts_are_somebody_elses),
    ("a_second_apply_costs_nothing", a_second_apply_costs_nothing),
];

/// What NVIDIA's Kata Manager leaves: a real folder under the class's name.
fn a_displaced_folder_comes_back(sandbox: &Sandbox) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let original = fs::read(node.containerd.config())?;
    let class = node.artifacts.join(DEMO);
    let file = class.join("sub/theirs");
    fs::create_dir_all(class.join("sub"))?;
    fs::write(&file, "theirs")?;
    let inodes =
        || Ok::<_, std::io::Error>((fs::metadata(&class)?.ino(), fs::metadata(&file)?.ino()));
    let before = inodes()?;

    let planned = node.km.expect(&["plan"], 0)?;
    ensure!(
        planned.stdout.contains(&*class.to_string_lossy()),
        "plan does not say that the folder is in the way: {planned}"
    );
    ensure!(fs::read(&file)? == b"theirs", "plan touched the folder");
    node.apply(&[DEMO])?;
    ensure!(
        class.is_symlink() && !file.exists(),
        "it was not taken over"
    );
    ensure!(fs::read(class.join("vmlinuz"))? == b"a kernel");
    node.demo_runs()?;

    let removed = node.km.expect(&["uninstall"], 0)?;
    ensure!(removed.stdout.contains(DEMO), "{removed}");
    ensure!(!class.is_symlink() && fs::read(&file)? == b"theirs");
    ensure!(inodes()? == before, "a copy came back, not the folder");
    ensure!(fs::read(node.containerd.config())? == original);
    let left = super::node::names(&node.artifacts)?;
    ensure!(left == [DEMO], "{left:?} is left");
    Ok(())
}

fn a_foreign_handler(sandbox: &Sandbox, version: Version) -> Result<()> {
    let options = Options::new(version).handler(DEMO, "io.containerd.runc.v2");
    let node = Node::start(sandbox, &options)?;
    let config = node.containerd.config();
    let text = fs::read_to_string(&config)?;
    // Something of their own in it, which must come back with the rest.
    let theirs = text.replacen(
        &format!("runtimes.{DEMO}]\n"),
        &format!(
            "runtimes.{DEMO}]\n      # ours, said somebody\n      pod_annotations = [ 'theirs' ]\n"
        ),
        1,
    );
    ensure!(theirs != text, "no place for a comment in\n{text}");
    fs::write(&config, &theirs)?;
    node.containerd.restart()?;
    let original = fs::read(&config)?;

    node.refuses(&["plan"], 3, &[DEMO, "--adopt"])?;
    node.refuses(&["apply"], 3, &[DEMO, "--adopt"])?;
    ensure!(!node.artifacts.exists(), "a refused apply made folders");
    node.km.expect(&["apply", "--adopt"], 0)?;
    ensure!(node.containerd.cri().handlers()? == [DEMO, "runc"]);
    ensure!(
        fs::read(&config)? != original,
        "the handler was not made ours"
    );
    node.demo_runs()?;
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    node.uninstall(&original, &[DEMO, "runc"])?;
    Ok(())
}

/// An imported file's table of a plugin takes the place of the main file's (containerd 1.x): it is in force, and it is somebody's.
fn a_handler_in_an_imported_file(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let drop_in = node.containerd.dir().join("etc/conf.d/10-theirs.toml");
    let config = fs::read_to_string(node.containerd.config())?;
    let own: Vec<&str> = config
        .lines()
        .filter(|line| !line.starts_with("imports"))
        .collect();
    let text = format!(
        "{}\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{DEMO}]\n  \
         runtime_type = \"io.containerd.runc.v2\"\n",
        own.join("\n")
    );
    fs::write(&drop_in, &text)?;
    node.containerd.restart()?;
    ensure!(node.containerd.cri().handlers()? == [DEMO, "runc"]);
    let names = drop_in.display().to_string();
    node.refuses(&["plan"], 3, &[DEMO, &names])?;
    node.refuses(&["apply"], 3, &[DEMO, &names])?;
    ensure!(fs::read_to_string(&drop_in)? == text, "their file changed");
    Ok(())
}

fn a_configuration_behind_a_link(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let link = node.containerd.config();
    let file = sandbox.folder("elsewhere")?.join("containerd.toml");
    fs::rename(&link, &file)?;
    std::os::unix::fs::symlink(&file, &link)?;
    let original = fs::read(&file)?;
    node.apply(&[DEMO])?;
    ensure!(fs::read_link(&link)? == file, "the link was replaced");
    ensure!(fs::read(&file)? != original, "its target was not written");
    node.uninstall(&original, &["runc"])?;
    ensure!(fs::read_link(&link)? == file, "the link was replaced");
    let beside = super::node::names(file.parent().context("its folder")?)?;
    ensure!(beside == ["containerd.toml"], "beside it lies {beside:?}");
    Ok(())
}

/// `restart.mode: none`: everything is prepared, and containerd is left alone.
fn restarts_are_somebody_elses(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    let original = fs::read(node.containerd.config())?;
    node.reconfigure("mode: command", "mode: none")?;
    let applied = node.km.expect(&["apply"], 0)?;
    ensure!(applied.stdout.contains("Restart containerd"), "{applied}");
    ensure!(node.containerd.cri().handlers()? == ["runc"]);
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(
        node.containerd.restarts()? == 0,
        "containerd was restarted: {again}"
    );
    node.containerd.restart()?;
    ensure!(node.containerd.cri().handlers()? == [DEMO, "runc"]);
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    node.demo_runs()?;
    node.km.expect(&["uninstall"], 0)?;
    node.is_clean(&original)?;
    node.containerd.restart()?;
    ensure!(node.containerd.cri().handlers()? == ["runc"]);
    Ok(())
}

/// The system calls by which a program starts others, or opens a file.
const WATCHED: &str = "execve,execveat,fork,vfork,open,openat,openat2,creat,truncate,ftruncate,fallocate,\
     fsync,fdatasync,syncfs,utimensat,chmod,fchmod,fchmodat,chown,fchown,fchownat,setxattr,fsetxattr";

fn a_second_apply_costs_nothing(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    node.apply(&[DEMO])?;
    let config = Stamped::of(&node.containerd.config())?;

    let (finished, changes) = node.km.traced(sandbox, &["apply"])?;
    finished.success()?;
    // Making a folder that is there changes nothing; strace shows such a call with its error.
    let changes: Vec<_> = changes
        .iter()
        .filter(|line| !line.contains("= -1 E"))
        .collect();
    ensure!(changes.is_empty(), "it changed {changes:?}");

    let log = sandbox.folder("watched")?.join("log");
    let mut strace = Command::new(sandbox.parts().strace());
    strace
        .args(["-f", "-qq", "-o"])
        .arg(&log)
        .args(["-e", &format!("trace={WATCHED}"), "--"])
        .arg(node.km.binary())
        .arg("apply")
        .env("KATA_MANAGER_CONFIG", &node.config);
    process::run(&mut strace, SOON)?.success()?;
    let text = fs::read_to_string(&log)?;
    let calls: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains("= -1 E"))
        .collect();
    let started = calls.iter().filter(|call| call.contains("execve")).count();
    ensure!(started == 1, "it started programs: {calls:?}");
    let written: Vec<_> = calls
        .iter()
        .filter(|call| !call.contains("execve(") && !reads_only(call))
        .collect();
    ensure!(written.is_empty(), "it wrote: {written:?}");
    ensure!(
        Stamped::of(&node.containerd.config())? == config,
        "containerd's file was written"
    );
    cheap(sandbox, &node)
}

/// Whether a traced call opens something for reading; the lock and devices may be opened for writing.
fn reads_only(call: &str) -> bool {
    let opens = call.contains("open");
    let writes = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"]
        .iter()
        .any(|flag| call.contains(flag));
    opens && (!writes || call.contains("/state/lock\"") || call.contains("\"/dev/"))
}

/// Processor time of a second apply, the mean of ten in one shell: its children's time is added up before it is rounded.
#[expect(clippy::print_stdout, reason = "a measurement is to be seen")]
fn cheap(sandbox: &Sandbox, node: &Node) -> Result<()> {
    /// proc(5): `/proc/PID/stat` counts in ticks of 1/100 s (USER_HZ).
    const TICK_MS: u64 = 10;
    const RUNS: u64 = 10;
    const LOOP: &str = "set -e; for run in 1 2 3 4 5 6 7 8 9 10; do \"$0\" apply; done";
    let mut shell = Command::new(sandbox.parts().busybox());
    shell
        .args(["sh", "-c", LOOP])
        .arg(node.km.binary())
        .env("KATA_MANAGER_CONFIG", &node.config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mean = ticks_of_children(&mut shell)? * TICK_MS / RUNS;
    let path = node.km.binary();
    let release = path.components().any(|part| part.as_os_str() == "release");
    println!("a second apply takes {mean} ms of processor time, release build: {release}");
    // A debug build is some times slower; what it must not do is far slower still.
    let most = if release { 50 } else { 400 };
    ensure!(
        mean < most,
        "a second apply takes {mean} ms of processor time"
    );
    Ok(())
}

/// User and system time of the children that a program waited for, read between its end and its burial.
fn ticks_of_children(command: &mut Command) -> Result<u64> {
    let mut child = command.spawn()?;
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("a process without a number")?;
    waitid(
        WaitId::Pid(pid),
        WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
    )?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    // proc(5): after the name in parentheses comes field 3; cutime and cstime are fields 16 and 17.
    let fields: Vec<&str> = stat
        .rsplit(") ")
        .next()
        .unwrap_or_default()
        .split(' ')
        .collect();
    Ok(fields[13].parse::<u64>()? + fields[14].parse::<u64>()?)
}
