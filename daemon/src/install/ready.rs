//! Waits until the manager is ready, and says what it waits for.

use std::time::Duration;

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};
use tpd_api::MANAGER;
use tpd_api::exit::ExitCode;
use tpd_api::inject::{ENABLED, ENTRY, INJECT};
use tpd_api::install::WEBHOOKS;

use super::Site;
use crate::failure::Failure;
use crate::kube::errors::{Call, bounded};
use crate::progress::Progress;

/// How often the cluster is asked. Pods take seconds; this is what a person does not notice.
const POLL: Duration = Duration::from_millis(250);

/// Time for one question.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A trouble that lasts this long does not go away by itself; a registry that hiccups does.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long it is tried to see the webhook at work. API server and kube-proxy learn of a new one within two seconds; where another
/// webhook, or a label, keeps agents out of what is tried, nobody can see it.
const TRIAL: Duration = Duration::from_secs(5);

/// How things stand.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Ready,
    /// It takes its time.
    Waiting(String),
    /// Somebody has to do something.
    Trouble(Trouble),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Trouble {
    what: String,
    cause: String,
    help: String,
}

/// Waits until every replica of this version is ready.
pub(crate) async fn wait(site: &Site, limit: Duration, progress: &mut Progress) -> Result<(), Failure> {
    let deadline = Instant::now() + limit;
    let (mut trouble_since, mut ready_since) = (None, None);
    loop {
        let (stage, said) = match look(site).await? {
            Stage::Ready
                if Instant::now() > deadline
                    || is_tried(site, *ready_since.get_or_insert_with(Instant::now)).await =>
            {
                return Ok(());
            }
            Stage::Ready => (None, "waiting: for the API server to reach the managers' webhooks".to_owned()),
            Stage::Waiting(what) => {
                trouble_since = None;
                (None, format!("waiting: {what}"))
            }
            Stage::Trouble(trouble) => {
                trouble_since.get_or_insert_with(Instant::now);
                let said = format!("waiting: {}: {}", trouble.what, trouble.cause);
                (Some(trouble), said)
            }
        };
        progress.step(&said);
        let lasts = trouble_since.is_some_and(|since| since.elapsed() > PATIENCE);
        if lasts || Instant::now() > deadline {
            return Err(gave_up(site, stage, &said));
        }
        sleep(POLL).await;
    }
}

fn gave_up(site: &Site, trouble: Option<Trouble>, said: &str) -> Failure {
    match trouble {
        Some(trouble) => {
            Failure::new(ExitCode::Failure, trouble.what).because(trouble.cause).help(trouble.help)
        }
        None => Failure::new(ExitCode::Timeout, "the manager is not ready yet")
            .because(said)
            .help(format!("the objects are applied; see: kubectl -n {} get pods,events", site.namespace)),
    }
}

async fn look(site: &Site) -> Result<Stage, Failure> {
    let call = Call { doing: "see how the manager starts", server: &site.server, namespace: &site.namespace };
    let sets: Api<StatefulSet> = Api::namespaced(site.client.clone(), &site.namespace);
    let set = bounded(call, CALL_TIMEOUT, sets.get(MANAGER)).await?;
    if is_ready(&set) {
        let webhooks: Api<MutatingWebhookConfiguration> = Api::all(site.client.clone());
        let webhooks = bounded(call, CALL_TIMEOUT, webhooks.get(WEBHOOKS)).await?;
        return Ok(registered(&webhooks));
    }
    let pods: Api<Pod> = Api::namespaced(site.client.clone(), &site.namespace);
    let selector = ListParams::default().labels(&format!("app.kubernetes.io/name={MANAGER}"));
    let pods = bounded(call, CALL_TIMEOUT, pods.list(&selector)).await?.items;
    if pods.is_empty() {
        let events: Api<Event> = Api::namespaced(site.client.clone(), &site.namespace);
        let about = ListParams::default().fields(&format!("involvedObject.name={MANAGER},type=Warning"));
        let events = bounded(call, CALL_TIMEOUT, events.list(&about)).await?.items;
        return Ok(without_pods(&events));
    }
    let stages: Vec<_> = pods.iter().map(|pod| stage(pod, &site.namespace)).collect();
    let worst = stages.iter().find(|stage| matches!(stage, Stage::Trouble(_)));
    Ok(worst
        .or_else(|| stages.iter().find(|stage| **stage != Stage::Ready))
        .cloned()
        .unwrap_or_else(|| Stage::Waiting("pods of the version before are being replaced".into())))
}

fn is_ready(set: &StatefulSet) -> bool {
    let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    set.status.as_ref().is_some_and(|status| {
        status.observed_generation == set.metadata.generation
            && status.updated_replicas == Some(wanted)
            && status.ready_replicas == Some(wanted)
    })
}

/// Until the managers have put their CA in, the API server trusts no webhook of theirs, and pods start without agents.
fn registered(configuration: &MutatingWebhookConfiguration) -> Stage {
    let mut webhooks = configuration.webhooks.iter().flatten();
    if webhooks.any(|webhook| webhook.client_config.ca_bundle.is_none()) {
        return Stage::Waiting("for the managers to register their webhooks".into());
    }
    Stage::Ready
}

