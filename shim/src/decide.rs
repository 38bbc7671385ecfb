//! What is done for a sandbox: from what each source says, the CDI specs, the configuration and a look at the functions to a
//! [`Decision`], or to the reason why the pod does not start. Pure: nothing here reads anything.

use std::collections::{BTreeMap, BTreeSet};

use km_host::claims;
use km_vfio::glance::Glance;
use km_vfio::{Address, Kind};

use crate::bundle::is_vfio_node;
use crate::settings::Companions;
use crate::table::{self, Action, Case, Source};
use km_topology::Flavor;

/// Where the kernel has the character devices of VFIO's functions (Linux, Documentation/driver-api/vfio.rst, "VFIO Device cdev").
pub const CDEVS: &str = "/dev/vfio/devices/";

/// What the kubelet says about the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Given {
    /// There is no kubelet, or no pod: whoever starts the sandbox knows what it does.
    NoKubelet,
    /// It gave these.
    Pod {
        /// Devices of device plugins, by CDI name: resource and ID.
        plugin: Vec<String>,
        /// Devices of claims, by CDI name.
        claims: Vec<String>,
        /// Whether the kubelet serves `Get`, which Kata asks.
        serves_get: bool,
    },
}

/// The CDI devices of the node, by whole name: the host's nodes of each. A device that two files of one folder list is nobody's, and has
/// no nodes here.
pub type Catalogue = BTreeMap<String, Vec<String>>;

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What the kubelet says.
    pub given: Given,
    /// VFIO's nodes in the sandbox's config.json.
    pub spec: Vec<String>,
    /// CDI devices that the pod's annotations name.
    pub annotated: Vec<String>,
}

/// What is known of VFIO's nodes and the functions behind them.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The functions behind each node: all members of a group's, bridges too, and one of a character device's.
    pub behind: BTreeMap<String, Vec<Address>>,
    /// The functions themselves, and the other members of their groups.
    pub functions: BTreeMap<Address, Glance>,
    /// The members of each group.
    pub groups: BTreeMap<u32, Vec<Address>>,
    /// The own character devices (`vfio0`) of functions that are behind no wanted node; empty where groups alone are given away.
    pub cdevs: BTreeMap<Address, String>,
    /// The device numbers of the groups' nodes that nobody has, which were opened to learn that.
    pub numbers: BTreeMap<String, u64>,
    /// Who else uses a function, in words.
    pub used: BTreeMap<Address, String>,
    /// The GPUs and NVSwitches of the node that VFIO drivers have.
    pub primaries: Vec<Glance>,
}

/// A VFIO node that the sandbox is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where it comes from.
    pub source: Source,
    /// What it was asked for as, for messages.
    pub name: String,
    /// The host's node.
    pub node: String,
}

/// What is done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The functions that the sandbox gets, by address.
    pub devices: Vec<claims::Device>,
    /// The nodes to write into config.json, sorted.
    pub write: Vec<String>,
}

/// Why a pod does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No spec lists the device.
    #[error(
        "the pod was given {name} ({source_}), which no CDI spec lists; \"kata-manager cdi generate\" writes the specs of what is bound to VFIO, and a resource's name must be the CDI kind and the device's ID its CDI name"
    )]
    NoSpec {
        /// The device.
        name: String,
        /// Where it comes from.
        source_: Source,
    },
    /// An annotation names what the kubelet did not give to the pod.
    #[error(
        "the pod's annotation names {name}, which the kubelet did not give to this pod; drop the annotation and request the device in the pod's resources"
    )]
    NotGiven {
        /// The device.
        name: String,
    },
    /// The table refuses.
    #[error("{name} ({source_}) cannot be given to this guest: {why}")]
    Table {
        /// The device.
        name: String,
        /// Where it comes from.
        source_: Source,
        /// The row's reason.
        why: &'static str,
    },
    /// Kata would attach a device twice.
    #[error(
        "{node} is asked for twice ({first} and {second}), and Kata would attach it twice; keep one of the two"
    )]
    Twice {
        /// The node.
        node: String,
        /// One source.
        first: Source,
        /// The other.
        second: Source,
    },
    /// Kata asks the kubelet in a way that this one does not serve.
    #[error(
        "this kubelet does not serve PodResources' Get, which Kata asks, and the pod has devices; switch on its feature gate KubeletPodResourcesGet, or use Kubernetes 1.34 or later"
    )]
    NoGet,
    /// Nodes of a kind that this guest cannot get.
    #[error(
        "{node} is a group's node, and a confidential guest needs iommufd (/dev/vfio/devices/vfioN); use a kernel with CONFIG_VFIO_DEVICE_CDEV, then \"kata-manager cdi generate\""
    )]
    NeedsIommufd {
        /// The node.
        node: String,
    },
    /// Nothing is behind a node.
    #[error(
        "{name} names {node}, behind which there is no device now; was it unbound from VFIO, or has it fallen off the bus? See \"kata-manager devices list\""
    )]
    Nothing {
        /// The device.
        name: String,
        /// The node.
        node: String,
    },
    /// A function is not fit.
    #[error("{address} {problem}")]
    Unfit {
        /// The function.
        address: Address,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A companion is missing.
    #[error("{address} goes with the pod's devices ({why}) and was not given to the pod{hint}")]
    Companion {
        /// The function.
        address: Address,
        /// What binds it to them.
        why: String,
        /// What to do.
        hint: String,
    },
}

