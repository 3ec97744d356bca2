//! What is kept of the cluster's objects: there can be ten thousand pods, so it is little.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt as _};
use serde::{Deserialize, Serialize};
use tpd_api::agent::{Entry, Protocol};
use tpd_api::inject::{
    self, AGENT, DISABLED, ENTRY, INIT, INJECT, INSTALLATION, KEPT, NOT_INJECTED, Origin, RELEASED,
    RELEASED_AT, TEMPLATE_HASH,
};
use tpd_api::intercept::{InterceptSpec, InterceptStatus, OUR_CONTAINERS, Workload, WorkloadKind, unpulled};

use crate::manager::workload;

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// When it was created, by the API server's clock.
    pub created: Timestamp,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// UID of what has made it.
    pub maker: Option<String>,
    /// What it is a pod of; also where it has been released from that.
    pub workload: Option<Workload>,
    /// The template of its Deployment that it was made from.
    pub template: Option<Template>,
    /// Whether its ReplicaSet was made to let go of it.
    pub released: bool,
    /// When that was, by a manager's clock.
    pub released_at: Option<Timestamp>,
    /// Why it was given back to its ReplicaSet, if it was.
    pub kept: Option<Kept>,
    /// Whether its containers run.
    pub running: bool,
    /// Whether it passes its readiness probes.
    pub ready: bool,
    /// Whether it is being deleted, or has ended.
    pub leaving: bool,
    /// Whether it is on its node's network.
    pub host_network: bool,
    /// Names of the app's containers.
    pub containers: Vec<String>,
    /// Ports of the app's containers.
    pub ports: Vec<ContainerPort>,
    /// How traffic comes to its agent; `None` where it has no agent.
    pub entry: Option<Entry>,
    /// Which installation of tpd its agent belongs to, if it says so.
    pub installation: Option<String>,
    /// Why it was given no agent though it was to have one.
    pub not_injected: Option<String>,
    /// Whether it is to have none.
    pub opted_out: bool,
    /// What keeps its agent from starting.
    pub trouble: Option<String>,
}

/// That a pod could not be replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Why.
    pub why: String,
    /// For which intercepts (see [`Intercept::version`]): for these it is not tried again.
    #[serde(rename = "for")]
    pub asked: BTreeSet<String>,
}

/// A version of a Deployment's template.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Template {
    /// Name of the ReplicaSet.
    pub replica_set: String,
    /// Hash of the template, which tells the ReplicaSet's pods.
    pub hash: String,
}

impl Template {
    /// Name of the Deployment.
    #[must_use]
    pub fn deployment(&self) -> Option<&str> {
        self.replica_set.strip_suffix(self.hash.as_str())?.strip_suffix('-')
    }
}

/// A port of an app's container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Name of the container.
    pub container: String,
    /// Name of the port.
    pub name: Option<String>,
    /// Number of the port.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// A Service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Labels of its pods; none where others keep its endpoints.
    pub selector: BTreeMap<String, String>,
    /// Its cluster addresses.
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    /// Its name.
    pub name: Option<String>,
    /// Its number.
    pub port: u16,
    /// Where it leads to.
    pub target: Target,
    /// Transport.
    pub protocol: Protocol,
}

/// A port of a pod as a Service names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By number.
    Number(u16),
    /// By the name of a container's port.
    Name(String),
}

/// Endpoints of a Service: UIDs of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Name of the Service.
    pub service: String,
    /// UIDs of the pods.
    pub pods: Vec<String>,
}

/// An intercept.
#[derive(Clone, Debug, PartialEq)]
pub struct Intercept {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// When it was created, by the API server's clock.
    pub created: Timestamp,
    /// Version of the object, to write against.
    pub resource_version: String,
    /// Version of its spec.
    pub generation: i64,
    /// What is asked for.
    pub spec: InterceptSpec,
    /// What is wrong with its filter.
    pub filter_problem: Option<String>,
    /// What it was answered.
    pub status: Option<InterceptStatus>,
}

