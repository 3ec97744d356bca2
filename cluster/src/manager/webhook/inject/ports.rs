//! Ports that an agent takes over by their names, where nothing may be redirected.

mod policies;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tpd_api::agent::{Protocol, TakenPort};
use tpd_api::inject::ENTRY_PORTS;

use self::policies::Door;
use super::patch::Patch;

/// A pod's own labels, and what leads to it.
#[derive(Clone, Copy, Debug)]
pub struct Ways<'a> {
    /// The pod's labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Services of its namespace.
    pub services: &'a [Service],
    /// NetworkPolicies of its namespace.
    pub policies: &'a [NetworkPolicy],
}

/// The ports that can be taken over, and what takes their names from the app.
///
/// # Errors
/// Tells why none can be.
pub fn take(pod: &PodSpec, ways: Ways<'_>) -> Result<(Patch, Vec<TakenPort>), String> {
    let (mut patch, mut taken, mut reasons) = (Patch::default(), Vec::<TakenPort>::new(), Vec::new());
    let all = named(pod);
    let is_shared = |port: &Named| {
        all.iter().filter(|other| other.name == port.name && other.protocol == port.protocol).count() > 1
    };
    for port in &all {
        let Some(listen) = u16::try_from(taken.len()).ok().map(|index| ENTRY_PORTS.start() + index) else {
            break;
        };
        let obstacle = if is_shared(port) {
            // Without the first of them, Services would lead to the second.
            Some(format!("two containers have a port named `{}`", port.name))
        } else {
            ways.obstacle(port, listen)
        };
        match obstacle {
            Some(reason) => reasons.push(reason),
            None if !ENTRY_PORTS.contains(&listen) => break,
            None => {
                patch.remove(format!("{}/name", port.path));
                let (app, protocol) = (port.number, port.protocol);
                taken.push(TakenPort { name: port.name.clone(), listen, app, protocol });
            }
        }
    }
    if taken.is_empty() {
        reasons.dedup();
        let why =
            if reasons.is_empty() { "no port of the pod has a name".to_owned() } else { reasons.join("; ") };
        return Err(format!("a port can only be taken over by its name here, and {why}"));
    }
    Ok((patch, taken))
}

/// A port of a container that has a name.
struct Named {
    path: String,
    name: String,
    number: u16,
    protocol: Protocol,
}

/// Named ports in the order in which Services find them.
fn named(pod: &PodSpec) -> Vec<Named> {
    let mut found = Vec::new();
    for (index, container) in pod.containers.iter().enumerate() {
        found.extend(named_of(container, &format!("/spec/containers/{index}")));
    }
    found
}

fn named_of(container: &Container, path: &str) -> Vec<Named> {
    let ports = container.ports.iter().flatten().enumerate();
    ports
        .filter_map(|(index, port)| {
            Some(Named {
                path: format!("{path}/ports/{index}"),
                name: port.name.clone().filter(|_| port.host_port.unwrap_or(0) == 0)?,
                number: u16::try_from(port.container_port).ok()?,
                protocol: protocol(port.protocol.as_deref())?,
            })
        })
        .collect()
}

/// A transport by its name in Kubernetes; `None` for one that is not forwarded.
#[must_use]
pub fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => None,
    }
}

impl Ways<'_> {
    /// What speaks against taking a port over, for an agent that listens there.
    fn obstacle(&self, port: &Named, listen: u16) -> Option<String> {
        let mut led_to = false;
        for service in self.services.iter().filter(|service| leads_to(service, self.labels)) {
            let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
            for one in ports.filter(|one| protocol(one.protocol.as_deref()) == Some(port.protocol)) {
                let by_number = match &one.target_port {
                    Some(IntOrString::String(name)) => {
                        led_to |= *name == port.name;
                        false
                    }
                    Some(IntOrString::Int(number)) => *number == i32::from(port.number),
                    None => one.port == i32::from(port.number),
                };
                if by_number {
                    let service = service.metadata.name.as_deref().unwrap_or_default();
                    return Some(format!(
                        "Service {service} leads to port {} by its number; set its targetPort to `{}`",
                        port.number, port.name
                    ));
                }
            }
        }
        if !led_to {
            return Some(format!("no Service leads to the pod by the port name `{}`", port.name));
        }
        let door = Door { number: port.number, listen, protocol: port.protocol };
        door.shut_by(self.policies, self.labels).map(|policy| {
            format!(
                "NetworkPolicy {policy} names port {} by its number; let it say `{}`",
                port.number, port.name
            )
        })
    }
}

/// Whether a Service has pods with these labels as its endpoints.
#[must_use]
pub fn leads_to(service: &Service, labels: &BTreeMap<String, String>) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| {
        !selector.is_empty() && selector.iter().all(|(name, value)| labels.get(name) == Some(value))
    })
}
