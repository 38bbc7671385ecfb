//! `node-agent`: does inside the node what the harness outside asks for, one request at a time. systemd starts it, and again
//! when it ends.

#![expect(
    clippy::disallowed_methods,
    reason = "it runs what it is told to, in a virtual machine made for that"
)]

use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use km_node_agent::{PORT, Reply, Request, bytes, receive, send};

/// Where the kernel lists virtio-serial ports, each with its name (kernel: Documentation/ABI, `drivers/char/virtio_console.c`).
const PORTS: &str = "/sys/class/virtio-ports";

/// Time between two looks at a running program.
const INTERVAL: Duration = Duration::from_millis(2);

fn main() -> Result<()> {
    let path = port()?;
    let open = || File::options().read(true).write(true).open(&path);
    let mut port = open().with_context(|| format!("open {}", path.display()))?;
    send(&mut port, &Reply::Ready, &[])?;
    loop {
        let request = receive(&mut port).context("read a request")?;
        // The content follows whether it can be written or not.
        let content = match &request {
            Request::Put { length, .. } => bytes(&mut port, *length)?,
            _ => Vec::new(),
        };
        let (reply, parts) = answer(&request, &content).unwrap_or_else(|error| {
            let reason = format!("{error:#}");
            (Reply::Failed { reason }, Vec::new())
        });
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        send(&mut port, &reply, &parts).context("write a reply")?;
    }
}

fn port() -> Result<PathBuf> {
    for entry in fs::read_dir(PORTS).with_context(|| format!("list {PORTS}"))? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("{PORTS} has no port named {PORT}")
}

fn answer(request: &Request, content: &[u8]) -> Result<(Reply, Vec<Vec<u8>>)> {
    match request {
        Request::Run { argv, deadline_ms } => run(argv, Duration::from_millis(*deadline_ms)),
        Request::Put { path, mode, .. } => put(Path::new(path), *mode, content),
        Request::Get { path } => {
            let content = fs::read(path).with_context(|| format!("read {path}"))?;
            let length = content.len() as u64;
            Ok((Reply::Content { length }, vec![content]))
        }
    }
}

fn put(path: &Path, mode: u32, content: &[u8]) -> Result<(Reply, Vec<Vec<u8>>)> {
    let folder = path.parent().context("the path of a file has a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("write {}", path.display()))?;
    Ok((Reply::Written, Vec::new()))
}

/// Runs a program. Its output goes through files, so that a grandchild that keeps them open cannot hold this up.
fn run(argv: &[String], deadline: Duration) -> Result<(Reply, Vec<Vec<u8>>)> {
    let [program, arguments @ ..] = argv else {
        bail!("no program was named");
    };
    let mut out = tempfile::tempfile().context("temporary file for output")?;
    let mut err = tempfile::tempfile().context("temporary file for output")?;
    let started = Instant::now();
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let status = wait(&mut child, started, deadline)?;
    let took_ms = u64::try_from(started.elapsed().as_millis())?;
    let (stdout, stderr) = (read_back(&mut out)?, read_back(&mut err)?);
    let Some(status) = status else {
        bail!(
            "{argv:?} ran longer than {deadline:?} and was killed; it had said:\n{}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
    };
    let reply = Reply::Finished {
        status: status.into_raw(),
        took_ms,
        stdout: stdout.len() as u64,
        stderr: stderr.len() as u64,
    };
    Ok((reply, vec![stdout, stderr]))
}

/// How the program ended; none when it had to be killed. One that not even that ends is left behind.
fn wait(child: &mut Child, started: Instant, deadline: Duration) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() >= deadline {
            child.kill()?;
            return Ok(None);
        }
        sleep(INTERVAL);
    }
}

fn read_back(file: &mut File) -> Result<Vec<u8>> {
    const MOST: u64 = 16 << 20;
    let mut content = Vec::new();
    file.rewind()?;
    let length = file.take(MOST + 1).read_to_end(&mut content)?;
    ensure!(
        length as u64 <= MOST,
        "the program said more than {MOST} bytes"
    );
    Ok(content)
}
