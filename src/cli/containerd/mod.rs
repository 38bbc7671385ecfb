//! `containerd`: how containerd's configuration stands, what would change in it, and the way back.

mod diff;
mod restore;
mod show;

use anyhow::Result;

use super::Global;

#[derive(Debug, clap::Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Tell which files containerd reads, which handlers they give, whose each is, and whether it is live.
    ///
    /// Reads only, and works while containerd is down. The files are the main one and all that it imports, merged by the
    /// rules of the containerd that runs: 1.x takes a plugin's whole table from the last file that has one, 2.x merges.
    Show,
    /// Show what "apply" would change in containerd's files, and what somebody changed in ours.
    ///
    /// Asks no registry and changes nothing.
    Diff(diff::Arguments),
    /// Take our handlers out of containerd again and leave everything else, artifacts too.
    ///
    /// The files come back byte for byte where nobody else changed them, and other people's later changes stay. containerd is
    /// restarted and asked; when it does not come back as wanted, the files from before this command are restored.
    Restore(restore::Arguments),
}

pub(super) async fn run(global: &Global, command: &Command) -> Result<()> {
    match command {
        Command::Show => show::run(global).await,
        Command::Diff(arguments) => diff::run(global, arguments).await,
        Command::Restore(arguments) => restore::run(global, arguments).await,
    }
}
