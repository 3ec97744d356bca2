//! Services and the pods behind them, in both directions, within one namespace.

use std::collections::HashMap;

use tpd_api::agent;

use super::objects::{Pod, Service};
use super::ports;
use super::world::World;

/// Which Services lead to which pods.
#[derive(Clone, Debug)]
pub struct Services<'a> {
    all: Vec<(&'a Service, Vec<&'a Pod>)>,
    of: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Services<'a> {
    /// Those of a namespace.
    ///
    /// A Service with a selector has the pods that it selects, from their creation on: EndpointSlices follow a moment later, and
    /// a new pod must not serve a request before its agent knows its ports. One without has what its slices name.
    #[must_use]
    pub fn of(world: &'a World, namespace: &str) -> Self {
        let pods: Vec<_> = world.pods_in(namespace).filter(|pod| !pod.leaving).collect();
        let by_uid: HashMap<_, _> = pods.iter().map(|pod| (pod.uid.as_str(), *pod)).collect();
        let mut all = Vec::new();
        let mut of: HashMap<&str, Vec<usize>> = HashMap::new();
        for service in world.services_in(namespace) {
            let members: Vec<_> = if service.selector.is_empty() {
                let slices = world.slices_in(namespace).filter(|slice| slice.service == service.name);
                let mut uids: Vec<_> = slices.flat_map(|slice| &slice.pods).collect();
                uids.sort_unstable();
                uids.dedup();
                uids.into_iter().filter_map(|uid| by_uid.get(uid.as_str()).copied()).collect()
            } else {
                pods.iter().copied().filter(|pod| selects(service, pod)).collect()
            };
            for pod in &members {
                of.entry(&pod.uid).or_default().push(all.len());
            }
            all.push((service, members));
        }
        Self { all, of }
    }

    /// The Services that lead to a pod.
    #[must_use]
    pub fn leading_to(&self, pod: &Pod) -> Vec<&'a Service> {
        self.indices(pod).map(|index| self.all[index].0).collect()
    }

    /// The Services that select a pod, whether it is still there or not.
    #[must_use]
    pub fn selecting(&self, pod: &Pod) -> Vec<&'a Service> {
        let services = self.all.iter().map(|(service, _)| *service);
        services.filter(|service| !service.selector.is_empty() && selects(service, pod)).collect()
    }

    /// The same as its agent is told.
    #[must_use]
    pub fn describe(&self, pod: &Pod, zone: &str) -> Vec<agent::Service> {
        self.indices(pod).map(|index| describe(&self.all[index], pod, zone)).collect()
    }

    fn indices(&self, pod: &Pod) -> impl Iterator<Item = usize> {
        self.of.get(pod.uid.as_str()).into_iter().flatten().copied()
    }
}

fn selects(service: &Service, pod: &Pod) -> bool {
    service.selector.iter().all(|(label, value)| pod.labels.get(label) == Some(value))
}

fn describe((service, members): &(&Service, Vec<&Pod>), pod: &Pod, zone: &str) -> agent::Service {
    let (name, namespace) = (&service.name, &service.namespace);
    let short = format!("{name}.{namespace}.svc");
    let full = (!zone.is_empty()).then(|| format!("{short}.{zone}"));
    let siblings = members.iter().filter(|other| other.uid != pod.uid).take(agent::MAX_SIBLINGS);
    let ports = service.ports.iter().map(|port| agent::ServicePort {
        name: port.name.clone(),
        port: port.port,
        target: ports::target(pod, port),
        protocol: port.protocol,
    });
    agent::Service {
        name: name.clone(),
        cluster_ips: service.cluster_ips.clone(),
        ports: ports.collect(),
        dns_names: full.into_iter().chain([short, format!("{name}.{namespace}"), name.clone()]).collect(),
        siblings: siblings.map(|other| other.name.clone()).collect(),
    }
}
