//! What an intercept is judged by, asked of the API server: it happens once per intercept, and what is newest counts.

use std::collections::BTreeMap;

use anyhow::Context as _;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, Pod, PodTemplateSpec, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;
use tpd_api::intercept::{Intercept, Workload, WorkloadKind};
use tpd_api::session::ClientSession;

use super::facts::list;
use super::judge::{Change, Found, Known};
use crate::manager::intercepts::evict;
use crate::manager::intercepts::objects::{self, TrimmedPod};
use crate::manager::workload;

/// All that an intercept is judged by.
///
/// # Errors
/// Fails where the API server does.
pub(super) async fn gather(client: &Client, managers: &str, change: &Change) -> anyhow::Result<Known> {
    let (namespace, spec) = (change.namespace.as_str(), &change.asked.spec);
    let (labels, session_owner, services, others, found) = tokio::try_join!(
        labels(client, namespace),
        owner(client, managers, &spec.session),
        list::<Service>(client, namespace),
        intercepts(client, namespace),
        find(client, namespace, &spec.workload),
    )?;
    let workloads = match found {
        Some(_) => Vec::new(),
        None => workloads(client, namespace).await?,
    };
    Ok(Known {
        labels,
        managers: managers.to_owned(),
        session_owner,
        services: services.into_iter().map(objects::service).collect(),
        others,
        found,
        workloads,
        now: Timestamp::now(),
    })
}

async fn labels(client: &Client, namespace: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let api = Api::<Namespace>::all(client.clone());
    let found = api.get_metadata(namespace).await.context("read the namespace")?;
    Ok(found.metadata.labels.unwrap_or_default())
}

async fn owner(client: &Client, managers: &str, session: &str) -> anyhow::Result<Option<String>> {
    let api = Api::<ClientSession>::namespaced(client.clone(), managers);
    Ok(api.get_opt(session).await.context("read the session")?.map(|session| session.spec.owner))
}

/// As they are in the store, not as they were a moment ago: two developers may well begin at the same time.
async fn intercepts(client: &Client, namespace: &str) -> anyhow::Result<Vec<Intercept>> {
    let api = Api::<Intercept>::namespaced(client.clone(), namespace);
    Ok(api.list(&ListParams::default()).await.context("list intercepts")?.items)
}

/// The workload as its pods are made.
async fn find(client: &Client, namespace: &str, workload: &Workload) -> anyhow::Result<Option<Found>> {
    let name = workload.name.as_str();
    Ok(match workload.kind {
        WorkloadKind::Deployment => get::<Deployment>(client, namespace, name).await?.and_then(|one| {
            let stands_alone = evict::stands_alone(&one);
            let found = found(one.metadata, Some(one.spec?.template))?;
            Some(Found { stands_alone, ..found })
        }),
        WorkloadKind::StatefulSet => get::<StatefulSet>(client, namespace, name)
            .await?
            .and_then(|one| found(one.metadata, Some(one.spec?.template))),
        WorkloadKind::DaemonSet => get::<DaemonSet>(client, namespace, name)
            .await?
            .and_then(|one| found(one.metadata, Some(one.spec?.template))),
        WorkloadKind::ReplicaSet => get::<ReplicaSet>(client, namespace, name)
            .await?
            .and_then(|one| found(one.metadata, one.spec?.template)),
        WorkloadKind::Pod => get::<Pod>(client, namespace, name).await?.and_then(|pod| {
            let belongs_to = workload::of(&pod.metadata).filter(|owner| owner.kind != WorkloadKind::Pod);
            let pod = json!({ "metadata": pod.metadata, "spec": pod.spec });
            let pod = objects::pod(serde_json::from_value::<TrimmedPod>(pod).ok()?);
            Some(Found { pod, belongs_to, stands_alone: false })
        }),
    })
}

async fn get<K>(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Option<K>>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    api.get_opt(name).await.with_context(|| format!("read the {}", K::kind(&())))
}

fn found(metadata: ObjectMeta, template: Option<PodTemplateSpec>) -> Option<Found> {
    let template = template?;
    let deployment = metadata.owner_references.into_iter().flatten().find(|owner| owner.kind == "Deployment");
    let belongs_to = deployment.map(|owner| Workload { kind: WorkloadKind::Deployment, name: owner.name });
    let pod = json!({ "metadata": template.metadata.unwrap_or_default(), "spec": template.spec });
    let pod = objects::pod(serde_json::from_value::<TrimmedPod>(pod).ok()?);
    Some(Found { pod, belongs_to, stands_alone: false })
}

/// Every workload of a namespace that an intercept could be of.
async fn workloads(client: &Client, namespace: &str) -> anyhow::Result<Vec<Workload>> {
    let (deployments, stateful, daemons, replicas, pods) = tokio::try_join!(
        names::<Deployment>(client, namespace),
        names::<StatefulSet>(client, namespace),
        names::<DaemonSet>(client, namespace),
        names::<ReplicaSet>(client, namespace),
        names::<Pod>(client, namespace),
    )?;
    let of = |kind, names: Vec<String>| names.into_iter().map(move |name| Workload { kind, name });
    let all = of(WorkloadKind::Deployment, deployments)
        .chain(of(WorkloadKind::StatefulSet, stateful))
        .chain(of(WorkloadKind::DaemonSet, daemons))
        .chain(of(WorkloadKind::ReplicaSet, replicas))
        .chain(of(WorkloadKind::Pod, pods));
    Ok(all.collect())
}

/// Names of the objects of a kind that nothing owns.
async fn names<K>(client: &Client, namespace: &str) -> anyhow::Result<Vec<String>>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let list = api.list_metadata(&ListParams::default().match_any()).await;
    let list = list.with_context(|| format!("list {}", K::plural(&())))?;
    let free = list.items.into_iter().filter(|object| object.owner_references().is_empty());
    Ok(free.map(|object| object.name_any()).collect())
}
