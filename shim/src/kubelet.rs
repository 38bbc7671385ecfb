//! Asks the kubelet which devices a pod has: `Get`, and `List` where it does not serve that. Fails closed: a kubelet that is there and
//! does not answer in time ends the start.

use std::path::Path;
use std::time::Duration;

use km_host::{Error, Root};
use km_podresources::{Client, Pod};

use crate::decide::Given;
use crate::settings::Settings;

/// How long a kubelet that starts again is waited for, which takes its socket away and puts a new one there at once.
const RESTART: Duration = Duration::from_millis(50);

/// Why it is not known what the kubelet gave.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The kubelet.
    #[error(transparent)]
    Kubelet(#[from] km_podresources::Error),
    /// The kubelet does not have the pod.
    #[error("the kubelet's PodResources List has no pod {namespace}/{name}")]
    NoPod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The host.
    #[error(transparent)]
    Host(#[from] Error),
}

/// Asks about a pod, and does something else while the kubelet looks for its answer. Without a pod, or where no socket is, there is no
/// kubelet to ask, and then it is not done.
///
/// # Errors
/// [`AskError`].
pub fn ask(
    root: &Root,
    settings: &Settings,
    pod: Option<&(String, String)>,
    meanwhile: impl FnOnce(),
) -> Result<Given, AskError> {
    let Some((namespace, name)) = pod else {
        return Ok(Given::NoKubelet);
    };
    let socket = root.resolve(&settings.kubelet_socket)?;
    let within = Duration::from_millis(settings.kubelet_timeout_ms);
    let client = match Client::connect(&socket, within) {
        Err(error) if error.is_absent() => match again(&socket, within)? {
            Some(client) => client,
            None => return Ok(Given::NoKubelet),
        },
        client => client?,
    };
    match client.get_and_meanwhile(namespace, name, meanwhile) {
        Ok(pod) => Ok(given(&pod, true)),
        Err(error) if error.is_unsupported() => {
            let pods = client.list()?;
            let mut pods = pods.iter();
            let pod = pods.find(|pod| pod.namespace == *namespace && pod.name == *name);
            pod.map(|pod| given(pod, false))
                .ok_or_else(|| AskError::NoPod {
                    namespace: namespace.clone(),
                    name: name.clone(),
                })
        }
        Err(error) => Err(error.into()),
    }
}

/// Looks once more where a kubelet has been: one that starts again has no socket for a moment, and may have asked for this sandbox before.
fn again(socket: &Path, within: Duration) -> Result<Option<Client>, km_podresources::Error> {
    if !socket.parent().is_some_and(Path::is_dir) {
        return Ok(None);
    }
    std::thread::sleep(RESTART);
    match Client::connect(socket, within) {
        Err(error) if error.is_absent() => Ok(None),
        client => client.map(Some),
    }
}

fn given(pod: &Pod, serves_get: bool) -> Given {
    let plugin = pod.plugin_devices();
    let claims = pod
        .claim_devices()
        .flat_map(|claim| claim.cdi.iter().cloned());
    Given::Pod {
        plugin: plugin
            .map(|(resource, id)| format!("{resource}={id}"))
            .collect(),
        claims: claims.collect(),
        serves_get,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_kubelet_that_starts_again_is_found_where_one_has_been() {
        let within = Duration::from_secs(10);
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("kubelet.sock");
        let nowhere = dir.path().join("none/kubelet.sock");
        assert!(again(&nowhere, within).unwrap().is_none());
        assert!(again(&socket, within).unwrap().is_none());
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(again(&socket, within).unwrap().is_some());
        // One that is there and does not listen is no absent one.
        drop(listener);
        assert!(again(&socket, within).is_err());
    }
}
