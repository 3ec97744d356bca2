//! `Intercept`: a workload's traffic, or a part of it, that goes to a laptop.
//!
//! It lives in the workload's namespace, so the right to intercept is RBAC on `intercepts` there. While it exists, every agent
//! of the workload has it; nothing is elected.

use std::net::Ipv6Addr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::agent::{Mode, Protocol};
use crate::filter::Filter;

/// Most ports of one intercept.
pub const MAX_PORTS: usize = 16;

/// Most pods that a status lists one by one; the counts are of all.
pub const MAX_PODS_LISTED: usize = 100;

/// Condition: every ready pod of the workload has acknowledged the intercept.
pub const COVERED: &str = "Covered";

/// Condition: the manager serves the intercept. `False` with the reason where it does not.
pub const ACCEPTED: &str = "Accepted";

/// Condition: the laptop's session is carried by a manager, so that traffic can reach it.
pub const CONNECTED: &str = "Connected";

/// How the reason of a pod without an agent begins while something is being done about it; with any other, the pod stays as it is.
pub const UNDER_WAY: [&str; 5] = [
    "it is being replaced",
    "it waits for its turn",
    "it is starting",
    "a rollout is under way",
    "its agent is not connected",
];

/// How the manager's warning says of pods that they will be gone for a while. Those who may be asked are asked for consent to that.
pub const RESTARTED: &str = "will be restarted";

/// What the containers are called whose image an administrator has named: the agent, and the one before it.
pub const OUR_CONTAINERS: [&str; 2] = ["the agent", "the container that sets up the redirect"];

/// How the manager says of a container that its node does not find its image.
#[must_use]
pub fn unpulled(container: &str) -> String {
    format!("the image of {container} cannot be pulled")
}

/// What a developer asks for.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "tpd.dev",
    version = "v1alpha1",
    kind = "Intercept",
    namespaced,
    status = "InterceptStatus",
    printcolumn = r#"{"name":"Workload","type":"string","jsonPath":".spec.workload.name"}"#,
    printcolumn = r#"{"name":"Owner","type":"string","jsonPath":".spec.owner"}"#,
    printcolumn = r#"{"name":"Mode","type":"string","jsonPath":".spec.mode"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.state"}"#,
    printcolumn = r#"{"name":"Pods","type":"integer","jsonPath":".status.counts.ready"}"#,
    printcolumn = r#"{"name":"Acknowledged","type":"integer","jsonPath":".status.counts.acknowledged"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct InterceptSpec {
    /// The user that the API server authenticated at creation. An admission policy holds it to that.
    #[schemars(length(min = 1, max = 1024))]
    pub owner: String,

    /// Name of the owner's ClientSession, in the manager's namespace, that the traffic goes to.
    #[schemars(length(min = 1, max = 253))]
    pub session: String,

    /// Whose traffic.
    pub workload: Workload,

    /// Which of its ports.
    #[schemars(length(min = 1, max = 16))]
    pub ports: Vec<PortMapping>,

    /// Which requests; all traffic if there is none.
    #[serde(default, skip_serializing_if = "Filter::is_empty")]
    pub filter: Filter,

    /// Whether traffic is handed over or copied.
    #[serde(default)]
    pub mode: Mode,

    /// Whether connections to the laptop begin with a PROXY protocol header (version 1) that names the client.
    #[serde(default)]
    pub proxy_protocol: bool,

    /// Whether the laptop is handed the environment of the app's container. Admitted only for those who may create
    /// `pods/exec` in the namespace, since it holds Secrets.
    #[serde(default)]
    pub environment: bool,

    /// Whether pods without an agent may be replaced even where that is felt: those of StatefulSets, DaemonSets and
    /// ReplicaSets of their own, which are gone before their successors are there.
    #[serde(default)]
    pub replace_pods: bool,

    /// When it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
}

