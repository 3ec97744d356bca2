//! What agents and managers say to each other.
//!
//! An agent connects to every manager: TLS to [`STREAM_PORT`](crate::STREAM_PORT), pinned to the managers' CA and to the name
//! [`SERVER_NAME`], then `GET` [`AGENT_PATH`] with `Upgrade:` [`AGENT_UPGRADE`] and its token as `Authorization: Bearer`. After
//! the 101 both sides send JSON lines, the agent [`ToManager`], the manager [`ToAgent`]. The first line is the agent's
//! [`Hello`]. A connection is the agent's session: when it ends, the session does. The agent's way into the overlay outlives it by
//! some seconds on both sides, for what is in flight.
//!
//! What a receiver does not know it ignores: fields and messages are added, never changed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::filter::Filter;

/// Path of the agents' connection.
pub const AGENT_PATH: &str = "/v1/agent";

/// Token of its `Upgrade` header.
pub const AGENT_UPGRADE: &str = "tpd-agent";

/// Name in the managers' certificates that agents ask for, whatever address they dial.
pub const SERVER_NAME: &str = "tpd-manager";

/// Audience of the agents' tokens.
pub const AUDIENCE: &str = "tpd-manager";

/// Longest line, bytes: a configuration with a hundred services, each with as many pods as are named, is half of it.
pub const MAX_LINE: usize = 1 << 20;

/// Most ports of laptops that a report names as still in use: those of a hundred intercepts that have ended within the hour.
pub const MAX_HELD: usize = 256;

/// Most other pods of a Service that a configuration names. Every pod that comes or goes changes those of all the others: a
/// thousand pods that named each other would cost 40 MB at each of a rollout's steps.
pub const MAX_SIBLINGS: usize = 100;

/// How often each side says something while an intercept concerns the agent. Three missed ones are a manager that is gone,
/// within the second that production may wait.
pub const BEAT: Duration = Duration::from_millis(250);

/// How often each side says something while none does: load balancers' idle time-outs begin at a minute.
pub const IDLE_BEAT: Duration = Duration::from_secs(15);

/// A manager that has said nothing for so long is gone, while an intercept concerns the agent.
pub const SILENCE: Duration = Duration::from_millis(900);

/// A manager that has said nothing for so long is gone, at any time.
pub const IDLE_SILENCE: Duration = Duration::from_secs(40);

/// Agent to manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum ToManager {
    /// Who it is; the first line.
    Hello(Box<Hello>),
    /// What became of the configuration, and what has gone where; whenever it changes, at most once a second.
    Report(Report),
    /// Nothing new.
    Beat,
}

/// Manager to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum ToAgent {
    /// All that concerns the agent, whenever any of it changes.
    Config(Box<Config>),
    /// Overlay addresses of the laptops that this manager carries, and hears, out of those that the configuration names; whenever
    /// that changes.
    Carried {
        /// The laptops' addresses.
        laptops: Vec<Ipv6Addr>,
    },
    /// Nothing new.
    Beat,
    /// The manager ends the connection for good reason; the agent need not come back before so many seconds.
    Refused {
        /// Why.
        reason: String,
        /// Seconds.
        retry_after: u64,
    },
}

/// Who an agent is. Its pod is taken from its token, not from here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// Version of tpd.
    pub version: String,
    /// Its WireGuard public key (base64). A new process has a new one.
    pub public_key: String,
    /// How traffic comes to it.
    pub entry: Entry,
}

/// How traffic comes to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum Entry {
    /// The kernel redirects any port, for as long as the agent says so.
    Redirect,
    /// It has taken over these named ports of the pod, and always stands in their path.
    Ports {
        /// The ports of the app.
        ports: Vec<TakenPort>,
    },
}

/// A port that an agent has taken over by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TakenPort {
    /// Name that is the agent's now.
    pub name: String,
    /// Port where the agent listens in its place.
    pub listen: u16,
    /// Port where the app listens.
    pub app: u16,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
}

/// Transport protocols.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// Whether traffic is handed over or copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// The laptop answers instead of the app.
    #[default]
    Intercept,
    /// The app answers, and the laptop gets a copy.
    Wiretap,
}

/// All that concerns one agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Raised by each change that this manager sends to this agent; reports say which one they are about.
    pub generation: u64,
    /// How new what the manager knows is: the latest resource version it has seen. Of several managers' configurations, that with
    /// the highest counts.
    pub revision: u64,
    /// The workload that the pod belongs to, as `deployment/web`.
    pub workload: String,
    /// The agent's overlay address.
    pub address: Ipv6Addr,
    /// The way into the overlay by this manager.
    pub manager: Manager,
    /// Every manager, this one included.
    pub replicas: Vec<Replica>,
    /// Services that have this pod as an endpoint.
    pub services: Vec<Service>,
    /// Intercepts of the workload, the oldest first.
    pub intercepts: Vec<Intercept>,
}

