//! What an installation consists of: the Kubernetes objects, as JSON ready for server-side apply.
//!
//! `tpd install` applies exactly these. The Helm chart in `deploy/chart` is written by hand and held to them by a
//! test, which renders it with the real helm and compares object by object.

mod admission;
mod crds;
mod rbac;
mod webhook;
mod workload;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

pub use crds::{custom_resource_definitions, custom_resource_definitions_yaml};
pub use rbac::{developer_rules, intercept_rules};

use crate::overlay::{DEFAULT_POOL_V4, DEFAULT_POOL_V6};
use crate::{MANAGER, MANAGER_NAMESPACE};

/// Field manager of everything that `tpd install` applies.
pub const FIELD_MANAGER: &str = "tpd";

/// Role that holds what a developer needs; bind it to people and groups.
pub const DEVELOPER_ROLE: &str = "tpd-developer";

/// ClusterRole that holds what intercepting needs; bind it in the namespaces whose workloads may be intercepted.
pub const INTERCEPT_ROLE: &str = "tpd-intercept";

/// Secret that the managers keep their WireGuard key in. They create it; no installation contains it.
pub const KEY_SECRET: &str = "tpd-manager-key";

/// Secret that the managers keep their certificate authority in. They create it; no installation contains it.
pub const CA_SECRET: &str = "tpd-manager-ca";

/// Name of the managers' two webhook configurations, of which they fill in their CA.
pub const WEBHOOKS: &str = "tpd-manager";

/// Lease that elects the manager which runs the controllers.
pub const LEASE: &str = MANAGER;

/// User that the manager's pods are to the kernel: the customary `nonroot` of images without a user database.
pub const MANAGER_UID: u32 = 65532;

/// How UDP reaches a replica from outside the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UdpService {
    /// A port of every node: works wherever the laptop reaches a node.
    #[default]
    NodePort,
    /// A load balancer of the cloud for each replica.
    LoadBalancer,
    /// Not at all: the API server carries every session.
    None,
}

/// What an administrator may choose. The default is what `tpd install` does without flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Namespace of the manager and of the ClientSessions.
    pub namespace: String,
    /// Image of the manager.
    pub image: String,
    /// Image of the agents that are put into pods. Those pods' nodes must be able to pull it.
    pub agent_image: String,
    /// `imagePullPolicy` of both: `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
    /// Secrets of the namespace that hold the registry's credentials.
    pub pull_secrets: Vec<String>,
    /// Replicas of the manager, at least one.
    pub replicas: u32,
    /// How UDP reaches them.
    pub udp_service: UdpService,
    /// Pod networks beside those that the manager finds by itself.
    pub pod_networks: Vec<IpNet>,
    /// Service networks beside those that the manager finds by itself.
    pub service_networks: Vec<IpNet>,
    /// Whether the manager looks at the addresses of the cluster's pods, to find pod networks that no node declares.
    pub watch_pods: bool,
    /// IPv4 addresses of the overlay.
    pub pool_v4: Ipv4Net,
    /// IPv6 addresses of the overlay.
    pub pool_v6: Ipv6Net,
    /// Seconds without a handshake after which a session is deleted.
    pub session_timeout: u32,
    /// Groups that the developer's role is bound to.
    pub developer_groups: Vec<String>,
    /// Namespaces where those groups may intercept.
    pub intercept_namespaces: Vec<String>,
    /// Whether the developer's role reaches the manager by port-forward too, for where the API server's proxy cannot.
    pub port_forward: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            namespace: MANAGER_NAMESPACE.to_owned(),
            image: default_image(),
            agent_image: default_agent_image(),
            pull_policy: "IfNotPresent".to_owned(),
            pull_secrets: Vec::new(),
            replicas: 2,
            udp_service: UdpService::default(),
            pod_networks: Vec::new(),
            service_networks: Vec::new(),
            watch_pods: true,
            pool_v4: DEFAULT_POOL_V4,
            pool_v6: DEFAULT_POOL_V6,
            session_timeout: 600,
            developer_groups: Vec::new(),
            intercept_namespaces: Vec::new(),
            port_forward: true,
        }
    }
}

/// The image that belongs to this build.
#[must_use]
pub fn default_image() -> String {
    format!("tpd/manager:{}", env!("CARGO_PKG_VERSION"))
}

/// The agent's image that belongs to this build.
#[must_use]
pub fn default_agent_image() -> String {
    format!("tpd/agent:{}", env!("CARGO_PKG_VERSION"))
}

/// Every object of an installation, in the order to apply them; the reverse is the order to delete them.
///
/// The Secrets with the managers' key and CA are not among them, so neither an upgrade nor a second installation changes them.
#[must_use]
pub fn objects(options: &Options) -> Vec<Value> {
    let mut objects = vec![namespace(options)];
    objects.extend(custom_resource_definitions());
    objects.extend(admission::objects(options));
    objects.extend(rbac::objects(options));
    objects.extend(workload::objects(options));
    objects.extend(webhook::objects(options));
    objects
}

fn namespace(options: &Options) -> Value {
    let mut metadata = cluster_metadata(&options.namespace);
    for mode in ["enforce", "warn"] {
        metadata["labels"][format!("pod-security.kubernetes.io/{mode}")] = json!("restricted");
    }
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata })
}

fn labels() -> Value {
    json!({
        "app.kubernetes.io/name": MANAGER,
        "app.kubernetes.io/part-of": "tpd",
        "app.kubernetes.io/version": env!("CARGO_PKG_VERSION"),
    })
}

fn metadata(options: &Options, name: &str) -> Value {
    json!({ "name": name, "namespace": options.namespace, "labels": labels() })
}

fn cluster_metadata(name: &str) -> Value {
    json!({ "name": name, "labels": labels() })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Options, UdpService, objects};

    #[test]
    fn every_object_is_whole_and_named_once() {
        let mut seen = BTreeSet::new();
        for object in objects(&Options::default()) {
            let kind = object["kind"].as_str().unwrap().to_owned();
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            assert!(object["apiVersion"].is_string(), "{kind} {name}");
            assert!(seen.insert((kind.clone(), name.clone())), "{kind} {name} twice");
        }
    }

    #[test]
    fn each_replica_has_its_service_and_its_place_in_the_role() {
        let options = Options { replicas: 3, ..Options::default() };
        let objects = objects(&options);
        for replica in 0..3 {
            let name = format!("tpd-manager-{replica}");
            assert!(objects.iter().any(|o| o["kind"] == "Service" && o["metadata"]["name"] == *name));
        }
        let role = objects.iter().find(|o| o["metadata"]["name"] == super::DEVELOPER_ROLE).unwrap();
        assert!(role.to_string().contains("tpd-manager-2:8443"));
    }

    #[test]
    fn what_is_left_out_is_absent() {
        let options = Options {
            replicas: 1,
            udp_service: UdpService::None,
            watch_pods: false,
            port_forward: false,
            ..Options::default()
        };
        let text = serde_json::to_string(&objects(&options)).unwrap();
        for absent in ["PodDisruptionBudget", "NodePort", r#""pods/portforward""#] {
            assert!(!text.contains(absent), "{absent}");
        }
    }
}
