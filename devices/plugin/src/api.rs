//! The kubelet's device plugin API, v1beta1: messages, clients and servers generated from `proto/deviceplugin.proto`. What the
//! fields mean is told there.

#![allow(missing_docs, clippy::all, reason = "generated code")]

include!("generated/v1beta1.rs");

/// The version that a plugin registers with.
pub const VERSION: &str = "v1beta1";

/// The kubelet's folder for plugins' sockets, below its own (`DevicePluginPath` of the API).
pub const FOLDER: &str = "device-plugins";

/// The kubelet's own socket in that folder (`KubeletSocket` of the API).
pub const KUBELET_SOCKET: &str = "kubelet.sock";

/// What a device that can be given out is called (`Healthy` of the API).
pub const HEALTHY: &str = "Healthy";

/// What a device that cannot be given out is called (`Unhealthy` of the API).
pub const UNHEALTHY: &str = "Unhealthy";