/// A manager's end of the overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manager {
    /// Its WireGuard public key (base64).
    pub key: String,
    /// Its overlay address, for the control channel.
    pub gateway: Ipv6Addr,
    /// Where its WireGuard datagrams go.
    pub udp: SocketAddr,
    /// Where its overlay stream is (plain HTTP Upgrade, as a laptop's), for where UDP does not get through.
    pub stream: SocketAddr,
}

/// A manager as agents reach it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replica {
    /// Its pod.
    pub pod: String,
    /// Where agents connect.
    pub address: SocketAddr,
}

/// A Service that has the pod as an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its cluster addresses; none if it is headless.
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Its names in DNS.
    pub dns_names: Vec<String>,
    /// The other pods behind it, by name; [`MAX_SIBLINGS`] at most.
    pub siblings: Vec<String>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its number.
    pub port: u16,
    /// Port of this pod that it leads to; `None` if the pod has no such port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<u16>,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
}

/// An intercept as an agent carries it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Intercept {
    /// UID of the Intercept.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Generation of its spec.
    pub generation: i64,
    /// Overlay address of the laptop.
    pub laptop: Ipv6Addr,
    /// Ports of this pod, by number.
    pub ports: Vec<Port>,
    /// Which requests; all traffic if it is empty.
    #[serde(default)]
    pub filter: Filter,
    /// Whether traffic is handed over or copied.
    #[serde(default)]
    pub mode: Mode,
    /// Whether connections to the laptop begin with a PROXY protocol header (version 1).
    #[serde(default)]
    pub proxy_protocol: bool,
    /// Name of the container whose environment the laptop may have; `None` if it may have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<String>,
}

/// A port of the pod that is intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// The app's.
    pub port: u16,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
    /// The laptop's, on the overlay.
    pub overlay_port: u16,
}

/// What became of a configuration, and what has gone where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Generation of the last configuration of this manager that is in force.
    pub generation: u64,
    /// One of each intercept in force.
    pub intercepts: Vec<InterceptReport>,
    /// Overlay addresses and ports of laptops that something is still under way with, although no intercept in force leads there
    /// any more; at most [`MAX_HELD`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<SocketAddr>,
}

/// How an intercept fares at one agent. Counts begin with the agent's process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterceptReport {
    /// UID of the Intercept.
    pub uid: String,
    /// Generation of its spec that is in force.
    pub generation: i64,
    /// Whether traffic comes to the agent and it has a way to the laptop: from here on requests go there.
    pub acknowledged: bool,
    /// To the laptop: requests where HTTP was understood, else connections, and of UDP, exchanges of one client.
    pub to_laptop: u64,
    /// To the app, because the filter did not match.
    pub to_app: u64,
    /// To the app, because the laptop did not answer.
    pub failed_open: u64,
    /// Copies that a wiretap lost.
    pub copies_lost: u64,
    /// Connections older than the intercept, or than its latest change, that have not changed side yet.
    pub stragglers: u64,
    /// The last probe to the local port, if one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
    /// What the agent could not do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A probe from the agent to the local port and back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// Round trip, microseconds; `None` if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micros: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Path where the environment of the app's container is fetched.
pub const ENVIRONMENT_PATH: &str = "/v1/environment";

/// What an agent answers at [`ENVIRONMENT_PATH`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Environment {
    /// Name of the container.
    pub container: String,
    /// Its variables.
    pub variables: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::{Entry, Hello, ToAgent, ToManager};

    #[test]
    fn lines_are_tagged_json() {
        let hello = Hello { version: "1".into(), public_key: "k".into(), entry: Entry::Redirect };
        let line = serde_json::to_string(&ToManager::Hello(Box::new(hello.clone()))).unwrap();
        assert_eq!(line, r#"{"type":"hello","version":"1","publicKey":"k","entry":{"type":"redirect"}}"#);
        assert_eq!(serde_json::from_str::<ToManager>(&line).unwrap(), ToManager::Hello(Box::new(hello)));
        assert_eq!(serde_json::to_string(&ToManager::Beat).unwrap(), r#"{"type":"beat"}"#);
        let carried: ToAgent =
            serde_json::from_str(r#"{"type":"carried","laptops":["fd74::2"],"new":1}"#).unwrap();
        assert_eq!(carried, ToAgent::Carried { laptops: vec!["fd74::2".parse().unwrap()] });
    }
}
