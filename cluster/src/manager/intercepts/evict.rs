//! What the plan says, done by the API server.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, EvictParams, ObjectMeta, Patch, PatchParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::timeout;
use tpd_api::inject::{KEPT, NOT_INJECTED, RELEASED, RELEASED_AT, TEMPLATE_HASH, given_back};
use tpd_api::intercept::{Workload, WorkloadKind};

use super::objects::{Kept, Template, shortened};
use super::replace::{Fate, Step, TURN, UNNEEDED, Victim, Wait, fate};

/// For one step.
const PATIENCE: Duration = Duration::from_secs(10);

/// For how long at most a successor is waited for: as long as Kubernetes gives a rollout that says nothing of it
/// (`progressDeadlineSeconds`).
const LONGEST_WAIT: SignedDuration = SignedDuration::from_secs(600);

/// For how long at least: to pull the agents' image, and to start what starts slowly.
const SHORTEST_WAIT: SignedDuration = SignedDuration::from_secs(60);

/// What is left on a pod that came without an agent though its predecessor was replaced for the sake of one.
const CAME_WITHOUT: &str = "it took the place of a pod that was replaced to get an agent, and came without one: does the webhook \
                            cover this namespace, and do the managers answer it?";

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The pod is released.
    Released,
    /// The pod is on its way out, or was already.
    Evicted,
    /// The pod is its ReplicaSet's again; why.
    GivenBack(String),
    /// The pod is deleted: nothing was left that it could be given back to.
    Deleted,
    /// It cannot be done yet; what hinders it.
    NotYet(String),
}

/// Takes a step.
///
/// # Errors
/// Fails where the API server refuses it, or does not answer.
pub async fn take(client: Client, step: Step) -> anyhow::Result<Outcome> {
    let taken = async {
        match step {
            Step::Release { pod, template } => release(&client, &pod, &template).await,
            Step::Finish { pod, template, ready, failed, wait } => {
                finish(&client, &pod, &template, ready, &failed, &wait).await
            }
            Step::Evict { pod, workload, others } => {
                match obstacle(wanted(&client, &pod.namespace, &workload).await?, others) {
                    Some(why) => Ok(Outcome::NotYet(why.to_owned())),
                    None => evict(&client, &pod).await,
                }
            }
        }
    };
    timeout(PATIENCE, taken).await.map_err(|_| anyhow!("the API server does not answer"))?
}

/// What hinders the eviction of a pod whose workload wants so many, if it is there, and has so many ready ones beside it.
fn obstacle(wanted: Option<usize>, others: usize) -> Option<&'static str> {
    match wanted {
        // Whoever deletes it may want to keep its pods (`--cascade=orphan`), and nothing would make another.
        None => Some("its workload is being deleted"),
        // The next one's turn comes when the last one's successor is ready, and not when it is merely gone.
        Some(wanted) if wanted > others + 1 => Some(TURN),
        Some(_) => None,
    }
}

async fn release(client: &Client, pod: &Victim, template: &Template) -> anyhow::Result<Outcome> {
    if let Some(name) = template.deployment() {
        let found = deployment(client, &pod.namespace, name).await?;
        if found.as_ref().is_some_and(stands_alone) {
            return Ok(Outcome::NotYet(format!(
                "its Deployment starts no pod beside an old one (strategy Recreate), so it is not replaced; give it an agent with: \
                 kubectl -n {} rollout restart deployment/{name}",
                pod.namespace
            )));
        }
    }
    let change = json!({
        "labels": { TEMPLATE_HASH: Value::Null },
        "annotations": {
            RELEASED: template.hash, RELEASED_AT: Timestamp::now().to_string(), KEPT: Value::Null,
        },
    });
    patch(client, pod, change).await.context("release the pod")?;
    Ok(Outcome::Released)
}

/// Whether a Deployment wants its old pods gone before there are new ones: whoever says so may have but one that writes.
#[must_use]
pub fn stands_alone(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate")
}