impl Intercept {
    /// What tells it from others, and from what it was before it was changed.
    #[must_use]
    pub fn version(&self) -> String {
        format!("{}.{}", self.uid, self.generation)
    }
}

/// Namespace and name of an object in one text, in the order of namespaces.
pub fn key<K: Resource>(object: &K) -> String {
    format!("{}/{}", object.meta().namespace.as_deref().unwrap_or_default(), object.name_any())
}

/// What is kept of an intercept.
#[must_use]
pub fn intercept(object: tpd_api::intercept::Intercept) -> Intercept {
    let filter_problem = object.spec.filter.compile().err().map(|error| error.to_string());
    Intercept {
        filter_problem,
        namespace: object.metadata.namespace.unwrap_or_default(),
        name: object.metadata.name.unwrap_or_default(),
        uid: object.metadata.uid.unwrap_or_default(),
        created: object.metadata.creation_timestamp.map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        resource_version: object.metadata.resource_version.unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        spec: object.spec,
        status: object.status,
    }
}

/// What is kept of a Service. An ExternalName has no pods, whatever else it says.
#[must_use]
pub fn service(object: core::Service) -> Service {
    let spec = object.spec.filter(|spec| spec.type_.as_deref() != Some("ExternalName")).unwrap_or_default();
    let ports = spec.ports.into_iter().flatten().filter_map(service_port).collect();
    Service {
        namespace: object.metadata.namespace.unwrap_or_default(),
        name: object.metadata.name.unwrap_or_default(),
        selector: spec.selector.unwrap_or_default(),
        cluster_ips: spec.cluster_ips.into_iter().flatten().filter_map(|ip| ip.parse().ok()).collect(),
        ports,
    }
}

fn service_port(port: core::ServicePort) -> Option<ServicePort> {
    let number = u16::try_from(port.port).ok()?;
    let target = match port.target_port {
        Some(IntOrString::Int(target)) => Target::Number(u16::try_from(target).ok()?),
        Some(IntOrString::String(name)) => Target::Name(name),
        None => Target::Number(number),
    };
    let protocol = protocol(port.protocol.as_deref())?;
    Some(ServicePort { name: port.name, port: number, target, protocol })
}

/// The transports that are intercepted: SCTP is not.
fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => None,
    }
}

/// What is kept of an EndpointSlice.
#[must_use]
pub fn slice(object: EndpointSlice) -> Option<Slice> {
    let service = object.metadata.labels?.remove("kubernetes.io/service-name")?;
    let pods = object.endpoints.into_iter().filter_map(|endpoint| {
        let target = endpoint.target_ref?;
        target.uid.filter(|_| target.kind.as_deref() == Some("Pod"))
    });
    Some(Slice { service, pods: pods.collect() })
}

