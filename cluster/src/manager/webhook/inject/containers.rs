//! The containers that injection adds, and their volume.

use k8s_openapi::api::core::v1::{Container, PodSpec, ResourceRequirements};
use serde_json::{Value, json};
use tpd_api::agent::{AUDIENCE, Entry};
use tpd_api::inject::{
    AGENT, AGENT_ENTRY, AGENT_UID, APP_CONTAINERS, INIT, MANAGER_ADDRESS, MANAGER_CA, MEMORY, PROBES,
    READY_PORT, TOKEN_DIRECTORY, TOKEN_FILE, TOKEN_VOLUME,
};

use super::probes::StandIns;
use super::{Settings, environment, quantity};

/// How long a token lasts, seconds. The kubelet renews it when four fifths have passed; the API server's least is ten minutes.
const TOKEN_SECONDS: u32 = 3600;

/// What both containers are like.
#[derive(Debug)]
pub struct Blueprint<'a> {
    /// What the manager is told.
    pub settings: &'a Settings,
    /// `address:port` of the managers.
    pub manager: &'a str,
    /// How traffic comes to the agent.
    pub entry: &'a Entry,
    /// What each gets of its node.
    pub resources: &'a ResourceRequirements,
}

impl Blueprint<'_> {
    /// The sidecar. It is there before any other container starts, and when the last has ended.
    #[must_use]
    pub fn agent(&self, pod: &PodSpec, stand_ins: &StandIns) -> Value {
        let (mut env, mut env_from) = (Vec::new(), Vec::new());
        for (number, container) in pod.containers.iter().enumerate() {
            let (variables, sources) = environment::copies(number, container);
            env.extend(variables.into_iter().map(|variable| json!(variable)));
            env_from.extend(sources.into_iter().map(|source| json!(source)));
        }
        let names: Vec<_> = pod.containers.iter().map(|container| container.name.as_str()).collect();
        env.extend([
            variable(MANAGER_ADDRESS, self.manager),
            variable(MANAGER_CA, &self.settings.ca),
            variable(AGENT_ENTRY, &self.entry()),
            variable(APP_CONTAINERS, &names.join(",")),
        ]);
        env.extend(self.memory().map(|limit| variable(MEMORY, &limit)));
        env.extend(probes(stand_ins));
        let mut agent = json!({
            "name": AGENT,
            "image": self.settings.image,
            "imagePullPolicy": self.settings.pull_policy,
            "args": ["run"],
            "restartPolicy": "Always",
            "env": env,
            // Once ready it stays so: an agent that is gone fails open, and its pod goes on serving.
            "readinessProbe": {
                "tcpSocket": { "port": READY_PORT },
                "periodSeconds": 1,
                "failureThreshold": i32::MAX,
            },
            "resources": self.resources,
            "securityContext": {
                "runAsUser": AGENT_UID,
                "runAsGroup": AGENT_UID,
                "runAsNonRoot": true,
                "privileged": false,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "volumeMounts": [{ "name": TOKEN_VOLUME, "mountPath": TOKEN_DIRECTORY, "readOnly": true }],
        });
        if !env_from.is_empty() {
            agent["envFrom"] = env_from.into();
        }
        if let Entry::Ports { ports } = self.entry {
            let ports = ports.iter().map(
                |port| json!({ "name": port.name, "containerPort": port.listen, "protocol": port.protocol }),
            );
            agent["ports"] = ports.collect();
        }
        agent
    }

    /// What sets the redirect up, and ends.
    #[must_use]
    pub fn redirect(&self, stand_ins: &StandIns) -> Value {
        let mut env = vec![variable(AGENT_ENTRY, &self.entry())];
        env.extend(probes(stand_ins));
        json!({
            "name": INIT,
            "image": self.settings.image,
            "imagePullPolicy": self.settings.pull_policy,
            "args": ["redirect"],
            "env": env,
            "resources": self.resources,
            "securityContext": {
                "runAsUser": 0,
                "runAsGroup": 0,
                "runAsNonRoot": false,
                "privileged": false,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
                "seccompProfile": { "type": "RuntimeDefault" },
            },
        })
    }

    /// How much memory the agent may have, bytes, if that is said.
    fn memory(&self) -> Option<String> {
        let limit = self.resources.limits.as_ref()?.get("memory").and_then(quantity::parse)?;
        Some((limit / 1000).to_string())
    }

    /// The entry as text.
    #[must_use]
    pub fn entry(&self) -> String {
        json!(self.entry).to_string()
    }
}

/// The volume with the token that tells the managers which pod an agent is in.
#[must_use]
pub fn token_volume() -> Value {
    let token = json!({ "audience": AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": TOKEN_FILE });
    json!({ "name": TOKEN_VOLUME, "projected": { "sources": [{ "serviceAccountToken": token }] } })
}

/// Tells which ports stand in for probed ones, if any do.
fn probes(stand_ins: &StandIns) -> Option<Value> {
    let pairs: Vec<_> = stand_ins.iter().map(|(port, stand_in)| format!("{stand_in}:{port}")).collect();
    (!pairs.is_empty()).then(|| variable(PROBES, &pairs.join(",")))
}

fn variable(name: &str, value: &str) -> Value {
    json!({ "name": name, "value": value })
}

/// Every port that a container of the pod declares.
pub fn declared(pod: &PodSpec) -> impl Iterator<Item = i32> {
    all(pod).flat_map(|container| container.ports.iter().flatten()).map(|port| port.container_port)
}

/// Every container of the pod, in whatever role.
pub fn all(pod: &PodSpec) -> impl Iterator<Item = &Container> {
    pod.containers.iter().chain(pod.init_containers.iter().flatten())
}
