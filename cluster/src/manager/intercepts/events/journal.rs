//! Events on their way to the API server: a queue, and a task that works it off. Nobody waits for it.
//!
//! kube's own recorder is not used. It takes two events that differ in what they say for the same, and goes on saying what the first
//! said; and it writes every repetition.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::Status;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tpd_api::MANAGER;
use tpd_api::intercept::{Intercept, WorkloadKind};
use tracing::{debug, warn};

use super::series::{Series, Write};
use super::{About, Entry, Kind};

/// Events that wait to be written: sixteen steps at the same time, each told on a pod and its workload, eight times over. What comes
/// while it is full is dropped.
const QUEUE: usize = 256;

/// For one event.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long nothing is said of events that are lost after it was said once.
const QUIET: Duration = Duration::from_mins(10);

/// Longest note that the API server takes, bytes.
const LONGEST_NOTE: usize = 1024;

/// What the leader tells.
#[derive(Debug)]
pub struct Journal {
    queue: mpsc::Sender<(Entry, Timestamp)>,
    complained: Option<Instant>,
}

impl Journal {
    /// Starts the task that writes. `instance` is the name of this manager's pod.
    #[must_use]
    pub fn start(client: Client, instance: String) -> Self {
        let (queue, entries) = mpsc::channel(QUEUE);
        tokio::spawn(Writer { client, instance, series: Series::default(), complained: None }.run(entries));
        Self { queue, complained: None }
    }

    /// Has events written, as well as that can be done.
    pub fn tell(&mut self, entries: impl IntoIterator<Item = Entry>) {
        let now = Timestamp::now();
        for entry in entries {
            if self.queue.try_send((entry, now)).is_err() && may_complain(&mut self.complained) {
                warn!("events come faster than they are written: some are dropped");
            }
        }
    }
}

struct Writer {
    client: Client,
    instance: String,
    series: Series,
    complained: Option<Instant>,
}

impl Writer {
    async fn run(mut self, mut entries: mpsc::Receiver<(Entry, Timestamp)>) {
        while let Some((entry, at)) = entries.recv().await {
            let About { namespace, name, .. } = entry.about.clone();
            let reason = entry.reason;
            let error = match timeout(PATIENCE, self.put(entry, at)).await {
                Ok(Ok(())) => continue,
                Ok(Err(kube::Error::Api(status))) if is_ending(&status) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the API server does not answer".to_owned(),
            };
            if may_complain(&mut self.complained) {
                warn!(namespace, name, reason, error, "events cannot be written");
            } else {
                debug!(namespace, name, reason, error, "an event could not be written");
            }
        }
    }

    async fn put(&mut self, mut entry: Entry, at: Timestamp) -> kube::Result<()> {
        if let Kind::Workload(kind) = entry.about.kind {
            entry.about.uid = self.uid(kind, &entry.about).await?;
            if entry.about.uid.is_none() {
                return Ok(());
            }
        }
        match self.series.take(entry, at) {
            Some(write) => self.write(&write).await,
            None => Ok(()),
        }
    }

    /// `kubectl describe` shows the events with the object's UID. `None` for a workload that is gone, or about to be.
    async fn uid(&self, kind: WorkloadKind, about: &About) -> kube::Result<Option<String>> {
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &about.namespace, &resource(kind));
        let found = api.get_metadata_opt(&about.name).await?.map(|found| found.metadata);
        Ok(found.filter(|found| found.deletion_timestamp.is_none()).and_then(|found| found.uid))
    }

    async fn write(&self, write: &Write) -> kube::Result<()> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &write.entry.about.namespace);
        let field_manager = Some(MANAGER.to_owned());
        if write.count > 1 {
            let series = EventSeries { count: write.count, last_observed_time: MicroTime(write.at) };
            let patch = Patch::Merge(json!({ "series": series }));
            let parameters = PatchParams { field_manager: field_manager.clone(), ..PatchParams::default() };
            match api.patch(&write.name, &parameters, &patch).await {
                // Somebody has deleted it, or it could not be written the first time.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                result => return result.map(drop),
            }
        }
        let parameters = PostParams { field_manager, ..PostParams::default() };
        api.create(&parameters, &event(write, &self.instance)).await.map(drop)
    }
}

/// Whether to say that events are lost.
fn may_complain(complained: &mut Option<Instant>) -> bool {
    let now = Instant::now();
    let may = complained.is_none_or(|last| now - last >= QUIET);
    if may {
        *complained = Some(now);
    }
    may
}

