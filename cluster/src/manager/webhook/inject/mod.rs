//! What becomes of a pod that is being created: an agent is put in, or it is told why not, or nothing.
//!
//! Pure: the pod and its surroundings in, a patch out. The app's own containers stay as they are but for what the kubelet is
//! to ask of them ([`probes`]), and where ports are taken over, for the names of those ([`ports`]).

pub mod containers;
pub mod environment;
pub mod patch;
pub mod ports;
pub mod probes;
pub mod quantity;
pub mod resources;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LimitRange, Pod, PodSpec, ResourceQuota, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tpd_api::agent::Entry;
use tpd_api::inject::{
    AGENT, DISABLED, DNS_PORT, ENABLED, ENTRY, INIT, INJECT, INSTALLATION, NOT_INJECTED, READY_PORT,
    TOKEN_VOLUME, installation,
};
use tpd_api::intercept::Workload;

use self::containers::{Blueprint, token_volume};
pub use self::patch::Patch;
use self::patch::escape;
use self::ports::Ways;
use self::probes::StandIns;
pub use self::resources::is_sidecar;
use crate::manager::workload;

/// Namespace of the cluster itself, whose pods no agent is put into.
pub const SYSTEM_NAMESPACE: &str = "kube-system";

/// Label of a namespace: the Pod Security Standard that its pods must meet.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// Annotation of the kubelet's own pods, which the API server only mirrors.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Largest pod with an agent, bytes of JSON. What is stored may have 1.5 MiB (etcd), and grows a little after admission.
const LARGEST: usize = 1 << 20;

/// Why nothing is redirected to the agent of a pod, where others like it were refused.
const REFUSED: &str = "pods like it did not come to be with a container that sets up a redirect (a policy of the cluster may \
                       forbid it)";

/// What is put into pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Image of the agent.
    pub image: String,
    /// When nodes pull it.
    pub pull_policy: String,
    /// The managers' namespace, whose pods no agent is put into.
    pub namespace: String,
    /// The managers' CA, PEM.
    pub ca: String,
}

/// What is known without asking: enough to tell whether a pod is concerned.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The pod's namespace.
    pub namespace: String,
    /// Labels of the namespace.
    pub labels: BTreeMap<String, String>,
    /// Workloads of the namespace that are intercepted.
    pub intercepted: Vec<Workload>,
}

/// What else of the namespace an agent must fit into.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Bounds of containers and pods.
    pub limit_ranges: Vec<LimitRange>,
    /// Quotas, and what is used of them.
    pub quotas: Vec<ResourceQuota>,
    /// Services.
    pub services: Vec<Service>,
    /// NetworkPolicies.
    pub policies: Vec<NetworkPolicy>,
    /// `address:port` of the managers' Service, once it is known.
    pub manager: Option<String>,
}

/// A pod that is to have an agent.
#[derive(Clone, Debug)]
pub struct Candidate {
    json: Value,
    metadata: ObjectMeta,
    spec: PodSpec,
    labels: BTreeMap<String, String>,
    /// Why nothing may be redirected, if so.
    unredirected: Option<String>,
}

impl Candidate {
    /// The pod, if it is to have an agent: its own word counts first, then its namespace's, and then whether its workload is
    /// intercepted. What cannot be read is left alone.
    #[must_use]
    pub fn new(json: Value, place: &Place, settings: &Settings) -> Option<Self> {
        let pod = Pod::deserialize(&json).ok()?;
        let (metadata, spec) = (pod.metadata, pod.spec?);
        let foreign = place.namespace == SYSTEM_NAMESPACE || place.namespace == settings.namespace;
        let mirrored = metadata.annotations.as_ref().is_some_and(|map| map.contains_key(MIRROR));
        let done = containers::all(&spec).any(|container| [AGENT, INIT].contains(&container.name.as_str()));
        if foreign || mirrored || done || !is_wanted(&metadata, place) {
            return None;
        }
        let labels = metadata.labels.clone().unwrap_or_default();
        let unredirected = restriction(&place.labels).map(|standard| {
            format!("its namespace enforces the Pod Security Standard {standard}, which forbids redirecting")
        });
        Some(Self { json, metadata, spec, labels, unredirected })
    }

    /// UID of what makes the pod, and makes another if this one is refused.
    #[must_use]
    pub fn maker(&self) -> Option<&str> {
        workload::maker(&self.metadata)
    }

    /// The same, where others with a redirect were refused.
    #[must_use]
    pub fn without_redirect(self) -> Self {
        let unredirected = self.unredirected.or_else(|| Some(REFUSED.to_owned()));
        Self { unredirected, ..self }
    }

    /// Says in the pod why it has no agent, and changes nothing else.
    #[must_use]
    pub fn refuse(&self, reason: &str) -> Patch {
        let mut patch = Patch::default();
        self.annotate(&mut patch, &[(NOT_INJECTED, reason)]);
        patch
    }

