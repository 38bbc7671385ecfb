//! What the stand-in is told, line by line, and what it answers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use km_plugin::api;
use km_plugin::api::device_plugin_client::DevicePluginClient;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::kubelet::Kubelet;
use crate::state::{Claimed, Given, Service, Shared, State};

/// The longest that a plugin may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// A command: an object with one key.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Command {
    /// Starts the kubelet, or starts it again.
    Start {},
    /// Ends it, with its connections. Its sockets' files stay.
    Stop {},
    /// What plugins have registered and listed.
    Show {},
    /// Asks a plugin which it would take. Without `available`: of all that are healthy and free.
    Prefer {
        resource: String,
        available: Option<Vec<String>>,
        #[serde(default)]
        must: Vec<String>,
        size: i32,
    },
    /// Gives devices to a container: those told, or as many as are told by `size`, chosen as the plugin prefers.
    Allocate {
        resource: String,
        #[serde(default)]
        ids: Vec<String>,
        #[serde(default)]
        size: i32,
        namespace: String,
        pod: String,
        container: String,
    },
    /// Has a container have devices without asking a plugin, as a kubelet knows them from its checkpoint.
    Give {
        resource: String,
        ids: Vec<String>,
        namespace: String,
        pod: String,
        container: String,
    },
    /// Has a container have a claim of dynamic resource allocation, with these CDI devices.
    Claim {
        claim: String,
        cdi: Vec<String>,
        namespace: String,
        pod: String,
        container: String,
    },
    /// How PodResources is served from now on.
    Serve { podresources: Service },
    /// Takes back all that a pod has.
    Release { namespace: String, pod: String },
    /// Calls Allocate again and again, and gives nothing to anybody. Answers with calls a second.
    Rate {
        resource: String,
        ids: Vec<String>,
        calls: u32,
    },
    /// Starts the kubelet again and again, each time until these resources are listed anew.
    Restarts { resources: Vec<String>, times: u32 },
}

/// The stand-in.
#[derive(Debug)]
pub(crate) struct Player {
    runtime: Runtime,
    folder: PathBuf,
    shared: Shared,
    kubelet: Option<Kubelet>,
}

impl Player {
    pub(crate) fn new(runtime: Runtime, folder: PathBuf) -> Self {
        Self {
            runtime,
            folder,
            shared: Shared::default(),
            kubelet: None,
        }
    }

    /// The answer to a line: `{"ok": ...}` or `{"error": ...}`.
    pub(crate) fn answer(&mut self, line: &str) -> Value {
        let command = serde_json::from_str(line).context("read the command");
        match command.and_then(|command| self.obey(command)) {
            Ok(answer) => json!({ "ok": answer }),
            Err(error) => json!({ "error": format!("{error:#}") }),
        }
    }

    pub(crate) fn stop(&mut self) {
        let _inside = self.runtime.enter();
        self.kubelet = None;
    }