async fn deployment(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Option<Deployment>> {
    let found = Api::<Deployment>::namespaced(client.clone(), namespace).get_opt(name).await;
    Ok(found.with_context(|| format!("read deployment/{name}"))?.filter(stays))
}

/// One that is being deleted adopts nobody, and is as good as gone.
fn stays(object: &impl ResourceExt) -> bool {
    object.meta().deletion_timestamp.is_none()
}

/// The ReplicaSet's wish is asked for only here: it may have been scaled meanwhile, or be gone.
async fn finish(
    client: &Client,
    pod: &Victim,
    template: &Template,
    ready: usize,
    failed: &[Victim],
    wait: &Wait,
) -> anyhow::Result<Outcome> {
    let set = Workload { kind: WorkloadKind::ReplicaSet, name: template.replica_set.clone() };
    let wanted = wanted(client, &pod.namespace, &set).await?;
    let fate = fate(wanted, ready, wait, limit(client, pod, template, wait).await?);
    match &fate {
        Fate::GiveBack(why) => return give_back(client, pod, template, wait, why).await,
        Fate::Wait => return Ok(Outcome::NotYet(wait.reason())),
        Fate::Orphan | Fate::Evict => {}
    }
    // What the plan was made from may be older than somebody's change: a pod that has its label back is one of those that serve.
    let found = pods(client, pod).get_metadata_opt(&pod.name).await.context("read the pod")?;
    if !found.is_some_and(|found| is_released(&found.metadata, pod)) {
        return Ok(Outcome::NotYet(wait.reason()));
    }
    if fate == Fate::Orphan {
        return orphaned(client, pod, template, wait).await;
    }
    for successor in failed {
        let change = json!({ "annotations": { NOT_INJECTED: CAME_WITHOUT } });
        patch(client, successor, change).await.context("mark a pod that came without an agent")?;
    }
    match evict(client, pod).await? {
        // Nobody is left who would see to it later.
        Outcome::NotYet(_) if wait.asked.is_empty() => give_back(client, pod, template, wait, UNNEEDED).await,
        outcome => Ok(outcome),
    }
}

/// Whether that very pod is still released.
fn is_released(found: &ObjectMeta, pod: &Victim) -> bool {
    let released = found.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(RELEASED));
    released && found.uid.as_deref() == Some(pod.uid.as_str())
}

/// How long the successor is waited for. Not asked before it matters.
async fn limit(
    client: &Client,
    pod: &Victim,
    template: &Template,
    wait: &Wait,
) -> anyhow::Result<SignedDuration> {
    match template.deployment() {
        Some(name) if wait.waited >= SHORTEST_WAIT => {
            Ok(deadline(deployment(client, &pod.namespace, name).await?.as_ref()))
        }
        _ => Ok(LONGEST_WAIT),
    }
}

/// How long a Deployment gives its pods to become ready, within bounds.
fn deadline(deployment: Option<&Deployment>) -> SignedDuration {
    let own = deployment.and_then(|deployment| deployment.spec.as_ref()?.progress_deadline_seconds);
    let own = own.map_or(LONGEST_WAIT, |seconds| SignedDuration::from_secs(seconds.into()));
    own.clamp(SHORTEST_WAIT, LONGEST_WAIT)
}

/// Its ReplicaSet is gone, or about to be. If a newer one took over, the pod is one too many once that has all its pods; if the
/// whole workload is gone, it goes like the other pods did.
async fn orphaned(
    client: &Client,
    pod: &Victim,
    template: &Template,
    wait: &Wait,
) -> anyhow::Result<Outcome> {
    if let Some(name) = template.deployment()
        && let Some(deployment) = deployment(client, &pod.namespace, name).await?
    {
        let sets = Api::<ReplicaSet>::namespaced(client.clone(), &pod.namespace);
        // While it is being deleted its pods still count, and are about to go.
        let is_going = sets.get_metadata_opt(&template.replica_set).await.context("read the ReplicaSet")?;
        return match is_going.is_none() && is_complete(&deployment) {
            true => evict(client, pod).await,
            false => Ok(Outcome::NotYet(wait.reason())),
        };
    }
    match pods(client, pod).delete(&pod.name, &only(pod)).await {
        Ok(_) => Ok(Outcome::Deleted),
        Err(error) => gone(error).map(|()| Outcome::Deleted).context("delete the pod"),
    }
}

/// Whether a Deployment has all the pods that it wants. It does not count those that its ReplicaSets do not know. What its
/// controller says of an earlier version of it says nothing.
fn is_complete(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().map_or(1, |spec| spec.replicas.unwrap_or(1));
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation >= deployment.metadata.generation
            && status.available_replicas.unwrap_or_default() >= wanted
    })
}

/// Has the ReplicaSet adopt the pod again. Intercepts that are there do not have it replaced again.
async fn give_back(
    client: &Client,
    pod: &Victim,
    template: &Template,
    wait: &Wait,
    why: &str,
) -> anyhow::Result<Outcome> {
    let mut change = given_back(&template.hash);
    if !wait.asked.is_empty() {
        let kept = Kept { why: why.to_owned(), asked: wait.asked.clone() };
        change["annotations"][KEPT] = serde_json::to_string(&kept)?.into();
    }
    patch(client, pod, change).await.context("give the pod back to its ReplicaSet")?;
    Ok(Outcome::GivenBack(why.to_owned()))
}

/// How many pods a workload is to have; `None` if there is no such workload, or not for long.
async fn wanted(client: &Client, namespace: &str, workload: &Workload) -> anyhow::Result<Option<usize>> {
    let (client, name) = (client.clone(), &workload.name);
    let wanted = match workload.kind {
        WorkloadKind::StatefulSet => {
            let found = Api::<StatefulSet>::namespaced(client, namespace).get_opt(name).await;
            found.map(|found| {
                found.filter(stays).and_then(|set| set.spec).map(|spec| spec.replicas.unwrap_or(1))
            })
        }
        WorkloadKind::DaemonSet => {
            let found = Api::<DaemonSet>::namespaced(client, namespace).get_opt(name).await;
            found.map(|found| {
                found.filter(stays).and_then(|set| set.status).map(|status| status.desired_number_scheduled)
            })
        }
        WorkloadKind::ReplicaSet | WorkloadKind::Deployment | WorkloadKind::Pod => {
            let found = Api::<ReplicaSet>::namespaced(client, namespace).get_opt(name).await;
            found.map(|found| {
                found.filter(stays).and_then(|set| set.spec).map(|spec| spec.replicas.unwrap_or(1))
            })
        }
    };
    let wanted = wanted.with_context(|| format!("read {workload}"))?;
    Ok(wanted.map(|wanted| usize::try_from(wanted).unwrap_or_default()))
}