/// Whether the webhook was seen at work, on a pod that is not stored, or that was tried for long enough. What the API server cannot
/// call yet, it leaves out, and the first pods after an installation would start without agents.
async fn is_tried(site: &Site, since: Instant) -> bool {
    let pods: Api<Pod> = Api::namespaced(site.client.clone(), "default");
    let trial = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "generateName": "tpd-trial-", "labels": { INJECT: ENABLED } },
        "spec": { "containers": [{ "name": "trial", "image": "trial" }] },
    });
    let Ok(trial) = serde_json::from_value(trial) else { return true };
    let how = PostParams { dry_run: true, field_manager: None };
    match timeout(CALL_TIMEOUT, pods.create(&how, &trial)).await {
        Ok(Ok(pod)) => has_agent(&pod) || since.elapsed() > TRIAL,
        // A quota, a policy, or no right to make pods: that says nothing of ours.
        Ok(Err(_)) | Err(_) => true,
    }
}

/// A webhook that says no may only just have started.
fn has_agent(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(ENTRY))
}

/// The StatefulSet makes no pods: a quota or an admission rule refuses them, and only an event tells.
fn without_pods(events: &[Event]) -> Stage {
    match events.last().and_then(|event| event.message.clone()) {
        Some(cause) => Stage::Trouble(Trouble {
            what: format!("StatefulSet {MANAGER} cannot create its pods"),
            cause,
            help: "a quota, a PodSecurity level or an admission webhook of the cluster refuses them".into(),
        }),
        None => Stage::Waiting("for the first pod".into()),
    }
}

fn stage(pod: &Pod, namespace: &str) -> Stage {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    if let Some(condition) = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False") {
        return Stage::Trouble(Trouble {
            what: format!("pod {name} fits on no node"),
            cause: condition.message.clone().unwrap_or_default(),
            help: "it asks for 100m CPU and 64 MiB of memory; make room, or add a node".into(),
        });
    }
    if conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True") {
        return Stage::Ready;
    }
    let containers = status.container_statuses.unwrap_or_default();
    containers.iter().find_map(|container| trouble(name, container, namespace)).map_or_else(
        || {
            Stage::Waiting(format!(
                "pod {name} is {}",
                status.phase.as_deref().unwrap_or("Pending").to_lowercase()
            ))
        },
        Stage::Trouble,
    )
}

fn trouble(pod: &str, container: &ContainerStatus, namespace: &str) -> Option<Trouble> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let (reason, message) = (waiting.reason.as_deref()?, waiting.message.clone().unwrap_or_default());
    let (what, help) = match reason {
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName" => (
            format!("pod {pod} cannot get its image {}", container.image),
            "name one that the nodes can pull with --image REF (make images builds it; docker load, ctr image import or\nskopeo take it), with --pull-secret NAME where the registry wants credentials, and --pull-policy Never where\nthe image was imported on the nodes"
                .to_owned(),
        ),
        "CrashLoopBackOff" | "RunContainerError" | "CreateContainerConfigError" | "CreateContainerError" => (
            format!("pod {pod} does not start"),
            format!("see why: kubectl -n {namespace} logs {pod} --previous; kubectl -n {namespace} describe pod {pod}"),
        ),
        _ => return None,
    };
    Some(Trouble { what, cause: format!("{reason}: {message}"), help })
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use tpd_api::inject::NOT_INJECTED;

    use super::*;

    #[test]
    fn an_image_that_cannot_be_pulled_is_named() {
        let pod = from_value(json!({
            "metadata": { "name": "tpd-manager-0" },
            "status": { "phase": "Pending", "containerStatuses": [{
                "name": "manager", "image": "nowhere/x:1", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": "ImagePullBackOff", "message": "not found" } },
            }] },
        }))
        .unwrap();
        let Stage::Trouble(trouble) = stage(&pod, "tpd-system") else { panic!("no trouble") };
        assert_eq!(trouble.what, "pod tpd-manager-0 cannot get its image nowhere/x:1");
        assert_eq!(trouble.cause, "ImagePullBackOff: not found");
    }

    #[test]
    fn webhooks_need_a_ca() {
        let configuration = |client: serde_json::Value| -> MutatingWebhookConfiguration {
            from_value(json!({ "metadata": {}, "webhooks": [{
                "name": "pods.tpd.dev", "clientConfig": client, "sideEffects": "None", "admissionReviewVersions": ["v1"],
            }] }))
            .unwrap()
        };
        assert_eq!(registered(&configuration(json!({ "caBundle": "Y2E=" }))), Stage::Ready);
        assert!(matches!(registered(&configuration(json!({}))), Stage::Waiting(_)));
    }

    #[test]
    fn a_webhook_is_at_work_once_it_says_yes() {
        let pod = |annotations: serde_json::Value| -> Pod {
            from_value(json!({ "metadata": { "annotations": annotations } })).unwrap()
        };
        assert!(has_agent(&pod(json!({ ENTRY: "{}" }))));
        assert!(!has_agent(&pod(json!({ NOT_INJECTED: "the managers' Service has no address yet" }))));
        assert!(!has_agent(&pod(json!({}))));
    }

    #[test]
    fn readiness_is_of_this_version() {
        let set = |updated: i32| -> StatefulSet {
            from_value(json!({
                "metadata": { "generation": 2 },
                "spec": { "replicas": 2, "selector": {}, "serviceName": "s", "template": {} },
                "status": { "observedGeneration": 2, "replicas": 2, "updatedReplicas": updated, "readyReplicas": 2 },
            }))
            .unwrap()
        };
        assert!(is_ready(&set(2)) && !is_ready(&set(1)));
    }
}