    /// Puts the agent in.
    ///
    /// # Errors
    /// Tells why it cannot be.
    pub fn inject(&self, around: &Surroundings, settings: &Settings) -> Result<Patch, String> {
        self.admissible()?;
        let manager = around.manager.as_deref().ok_or("the managers' Service has no address yet")?;
        let (mut patch, entry, stand_ins) = self.entry(around)?;
        let stands_in = entry != Entry::Redirect;
        let resources = resources::fit(&self.spec, stands_in, &around.limit_ranges, &around.quotas)?;
        let blueprint = Blueprint { settings, manager, entry: &entry, resources: &resources };
        let mut added = vec![blueprint.agent(&self.spec, &stand_ins)];
        if entry == Entry::Redirect {
            added.push(blueprint.redirect(&stand_ins));
        }
        // Each goes to the front, so the redirect is set up first, and the agent there before any other container.
        let paths = &self.json["spec"];
        prepend(&mut patch, paths, "initContainers", added);
        prepend(&mut patch, paths, "volumes", vec![token_volume()]);
        let installation = installation(&settings.ca, manager);
        self.annotate(&mut patch, &[(ENTRY, &blueprint.entry()), (INSTALLATION, &installation)]);
        if self.json.to_string().len() + patch.size() > LARGEST {
            return Err("with the agent, which repeats its environment, it would be too large to be stored"
                .to_owned());
        }
        Ok(patch)
    }

    /// What no surroundings can change.
    fn admissible(&self) -> Result<(), String> {
        if self.spec.host_network == Some(true) {
            return Err("it is on its node's network (hostNetwork)".to_owned());
        }
        let selected = self.spec.node_selector.as_ref().and_then(|labels| labels.get("kubernetes.io/os"));
        if self.spec.os.as_ref().map(|os| &os.name).or(selected).is_some_and(|os| os == "windows") {
            return Err("it runs Windows".to_owned());
        }
        if self.spec.volumes.iter().flatten().any(|volume| volume.name == TOKEN_VOLUME) {
            return Err(format!("it has a volume {TOKEN_VOLUME} of its own"));
        }
        let ours = i32::from(READY_PORT)..=i32::from(DNS_PORT);
        match containers::declared(&self.spec).find(|port| ours.contains(port)) {
            Some(port) => Err(format!(
                "it uses port {port}, and the agent needs those from {READY_PORT} to {DNS_PORT} itself"
            )),
            None => Ok(()),
        }
    }

    /// How traffic will come to the agent, and what the app's containers need for that.
    fn entry(&self, around: &Surroundings) -> Result<(Patch, Entry, StandIns), String> {
        let Some(unredirected) = &self.unredirected else {
            let (patch, stand_ins) = probes::redirect(&self.json)?;
            return Ok((patch, Entry::Redirect, stand_ins));
        };
        let ways = Ways { labels: &self.labels, services: &around.services, policies: &around.policies };
        let (names, ports) = ports::take(&self.spec, ways).map_err(|why| format!("{unredirected}: {why}"))?;
        // Before their names are gone.
        let mut patch = probes::by_number(&self.json);
        patch.extend(names);
        Ok((patch, Entry::Ports { ports }, StandIns::new()))
    }

    fn annotate(&self, patch: &mut Patch, annotations: &[(&str, &str)]) {
        if self.metadata.annotations.is_none() {
            patch.add("/metadata/annotations", json!({}));
        }
        for (name, value) in annotations {
            patch.add(format!("/metadata/annotations/{}", escape(name)), *value);
        }
    }
}

/// The Pod Security Standard of a namespace that forbids what redirecting needs, if it enforces one. What tpd does not know is
/// taken to forbid it, too.
#[must_use]
pub fn restriction(namespace: &BTreeMap<String, String>) -> Option<&str> {
    namespace.get(POD_SECURITY).map(String::as_str).filter(|level| *level != "privileged")
}

/// What a pod, or the template of one, says of agents itself.
#[must_use]
pub fn own_word(pod: &ObjectMeta) -> Option<&str> {
    let word = |map: &Option<BTreeMap<String, String>>| map.as_ref()?.get(INJECT).cloned();
    match (word(&pod.labels).as_deref(), word(&pod.annotations).as_deref()) {
        (Some(DISABLED), _) | (_, Some(DISABLED)) => Some(DISABLED),
        (Some(ENABLED), _) | (_, Some(ENABLED)) => Some(ENABLED),
        _ => None,
    }
}

fn is_wanted(pod: &ObjectMeta, place: &Place) -> bool {
    let namespace = place.labels.get(INJECT).map(String::as_str);
    match (own_word(pod), namespace) {
        (Some(DISABLED), _) | (_, Some(DISABLED)) => false,
        (Some(ENABLED), _) | (_, Some(ENABLED)) => true,
        _ => workload::of(pod).is_some_and(|workload| place.intercepted.contains(&workload)),
    }
}

/// Puts values to the front of a list of the spec, the last one first of all.
fn prepend(patch: &mut Patch, spec: &Value, list: &str, values: Vec<Value>) {
    if spec[list].is_array() {
        for value in values {
            patch.add(format!("/spec/{list}/0"), value);
        }
    } else {
        patch.add(format!("/spec/{list}"), Value::from_iter(values.into_iter().rev()));
    }
}
