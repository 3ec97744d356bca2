//! `ClientSession`: one laptop's place on the cluster's network.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::overlay::DualAddress;

/// Most lanes, and so WireGuard keys, that one session may bring. Sixteen cores of lanes carry more than
/// any laptop's uplink; the bound keeps a session's cost to the manager known.
pub const MAX_LANES: usize = 16;

/// What a laptop asks for. The owner creates it, and it alone may change or delete it.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "tpd.dev",
    version = "v1alpha1",
    kind = "ClientSession",
    namespaced,
    status = "ClientSessionStatus",
    printcolumn = r#"{"name":"Owner","type":"string","jsonPath":".spec.owner"}"#,
    printcolumn = r#"{"name":"Host","type":"string","jsonPath":".spec.host"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Address","type":"string","jsonPath":".status.address.ipv4"}"#,
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".spec.version","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ClientSessionSpec {
    /// The user that the API server authenticated at creation. An admission policy holds it to that.
    #[schemars(length(min = 1, max = 1024))]
    pub owner: String,

    /// WireGuard public keys (base64, RFC 4648), one per lane of the laptop.
    #[schemars(length(min = 1, max = 16), inner(regex(pattern = r"^[A-Za-z0-9+/]{43}=$")))]
    pub public_keys: Vec<String>,

    /// Host name of the laptop, for people.
    #[schemars(length(max = 253))]
    #[serde(default)]
    pub host: String,

    /// Version of tpd on the laptop.
    #[schemars(length(max = 64))]
    #[serde(default)]
    pub version: String,

    /// Namespace whose services resolve by their bare names.
    #[schemars(length(max = 63))]
    #[serde(default)]
    pub namespace: String,
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// The manager has not answered yet.
    #[default]
    Pending,
    /// Addresses are assigned: a handshake will be answered.
    Ready,
    /// The manager will not serve this session; a condition says why.
    Rejected,
}

/// What the manager answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClientSessionStatus {
    /// Where the session stands.
    #[serde(default)]
    pub phase: Phase,

    /// The laptop's overlay addresses: /32 and /128, its own for as long as the session lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<DualAddress>,

    /// The manager's overlay addresses: DNS gateway and control channel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<DualAddress>,

    /// The managers' WireGuard public key (base64). Every replica holds the same key.
    #[serde(default)]
    pub manager_key: String,

    /// Every replica that can carry the session, the preferred ones first.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,

    /// Networks to route to the overlay: pods and services, either family.
    #[serde(default)]
    pub networks: Networks,

    /// The cluster's DNS zone, such as `cluster.local`.
    #[serde(default)]
    pub zone: String,

    /// Version of the manager.
    #[serde(default)]
    pub version: String,

    /// Newest and oldest protocol that the manager speaks.
    #[serde(default)]
    pub protocol: ProtocolRange,

    /// Standard conditions; `Ready` carries the reason of a rejection.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// Protocol numbers that one side speaks, inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProtocolRange {
    /// Oldest.
    pub min: u32,
    /// Newest.
    pub max: u32,
}

/// What this build speaks. Raised when the session, the stream handshake or the control channel changes incompatibly.
pub const PROTOCOL: ProtocolRange = ProtocolRange { min: 1, max: 1 };

impl Default for ProtocolRange {
    fn default() -> Self {
        PROTOCOL
    }
}

impl ProtocolRange {
    /// The newest protocol that both sides speak, if there is one.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u32> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

/// One manager replica and the ways to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Pod to name in `pods/proxy` and `pods/portforward`.
    pub pod: String,
    /// TCP port of the overlay stream in that pod.
    pub port: u16,
    /// `address:port` pairs that may reach this replica's UDP port from outside: node ports, load balancers.
    #[serde(default)]
    pub udp: Vec<String>,
}

/// The cluster's networks as the manager found them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Networks {
    /// Networks of pods.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub pods: Vec<IpNet>,
    /// Networks of Services' cluster addresses.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub services: Vec<IpNet>,
}

impl Networks {
    /// All networks, pods' first.
    pub fn all(&self) -> impl Iterator<Item = IpNet> {
        self.pods.iter().chain(&self.services).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::ProtocolRange;

    #[test]
    fn the_newest_common_protocol_is_chosen() {
        let ours = ProtocolRange { min: 2, max: 4 };
        assert_eq!(ours.common(ProtocolRange { min: 1, max: 3 }), Some(3));
        assert_eq!(ours.common(ProtocolRange { min: 4, max: 9 }), Some(4));
        assert_eq!(ours.common(ProtocolRange { min: 1, max: 1 }), None);
        assert_eq!(ours.common(ProtocolRange { min: 5, max: 6 }), None);
    }
}
