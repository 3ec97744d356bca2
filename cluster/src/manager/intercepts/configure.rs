//! What an agent is told.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use tpd_api::STREAM_PORT;
use tpd_api::agent::{self, Config, Manager};
use tpd_api::inject::AGENT_SERVICE_PORT;
use tpd_api::overlay::DNS_PORT;
use tpd_netstack::key::PublicKey;
use tpd_netstack::server::Pair;

use super::objects::{Intercept, Pod, Service};
use super::ports;
use crate::manager;
use crate::manager::endpoints::Replica;
use crate::manager::resolv::Resolver;

/// What every agent is told alike.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The managers' key.
    pub key: PublicKey,
    /// The managers' overlay address.
    pub gateway: Ipv6Addr,
    /// Where this manager's WireGuard datagrams go.
    pub udp: SocketAddr,
    /// Where this manager's streams are.
    pub stream: SocketAddr,
    /// The cluster's DNS zone.
    pub zone: String,
}

/// An intercept that is served, and the laptop that it goes to.
#[derive(Clone, Copy, Debug)]
pub struct Served<'a> {
    /// The intercept.
    pub intercept: &'a Intercept,
    /// Overlay address of the laptop.
    pub laptop: Ipv6Addr,
}

impl Facts {
    /// Those of this manager.
    #[must_use]
    pub fn new(config: &manager::config::Config, key: PublicKey, resolver: &Resolver) -> Self {
        let own = config.pod_ips.first().copied().unwrap_or_else(|| config.overlay.ip());
        Self {
            key,
            gateway: config.gateway().ipv6,
            udp: (own, config.overlay.port()).into(),
            stream: (own, config.stream.port()).into(),
            zone: config.zone.clone().or_else(|| resolver.zone.clone()).unwrap_or_default(),
        }
    }

    /// All that concerns the agent in a pod, without generation and revision.
    #[must_use]
    pub fn config(
        &self,
        pod: &Pod,
        address: Ipv6Addr,
        replicas: &BTreeMap<String, Replica>,
        leading: &[&Service],
        services: Vec<agent::Service>,
        served: &[Served<'_>],
    ) -> Config {
        Config {
            generation: 0,
            revision: 0,
            workload: pod.workload.as_ref().map(ToString::to_string).unwrap_or_default(),
            address,
            manager: Manager {
                key: self.key.to_string(),
                gateway: self.gateway,
                udp: self.udp,
                stream: self.stream,
            },
            replicas: replicas.values().filter_map(replica).collect(),
            services,
            intercepts: served.iter().filter_map(|served| intercept(pod, leading, served)).collect(),
        }
    }
}

fn replica(replica: &Replica) -> Option<agent::Replica> {
    let address: &IpAddr = replica.addresses.first().filter(|_| !replica.leaving)?;
    Some(agent::Replica { pod: replica.name.clone(), address: (*address, STREAM_PORT).into() })
}

/// An intercept as this pod carries it out; `None` if the pod has none of its ports.
fn intercept(pod: &Pod, leading: &[&Service], served: &Served<'_>) -> Option<agent::Intercept> {
    let Served { intercept, laptop } = *served;
    let found = intercept.spec.ports.iter().filter_map(|mapping| {
        let found = ports::find(pod, leading, mapping).ok()?;
        is_in_path(pod, found.port, found.protocol).then_some((found, mapping.overlay_port))
    });
    let found: Vec<_> = found.collect();
    let (first, _) = found.first()?;
    let container = first.container.as_ref().or_else(|| pod.containers.first());
    let ports = found.iter().map(|(found, overlay_port)| agent::Port {
        port: found.port,
        protocol: found.protocol,
        overlay_port: *overlay_port,
    });
    Some(agent::Intercept {
        uid: intercept.uid.clone(),
        name: intercept.name.clone(),
        generation: intercept.generation,
        laptop,
        ports: ports.collect(),
        filter: intercept.spec.filter.clone(),
        mode: intercept.spec.mode,
        proxy_protocol: intercept.spec.proxy_protocol,
        environment: container.filter(|_| intercept.spec.environment).cloned(),
    })
}

/// Whether traffic of a port of the pod comes to its agent.
#[must_use]
pub fn is_in_path(pod: &Pod, port: u16, protocol: agent::Protocol) -> bool {
    match &pod.entry {
        Some(agent::Entry::Redirect) => true,
        Some(agent::Entry::Ports { ports }) => {
            ports.iter().any(|taken| (taken.app, taken.protocol) == (port, protocol))
        }
        None => false,
    }
}

/// What of an intercept's ports Services lead past the agent of a pod. It keeps the ports: what still comes by their names is
/// handed over.
#[must_use]
pub fn bypasses(pod: &Pod, leading: &[&Service], intercept: &Intercept) -> Option<Bypasses> {
    let found = intercept.spec.ports.iter().filter_map(|mapping| {
        let found = ports::find(pod, leading, mapping).ok()?;
        is_in_path(pod, found.port, found.protocol)
            .then(|| ports::bypass(pod, leading, found.port, found.protocol))
    });
    let found: Vec<_> = found.collect();
    let wholly = found.iter().all(|bypass| bypass.as_ref().is_some_and(|bypass| !bypass.partly));
    let first = found.into_iter().flatten().next()?;
    Some(Bypasses { reason: first.to_string(), wholly })
}

/// Whether all that an intercept takes of a pod comes to its agent.
#[must_use]
pub fn covers(pod: &Pod, leading: &[&Service], intercept: &Intercept) -> bool {
    let found = intercept.spec.ports.iter().filter_map(|mapping| ports::find(pod, leading, mapping).ok());
    let found: Vec<_> = found.map(|found| (found.port, found.protocol)).collect();
    let comes = |(port, protocol): &(u16, agent::Protocol)| {
        is_in_path(pod, *port, *protocol) && ports::bypass(pod, leading, *port, *protocol).is_none()
    };
    !found.is_empty() && found.iter().all(comes)
}

/// That traffic of an intercept goes past an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bypasses {
    /// How.
    pub reason: String,
    /// Whether nothing comes to the agent.
    pub wholly: bool,
}

/// What may pass for the sake of an agent's configuration: one pair for each laptop in it.
#[must_use]
pub fn pairs(config: &Config) -> Vec<Pair> {
    let mut laptops: BTreeMap<Ipv6Addr, Pair> = BTreeMap::new();
    for intercept in &config.intercepts {
        let pair = laptops.entry(intercept.laptop).or_insert_with(|| Pair {
            agent: config.address,
            laptop: intercept.laptop,
            ports: Vec::new(),
            services: vec![DNS_PORT],
        });
        pair.ports.extend(intercept.ports.iter().map(|port| port.overlay_port));
        if intercept.environment.is_some() && !pair.services.contains(&AGENT_SERVICE_PORT) {
            pair.services.push(AGENT_SERVICE_PORT);
        }
    }
    for pair in laptops.values_mut() {
        pair.ports.sort_unstable();
        pair.ports.dedup();
    }
    laptops.into_values().collect()
}
