//! A workload in the cluster: one of the samples, or one that a test has for itself.

use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::has_agent;
use crate::wait::until;
use crate::{Cluster, Run};

/// Pods start in a second or two; on a busy machine a few at a time take longer.
const ROLLOUT: Duration = Duration::from_secs(60);

/// Pods with the label `app`, and a Service that leads to them.
#[derive(Debug)]
pub struct Workload {
    /// The cluster that it is in.
    pub cluster: &'static Cluster,
    /// Its namespace.
    pub namespace: String,
    /// Its name, its Service's, and the value of its pods' label.
    pub name: String,
    owned: bool,
}

impl Workload {
    /// One of the samples.
    #[must_use]
    pub fn sample(cluster: &'static Cluster, namespace: &str, name: &str) -> Self {
        Self { cluster, namespace: namespace.to_owned(), name: name.to_owned(), owned: false }
    }

    /// [`deploy_in`](Self::deploy_in) the namespace `store`.
    #[must_use]
    #[track_caller]
    pub fn deploy(cluster: &'static Cluster, name: &str, replicas: u32, changes: &Value) -> Self {
        Self::deploy_in(cluster, "store", name, replicas, changes)
    }

    /// A new Deployment of `tpd-echo http` in a namespace, with port 8080 named `http` and a Service that has it at 80.
    /// `changes` are merged into its pod template, and it is deleted when this is dropped. It need not be ready.
    #[must_use]
    #[track_caller]
    pub fn deploy_in(
        cluster: &'static Cluster,
        namespace: &str,
        name: &str,
        replicas: u32,
        changes: &Value,
    ) -> Self {
        let mut deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "replicas": replicas,
                "selector": { "matchLabels": { "app": name } },
                "template": { "metadata": { "labels": { "app": name } }, "spec": {
                    "terminationGracePeriodSeconds": 2,
                    "containers": [{
                        "name": "app", "image": "tpd-test/echo:1", "imagePullPolicy": "Never",
                        "args": ["http", ":8080"],
                        "env": [{ "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }],
                        "ports": [{ "name": "http", "containerPort": 8080 }],
                        "readinessProbe": { "httpGet": { "path": "/healthz", "port": "http" }, "periodSeconds": 1 },
                        "resources": { "requests": { "cpu": "10m", "memory": "16Mi" } },
                    }],
                } },
            },
        });
        merge(&mut deployment["spec"]["template"], changes);
        let workload = Self { cluster, namespace: namespace.to_owned(), name: name.to_owned(), owned: true };
        cluster.apply(&deployment);
        cluster.apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": namespace },
            "spec": { "selector": { "app": name }, "ports": [{ "name": "http", "port": 80, "targetPort": "http" }] },
        }));
        // A connection to a Service that the node does not know yet is led nowhere, and so are its repetitions.
        until(Duration::from_secs(10), "the node knows the Service", || {
            if cluster.leads_to(workload.address()) { Ok(()) } else { Err(workload.address()) }
        });
        workload
    }

    /// `http://` and the Service's cluster address, as the node reaches it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// The Service's cluster address.
    #[must_use]
    pub fn address(&self) -> std::net::IpAddr {
        self.cluster.service(&format!("{}/{}", self.namespace, self.name))[0]
    }

    /// Its pods that are not being deleted.
    #[must_use]
    pub fn pods(&self) -> Vec<Value> {
        let list = self.cluster.object(&format!("pods -n {} -l app={}", self.namespace, self.name));
        let mut pods = list["items"].as_array().cloned().unwrap_or_default();
        pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        pods
    }

    /// The names of those that are ready.
    #[must_use]
    pub fn ready(&self) -> Vec<String> {
        let pods = self.pods();
        pods.iter().filter(|pod| is_ready(pod)).map(|pod| text(&pod["metadata"]["name"])).collect()
    }

    /// The names of those that were made with an agent.
    #[must_use]
    pub fn injected(&self) -> Vec<String> {
        let pods = self.pods();
        pods.iter().filter(|pod| has_agent(pod)).map(|pod| text(&pod["metadata"]["name"])).collect()
    }

    /// How often containers of its pods have restarted, agents' included.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        let counts = |pod: &Value| -> u64 {
            let lists = [&pod["status"]["containerStatuses"], &pod["status"]["initContainerStatuses"]];
            let statuses = lists.into_iter().filter_map(Value::as_array).flatten();
            statuses.filter_map(|status| status["restartCount"].as_u64()).sum()
        };
        self.pods().iter().map(counts).sum()
    }

    /// Waits until just so many pods are there, and all are ready.
    #[track_caller]
    pub fn until_ready(&self, count: usize) -> Vec<String> {
        let what = format!("{} has {count} pods, all of them ready", self.name);
        let (ready, _) = until(ROLLOUT, &what, || {
            let (pods, ready) = (self.pods(), self.ready());
            if pods.len() == count && ready.len() == count {
                Ok(ready)
            } else {
                Err(format!("of {} pods {ready:?} are ready", pods.len()))
            }
        });
        self.until_led_to();
        ready
    }

    /// Waits until the node leads to every pod by the workload's Service, if it has one: it learns of them a moment after they
    /// are ready.
    #[track_caller]
    fn until_led_to(&self) {
        let (cluster, namespace) = (self.cluster, &self.namespace);
        if self.kubectl(&format!("get service {}", self.name)).code != Some(0) {
            return;
        }
        until(Duration::from_secs(10), "the node leads to every pod", || {
            let pods = cluster.pods(namespace, &format!("app={}", self.name));
            let first = pods.iter().filter_map(|addresses| addresses.first());
            match first.into_iter().find(|address| !cluster.leads_to(**address)) {
                Some(address) => Err(format!("not to {address}")),
                None => Ok(()),
            }
        });
    }

    /// Has a Deployment of its own scaled.
    #[track_caller]
    pub fn scale(&self, replicas: usize) {
        let count = format!("scale deployment {} --replicas={replicas}", self.name);
        self.kubectl(&count).ok();
    }

    /// Has its HorizontalPodAutoscaler scale it to just so many, and waits until that has happened.
    #[track_caller]
    pub fn autoscale(&self, replicas: usize) -> Vec<String> {
        let spec = json!({ "spec": { "minReplicas": replicas, "maxReplicas": replicas } });
        self.kubectl(&format!("patch hpa {} --type=merge -p '{spec}'", self.name)).ok();
        self.until_ready(replicas)
    }

    /// Runs kubectl in its namespace, as the administrator.
    #[must_use]
    #[track_caller]
    pub fn kubectl(&self, arguments: &str) -> Run {
        self.cluster.kubectl(&format!("-n {} {arguments}", self.namespace))
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        if self.owned {
            let _ = self.kubectl(&format!(
                "delete deployment/{0} service/{0} --wait=false --ignore-not-found",
                self.name
            ));
        }
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Merges objects into objects (RFC 7396) and lists into lists, item by item.
fn merge(into: &mut Value, changes: &Value) {
    match (into, changes) {
        (Value::Object(into), Value::Object(changes)) => {
            for (key, change) in changes {
                merge(into.entry(key).or_insert(Value::Null), change);
            }
        }
        (Value::Array(into), Value::Array(changes)) => {
            for (number, change) in changes.iter().enumerate() {
                match into.get_mut(number) {
                    Some(item) => merge(item, change),
                    None => into.push(change.clone()),
                }
            }
        }
        (into, change) => *into = change.clone(),
    }
}
