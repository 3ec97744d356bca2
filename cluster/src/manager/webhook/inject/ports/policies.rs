//! NetworkPolicies that let traffic through to a port by its number: none of it would get to an agent that has taken the port's name
//! over, and listens elsewhere.
//!
//! Those of the pod's own namespace are looked at: what they let in to the pod, and what they let out of pods that may be its clients.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::{Selector, SelectorExt as _};
use tpd_api::agent::Protocol;

use super::protocol;

/// A port of the app, and the one that would take its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Door {
    /// Where the app listens.
    pub(super) number: u16,
    /// Where the agent would.
    pub(super) listen: u16,
    /// Transport.
    pub(super) protocol: Protocol,
}

impl Door {
    /// Name of the first policy that lets traffic through to the app's port and not to the agent's, for a pod with these labels.
    #[must_use]
    pub(super) fn shut_by<'a>(
        &self,
        policies: &'a [NetworkPolicy],
        labels: &BTreeMap<String, String>,
    ) -> Option<&'a str> {
        let mut shut = policies.iter().filter(|policy| {
            let spec = policy.spec.as_ref();
            spec.is_some_and(|spec| self.is_shut_inward(spec, labels) || self.is_shut_outward(spec, labels))
        });
        shut.find_map(|policy| policy.metadata.name.as_deref())
    }

    /// What comes in to the pods that the policy is about.
    fn is_shut_inward(&self, spec: &NetworkPolicySpec, labels: &BTreeMap<String, String>) -> bool {
        let selector = spec.pod_selector.clone().unwrap_or_default();
        let mut rules = spec.ingress.iter().flatten();
        is_about(spec, "Ingress")
            && selects(selector, labels)
            && rules.any(|rule| self.is_named_by(rule.ports.as_deref()))
    }

    /// What goes out of them, whoever they are.
    fn is_shut_outward(&self, spec: &NetworkPolicySpec, labels: &BTreeMap<String, String>) -> bool {
        let mut rules = spec.egress.iter().flatten();
        is_about(spec, "Egress")
            && rules.any(|rule| {
                self.is_named_by(rule.ports.as_deref()) && may_be_among(rule.to.as_deref(), labels)
            })
    }

    fn is_named_by(&self, ports: Option<&[NetworkPolicyPort]>) -> bool {
        ports.into_iter().flatten().any(|port| {
            let Some(IntOrString::Int(first)) = port.port else { return false };
            let range = first..=port.end_port.unwrap_or(first);
            protocol(port.protocol.as_deref()) == Some(self.protocol)
                && range.contains(&self.number.into())
                && !range.contains(&self.listen.into())
        })
    }
}

/// Whether rules of a direction count. The API server says of every policy which do.
fn is_about(spec: &NetworkPolicySpec, direction: &str) -> bool {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    types.is_empty() || types.iter().any(|one| one == direction)
}

/// Whether a pod may be among those that a rule lets traffic out to. Namespaces and addresses are not looked at: a port is rather
/// left alone.
fn may_be_among(peers: Option<&[NetworkPolicyPeer]>, labels: &BTreeMap<String, String>) -> bool {
    let peers = peers.unwrap_or_default();
    peers.is_empty()
        || peers.iter().any(|peer| peer.pod_selector.clone().is_none_or(|selector| selects(selector, labels)))
}

/// One that cannot be read is taken to select everything, for the same reason.
fn selects(selector: LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    Selector::try_from(selector).map_or(true, |selector| selector.matches(labels))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};
    use tpd_api::agent::Protocol;

    use super::Door;

    fn is_shut(spec: Value) -> bool {
        let door = Door { number: 8080, listen: 19_901, protocol: Protocol::Tcp };
        let policy = from_value(json!({ "metadata": { "name": "fence" }, "spec": spec })).unwrap();
        let labels = [("app".to_owned(), "web".to_owned())].into();
        door.shut_by(&[policy], &labels) == Some("fence")
    }

    #[test]
    fn a_policy_shuts_a_port_that_it_names_by_its_number_and_no_other() {
        for (port, expected) in [
            (json!({ "port": 8080 }), true),
            (json!({ "port": 8080, "protocol": "TCP" }), true),
            (json!({ "port": 8000, "endPort": 8100 }), true),
            (json!({ "port": "http" }), false),
            (json!({ "port": 8080, "protocol": "UDP" }), false),
            (json!({ "port": 8081 }), false),
            (json!({ "port": 8081, "endPort": 8100 }), false),
            (json!({ "protocol": "TCP" }), false),
            (json!({ "port": 1024, "endPort": 65_535 }), false),
        ] {
            for direction in ["ingress", "egress"] {
                let spec = json!({ "podSelector": {}, direction: [{ "ports": [port] }] });
                assert_eq!(is_shut(spec), expected, "{direction} {port}");
            }
        }
        assert!(!is_shut(json!({ "podSelector": {}, "ingress": [{}], "egress": [{}] })));
    }

    #[test]
    fn what_is_let_in_counts_for_the_pods_that_the_policy_is_about() {
        let about = |app: &str, types: Value| {
            let selector = json!({ "matchLabels": { "app": app } });
            let ingress = json!([{ "ports": [{ "port": 8080 }] }]);
            is_shut(json!({ "podSelector": selector, "ingress": ingress, "policyTypes": types }))
        };
        assert!(about("web", json!(["Ingress"])) && about("web", json!(["Egress", "Ingress"])));
        assert!(about("web", Value::Null) && about("web", json!([])));
        assert!(!about("db", json!(["Ingress"])));
        assert!(!about("web", json!(["Egress"])), "what is let in is not what it is about");
    }

    #[test]
    fn what_is_let_out_of_others_counts_where_it_may_lead_to_the_pod() {
        let to = |peers: Value| {
            let egress = json!([{ "ports": [{ "port": 8080 }], "to": peers }]);
            is_shut(json!({ "podSelector": { "matchLabels": { "app": "front" } }, "egress": egress }))
        };
        let app = |name: &str| json!({ "matchLabels": { "app": name } });
        for (peers, expected) in [
            (Value::Null, true),
            (json!([]), true),
            (json!([{ "podSelector": app("web") }]), true),
            (json!([{ "podSelector": app("db") }]), false),
            (json!([{ "podSelector": app("db") }, { "podSelector": app("web") }]), true),
            (json!([{ "namespaceSelector": {}, "podSelector": app("db") }]), false),
            (json!([{ "namespaceSelector": {} }]), true),
            (json!([{ "ipBlock": { "cidr": "10.0.0.0/8" } }]), true),
        ] {
            assert_eq!(to(peers.clone()), expected, "{peers}");
        }
    }
}
