//! The kubelet's side of a plugin: connects to its socket, asks for its options, follows its lists.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use km_plugin::api;
use km_plugin::api::device_plugin_client::DevicePluginClient;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

use crate::state::{Device, Shared};

/// The kubelet's own deadline for connecting (`pkg/kubelet/cm/devicemanager/plugin/v1beta1/client.go`).
const CONNECT: Duration = Duration::from_secs(10);

/// Connects to a plugin.
pub(crate) async fn connect(socket: PathBuf) -> Result<Channel, String> {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    match timeout(CONNECT, endpoint.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(format!("{error:?}")),
        Err(_) => Err(format!("no connection within {CONNECT:?}")),
    }
}

/// Follows a plugin from its registration to the end of its stream of lists; then its devices count as unhealthy, as with a kubelet.
pub(crate) async fn follow(shared: Shared, resource: String, serial: u64, socket: PathBuf) {
    let ended = lists(&shared, &resource, serial, socket).await;
    shared.resource(&resource, serial, |one| {
        one.connected = false;
        one.channel = None;
        one.problem = ended.err();
        for device in &mut one.devices {
            device.healthy = false;
        }
    });
}

async fn lists(
    shared: &Shared,
    resource: &str,
    serial: u64,
    socket: PathBuf,
) -> Result<(), String> {
    let channel = connect(socket).await?;
    let mut client = DevicePluginClient::new(channel.clone());
    let said = |status: tonic::Status| status.to_string();
    let options = client.get_device_plugin_options(api::Empty {}).await;
    let prefers = options
        .map_err(said)?
        .into_inner()
        .get_preferred_allocation_available;
    let mut lists = client
        .list_and_watch(api::Empty {})
        .await
        .map_err(said)?
        .into_inner();
    shared.resource(resource, serial, |one| {
        one.channel = Some(channel);
        one.prefers = prefers;
        one.connected = true;
    });
    while let Some(list) = lists.message().await.map_err(said)? {
        let devices = list.devices.into_iter().map(device).collect();
        shared.resource(resource, serial, |one| {
            one.devices = devices;
            one.lists += 1;
            one.listed_at = now();
        });
    }
    Err("the plugin has ended its list".to_owned())
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn device(listed: api::Device) -> Device {
    let nodes = listed.topology.unwrap_or_default().nodes;
    Device {
        id: listed.id,
        healthy: listed.health == api::HEALTHY,
        numa: nodes.iter().map(|node| node.id).collect(),
    }
}
