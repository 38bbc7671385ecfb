//! Who else serves a resource. A kubelet gives a resource to whoever registered last, so two plugins take it from each other for ever.

use std::fmt;

use km_cdi::names::Class;
use km_host::{Root, process};

use crate::api;
use crate::folder::Folder;

/// How NVIDIA's Sandbox Device Plugin begins the names of its sockets.
const NVIDIA: &str = "sandbox-";

/// Another plugin that serves a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    /// Its socket, as the host sees it.
    pub socket: String,
    /// What is known of who listens there.
    pub who: String,
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.who, self.socket)
    }
}

/// The name of our socket for a class. With the kubelet's folder before it, even the longest class stays below the 108 bytes that a
/// socket's path may have (unix(7)): the kubelet connects by that path.
pub fn socket_name(class: &Class) -> String {
    format!("km-{class}.sock")
}

/// Whether a socket's name is that of a plugin for a class: `<class>.sock`, or `<anything>-<class>.sock`, as NVIDIA's
/// (`sandbox-pgpu.sock`) and KubeVirt's are.
pub(crate) fn is_for(name: &str, class: &Class) -> bool {
    let stem = name.strip_suffix(".sock");
    let before = stem.and_then(|stem| stem.strip_suffix(class.as_str()));
    before.is_some_and(|before| before.is_empty() || before.ends_with('-'))
}

/// The sockets for a class that others have.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Others {
    /// Those that somebody serves, by their names.
    pub(crate) served: Vec<String>,
    /// Whether there is one that nobody listens on: left over, or one that its plugin has just made.
    pub(crate) silent: bool,
}

/// Looks for sockets of other plugins that serve a class. Our own counts when `ours` is false: then another process has it.
pub(crate) fn find(folder: &Folder, class: &Class, ours: bool) -> Others {
    let mine = socket_name(class);
    let candidates = folder.sockets().into_iter().filter(|name| {
        name != api::KUBELET_SOCKET && is_for(name, class) && !(ours && *name == mine)
    });
    let (served, silent): (Vec<_>, Vec<_>) =
        candidates.partition(|name| process::is_served(&folder.at(name)));
    Others {
        served,
        silent: !silent.is_empty(),
    }
}

/// The plugin behind a socket.
pub(crate) fn behind(root: &Root, folder: &Folder, class: &Class, name: &str) -> Other {
    Other {
        who: describe(root, folder, name, name == socket_name(class)),
        socket: folder.shown(name),
    }
}

fn describe(root: &Root, folder: &Folder, name: &str, mine: bool) -> String {
    let what = match name {
        _ if mine => "another kata-manager device-plugin",
        name if name.starts_with(NVIDIA) => "NVIDIA's Sandbox Device Plugin",
        _ => "another device plugin",
    };
    match process::socket_peer(root, &folder.at(name)) {
        Ok(Some(process)) => match process.exe {
            Some(exe) => format!("{what} (process {}, {})", process.pid, exe.display()),
            None => format!("{what} (process {}, {})", process.pid, process.name),
        },
        // In another process namespace, or hanging: its socket is all that is known.
        Ok(None) | Err(_) => what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use km_host::HostPath;

    use super::*;

    fn class(name: &str) -> Class {
        Class::new(name).unwrap()
    }

    #[test]
    fn sockets_are_told_by_their_names() {
        let pgpu = class("pgpu");
        for name in [
            "sandbox-pgpu.sock",
            "pgpu.sock",
            "kubevirt-pgpu.sock",
            "km-pgpu.sock",
        ] {
            assert!(is_for(name, &pgpu), "{name}");
        }
        for name in [
            "kubelet.sock",
            "sandbox-nvswitch.sock",
            "vpgpu.sock",
            "sandbox-pgpu",
            "pgpu.socket",
        ] {
            assert!(!is_for(name, &pgpu), "{name}");
        }
        let longest = "x".repeat(63);
        let path = format!(
            "/var/lib/kubelet/device-plugins/{}",
            socket_name(&class(&longest))
        );
        assert!(path.len() < 108, "{path}");
    }

    #[tokio::test]
    async fn only_a_plugin_that_lives_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new("/").unwrap();
        let path = HostPath::new(dir.path().canonicalize().unwrap()).unwrap();
        let folder = Folder::open(&root, &path).unwrap();
        let pgpu = class("pgpu");
        let theirs = UnixListener::bind(folder.at("sandbox-pgpu.sock")).unwrap();
        let find = |class: &Class, ours| find(&folder, class, ours);
        let behind = |name: &str| behind(&root, &folder, &pgpu, name);
        let alone = Others::default();
        let others = find(&pgpu, true);
        assert_eq!(others.served, ["sandbox-pgpu.sock"]);
        assert!(!others.silent);
        let said = behind("sandbox-pgpu.sock").to_string();
        let process = format!("process {}", std::process::id());
        assert!(
            said.starts_with("NVIDIA's Sandbox Device Plugin") && said.contains(&process),
            "{said}"
        );
        assert!(said.ends_with("/sandbox-pgpu.sock"), "{said}");
        assert_eq!(find(&class("nvswitch"), true), alone);
        drop(theirs);
        let left = find(&pgpu, true);
        assert!(left.served.is_empty() && left.silent, "{left:?}");
        std::fs::remove_file(folder.at("sandbox-pgpu.sock")).unwrap();
        let _mine = UnixListener::bind(folder.at("km-pgpu.sock")).unwrap();
        assert_eq!(find(&pgpu, true), alone);
        assert_eq!(find(&pgpu, false).served, ["km-pgpu.sock"]);
        let other = behind("km-pgpu.sock");
        assert!(other.who.starts_with("another kata-manager"), "{other}");
    }
}