/// Whether the API server takes nothing new because the namespace is being deleted, or is gone.
fn is_ending(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 404 || causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

fn resource(kind: WorkloadKind) -> ApiResource {
    match kind {
        WorkloadKind::Deployment => ApiResource::erase::<Deployment>(&()),
        WorkloadKind::StatefulSet => ApiResource::erase::<StatefulSet>(&()),
        WorkloadKind::DaemonSet => ApiResource::erase::<DaemonSet>(&()),
        WorkloadKind::ReplicaSet => ApiResource::erase::<ReplicaSet>(&()),
        WorkloadKind::Pod => ApiResource::erase::<Pod>(&()),
    }
}

fn reference(about: &About) -> ObjectReference {
    let resource = match about.kind {
        Kind::Intercept => ApiResource::erase::<Intercept>(&()),
        Kind::Pod => resource(WorkloadKind::Pod),
        Kind::Workload(kind) => resource(kind),
    };
    ObjectReference {
        api_version: Some(resource.api_version),
        kind: Some(resource.kind),
        namespace: Some(about.namespace.clone()),
        name: Some(about.name.clone()),
        uid: about.uid.clone(),
        ..ObjectReference::default()
    }
}

fn event(write: &Write, instance: &str) -> Event {
    let entry = &write.entry;
    // The API server wants to be told what was done, as well as why.
    let action = if entry.about.kind == Kind::Intercept { "Intercept" } else { "Replace" };
    Event {
        metadata: ObjectMeta {
            namespace: Some(entry.about.namespace.clone()),
            name: Some(write.name.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(write.at)),
        reporting_controller: Some(MANAGER.to_owned()),
        reporting_instance: Some(instance.to_owned()),
        action: Some(action.to_owned()),
        reason: Some(entry.reason.to_owned()),
        type_: Some(if entry.is_warning { "Warning" } else { "Normal" }.to_owned()),
        note: Some(cut(&entry.note).to_owned()),
        related: entry.related.as_ref().map(reference),
        regarding: Some(reference(&entry.about)),
        ..Event::default()
    }
}

fn cut(note: &str) -> &str {
    &note[..note.floor_char_boundary(LONGEST_NOTE)]
}

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use serde_json::{from_value, json, to_value};
    use tokio::time::Instant;
    use tpd_api::intercept::WorkloadKind;

    use super::super::super::samples::at;
    use super::super::series::Write;
    use super::super::{About, Entry, Kind};
    use super::{LONGEST_NOTE, QUIET, cut, event, is_ending, may_complain};

    #[test]
    fn an_event_is_as_the_api_server_wants_it() {
        let named = |kind, name: &str| About {
            kind,
            namespace: "shop".into(),
            name: name.into(),
            uid: Some("u".into()),
        };
        let about = named(Kind::Workload(WorkloadKind::Deployment), "web");
        let entry = Entry {
            related: Some(named(Kind::Intercept, "a")),
            about,
            is_warning: true,
            reason: "PodKept",
            note: "no".into(),
        };
        let write = Write { entry, name: "web.1".into(), count: 1, at: at(1) };
        let event = to_value(event(&write, "tpd-manager-0")).unwrap();
        let mut expected = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": { "namespace": "shop", "name": "web.1" }, "eventTime": "1970-01-01T00:00:01.000000Z",
            "reportingController": "tpd-manager", "reportingInstance": "tpd-manager-0",
            "action": "Replace", "reason": "PodKept", "type": "Warning", "note": "no",
        });
        for (field, api_version, kind, name) in
            [("regarding", "apps/v1", "Deployment", "web"), ("related", "tpd.dev/v1alpha1", "Intercept", "a")]
        {
            expected[field] = json!({ "apiVersion": api_version, "kind": kind, "namespace": "shop", "name": name, "uid": "u" });
        }
        assert_eq!(event, expected);
    }

    #[test]
    fn a_namespace_that_is_being_deleted_is_no_failure() {
        let refused = |cause: &str| -> Status {
            from_value(json!({
                "code": 403, "reason": "Forbidden", "message": "no",
                "details": { "causes": [{ "reason": cause, "message": "no" }] },
            }))
            .unwrap()
        };
        assert!(is_ending(&refused("NamespaceTerminating")));
        assert!(!is_ending(&refused("else")));
        assert!(is_ending(&from_value(json!({ "code": 404 })).unwrap()));
        assert!(!is_ending(&from_value(json!({ "code": 403 })).unwrap()));
    }

    #[test]
    fn that_events_are_lost_is_said_once() {
        let mut complained = None;
        assert!(may_complain(&mut complained));
        assert!(!may_complain(&mut complained));
        complained = Instant::now().checked_sub(QUIET);
        assert!(may_complain(&mut complained));
    }

    #[test]
    fn a_note_is_no_longer_than_may_be() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"ä".repeat(999)).len(), LONGEST_NOTE);
        assert_eq!(cut(&format!("a{}", "ä".repeat(999))).len(), LONGEST_NOTE - 1);
    }
}
