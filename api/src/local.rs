//! The daemon's local API: HTTP and JSON on a Unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`Status`] |
//! | `POST /v1/down` | [`Down`], once everything is as it was before |
//! | `GET /v1/intercepts` | [`Intercept`]s of this laptop, a list |
//! | `POST /v1/intercepts` with an [`InterceptRequest`] | the [`Intercept`] as it was created, or changed |
//! | `GET /v1/intercepts/NAMESPACE/NAME` | the [`Intercept`] as it is now |
//! | `GET /v1/intercepts/NAMESPACE/NAME/environment` | [`Environment`], once an agent has sent it |
//! | `DELETE /v1/intercepts/NAMESPACE/NAME` | nothing, once it is gone |
//! | `POST /v1/preview` with an [`InterceptRequest`] | [`Preview`]: what it would come to |
//! | `GET /v1/others`, `GET /v1/others/NAMESPACE` | [`Other`]s: intercepts that are not this laptop's, as far as its user may list them |
//!
//! What fails answers with a [`Problem`].
//!
//! Only root and the user who ran `tpd up` are answered. The log is a file, [`LOG`], which that user may read.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::exit::ExitCode;
use crate::filter::Filter;
use crate::intercept::{InterceptStatus, Mode, Protocol, Workload};
use crate::overlay::DualAddress;

/// Socket that the daemon listens on, mode 0600, owned by the user who ran `tpd up`.
pub const SOCKET: &str = "/run/tpd/tpd.sock";

/// Log of the daemon, mode 0600, owned by the user who ran `tpd up`. The one before it ends in `.1`.
pub const LOG: &str = "/var/log/tpd/tpd.log";

/// What `tpd up` was asked for. A second `tpd up` that asks for the same is told that it is connected already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// Context of the kubeconfig.
    pub context: String,
    /// URL of the API server.
    pub server: String,
    /// Namespace whose services resolve by their bare names.
    pub namespace: String,
    /// Namespace that the manager is looked for in.
    pub manager_namespace: String,
    /// Which paths may be used; none named means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathKind>,
    /// Networks that stay with the laptop.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub exclude: Vec<IpNet>,
    /// Networks that go to the cluster even where they overlap with the laptop's own.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub prefer_cluster: Vec<IpNet>,
}

/// A kind of path between laptop and manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    /// WireGuard over UDP, straight to the manager.
    Udp,
    /// A stream through the API server's proxy (`pods/proxy`, HTTP Upgrade).
    Proxy,
    /// A stream through the API server's port-forward (`pods/portforward`, WebSocket).
    Forward,
}

/// What the daemon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Setting up.
    Connecting,
    /// A path carries the session.
    Connected,
    /// No path carries it at the moment; the daemon keeps trying.
    Reconnecting,
    /// Undoing what it set up.
    Disconnecting,
}

/// Everything `tpd status` shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// What the daemon is doing.
    pub phase: Phase,
    /// Why it is not connected, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Seconds since `tpd up`.
    pub uptime_seconds: u64,
    /// What it was asked for.
    pub request: Request,
    /// User as the API server knows it, once it has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The laptop's `ClientSession`, once it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Milliseconds from the start of `tpd up` until it had proved itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_ms: Option<u64>,
    /// The manager, once it has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manager: Option<Manager>,
    /// The laptop's overlay address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<DualAddress>,
    /// Networks that are routed to the cluster.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub networks: Vec<IpNet>,
    /// Networks of the cluster that are left alone, and why.
    #[serde(default)]
    pub excluded: Vec<Excluded>,
    /// The TUN device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tun: Option<Tun>,
    /// The resolver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// Every path that was tried, the one in use first.
    #[serde(default)]
    pub paths: Vec<Path>,
    /// Seconds since the newest WireGuard handshake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handshake_seconds: Option<u64>,
    /// Traffic inside the tunnel since `tpd up`.
    #[serde(default)]
    pub traffic: Traffic,
    /// Intercepts of this laptop.
    #[serde(default)]
    pub intercepts: Vec<Intercept>,
}

/// The manager that carries the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Manager {
    /// Namespace it is installed in.
    pub namespace: String,
    /// Pod that carries the session.
    pub pod: String,
    /// Version it runs.
    pub version: String,
}

/// A cluster network that is not routed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Excluded {
    /// The network.
    #[schemars(with = "String")]
    pub network: IpNet,
    /// Why.
    pub reason: String,
}