/// A workload: what pods are made by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Kind of object.
    #[serde(default)]
    pub kind: WorkloadKind,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Kinds of objects that make pods.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum WorkloadKind {
    /// `apps/v1` Deployment.
    #[default]
    Deployment,
    /// `apps/v1` StatefulSet.
    StatefulSet,
    /// `apps/v1` DaemonSet.
    DaemonSet,
    /// `apps/v1` ReplicaSet that no Deployment owns.
    ReplicaSet,
    /// A pod that nothing owns.
    Pod,
}

impl WorkloadKind {
    /// Kind as the API server spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::ReplicaSet => "ReplicaSet",
            Self::Pod => "Pod",
        }
    }
}

impl Workload {
    /// What the manager's warning says where none of its pods can take part in an intercept as it is asked for.
    #[must_use]
    pub fn without_agents(&self) -> String {
        format!("no pod of {self} has an agent that this traffic would come to")
    }

    /// How the manager's refusal begins where there is no such workload. What goes on with `, but` names those of other kinds that
    /// have its name, with `and` between them.
    #[must_use]
    pub fn absent_from(&self, namespace: &str) -> String {
        format!("there is no {self} in namespace {namespace}")
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.kind.as_str().to_ascii_lowercase(), self.name)
    }
}

/// One port of the pods, and where its traffic arrives at the laptop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Name or number of a container's port, or of a Service's port that leads to one; the only one that there is if none is
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 15))]
    pub port: Option<String>,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
    /// Port of the laptop's overlay address that agents connect to. The laptop draws it and knows what is behind it; nothing
    /// here names a local address.
    #[schemars(range(min = 1024))]
    pub overlay_port: u16,
}

/// Where an intercept stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum State {
    /// No pod of the workload has an agent.
    #[default]
    NoAgent,
    /// There are agents, and none has acknowledged yet.
    Waiting,
    /// Agents hand traffic over. How many is in the counts.
    Active,
}

/// What the manager says of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterceptStatus {
    /// Where it stands.
    #[serde(default)]
    pub state: State,
    /// Generation of the spec that this is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// The ports as they were found, in the order of the spec.
    #[serde(default)]
    pub ports: Vec<FoundPort>,
    /// How many pods.
    #[serde(default)]
    pub counts: Counts,
    /// What has gone where, all pods together, since it began.
    #[serde(default)]
    pub traffic: Traffic,
    /// Pod by pod, the first hundred by name.
    #[serde(default)]
    pub pods: Vec<PodStatus>,
    /// [`COVERED`], [`ACCEPTED`], [`CONNECTED`].
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// A port of the pods as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FoundPort {
    /// Number; of a name that means different ones in different pods, the first.
    pub port: u16,
    /// Name, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Container that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
}

/// How many pods of the workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// There are.
    pub pods: u32,
    /// Are ready.
    pub ready: u32,
    /// Are connected by their agents.
    pub agents: u32,
    /// Are ready, and their agents hand traffic over.
    pub acknowledged: u32,
    /// Have just left without having handed theirs over, so Services may still lead to them.
    #[serde(default)]
    pub leaving: u32,
}

/// What has gone where. Requests where HTTP was understood; elsewhere connections, and of UDP, exchanges of one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// To the laptop.
    pub to_laptop: u64,
    /// To the app, because the filter did not match.
    pub to_app: u64,
    /// To the app, because the laptop did not answer.
    pub failed_open: u64,
    /// Copies that a wiretap lost, because it was too slow.
    pub copies_lost: u64,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.to_laptop += other.to_laptop;
        self.to_app += other.to_app;
        self.failed_open += other.failed_open;
        self.copies_lost += other.copies_lost;
    }
}

/// One pod of the workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether its agent is connected.
    pub agent: bool,
    /// Whether its agent hands traffic over.
    pub acknowledged: bool,
    /// Overlay address of its agent, while that is connected: for DNS and for the environment of the app.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv6Addr>,
    /// Why it has no agent, or what its agent complains of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What has gone where.
    #[serde(default)]
    pub traffic: Traffic,
    /// Connections from before the intercept, or its latest change, that have not changed side yet.
    #[serde(default)]
    pub stragglers: u64,
    /// Microseconds of the last probe from the agent to the local port and back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof_micros: Option<u64>,
    /// Why the last probe failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}
