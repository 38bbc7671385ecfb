//! A stand-in for the kubelet, for tests: `kubelet-stand-in DIR`, where DIR is what `/var/lib/kubelet` is to a kubelet.
//!
//! It serves Registration, connects to plugins that register, follows their lists, asks them for preferences and devices, and serves
//! PodResources for what it gave to pods. It is told what to do by lines of JSON on standard input and answers each with one on
//! standard output ([`commands`]). The README beside it says what a kubelet does and this does not.

mod commands;
mod kubelet;
mod plugin;
mod podresources;
mod state;

use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::commands::Player;

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.context("usage: kubelet-stand-in DIR")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start a runtime")?;
    let mut player = Player::new(runtime, folder);
    for line in std::io::stdin().lock().lines() {
        let line = line.context("read a command")?;
        let answer = player.answer(&line);
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}").context("write an answer")?;
        out.flush().context("write an answer")?;
    }
    player.stop();
    Ok(())
}
