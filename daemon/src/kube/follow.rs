//! Follows one object, by its name, for as long as somebody listens. A developer may get and watch a ClientSession, but not list.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use kube::api::{WatchEvent, WatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tpd_api::exit::ExitCode;

use super::cluster::Cluster;
use super::errors::{self, Call, Judge};
use super::session::CALL_TIMEOUT;
use crate::failure::Failure;

/// The server ends a watch after this long. Nothing arrives on a watch whose far end vanished, so a short one, begun
/// anew, is what finds that out; a request a minute per laptop is no load.
const WATCH_SECONDS: u32 = 60;

/// A watch that outlives its own end by this much is dead.
const WATCH_LIMIT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// First and longest pause before trying again. The longest is what a person waits at most after an outage.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

/// Objects that can be followed.
pub(crate) trait Followed:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl<K> Followed for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

/// What became of the object.
#[derive(Debug)]
pub(crate) enum Change<K> {
    /// It is there, perhaps changed.
    Applied(Box<K>),
    /// Somebody deleted it.
    Deleted,
    /// The API server cannot be asked at the moment; it is tried again.
    Unknown(Failure),
}

/// Where to look.
#[derive(Clone, Debug)]
pub(crate) struct Follow {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// What the API server's refusals mean.
    pub(crate) judge: Judge,
}

impl Follow {
    /// Sends changes until nobody listens. `version` is the resource version to begin after; without one, the
    /// object is read first.
    pub(crate) async fn run<K: Followed>(
        self,
        mut version: Option<String>,
        changes: mpsc::Sender<Change<K>>,
    ) {
        let mut pause = BACKOFF.0;
        loop {
            let since = Instant::now();
            let result = tokio::select! {
                () = changes.closed() => return,
                result = self.round(version.take(), &changes) => result,
            };
            match result {
                Ok(next) => {
                    pause = BACKOFF.0;
                    version = next;
                    // A server that is shutting down ends every watch at once.
                    if since.elapsed() < BACKOFF.0 {
                        sleep(BACKOFF.0).await;
                    }
                }
                Err(failure) => {
                    if changes.send(Change::Unknown(failure)).await.is_err() {
                        return;
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// One watch. Answers the version that the next one may begin after.
    async fn round<K: Followed>(
        &self,
        version: Option<String>,
        changes: &mpsc::Sender<Change<K>>,
    ) -> Result<Option<String>, Failure> {
        let api: Api<K> = Api::namespaced(self.cluster.client().await?, &self.namespace);
        let version = match version {
            Some(version) => version,
            None => match self.read(&api, changes).await? {
                Some(version) => version,
                // Gone: whoever listens makes a new one; look for it shortly.
                None => {
                    sleep(BACKOFF.0).await;
                    return Ok(None);
                }
            },
        };
        let watching = self.watch(&api, &version, changes);
        match timeout(WATCH_LIMIT, watching).await {
            Ok(Ok(next)) => Ok(next),
            Ok(Err(error)) => Err(self.failure::<K>("watch", &error).await),
            Err(_) => Ok(Some(version)),
        }
    }

    async fn read<K: Followed>(
        &self,
        api: &Api<K>,
        changes: &mpsc::Sender<Change<K>>,
    ) -> Result<Option<String>, Failure> {
        let doing = self.doing::<K>("get");
        let request = api.get_opt(&self.name);
        let found = match errors::judged(self.call(&doing), self.judge, CALL_TIMEOUT, request).await {
            Ok(found) => found,
            Err(failure) => {
                self.renew_after(&failure).await;
                return Err(failure);
            }
        };
        let version = found.as_ref().and_then(ResourceExt::resource_version);
        let change = found.map_or(Change::Deleted, |object| Change::Applied(Box::new(object)));
        let _ = changes.send(change).await;
        Ok(version)
    }

    /// Watches until the server ends it. `None` says that the object must be read again.
    async fn watch<K: Followed>(
        &self,
        api: &Api<K>,
        version: &str,
        changes: &mpsc::Sender<Change<K>>,
    ) -> Result<Option<String>, kube::Error> {
        let parameters =
            WatchParams::default().fields(&format!("metadata.name={}", self.name)).timeout(WATCH_SECONDS);
        let mut events = std::pin::pin!(api.watch(&parameters, version).await?);
        let mut newest = version.to_owned();
        while let Some(event) = events.try_next().await? {
            let change = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    if let Some(version) = object.resource_version() {
                        newest = version;
                    }
                    Change::Applied(Box::new(object))
                }
                WatchEvent::Deleted(_) => Change::Deleted,
                WatchEvent::Bookmark(bookmark) => {
                    newest = bookmark.metadata.resource_version;
                    continue;
                }
                // 410 Gone: the version is too old by now.
                WatchEvent::Error(status) if status.code == 410 => return Ok(None),
                WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
            };
            let deleted = matches!(change, Change::Deleted);
            if changes.send(change).await.is_err() || deleted {
                return Ok(None);
            }
        }
        Ok(Some(newest))
    }

    async fn failure<K: Followed>(&self, verb: &str, error: &kube::Error) -> Failure {
        let failure = (self.judge)(self.call(&self.doing::<K>(verb)), error);
        self.renew_after(&failure).await;
        failure
    }

    fn doing<K: Followed>(&self, verb: &str) -> String {
        format!("{verb} {} {}/{}", K::kind(&()), self.namespace, self.name)
    }

    fn call<'a>(&'a self, doing: &'a str) -> Call<'a> {
        Call { doing, server: &self.cluster.target().server, namespace: &self.namespace }
    }

    async fn renew_after(&self, failure: &Failure) {
        if failure.code == ExitCode::Unauthenticated {
            self.cluster.forget_credential().await;
        }
    }
}