async fn evict(client: &Client, pod: &Victim) -> anyhow::Result<Outcome> {
    let parameters = EvictParams { delete_options: Some(only(pod)), ..EvictParams::default() };
    match pods(client, pod).evict(&pod.name, &parameters).await {
        Ok(_) => Ok(Outcome::Evicted),
        Err(kube::Error::Api(status)) if status.code == 429 => {
            let why = shortened(&status.message);
            Ok(Outcome::NotYet(format!("it cannot be evicted yet: {why}")))
        }
        Err(error) => gone(error).map(|()| Outcome::Evicted).context("evict the pod"),
    }
}

/// That very pod, and not one of the same name.
fn only(pod: &Victim) -> DeleteParams {
    let preconditions = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
    DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() }
}

/// A patch of the metadata of that very pod.
async fn patch(client: &Client, pod: &Victim, mut metadata: Value) -> anyhow::Result<()> {
    metadata["uid"] = json!(pod.uid);
    let parameters =
        PatchParams { field_manager: Some(tpd_api::MANAGER.to_owned()), ..PatchParams::default() };
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    match pods(client, pod).patch(&pod.name, &parameters, &patch).await {
        Ok(_) => Ok(()),
        Err(error) => gone(error),
    }
}

/// A pod that is gone, or is another by now (409), needs nothing done.
fn gone(error: kube::Error) -> anyhow::Result<()> {
    match error {
        kube::Error::Api(status) if matches!(status.code, 404 | 409) => Ok(()),
        error => Err(error.into()),
    }
}

fn pods(client: &Client, pod: &Victim) -> Api<Pod> {
    Api::namespaced(client.clone(), &pod.namespace)
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::{Victim, deadline, is_complete, is_released, obstacle, stands_alone};

    #[test]
    fn a_deployment_that_recreates_has_no_second_pod_put_beside_its_own() {
        let with = |strategy| {
            let spec = json!({ "selector": {}, "template": {}, "strategy": strategy });
            stands_alone(&from_value(json!({ "metadata": {}, "spec": spec })).unwrap())
        };
        assert!(with(json!({ "type": "Recreate" })));
        assert!(!with(json!({ "type": "RollingUpdate" })) && !with(json!({})));
    }

    #[test]
    fn a_pod_goes_before_its_successor_is_there_only_while_its_workload_stays() {
        assert_eq!(obstacle(Some(3), 2), None);
        assert_eq!(obstacle(Some(0), 0), None);
        assert_eq!(obstacle(Some(3), 1), Some("it waits for its turn to be replaced"));
        assert_eq!(obstacle(None, 2), Some("its workload is being deleted"));
    }

    #[test]
    fn an_orphan_serves_on_until_its_deployment_is_complete_without_it() {
        let with = |replicas, status| {
            let spec = json!({ "selector": {}, "template": {}, "replicas": replicas });
            let deployment = json!({ "metadata": { "generation": 2 }, "spec": spec, "status": status });
            is_complete(&from_value(deployment).unwrap())
        };
        assert!(with(2, json!({ "observedGeneration": 2, "availableReplicas": 2 })));
        assert!(!with(2, json!({ "observedGeneration": 2, "availableReplicas": 1 })));
        assert!(!with(1, json!({ "observedGeneration": 2 })));
        assert!(!with(2, json!({ "observedGeneration": 1, "availableReplicas": 2 })), "it was scaled up");
        assert!(!with(1, json!({})));
    }

    #[test]
    fn only_that_very_pod_and_only_while_it_is_released_is_taken_away() {
        let pod = Victim { namespace: "shop".into(), name: "web".into(), uid: "u".into() };
        let with = |uid: &str, annotations| {
            let metadata = json!({ "name": "web", "uid": uid, "annotations": annotations });
            is_released(&from_value(metadata).unwrap(), &pod)
        };
        assert!(with("u", json!({ "tpd.dev/released": "7d4b9" })));
        assert!(!with("v", json!({ "tpd.dev/released": "7d4b9" })));
        assert!(!with("u", json!({})));
    }

    #[test]
    fn a_successor_is_waited_for_as_long_as_a_rollout_is_within_bounds() {
        let with = |seconds: i32| {
            let spec = json!({ "selector": {}, "template": {}, "progressDeadlineSeconds": seconds });
            deadline(Some(&from_value(json!({ "metadata": {}, "spec": spec })).unwrap())).as_secs()
        };
        assert_eq!([with(1), with(120), with(i32::MAX), deadline(None).as_secs()], [60, 120, 600, 600]);
    }
}
