//! The configuration files that a private containerd is started with.

use std::path::Path;

use super::{Flavour, Options};
use crate::images;

/// The text of `config.toml` for a containerd whose folder is `dir`.
pub(super) fn text(dir: &Path, options: &Options) -> String {
    match options.flavour {
        Flavour::Version2 => version_2(dir, options),
        Flavour::Version3 => version_3(dir, options),
    }
}

/// What 1.6 and 1.7 want. 2.x takes it too, and it is the version that Debian's package of 2.x installs.
fn version_2(dir: &Path, options: &Options) -> String {
    let r = dir.display();
    let cri = r#"plugins."io.containerd.grpc.v1.cri""#;
    format!(
        r#"# A private containerd.
version = 2
root = "{r}/root"
state = "{r}/state"
imports = ["{r}/etc/conf.d/*.toml"]

[grpc]
  address = "{r}/containerd.sock"

[{cri}]
  sandbox_image = "{pause}"
  # Lowering oom_score_adj needs CAP_SYS_RESOURCE, which a container that runs tests may lack.
  restrict_oom_score_adj = true
  disable_apparmor = true
  [{cri}.cni]
    bin_dir = "{r}/cni/bin"
    conf_dir = "{r}/cni/net.d"
  [{cri}.containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [{cri}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
{handlers}
[plugins."io.containerd.internal.v1.opt"]
  path = "{r}/opt"

[plugins."io.containerd.nri.v1.nri"]
  disable = true
"#,
        pause = images::PAUSE,
        handlers = handlers(options, &format!("{cri}.containerd.runtimes")),
    )
}

/// What 2.x writes by itself: runtimes and images are two plugins.
fn version_3(dir: &Path, options: &Options) -> String {
    let r = dir.display();
    let runtime = r#"plugins."io.containerd.cri.v1.runtime""#;
    let images_plugin = r#"plugins."io.containerd.cri.v1.images""#;
    format!(
        r#"# A private containerd.
version = 3
root = "{r}/root"
state = "{r}/state"
imports = ["{r}/etc/conf.d/*.toml"]

[grpc]
  address = "{r}/containerd.sock"

[{images_plugin}]
  snapshotter = "native"
  [{images_plugin}.pinned_images]
    sandbox = "{pause}"

[{runtime}]
  # Lowering oom_score_adj needs CAP_SYS_RESOURCE, which a container that runs tests may lack.
  restrict_oom_score_adj = true
  disable_apparmor = true
  [{runtime}.cni]
    bin_dirs = ["{r}/cni/bin"]
    conf_dir = "{r}/cni/net.d"
  [{runtime}.containerd]
    default_runtime_name = "runc"
    [{runtime}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
{handlers}
[plugins."io.containerd.internal.v1.opt"]
  path = "{r}/opt"

[plugins."io.containerd.nri.v1.nri"]
  disable = true
"#,
        pause = images::PAUSE,
        handlers = handlers(options, &format!("{runtime}.containerd.runtimes")),
    )
}

fn handlers(options: &Options, table: &str) -> String {
    options
        .handlers
        .iter()
        .map(|(name, runtime_type)| {
            format!("    [{table}.{name}]\n      runtime_type = \"{runtime_type}\"\n")
        })
        .collect()
}