/// A pod without all that a Pod may hold.
#[derive(Clone, Debug, Deserialize, Resource)]
#[resource(inherit = core::Pod)]
pub struct TrimmedPod {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: TrimmedSpec,
    #[serde(default)]
    status: TrimmedStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TrimmedSpec {
    host_network: bool,
    containers: Vec<TrimmedContainer>,
    init_containers: Vec<TrimmedContainer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct TrimmedContainer {
    name: String,
    ports: Vec<core::ContainerPort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TrimmedStatus {
    phase: String,
    conditions: Vec<TrimmedCondition>,
    init_container_statuses: Vec<TrimmedContainerStatus>,
    container_statuses: Vec<TrimmedContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct TrimmedCondition {
    r#type: String,
    status: String,
    reason: String,
    message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct TrimmedContainerStatus {
    name: String,
    state: TrimmedState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct TrimmedState {
    waiting: Option<TrimmedReason>,
    terminated: Option<TrimmedReason>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TrimmedReason {
    reason: String,
    message: String,
    exit_code: i32,
}

/// What is kept of a pod.
#[must_use]
pub fn pod(object: TrimmedPod) -> Pod {
    let TrimmedPod { metadata, spec, status } = object;
    let released = annotation(&metadata, RELEASED);
    let (workload, template) = origin(&metadata, released);
    let injected = spec.init_containers.iter().any(|container| container.name == AGENT);
    let entry = annotation(&metadata, ENTRY).and_then(|text| serde_json::from_str(text).ok());
    let has = |condition: &str| {
        status.conditions.iter().any(|found| found.r#type == condition && found.status == "True")
    };
    let marks = [&metadata.labels, &metadata.annotations];
    let opted_out =
        marks.into_iter().flatten().any(|marks| marks.get(INJECT).is_some_and(|mark| mark == DISABLED));
    let apps = spec.containers.iter().filter(|container| container.name != AGENT);
    Pod {
        created: metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        maker: workload::maker(&metadata).map(str::to_owned),
        workload,
        template,
        released: released.is_some(),
        released_at: annotation(&metadata, RELEASED_AT).and_then(|time| time.parse().ok()),
        kept: annotation(&metadata, KEPT).and_then(kept),
        running: status.phase == "Running",
        ready: has("Ready"),
        leaving: metadata.deletion_timestamp.is_some()
            || matches!(status.phase.as_str(), "Succeeded" | "Failed"),
        host_network: spec.host_network,
        containers: apps.clone().map(|container| container.name.clone()).collect(),
        ports: apps.flat_map(container_ports).collect(),
        entry: injected.then(|| entry.unwrap_or(Entry::Redirect)),
        installation: annotation(&metadata, INSTALLATION).map(str::to_owned),
        not_injected: annotation(&metadata, NOT_INJECTED).map(str::to_owned),
        opted_out,
        trouble: unscheduled(&status.conditions).or_else(|| {
            (status.init_container_statuses.iter().chain(&status.container_statuses)).find_map(trouble)
        }),
        namespace: metadata.namespace.unwrap_or_default(),
        name: metadata.name.unwrap_or_default(),
        uid: metadata.uid.unwrap_or_default(),
        labels: metadata.labels.unwrap_or_default(),
    }
}

fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// Largest annotation of this kind that is read, bytes: enough for more intercepts than a workload can have without conflict, and
/// no more than whoever may change pods should be able to have the managers remember.
const LARGEST_KEPT: usize = 16 << 10;

fn kept(text: &str) -> Option<Kept> {
    let kept: Kept = serde_json::from_str(Some(text).filter(|text| text.len() <= LARGEST_KEPT)?).ok()?;
    Some(Kept { why: shortened(&kept.why), ..kept })
}

/// A released pod has lost its owner and the hash in its labels; its name was drawn from its ReplicaSet's.
fn origin(metadata: &ObjectMeta, released: Option<&str>) -> (Option<Workload>, Option<Template>) {
    let template = |hash: &str, replica_set: &str| {
        Some(Template { replica_set: replica_set.to_owned(), hash: hash.to_owned() })
    };
    if let Some(hash) = released {
        let origin = metadata.generate_name.as_deref().and_then(|prefix| inject::origin(prefix, hash));
        let Some(Origin { replica_set, deployment }) = origin else { return (None, None) };
        let workload = Workload { kind: WorkloadKind::Deployment, name: deployment.to_owned() };
        return (Some(workload), template(hash, replica_set));
    }
    let workload = workload::of(metadata);
    let hash = metadata.labels.as_ref().and_then(|labels| labels.get(TEMPLATE_HASH));
    let template = match &workload {
        Some(Workload { kind: WorkloadKind::Deployment, name }) => {
            hash.and_then(|hash| template(hash, &format!("{name}-{hash}")))
        }
        _ => None,
    };
    (workload, template)
}

fn container_ports(container: &TrimmedContainer) -> impl Iterator<Item = ContainerPort> {
    container.ports.iter().filter_map(|port| {
        Some(ContainerPort {
            container: container.name.clone(),
            name: port.name.clone(),
            port: u16::try_from(port.container_port).ok()?,
            protocol: protocol(port.protocol.as_deref())?,
        })
    })
}

/// Why no node takes a pod, as the scheduler has it.
fn unscheduled(conditions: &[TrimmedCondition]) -> Option<String> {
    let condition = conditions.iter().find(|condition| {
        condition.r#type == "PodScheduled"
            && condition.status == "False"
            && condition.reason == "Unschedulable"
    })?;
    Some(format!("no node takes it: {}", shortened(&condition.message)))
}

/// Why a container does not run: whose image cannot be had, or what else keeps one of ours.
fn trouble(status: &TrimmedContainerStatus) -> Option<String> {
    let [agent, redirect] = OUR_CONTAINERS.map(str::to_owned);
    let (what, ours) = match status.name.as_str() {
        AGENT => (agent, true),
        INIT => (redirect, true),
        theirs => (format!("container {theirs}"), false),
    };
    if let Some(waiting) = &status.state.waiting {
        let image = ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"];
        if image.contains(&waiting.reason.as_str()) {
            return Some(format!("{}: {}", unpulled(&what), clause(waiting)));
        }
        if !ours {
            return None;
        }
        let starting = ["PodInitializing", "ContainerCreating", ""].contains(&waiting.reason.as_str());
        return (!starting).then(|| format!("{what} does not start: {}", clause(waiting)));
    }
    let ended = status.state.terminated.as_ref().filter(|ended| ours && ended.exit_code != 0)?;
    Some(format!("{what} has ended: {} (exit code {})", clause(ended), ended.exit_code))
}

fn clause(reason: &TrimmedReason) -> String {
    let text = if reason.message.is_empty() { &reason.reason } else { &reason.message };
    shortened(text)
}

/// Longest text of somebody else's that goes into a status, characters.
const LONGEST_TEXT: usize = 200;

/// The beginning of a text that somebody else has written, on one line.
#[must_use]
pub fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST_TEXT) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};
    use tpd_api::agent::Entry;

    use super::{Pod, Target, pod, service, shortened, slice};

    fn kept(changes: Value) -> Pod {
        let mut object = json!({
            "metadata": {
                "namespace": "shop", "name": "web-7d4b9-x1", "generateName": "web-7d4b9-", "uid": "u",
                "labels": { "app": "web", "pod-template-hash": "7d4b9" },
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d4b9", "uid": "r",
                    "controller": true,
                }],
            },
            "spec": { "containers": [
                { "name": "app", "ports": [{ "name": "http", "containerPort": 8080 }] },
            ] },
            "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
        });
        merge(&mut object, changes);
        pod(from_value(object).unwrap())
    }

    fn merge(into: &mut Value, changes: Value) {
        match (into, changes) {
            (Value::Object(into), Value::Object(changes)) => {
                for (name, change) in changes {
                    if change.is_null() {
                        into.remove(&name);
                        continue;
                    }
                    merge(into.entry(name).or_insert(Value::Null), change);
                }
            }
            (into, change) => *into = change,
        }
    }

    #[test]
    fn a_pod_of_a_deployment() {
        let pod = kept(json!({}));
        assert_eq!(pod.workload.unwrap().to_string(), "deployment/web");
        assert_eq!(pod.maker.as_deref(), Some("r"));
        assert_eq!(pod.template.unwrap().replica_set, "web-7d4b9");
        assert!(pod.ready && pod.running && !pod.leaving && pod.entry.is_none());
        assert_eq!((pod.ports[0].port, pod.ports[0].name.as_deref()), (8080, Some("http")));
    }

    #[test]
    fn a_released_pod_is_still_known_as_its_deployments() {
        let pod = kept(json!({ "metadata": {
            "labels": { "pod-template-hash": null }, "ownerReferences": [],
            "annotations": {
                "tpd.dev/released": "7d4b9", "tpd.dev/released-at": "1970-01-01T00:01:40Z",
                "tpd.dev/kept": r#"{"why":"in vain","for":["u.1"]}"#,
            },
        } }));
        assert!(pod.released);
        assert_eq!(pod.released_at.unwrap().as_second(), 100);
        assert_eq!(pod.kept.unwrap().why, "in vain");
        assert_eq!(pod.workload.unwrap().to_string(), "deployment/web");
        assert_eq!(pod.template.unwrap().hash, "7d4b9");
    }

    #[test]
    fn what_injection_left_is_read() {
        let entry = r#"{"type":"ports","ports":[{"name":"http","listen":19901,"app":8080}]}"#;
        let pod = kept(json!({
            "metadata": { "annotations": { "tpd.dev/entry": entry, "tpd.dev/installation": "1" } },
            "spec": { "initContainers": [{ "name": "tpd-agent" }] },
        }));
        assert!(matches!(pod.entry, Some(Entry::Ports { ports }) if ports[0].app == 8080));
        assert_eq!(pod.installation.as_deref(), Some("1"));
        let without = kept(json!({ "metadata": { "annotations": {
            "tpd.dev/not-injected": "the quota is full", "tpd.dev/inject": "disabled",
        } } }));
        assert_eq!(without.not_injected.as_deref(), Some("the quota is full"));
        assert!(without.opted_out);
    }

    #[test]
    fn what_keeps_an_agent_from_starting_is_said() {
        let trouble = |name: &str, state: Value| {
            kept(json!({ "status": { "initContainerStatuses": [{ "name": name, "state": state }] } })).trouble
        };
        let waiting = |reason: &str| json!({ "waiting": { "reason": reason, "message": "no such\n image" } });
        let text = trouble("tpd-agent", waiting("ImagePullBackOff")).unwrap();
        assert_eq!(text, "the image of the agent cannot be pulled: no such image");
        assert!(trouble("tpd-agent", waiting("CrashLoopBackOff")).is_some());
        assert_eq!(trouble("tpd-agent", waiting("PodInitializing")), None);
        assert!(trouble("theirs", waiting("ImagePullBackOff")).unwrap().contains("container theirs"));
        assert_eq!(trouble("theirs", waiting("CrashLoopBackOff")), None);
        let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes" });
        let pending = kept(json!({ "status": { "conditions": [condition] } }));
        assert_eq!(pending.trouble.as_deref(), Some("no node takes it: 0/1 nodes"));
        let ended = json!({ "terminated": { "exitCode": 1, "reason": "Error" } });
        assert!(trouble("tpd-redirect", ended).unwrap().contains("exit code 1"));
        assert_eq!(trouble("tpd-redirect", json!({ "terminated": { "exitCode": 0 } })), None);
    }

    #[test]
    fn services_and_slices() {
        let service = service(
            from_value(json!({
                "metadata": { "namespace": "shop", "name": "web" },
                "spec": {
                    "clusterIPs": ["10.96.0.5", "None"], "selector": { "app": "web" },
                    "ports": [
                        { "port": 80, "targetPort": "http" }, { "port": 81 },
                        { "port": 82, "protocol": "SCTP" },
                    ],
                },
            }))
            .unwrap(),
        );
        assert_eq!(service.cluster_ips.len(), 1);
        assert_eq!(service.ports.len(), 2);
        assert_eq!(service.ports[0].target, Target::Name("http".into()));
        assert_eq!(service.ports[1].target, Target::Number(81));
        let slice = slice(
            from_value(json!({
                "metadata": { "labels": { "kubernetes.io/service-name": "web" } }, "addressType": "IPv4",
                "endpoints": [
                    { "addresses": ["10.0.0.1"], "targetRef": { "kind": "Pod", "uid": "u" } },
                    { "addresses": ["10.0.0.2"] },
                ],
            }))
            .unwrap(),
        );
        assert_eq!(slice.unwrap().pods, ["u"]);
    }

    #[test]
    fn foreign_text_is_bounded() {
        assert_eq!(shortened(&"ä".repeat(999)).chars().count(), 201);
    }
}