/// From names to nodes, in the order of authority; each node once.
///
/// # Errors
/// [`Refusal`].
pub fn wanted(asked: &Asked, case: Case, catalogue: &Catalogue) -> Result<Vec<Wanted>, Refusal> {
    let mut found: Vec<Wanted> = Vec::new();
    if let Given::Pod { plugin, claims, .. } = &asked.given {
        for (source, names) in [(Source::Plugin, plugin), (Source::Claim, claims)] {
            for name in names {
                add(
                    &mut found,
                    source,
                    name,
                    nodes_of(name, source, catalogue)?,
                    case,
                )?;
            }
        }
    }
    for node in &asked.spec {
        add(
            &mut found,
            Source::Spec,
            node,
            std::slice::from_ref(node),
            case,
        )?;
    }
    for name in &asked.annotated {
        let nodes = nodes_of(name, Source::Annotation, catalogue)?;
        if asked.given == Given::NoKubelet {
            add(&mut found, Source::Annotation, name, nodes, case)?;
            continue;
        }
        // Where there is a kubelet, an annotation gives nothing; it may repeat what the kubelet gave.
        for node in nodes.iter().filter(|node| is_vfio_node(node)) {
            let given = found.iter().find(|wanted| wanted.node == *node);
            match given {
                Some(wanted) if case.kata.cold_plugs() || wanted.source == Source::Spec => {}
                // An older Kata reads the annotation whatever the kubelet says.
                Some(wanted) => {
                    return Err(Refusal::Twice {
                        node: node.clone(),
                        first: wanted.source,
                        second: Source::Annotation,
                    });
                }
                None => return Err(Refusal::NotGiven { name: name.clone() }),
            }
        }
    }
    Ok(found)
}

/// The nodes of a CDI device. A device of another vendor that no spec lists is none of our business.
fn nodes_of<'a>(
    name: &str,
    source: Source,
    catalogue: &'a Catalogue,
) -> Result<&'a [String], Refusal> {
    let vendor = name.split('/').next().unwrap_or_default();
    let ours = vendor == km_cdi::VENDOR || vendor.ends_with(".nvidia.com");
    match catalogue.get(name) {
        Some(nodes) if !nodes.is_empty() || !ours => Ok(nodes),
        None if !ours => Ok(&[]),
        _ => Err(Refusal::NoSpec {
            name: name.to_owned(),
            source_: source,
        }),
    }
}

