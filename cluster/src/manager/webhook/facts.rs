//! What the webhooks know of the cluster.
//!
//! What every new pod is judged by is mirrored: labels of namespaces, and which workloads are intercepted. The rest is asked
//! for when an agent is about to be put in, which is rare, so that nothing is watched that nobody needs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{LimitRange, Namespace, ResourceQuota, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{ListParams, PartialObjectMeta};
use kube::core::NamespaceResourceScope;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tpd_api::inject;
use tpd_api::intercept::{Intercept, Workload};
use tpd_api::{STREAM_PORT, WEBHOOK_SERVICE};
use tracing::warn;

use super::super::intercepts::watch::INTERCEPTS_TIMEOUT;
use super::inject::{Place, Surroundings};
use crate::manager::watch::Pause;

/// For the first lists after a start, and for each question about a namespace, which the API server answers within milliseconds:
/// all of them together are less than the two seconds that it waits.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long after a failed watch a mirror is not relied on: the longest pause before the next one is 3 s, and that may take 30 s to
/// find out that nobody answers.
const BLIND: Duration = Duration::from_secs(35);

/// Mirrors, and where to ask for more.
#[derive(Clone)]
pub struct Facts {
    client: Client,
    namespaces: Mirror<PartialObjectMeta<Namespace>>,
    intercepts: Mirror<Intercept>,
    services: Mirror<Service>,
}

/// The objects of one kind as the API server tells of them.
#[derive(Clone)]
struct Mirror<K: Resource<DynamicType = ()> + Clone + 'static> {
    objects: Store<K>,
    /// When it could not be told for the last time: there may be more, or less.
    failed: Arc<Mutex<Option<Instant>>>,
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Mirror<K> {
    /// Whether it may not be what the API server has.
    fn is_blind(&self) -> bool {
        let failed = *self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|at| at.elapsed() < BLIND)
    }
}

impl Facts {
    /// Begins to mirror. `installation` is told which one `ca` and the address of the managers' Service make.
    #[must_use]
    pub fn new(
        client: &Client,
        namespace: &str,
        ca: String,
        installation: watch::Sender<Option<String>>,
    ) -> Self {
        let tell = move |services: &Store<Service>| {
            let present = address(services).map(|manager| inject::installation(&ca, &manager));
            installation.send_if_modified(|old| {
                let changed = *old != present;
                *old = present;
                changed
            });
        };
        let everything = watcher::Config::default;
        let intercepts = everything().timeout(INTERCEPTS_TIMEOUT);
        let own = everything().fields(&format!("metadata.name={WEBHOOK_SERVICE}"));
        Self {
            client: client.clone(),
            namespaces: mirror(watcher(Api::all(client.clone()), everything()), |_| {}),
            intercepts: mirror(watcher(Api::all(client.clone()), intercepts), |_| {}),
            services: mirror(watcher(Api::namespaced(client.clone(), namespace), own), tell),
        }
    }

    /// What is known of a namespace; `None` if nothing is, yet.
    pub async fn place(&self, namespace: &str) -> Option<Place> {
        let ready = async {
            self.namespaces.objects.wait_until_ready().await?;
            self.intercepts.objects.wait_until_ready().await
        };
        timeout(PATIENCE, ready).await.ok()?.ok()?;
        let labels = match self.namespaces.objects.get(&ObjectRef::new(namespace)) {
            Some(known) => known.metadata.labels.clone(),
            // It is so new that the mirror has not heard of it.
            None => self.labels(namespace).await?,
        };
        Some(Place {
            namespace: namespace.to_owned(),
            labels: labels.unwrap_or_default(),
            intercepted: self.intercepted(namespace).await,
        })
    }

    /// The workloads of a namespace that somebody intercepts.
    async fn intercepted(&self, namespace: &str) -> Vec<Workload> {
        if self.intercepts.is_blind() {
            let asked = list::<Intercept>(&self.client, namespace);
            if let Ok(Ok(known)) = timeout(PATIENCE, asked).await {
                return known.into_iter().map(|one| one.spec.workload).collect();
            }
        }
        let known = self.intercepts.objects.state().into_iter();
        let known = known.filter(|one| one.metadata.namespace.as_deref() == Some(namespace));
        known.map(|one| one.spec.workload.clone()).collect()
    }

    async fn labels(&self, namespace: &str) -> Option<Option<BTreeMap<String, String>>> {
        let api = Api::<Namespace>::all(self.client.clone());
        let found = timeout(PATIENCE, api.get_metadata(namespace)).await.ok()?.ok()?;
        Some(found.metadata.labels)
    }

    /// What else an agent must fit into.
    ///
    /// # Errors
    /// Fails where the API server does not tell in time.
    pub async fn surroundings(&self, namespace: &str) -> anyhow::Result<Surroundings> {
        let all = async {
            tokio::try_join!(
                list::<LimitRange>(&self.client, namespace),
                list::<ResourceQuota>(&self.client, namespace),
                list::<Service>(&self.client, namespace),
                list::<NetworkPolicy>(&self.client, namespace),
            )
        };
        let (limit_ranges, quotas, services, policies) =
            timeout(PATIENCE, all).await.context("the API server took too long")??;
        Ok(Surroundings {
            limit_ranges,
            quotas,
            services,
            policies,
            manager: address(&self.services.objects),
        })
    }
}

/// `address:port` of the managers' Service.
fn address(services: &Store<Service>) -> Option<String> {
    let services = services.state();
    let address = services.first()?.spec.as_ref()?.cluster_ip.as_deref()?;
    let address = address.parse::<std::net::IpAddr>().ok()?;
    Some(std::net::SocketAddr::new(address, STREAM_PORT).to_string())
}

impl std::fmt::Debug for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Facts").finish_non_exhaustive()
    }
}

/// A mirror that is kept for as long as the process runs. `told` sees it after each event.
fn mirror<K>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    mut told: impl FnMut(&Store<K>) + Send + 'static,
) -> Mirror<K>
where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
{
    let (reader, writer) = store();
    let mirror = Mirror { objects: reader.clone(), failed: Arc::default() };
    let failed = Arc::clone(&mirror.failed);
    let mut failing = false;
    let events = events
        .backoff(Pause::default())
        .modify(|object| object.meta_mut().managed_fields = None)
        .inspect(move |event| match event {
            Ok(_) => failing = false,
            Err(error) => {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                if !std::mem::replace(&mut failing, true) {
                    warn!(kind = %K::kind(&()), %error, "cannot watch");
                }
            }
        })
        .reflect(writer);
    tokio::spawn(events.for_each(move |_| {
        told(&reader);
        std::future::ready(())
    }));
    mirror
}

/// All objects of a kind in a namespace, as the API server has them in its memory.
pub(super) async fn list<K>(client: &Client, namespace: &str) -> anyhow::Result<Vec<K>>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let list = api.list(&ListParams::default().match_any()).await;
    Ok(list.with_context(|| format!("list {}", K::plural(&())))?.items)
}
