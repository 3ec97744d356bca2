//! Which workload a pod belongs to.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use tpd_api::inject::TEMPLATE_HASH;
use tpd_api::intercept::{Workload, WorkloadKind};

/// The workload of a pod, from its metadata alone; `None` for one that something else owns, such as a Job.
///
/// A pod without an owner that has no name yet, because the API server draws it, is nobody's.
#[must_use]
pub fn of(pod: &ObjectMeta) -> Option<Workload> {
    let Some(owner) = controller(pod) else {
        let name = pod.name.clone().filter(|_| pod.owner_references.iter().flatten().next().is_none())?;
        return Some(Workload { kind: WorkloadKind::Pod, name });
    };
    if !owner.api_version.starts_with("apps/") {
        return None;
    }
    let workload = |kind, name: &str| Some(Workload { kind, name: name.to_owned() });
    match owner.kind.as_str() {
        "ReplicaSet" => match deployment(&owner.name, pod) {
            Some(name) => workload(WorkloadKind::Deployment, name),
            None => workload(WorkloadKind::ReplicaSet, &owner.name),
        },
        "StatefulSet" => workload(WorkloadKind::StatefulSet, &owner.name),
        "DaemonSet" => workload(WorkloadKind::DaemonSet, &owner.name),
        _ => None,
    }
}

/// UID of what makes the pod anew when it is gone, if anything does.
#[must_use]
pub fn maker(pod: &ObjectMeta) -> Option<&str> {
    controller(pod).map(|owner| owner.uid.as_str())
}

fn controller(pod: &ObjectMeta) -> Option<&OwnerReference> {
    pod.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// The Deployment that a ReplicaSet belongs to by its name, which ends with the hash of the template.
fn deployment<'a>(replica_set: &'a str, pod: &ObjectMeta) -> Option<&'a str> {
    let hash = pod.labels.as_ref()?.get(TEMPLATE_HASH)?;
    replica_set.strip_suffix(hash.as_str())?.strip_suffix('-').filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::of;

    fn workload(pod: Value) -> Option<String> {
        of(&from_value(pod).unwrap()).map(|workload| workload.to_string())
    }

    fn owned(api_version: &str, kind: &str, name: &str) -> Value {
        json!({
            "generateName": "web-",
            "labels": { "pod-template-hash": "7d4b9" },
            "ownerReferences": [
                { "apiVersion": "v1", "kind": "Other", "name": "x", "uid": "1" },
                { "apiVersion": api_version, "kind": kind, "name": name, "uid": "2", "controller": true },
            ],
        })
    }

    #[test]
    fn a_pod_belongs_to_what_made_its_maker() {
        for (api_version, kind, name, expected) in [
            ("apps/v1", "ReplicaSet", "web-7d4b9", Some("deployment/web")),
            ("apps/v1", "ReplicaSet", "web-v2-7d4b9", Some("deployment/web-v2")),
            ("apps/v1", "ReplicaSet", "alone", Some("replicaset/alone")),
            ("apps/v1", "ReplicaSet", "-7d4b9", Some("replicaset/-7d4b9")),
            ("apps/v1", "StatefulSet", "db", Some("statefulset/db")),
            ("apps/v1", "DaemonSet", "log", Some("daemonset/log")),
            ("batch/v1", "Job", "once", None),
            ("example.com/v1", "StatefulSet", "theirs", None),
        ] {
            assert_eq!(workload(owned(api_version, kind, name)).as_deref(), expected, "{kind} {name}");
        }
    }

    #[test]
    fn a_pod_alone_is_its_own() {
        assert_eq!(workload(json!({ "name": "shell" })).as_deref(), Some("pod/shell"));
        assert_eq!(workload(json!({ "generateName": "shell-" })), None);
        let orphan = json!({ "name": "x", "ownerReferences": [
            { "apiVersion": "v1", "kind": "Node", "name": "n", "uid": "1" },
        ] });
        assert_eq!(workload(orphan), None);
    }

    #[test]
    fn a_released_pod_has_lost_its_maker() {
        let released = json!({ "name": "web-7d4b9-x1", "labels": {}, "ownerReferences": [] });
        assert_eq!(workload(released).as_deref(), Some("pod/web-7d4b9-x1"));
    }
}
