//! Pods that were being replaced when the managers went: their ReplicaSets do not know them, and nobody would see to them.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, Preconditions};
use kube::core::PartialObjectMeta;
use serde_json::json;
use tpd_api::inject::{RELEASED, given_back, origin};
use tpd_api::install::FIELD_MANAGER;

use super::{OBJECT_TIMEOUT, Site, refused};
use crate::failure::Failure;
use crate::kube::errors::{Call, judged};
use crate::progress::Progress;

/// Pods of one answer: some megabytes at most, since only their metadata is asked for.
const PAGE: u32 = 500;

/// A pod that a ReplicaSet was made to let go of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Released {
    namespace: String,
    name: String,
    uid: String,
    hash: String,
    replica_set: String,
    deployment: String,
}

/// What is done with such a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Its ReplicaSet is to adopt it again.
    GiveBack,
    /// It serves on: its ReplicaSet is gone, and its Deployment may be short of pods.
    Leave,
    /// It goes as the rest of its workload did.
    Delete,
}

/// What is there of where a pod came from. What is being deleted adopts nobody, and is as good as gone.
fn fate(replica_set: bool, deployment: bool) -> Fate {
    match (replica_set, deployment) {
        (true, _) => Fate::GiveBack,
        (false, true) => Fate::Leave,
        (false, false) => Fate::Delete,
    }
}

/// What became of such pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    /// How many are their ReplicaSets' again.
    pub(crate) given_back: usize,
    /// The commands that delete those that serve on and are nobody's.
    pub(crate) left: Vec<String>,
}

impl Site {
    /// Gives such pods back to their ReplicaSets, which then end one each that is too many, and deletes those whose workload is
    /// gone. Only once the managers are gone, too: they would go on with what they do.
    pub(crate) async fn settle_released(&self, progress: &mut Progress) -> Result<Settled, Failure> {
        progress.step("looking for pods that were being replaced");
        let mut settled = Settled::default();
        for pod in self.released().await? {
            progress.step(&format!("giving pod {}/{} back to its ReplicaSet", pod.namespace, pod.name));
            let doing = format!("give pod {} back to its ReplicaSet", pod.name);
            let call = Call { doing: &doing, server: &self.server, namespace: &pod.namespace };
            match judged(call, refused, OBJECT_TIMEOUT, self.settle(&pod)).await? {
                Fate::GiveBack => settled.given_back += 1,
                Fate::Leave => {
                    settled.left.push(format!("kubectl -n {} delete pod {}", pod.namespace, pod.name))
                }
                Fate::Delete => {}
            }
        }
        Ok(settled)
    }

    async fn released(&self) -> Result<Vec<Released>, Failure> {
        let call = Call { doing: "list pods", server: &self.server, namespace: &self.namespace };
        let pods: Api<Pod> = Api::all(self.client.clone());
        let (mut found, mut next) = (Vec::new(), None);
        loop {
            let page = ListParams { limit: Some(PAGE), continue_token: next, ..ListParams::default() };
            let page = judged(call, refused, OBJECT_TIMEOUT, pods.list_metadata(&page)).await?;
            found.extend(page.items.into_iter().filter_map(|pod| Released::of(pod.metadata)));
            next = page.metadata.continue_.filter(|token| !token.is_empty());
            if next.is_none() {
                return Ok(found);
            }
        }
    }

    async fn settle(&self, pod: &Released) -> Result<Fate, kube::Error> {
        let sets: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &pod.namespace);
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &pod.namespace);
        let set = sets.get_metadata_opt(&pod.replica_set).await?.is_some_and(stays);
        let deployment = deployments.get_metadata_opt(&pod.deployment).await?.is_some_and(stays);
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let fate = fate(set, deployment);
        let settled = match fate {
            Fate::GiveBack => {
                let mut metadata = given_back(&pod.hash);
                metadata["uid"] = json!(pod.uid);
                let parameters =
                    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
                let patch = Patch::Merge(json!({ "metadata": metadata }));
                pods.patch_metadata(&pod.name, &parameters, &patch).await.map(drop)
            }
            Fate::Leave => Ok(()),
            Fate::Delete => {
                let preconditions = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
                let parameters =
                    DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
                pods.delete(&pod.name, &parameters).await.map(drop)
            }
        };
        match settled {
            // It is gone, or another has its name by now.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(Fate::Delete),
            other => other.map(|()| fate),
        }
    }
}

fn stays<K>(object: PartialObjectMeta<K>) -> bool {
    object.metadata.deletion_timestamp.is_none()
}

impl Released {
    /// One that merely carries the annotation, or that somebody has adopted, is none.
    fn of(pod: ObjectMeta) -> Option<Self> {
        let hash = pod.annotations?.remove(RELEASED)?;
        let owned = pod.owner_references.iter().flatten().any(|owner| owner.controller == Some(true));
        if pod.deletion_timestamp.is_some() || owned {
            return None;
        }
        let origin = origin(pod.generate_name.as_deref()?, &hash)?;
        Some(Self {
            replica_set: origin.replica_set.to_owned(),
            deployment: origin.deployment.to_owned(),
            namespace: pod.namespace?,
            name: pod.name?,
            uid: pod.uid?,
            hash,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::{Fate, Released, fate};

    #[test]
    fn released_pods_are_told_from_others() {
        let mut pod = json!({
            "namespace": "shop", "name": "web-7d4b9-x1", "generateName": "web-7d4b9-", "uid": "u",
            "annotations": { "tpd.dev/released": "7d4b9" },
        });
        let of = |pod: &Value| Released::of(from_value(pod.clone()).unwrap());
        let released = of(&pod).unwrap();
        assert_eq!(
            (&*released.hash, &*released.replica_set, &*released.deployment),
            ("7d4b9", "web-7d4b9", "web")
        );
        pod["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        assert_eq!(of(&pod), None);
        assert_eq!(of(&json!({ "name": "web", "annotations": {} })), None);
    }

    #[test]
    fn a_pod_that_merely_carries_the_annotation_is_left_alone() {
        let mut pod = json!({
            "namespace": "shop", "name": "copy", "uid": "u", "annotations": { "tpd.dev/released": "7d4b9" },
        });
        let of = |pod: &Value| Released::of(from_value(pod.clone()).unwrap());
        assert_eq!(of(&pod), None);
        for prefix in ["web-", "-7d4b9-", "web-7d4b9"] {
            pod["generateName"] = prefix.into();
            assert_eq!(of(&pod), None, "{prefix}");
        }
        pod["generateName"] = "web-7d4b9-".into();
        assert!(of(&pod).is_some());
        let owner =
            json!({ "apiVersion": "v1", "kind": "Owner", "name": "o", "uid": "o", "controller": true });
        pod["ownerReferences"] = json!([owner]);
        assert_eq!(of(&pod), None);
    }

    #[test]
    fn a_pod_serves_on_while_its_deployment_is_there() {
        assert_eq!(fate(true, true), Fate::GiveBack);
        assert_eq!(fate(true, false), Fate::GiveBack);
        assert_eq!(fate(false, true), Fate::Leave);
        assert_eq!(fate(false, false), Fate::Delete);
    }
}