/// The TUN device as it came to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Tun {
    /// Interface name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u16,
    /// What the kernel offloads: `super-packets`, or why there are none.
    pub offload: String,
}

/// The resolver as it came to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Dns {
    /// How the system's resolver was taken over: `systemd-resolved` or `resolv.conf`.
    pub method: String,
    /// Address that the system asks.
    pub listen: Vec<IpAddr>,
    /// The cluster's zone.
    pub zone: String,
    /// Questions answered since `tpd up`.
    pub queries: u64,
    /// Of those, how many the cluster or the old resolver failed to answer.
    pub failures: u64,
    /// What is in its way, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One path and how it fares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// Which kind.
    pub kind: PathKind,
    /// Where it leads: a pod, or an address.
    pub target: String,
    /// Whether it carries the session now.
    pub active: bool,
    /// Why it is in use, or why it is not.
    pub reason: String,
    /// Round trip of the last probe through it, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
}

/// Packets and bytes inside the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// Bytes from the laptop to the cluster.
    pub sent_bytes: u64,
    /// Bytes from the cluster to the laptop.
    pub received_bytes: u64,
    /// IP packets (or super-packets) sent.
    pub sent_packets: u64,
    /// IP packets (or super-packets) received.
    pub received_packets: u64,
    /// Packets that were dropped, for whatever reason.
    pub dropped_packets: u64,
}

/// Answer to `POST /v1/down`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Down {
    /// What could not be undone, a sentence each; empty when all is as before.
    pub leftovers: Vec<String>,
}

/// Why a request was not carried out; what the command line prints and ends with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// How the command ends.
    pub code: ExitCode,
    /// What happened.
    pub message: String,
    /// What caused it, the nearest first.
    #[serde(default)]
    pub causes: Vec<String>,
    /// What to do next.
    #[serde(default)]
    pub help: Vec<String>,
}

/// What `tpd intercept` asks for. The same workload, namespace and ports again change the intercept that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterceptRequest {
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of the Intercept; one is made from the workload and the session if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whose traffic.
    pub workload: Workload,
    /// Which ports, and what is behind each here.
    pub ports: Vec<LocalPort>,
    /// Which requests.
    #[serde(default)]
    pub filter: Filter,
    /// Whether traffic is handed over or copied.
    #[serde(default)]
    pub mode: Mode,
    /// Whether local connections begin with a PROXY protocol header.
    #[serde(default)]
    pub proxy_protocol: bool,
    /// Whether the environment of the app's container is asked for.
    #[serde(default)]
    pub environment: bool,
    /// Whether pods may be replaced even where that is felt.
    #[serde(default)]
    pub replace_pods: bool,
    /// Seconds after which it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Domains whose names are resolved as the workload's pods resolve them.
    #[serde(default)]
    pub dns: Vec<String>,
}

/// A port of the workload and what is behind it on the laptop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalPort {
    /// Where the laptop's process listens: as its user typed it, never read from the cluster.
    pub local: SocketAddr,
    /// Name or number of the workload's port; its only one if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
}

/// An intercept of this laptop, and how it fares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Intercept {
    /// What was asked for; `name` is the one that it has.
    pub request: InterceptRequest,
    /// What the manager says of it; `None` until it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<InterceptStatus>,
    /// Whether `status` is about the latest request.
    pub current: bool,
    /// Local ports where nothing listens at the moment.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub silent: Vec<SocketAddr>,
    /// Whether it is no longer there, though nobody has left it here: its time was up, or somebody deleted it.
    #[serde(default)]
    pub over: bool,
    /// Why it cannot be followed at the moment, or why it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What an intercept would come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    /// What the cluster warns of, in whole sentences: that it takes everything, and which pods are replaced. Empty where nobody
    /// notices.
    pub notes: Vec<String>,
}

/// An intercept that is not this laptop's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Other {
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of the Intercept.
    pub name: String,
    /// Whose it is.
    pub owner: String,
    /// Whose traffic.
    pub workload: Workload,
    /// Which requests.
    #[serde(default)]
    pub filter: Filter,
    /// Whether traffic is handed over or copied.
    #[serde(default)]
    pub mode: Mode,
    /// What the manager says of it; `None` until it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<InterceptStatus>,
}

/// The environment of the app's container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Environment {
    /// Pod that it was read in.
    pub pod: String,
    /// Container that it belongs to.
    pub container: String,
    /// Its variables.
    pub variables: BTreeMap<String, String>,
}
