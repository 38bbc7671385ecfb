//! What containerd's files say, what runs, and whether the shims that handlers name can be run. Reads only.

use std::path::PathBuf;

use anyhow::Result;
use km_containerd_config::effective::{Effective, Snapshot};
use km_containerd_config::handler::Settings;
use km_containerd_config::live::LiveHandlers;
use km_containerd_config::place;
use km_containerd_config::shim::{self, ShimSearch};
use km_containerd_config::{ContainerdVersion, Handler};
use km_cri::Sandbox;

use crate::failure::{Failure, Kind};
use crate::flavor;
use crate::journal::Journal;
use crate::node::Node;
use crate::{programs, wanted};

/// containerd and its configuration.
#[derive(Debug)]
pub(crate) struct SeenContainerd {
    /// The main file, with symlinks followed.
    pub(crate) path: PathBuf,
    /// The path that containerd is told, if that is another.
    pub(crate) told: PathBuf,
    /// Every file that was read, for a plan that reads no more.
    pub(crate) files: Snapshot,
    /// The main file and what it imports.
    pub(crate) effective: Effective,
    pub(crate) flavor: flavor::Kind,
    pub(crate) version: ContainerdVersion,
    /// Settings of the CRI plugin to write where nobody set them.
    pub(crate) cri: Settings,
    pub(crate) live: LiveHandlers,
    pub(crate) sandboxes: Vec<Sandbox>,
    /// The handlers as this containerd wants them written.
    pub(crate) wanted: Vec<Handler>,
    /// The handlers as we last wrote them.
    pub(crate) recorded: Vec<Handler>,
}

/// Looks at containerd, which must answer.
pub(crate) async fn containerd(node: &Node, journal: &Journal) -> Result<SeenContainerd> {
    node.flavor()?;
    let daemon = node.daemon()?;
    let (path, told) = node.containerd_config()?;
    let not_running = || {
        format!(
            "containerd does not answer on {}: start it, or name another socket in containerd.socket",
            node.config.containerd.socket
        )
    };
    let asked = async {
        let cri = daemon.cri().await?;
        let version = cri.version().await?;
        let status = cri.status().await?;
        Ok::<_, km_cri::Error>((version, status, cri.sandboxes().await?))
    };
    let (version, status, sandboxes) = asked
        .await
        .map_err(|error| Failure::because(Kind::Containerd, not_running(), error))?;
    let version: ContainerdVersion = version.runtime_version.parse().map_err(|error| {
        Failure::because(
            Kind::Containerd,
            format!(
                "containerd's version {:?} is in no known form",
                version.runtime_version
            ),
            error,
        )
    })?;
    let (files, effective) = files(node, version)?;
    Ok(SeenContainerd {
        told,
        path,
        files,
        effective,
        flavor: node.flavor()?,
        version,
        cri: wanted::cri_settings(&node.config, version),
        live: LiveHandlers::from_cri_config(&status.config),
        sandboxes,
        wanted: wanted::handlers(&node.config, version, programs::available(&node.config)),
        recorded: journal.record().handlers.clone(),
    })
}

/// The configuration in force by the files, read by the rules of a version.
pub(crate) fn files(node: &Node, version: ContainerdVersion) -> Result<(Snapshot, Effective)> {
    let main = &node.config.containerd.config;
    Ok(Snapshot::take(&node.root, main, version, |effective| {
        place::possible_drop_ins(effective, main)
    })?)
}

/// Which wanted handlers' shims cannot be run, and why.
pub(super) fn missing_shims(node: &Node, containerd: &SeenContainerd) -> Result<Vec<String>> {
    if containerd.wanted.is_empty() {
        return Ok(Vec::new());
    }
    let opt = containerd.effective.opt_path();
    let search: ShimSearch = node.daemon()?.shim_search(opt)?;
    let resolve =
        |handler: &Handler| shim::resolve(&node.root, handler, &search, containerd.version).err();
    Ok(containerd
        .wanted
        .iter()
        .filter(|handler| !programs::is_ours(handler))
        .filter_map(resolve)
        .map(|error| error.to_string())
        .collect())
}