fn add(
    found: &mut Vec<Wanted>,
    source: Source,
    name: &str,
    nodes: &[String],
    case: Case,
) -> Result<(), Refusal> {
    for node in nodes.iter().filter(|node| is_vfio_node(node)) {
        match found.iter().find(|wanted| wanted.node == *node) {
            None => found.push(Wanted {
                source,
                name: name.to_owned(),
                node: node.clone(),
            }),
            // Kata in Go adds the kubelet's devices to those in config.json; runtime-rs, and a Kata that does not ask, take each once.
            Some(first)
                if source == Source::Spec
                    && first.source == Source::Plugin
                    && case.kata.cold_plugs()
                    && case.kata.flavor == Flavor::Go =>
            {
                return Err(Refusal::Twice {
                    node: node.clone(),
                    first: first.source,
                    second: source,
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Decides.
///
/// # Errors
/// [`Refusal`].
pub fn decide(
    asked: &Asked,
    wanted: &[Wanted],
    case: Case,
    policy: Companions,
    seen: &Seen,
) -> Result<Decision, Refusal> {
    if let Given::Pod {
        serves_get: false, ..
    } = asked.given
        && case.kata.cold_plugs()
        && !wanted.is_empty()
    {
        return Err(Refusal::NoGet);
    }
    let mut plan = Plan {
        case,
        seen,
        got: BTreeMap::new(),
        write: BTreeSet::new(),
        checked: None,
    };
    for one in wanted {
        plan.take(one, asked)?;
    }
    for (address, why, node) in plan.missing() {
        plan.companion(address, why, node, policy, asked)?;
    }
    plan.fit()?;
    Ok(plan.finish())
}

struct Plan<'a> {
    case: Case,
    seen: &'a Seen,
    /// Each function, by which node and from where it comes.
    got: BTreeMap<Address, (String, Source)>,
    write: BTreeSet<String>,
    /// What Kata takes from the kubelet.
    checked: Option<&'a str>,
}

impl<'a> Plan<'a> {
    fn take(&mut self, wanted: &'a Wanted, asked: &Asked) -> Result<(), Refusal> {
        let action = self.action(&wanted.name, wanted.source)?;
        if action == Action::Write && !asked.spec.contains(&wanted.node) {
            self.write.insert(wanted.node.clone());
        }
        if wanted.source == Source::Plugin && action == Action::Check {
            self.checked = Some(&wanted.name);
        }
        // Whether Kata in Go attaches nodes of config.json beside the kubelet's is told nowhere.
        if let (Flavor::Go, true, Some(_), Action::Write) = (
            self.case.kata.flavor,
            self.case.kata.cold_plugs(),
            self.checked,
            action,
        ) {
            return Err(Refusal::Table {
                name: wanted.name.clone(),
                source_: wanted.source,
                why: "the pod has devices of a device plugin as well, and whether this Kata attaches both is told nowhere; request all of them in one way",
            });
        }
        if self.case.confidential && !wanted.node.starts_with(CDEVS) {
            return Err(Refusal::NeedsIommufd {
                node: wanted.node.clone(),
            });
        }
        let behind = self.seen.behind.get(&wanted.node).into_iter().flatten();
        let mut any = false;
        for address in behind {
            let Some(function) = self.seen.functions.get(address) else {
                continue;
            };
            if function.kind.is_none() {
                continue;
            }
            any = true;
            let here = (wanted.node.clone(), wanted.source);
            if let Some((node, first)) = self.got.insert(*address, here)
                && node != wanted.node
            {
                return Err(Refusal::Twice {
                    node: format!("{address}, by {node} and {}", wanted.node),
                    first,
                    second: wanted.source,
                });
            }
        }
        match any {
            true => Ok(()),
            false => Err(Refusal::Nothing {
                name: wanted.name.clone(),
                node: wanted.node.clone(),
            }),
        }
    }

    fn action(&self, name: &str, source: Source) -> Result<Action, Refusal> {
        match table::look_up(source, self.case) {
            Some(rule) if rule.action != Action::Refuse => Ok(rule.action),
            Some(rule) => Err(Refusal::Table {
                name: name.to_owned(),
                source_: source,
                why: rule.why,
            }),
            // A test counts that there is a row for each case.
            None => Err(Refusal::Table {
                name: name.to_owned(),
                source_: source,
                why: "the table has no row for it",
            }),
        }
    }

    /// What goes with the functions and is not among them: why, and its node.
    fn missing(&self) -> Vec<(Address, String, Option<String>)> {
        let mut missing = BTreeMap::new();
        let mut nodes = self.got.values().map(|(node, _)| node);
        let cdev = nodes.any(|node| node.starts_with(CDEVS));
        for address in self.got.keys() {
            let group = self.seen.functions.get(address).and_then(|f| f.iommu_group);
            let members = group.and_then(|id| self.seen.groups.get(&id));
            for member in members.into_iter().flatten() {
                let function = self.seen.functions.get(member);
                // What is no VFIO driver's is judged with the group, and a bridge stays with the host.
                let ours = function.filter(|f| f.kind.is_some() && f.on_vfio());
                if let Some(function) = ours.filter(|f| !self.got.contains_key(&f.address)) {
                    let why = format!("it is in the IOMMU group of {address}");
                    missing.insert(*member, (why, self.node(function, cdev)));
                }
            }
        }
        let has = |glance: &&Glance| self.got.contains_key(&glance.address);
        let of = |kind| {
            self.seen
                .primaries
                .iter()
                .filter(move |one| one.kind == Some(kind))
        };
        let gpus = of(Kind::Gpu).count();
        if gpus > 1 && of(Kind::Gpu).all(|gpu| has(&gpu)) {
            for switch in of(Kind::NvSwitch).filter(|switch| !has(switch)) {
                let why = format!("it is an NVSwitch, and the pod has all {gpus} GPUs");
                missing.insert(switch.address, (why, self.node(switch, cdev)));
            }
        }
        let missing = missing.into_iter();
        missing
            .map(|(address, (why, node))| (address, why, node))
            .collect()
    }

    /// The node by which a companion is given away: as the others are, its own or its group's.
    fn node(&self, function: &Glance, cdev: bool) -> Option<String> {
        if cdev {
            let name = self.seen.cdevs.get(&function.address)?;
            return Some(format!("{CDEVS}{name}"));
        }
        let group = function.iommu_group?;
        Some(format!("/dev/vfio/{group}"))
    }

    fn companion(
        &mut self,
        address: Address,
        why: String,
        node: Option<String>,
        policy: Companions,
        asked: &Asked,
    ) -> Result<(), Refusal> {
        let refused = |hint: &str| Refusal::Companion {
            address,
            why: why.clone(),
            hint: hint.to_owned(),
        };
        if policy == Companions::Refuse {
            return Err(refused(
                "; request it in the pod's resources, or let it be added (shim.companions: add)",
            ));
        }
        let node = node.ok_or_else(|| refused("; it has no node by which it could be given"))?;
        let action = self
            .action(&address.to_string(), Source::Companion)
            .map_err(|refusal| refused(&format!(": {refusal}")))?;
        if action == Action::Write && !asked.spec.contains(&node) {
            self.write.insert(node.clone());
        }
        self.got.insert(address, (node, Source::Companion));
        Ok(())
    }

    /// Whether each function can be given away now, with its whole group, and nobody else has it.
    fn fit(&self) -> Result<(), Refusal> {
        for address in self.got.keys() {
            let unfit = |problem: String| {
                Err(Refusal::Unfit {
                    address: *address,
                    problem,
                })
            };
            let Some(function) = self.seen.functions.get(address) else {
                return unfit("is not on the bus any more".to_owned());
            };
            if let Some(user) = self.seen.used.get(address) {
                return unfit(format!("is in use by {user}; end that first"));
            }
            if function.dead {
                return unfit("answers nothing (all ones): it has fallen off the bus; reset it, or restart the machine".to_owned());
            }
            if !function.on_vfio() {
                let driver = function.driver.as_deref().map_or_else(
                    || "no driver has it".to_owned(),
                    |driver| format!("the driver {driver} has it"),
                );
                return unfit(format!(
                    "is not bound to VFIO: {driver}; \"kata-manager devices bind\" hands it over"
                ));
            }
            let Some(id) = function.iommu_group else {
                return unfit("has no IOMMU group: switch the IOMMU on".to_owned());
            };
            let Some(group) = self.seen.groups.get(&id) else {
                return unfit(format!(
                    "names the IOMMU group {id}, which lists no function: it comes or goes just now; start the pod again"
                ));
            };
            let members = group
                .iter()
                .filter_map(|member| self.seen.functions.get(member));
            if let Some(other) = members.clone().find(|member| member.in_the_way()) {
                return unfit(format!(
                    "cannot be given away: {} of its IOMMU group has the driver {}",
                    other.address,
                    other.driver.as_deref().unwrap_or_default()
                ));
            }
        }
        Ok(())
    }

    fn finish(self) -> Decision {
        let device = |(address, (node, _)): (&Address, &(String, Source))| {
            let function = self.seen.functions.get(address)?;
            Some(claims::Device {
                address: address.to_string(),
                class: function.class,
                numa_node: function.numa_node,
                iommu_group: function.iommu_group,
                cdev: node.strip_prefix(CDEVS).map(str::to_owned),
            })
        };
        Decision {
            devices: self.got.iter().filter_map(device).collect(),
            write: self.write.iter().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests;