    fn start(&mut self) -> Result<()> {
        self.stop();
        let _inside = self.runtime.enter();
        self.kubelet = Some(Kubelet::start(&self.folder, &self.shared)?);
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<Value> {
        match command {
            Command::Start {} => self.start().map(|()| Value::Null),
            Command::Stop {} => {
                self.stop();
                Ok(Value::Null)
            }
            Command::Show {} => Ok(self.show()),
            Command::Prefer {
                resource,
                available,
                must,
                size,
            } => {
                let available = available.unwrap_or_else(|| self.shared.lock().free(&resource));
                Ok(json!(self.prefer(&resource, available, must, size)?))
            }
            Command::Allocate {
                resource,
                ids,
                size,
                namespace,
                pod,
                container,
            } => {
                let ids = match ids.is_empty() {
                    false => ids,
                    true => self.choose(&resource, size)?,
                };
                let answer = self.call_allocate(&resource, &ids)?;
                self.shared.lock().given.push(Given {
                    namespace,
                    pod,
                    container,
                    resource,
                    ids: ids.iter().cloned().collect(),
                });
                Ok(shown(&ids, &answer))
            }
            Command::Give {
                resource,
                ids,
                namespace,
                pod,
                container,
            } => {
                self.shared.lock().given.push(Given {
                    namespace,
                    pod,
                    container,
                    resource,
                    ids: ids.into_iter().collect(),
                });
                Ok(Value::Null)
            }
            Command::Claim {
                claim,
                cdi,
                namespace,
                pod,
                container,
            } => {
                self.shared.lock().claimed.push(Claimed {
                    namespace,
                    pod,
                    container,
                    claim,
                    cdi,
                });
                Ok(Value::Null)
            }
            Command::Serve { podresources } => {
                self.shared.lock().service = podresources;
                Ok(Value::Null)
            }
            Command::Release { namespace, pod } => {
                let mut state = self.shared.lock();
                let count = |state: &State| state.given.len() + state.claimed.len();
                let before = count(&state);
                let other = |of: &str, name: &str| of != namespace || name != pod;
                state.given.retain(|one| other(&one.namespace, &one.pod));
                state.claimed.retain(|one| other(&one.namespace, &one.pod));
                Ok(json!(before - count(&state)))
            }
            Command::Rate {
                resource,
                ids,
                calls,
            } => self.rate(&resource, &ids, calls),
            Command::Restarts { resources, times } => self.restarts(&resources, times),
        }
    }

    fn show(&self) -> Value {
        let state = self.shared.lock();
        let resource = |(name, one): (&String, &crate::state::Resource)| {
            let shown = json!({
                "endpoint": one.endpoint,
                "registrations": one.registrations,
                "prefers": one.prefers,
                "connected": one.connected,
                "lists": one.lists,
                "listedAt": one.listed_at,
                "devices": one.devices,
                "problem": one.problem,
            });
            (name.clone(), shown)
        };
        Value::Object(state.resources.iter().map(resource).collect())
    }

    fn client(&self, resource: &str) -> Result<DevicePluginClient<Channel>> {
        let state = self.shared.lock();
        let channel = state
            .resources
            .get(resource)
            .and_then(|one| one.channel.clone());
        let channel = channel.with_context(|| format!("no plugin serves {resource}"))?;
        Ok(DevicePluginClient::new(channel))
    }

    fn prefer(
        &self,
        resource: &str,
        available: Vec<String>,
        must: Vec<String>,
        size: i32,
    ) -> Result<Vec<String>> {
        let mut client = self.client(resource)?;
        let request = api::PreferredAllocationRequest {
            container_requests: vec![api::ContainerPreferredAllocationRequest {
                available_device_i_ds: available,
                must_include_device_i_ds: must,
                allocation_size: size,
            }],
        };
        let call = async { timeout(DEADLINE, client.get_preferred_allocation(request)).await };
        let answer = self
            .runtime
            .block_on(call)
            .context("GetPreferredAllocation")??;
        let mut answers = answer.into_inner().container_responses;
        ensure!(
            answers.len() == 1,
            "{} answers to one question",
            answers.len()
        );
        Ok(answers.remove(0).device_i_ds)
    }

    /// As the device manager does: the plugin's preference where it has one, else the first that are free.
    fn choose(&self, resource: &str, size: i32) -> Result<Vec<String>> {
        let free = self.shared.lock().free(resource);
        let wanted = usize::try_from(size).context("size")?;
        ensure!(
            wanted > 0 && wanted <= free.len(),
            "{wanted} of {} free {resource}",
            free.len()
        );
        let prefers = self
            .shared
            .lock()
            .resources
            .get(resource)
            .is_some_and(|one| one.prefers);
        match prefers {
            true => self.prefer(resource, free, Vec::new(), size),
            false => Ok(free.into_iter().take(wanted).collect()),
        }
    }

    fn call_allocate(&self, resource: &str, ids: &[String]) -> Result<api::AllocateResponse> {
        let mut client = self.client(resource)?;
        let call = async { timeout(DEADLINE, client.allocate(request(ids))).await };
        Ok(self
            .runtime
            .block_on(call)
            .context("Allocate")??
            .into_inner())
    }

    fn rate(&self, resource: &str, ids: &[String], calls: u32) -> Result<Value> {
        let mut client = self.client(resource)?;
        let started = Instant::now();
        self.runtime.block_on(async {
            for _ in 0..calls {
                timeout(DEADLINE, client.allocate(request(ids)))
                    .await
                    .context("Allocate")??;
            }
            anyhow::Ok(())
        })?;
        Ok(json!(f64::from(calls) / started.elapsed().as_secs_f64()))
    }

    fn restarts(&mut self, resources: &[String], times: u32) -> Result<Value> {
        let started = Instant::now();
        for time in 0..times {
            self.start()?;
            let since = Instant::now();
            loop {
                let listed = {
                    let state = self.shared.lock();
                    resources.iter().all(|name| {
                        state
                            .resources
                            .get(name)
                            .is_some_and(|one| one.connected && one.lists > 0)
                    })
                };
                if listed {
                    break;
                }
                if since.elapsed() > DEADLINE {
                    bail!("after {time} restarts: {}", self.show());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(json!(started.elapsed().as_secs_f64()))
    }
}

fn request(ids: &[String]) -> api::AllocateRequest {
    api::AllocateRequest {
        container_requests: vec![api::ContainerAllocateRequest {
            devices_ids: ids.to_vec(),
        }],
    }
}

fn shown(ids: &[String], answer: &api::AllocateResponse) -> Value {
    let containers = answer.container_responses.iter();
    let nodes: Vec<Value> = containers
        .clone()
        .flat_map(|container| &container.devices)
        .map(|node| {
            json!({ "host": node.host_path, "container": node.container_path, "permissions": node.permissions })
        })
        .collect();
    let cdi: Vec<&str> = containers
        .flat_map(|container| &container.cdi_devices)
        .map(|cdi| cdi.name.as_str())
        .collect();
    json!({ "ids": ids, "nodes": nodes, "cdi": cdi })
}
