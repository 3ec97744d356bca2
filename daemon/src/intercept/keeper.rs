//! The keeper of this laptop's intercepts.

mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tpd_api::exit::ExitCode;
use tpd_api::install::FIELD_MANAGER;
use tpd_api::intercept::{Intercept, Protocol};
use tpd_api::local::{self, InterceptRequest};
use tpd_dns::Forward;

use self::record::Record;
use super::resource::{self, Owner};
use super::state::{self, State};
use super::{check, refusals, targets, webhook};
use crate::failure::Failure;
use crate::kube::cluster::Cluster;
use crate::kube::errors::{self, Call};
use crate::kube::follow::{Change, Follow};
use crate::kube::session::{CALL_TIMEOUT, host};

/// Most intercepts of one laptop. Each costs a watch at the API server, and an agent a look at every request.
const MAX_INTERCEPTS: usize = 64;

/// Time to end every intercept when the laptop leaves. The agents notice by themselves if the cluster can't be told, so one that
/// is gone must not hold up a person who wants the laptop back.
const FAREWELL: Duration = Duration::from_secs(2);

/// After that, time for the news to reach the agents and for what is in flight to be answered: agents hear it within a round
/// trip, and most requests take less than this.
const DRAIN: Duration = Duration::from_millis(300);

/// Changes of one intercept that may wait; the follower pauses when they do.
const CHANGES: usize = 8;

/// Namespace and name.
type Key = (String, String);

/// Where intercepts are made, and for whom.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) cluster: Arc<Cluster>,
    /// User as the API server knows it.
    pub(crate) owner: String,
    /// Namespace of the manager.
    pub(crate) namespace: String,
    /// Name of the ClientSession there.
    pub(crate) session: String,
}

impl Place {
    fn owner(&self) -> Owner<'_> {
        Owner { user: &self.owner, session: &self.session }
    }

    pub(super) fn server(&self) -> &str {
        &self.cluster.target().server
    }
}

/// What the rest of the daemon does for intercepts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    /// What is behind each overlay port.
    pub(crate) targets: BTreeMap<(Protocol, u16), SocketAddr>,
    /// Domains that are resolved by pods.
    pub(crate) forwards: Vec<Forward>,
}

/// Every intercept of this laptop.
#[derive(Debug)]
pub(crate) struct Keeper {
    path: PathBuf,
    inner: Mutex<Inner>,
    effects: watch::Sender<Effects>,
    /// Held while the cluster is asked to change something: one change at a time.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    place: Option<Place>,
    records: BTreeMap<Key, Record>,
    checker: Option<AbortOnDropHandle<()>>,
}

impl Keeper {
    /// A keeper of nothing, which keeps its state at `path`.
    pub(crate) fn new(path: PathBuf) -> Arc<Self> {
        let (effects, _) = watch::channel(Effects::default());
        Arc::new(Self { path, inner: Mutex::default(), effects, changing: tokio::sync::Mutex::default() })
    }

    /// What the rest of the daemon is to do, as it changes.
    pub(crate) fn effects(&self) -> watch::Receiver<Effects> {
        self.effects.subscribe()
    }

    /// The laptop has a session. With the first one, what a killed daemon left in the same session is resumed.
    pub(crate) fn connect(self: &Arc<Self>, place: Place) {
        let first = self.lock().place.replace(place.clone()).is_none();
        if !first {
            return;
        }
        let session = format!("{}/{}", place.namespace, place.session);
        let left = state::load(&self.path)
            .filter(|state| state.server == place.server() && state.session == session);
        for kept in left.into_iter().flat_map(|state| state.intercepts).take(MAX_INTERCEPTS) {
            tracing::info!(name = kept.name, "intercept resumed");
            let key = (kept.request.namespace.clone(), kept.name.clone());
            let mut record = Record::new(kept.request, kept.overlay_ports);
            record.follower = Some(self.follow(&place, &key, None));
            self.lock().records.insert(key, record);
        }
        let keeper = Arc::clone(self);
        let checker = tokio::spawn(async move { keeper.keep_checking().await });
        self.lock().checker = Some(AbortOnDropHandle::new(checker));
        self.changed();
    }

    /// Every intercept, as it is now.
    pub(crate) fn list(&self) -> Vec<local::Intercept> {
        self.lock().records.values().map(Record::describe).collect()
    }

    /// One intercept, as it is now.
    pub(crate) fn get(&self, namespace: &str, name: &str) -> Result<local::Intercept, Failure> {
        let key = (namespace.to_owned(), name.to_owned());
        self.lock().records.get(&key).map(Record::describe).ok_or_else(|| unknown(namespace, name))
    }

    /// Where the laptop is connected.
    pub(super) fn place(&self) -> Result<Place, Failure> {
        self.lock().place.clone().ok_or_else(|| {
            Failure::new(ExitCode::NotConnected, "tpd is not connected yet")
                .help("tpd status tells how far it is")
        })
    }

    /// What a request would become in the cluster. Nothing is in force by that.
    pub(super) fn draft(&self, request: &InterceptRequest, place: &Place) -> Intercept {
        let name = resource::name(request, place.owner(), &host());
        let key = (request.namespace.clone(), name);
        let overlay_ports = self.lock().overlay_ports(&key, request);
        resource::object(request, &key.1, place.owner(), &overlay_ports)
    }

    /// Makes the intercept, or changes the one that is there. It is in force here before the cluster hears of it, so that the
    /// first connection finds its target.
    pub(crate) async fn create(
        self: &Arc<Self>,
        mut request: InterceptRequest,
    ) -> Result<local::Intercept, Failure> {
        resource::check(&request)?;
        let _changing = self.changing.lock().await;
        let place = self.place()?;
        let name = resource::name(&request, place.owner(), &host());
        request.name = Some(name.clone());
        let key = (request.namespace.clone(), name.clone());
        let (overlay_ports, before) = self.admit(&key, &request)?;
        let object = resource::object(&request, &name, place.owner(), &overlay_ports);

        let silent = check::silent(&request.ports).await;
        match self.apply(&place, &object).await {
            Ok(applied) => {
                let follower = self.follow(&place, &key, applied.metadata.resource_version.clone());
                if let Some(record) = self.lock().records.get_mut(&key) {
                    record.begin(&applied, silent, follower);
                }
                self.changed();
                self.get(&key.0, &key.1)
            }
            // It may have arrived all the same; what is in force here harms nobody meanwhile.
            Err(failure) => {
                let mut inner = self.lock();
                match before {
                    Some(before) => inner.records.insert(key, before),
                    None => inner.records.remove(&key),
                };
                drop(inner);
                self.changed();
                Err(failure)
            }
        }
    }

    /// Puts a request in force here. Answers its overlay ports, and what was there before.
    fn admit(&self, key: &Key, request: &InterceptRequest) -> Result<(Vec<u16>, Option<Record>), Failure> {
        let mut inner = self.lock();
        if inner.records.len() >= MAX_INTERCEPTS && !inner.records.contains_key(key) {
            return Err(Failure::new(
                ExitCode::Failure,
                format!("this machine has {MAX_INTERCEPTS} intercepts already, and no more are kept"),
            )
            .help("end some with: tpd leave NAME"));
        }
        let overlay_ports = inner.overlay_ports(key, request);
        let record = Record::new(request.clone(), overlay_ports.clone());
        let before = inner.records.insert(key.clone(), record);
        drop(inner);
        self.changed();
        Ok((overlay_ports, before))
    }

    async fn apply(&self, place: &Place, object: &Intercept) -> Result<Intercept, Failure> {
        let (namespace, name) = (object.metadata.namespace.as_deref(), object.metadata.name.as_deref());
        let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
        let doing = creating(namespace, name);
        let call = Call { doing: &doing, server: place.server(), namespace };
        let api: Api<Intercept> = Api::namespaced(place.cluster.client().await?, namespace);
        let (parameters, patch) = (patching(), Patch::Apply(object));
        webhook::judged(call, || api.patch(name, &parameters, &patch)).await
    }

    /// Ends an intercept. That it is gone from the cluster already is fine.
    pub(crate) async fn remove(&self, namespace: &str, name: &str) -> Result<(), Failure> {
        let _changing = self.changing.lock().await;
        let key = (namespace.to_owned(), name.to_owned());
        let place = self.place()?;
        if !self.lock().records.contains_key(&key) {
            return Err(unknown(namespace, name));
        }
        delete(&place, &key).await?;
        self.lock().records.remove(&key);
        self.changed();
        Ok(())
    }

    /// Ends every intercept, within [`FAREWELL`]. Answers what could not be ended.
    pub(crate) async fn leave(&self) -> Vec<String> {
        let Ok(place) = self.place() else { return Vec::new() };
        let place = &place;
        let keys: Vec<Key> = {
            let inner = self.lock();
            inner.records.iter().filter(|(_, record)| !record.is_over).map(|(key, _)| key.clone()).collect()
        };
        let ended = join_all(keys.iter().map(|key| async move {
            match timeout(FAREWELL, delete(place, key)).await {
                Ok(ended) => ended.err().map(|failure| failure.to_string()),
                Err(_) => Some(format!("no answer within {} s", FAREWELL.as_secs())),
            }
        }))
        .await;
        if ended.iter().any(Option::is_none) {
            sleep(DRAIN).await;
        }
        self.lock().records.clear();
        self.changed();
        let left = keys.iter().zip(ended).filter_map(|((namespace, name), why)| {
            let why = why?;
            Some(format!("Intercept {namespace}/{name} is still in the cluster, where the app serves; delete it with: kubectl -n {namespace} delete intercept {name} ({why})"))
        });
        left.collect()
    }

    /// Follows an intercept until it is gone.
    fn follow(self: &Arc<Self>, place: &Place, key: &Key, version: Option<String>) -> AbortOnDropHandle<()> {
        let (sender, mut changes) = mpsc::channel(CHANGES);
        let (namespace, name) = key.clone();
        let follow =
            Follow { cluster: Arc::clone(&place.cluster), namespace, name, judge: refusals::failure };
        let (keeper, key) = (Arc::clone(self), key.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let heard = async {
                while let Some(change) = changes.recv().await {
                    let over = matches!(change, Change::Deleted);
                    keeper.heard(&key, change);
                    if over {
                        break;
                    }
                }
                // The follower ends when nobody listens.
                drop(changes);
            };
            tokio::join!(follow.run(version, sender), heard);
        }))
    }

    fn heard(&self, key: &Key, change: Change<Intercept>) {
        if let Some(record) = self.lock().records.get_mut(key) {
            record.heard(change);
        }
        self.changed();
    }

    /// Looks again and again whether anything listens at the local ports.
    async fn keep_checking(&self) {
        loop {
            sleep(check::INTERVAL).await;
            let ports: Vec<_> = {
                let inner = self.lock();
                let present = inner.records.values().filter(|record| !record.is_over);
                present.flat_map(|record| record.request.ports.clone()).collect()
            };
            let silent = check::silent(&ports).await;
            self.lock().records.values_mut().for_each(|record| record.checked(&silent));
        }
    }

    /// Something may have changed: everyone concerned is told, and what must outlive the process is kept.
    fn changed(&self) {
        let inner = self.lock();
        let present = || inner.records.values().filter(|record| !record.is_over);
        let effects = Effects {
            targets: present().flat_map(Record::targets).collect(),
            forwards: present().flat_map(Record::forwards).collect(),
        };
        self.effects.send_if_modified(|known| {
            let news = *known != effects;
            *known = effects;
            news
        });
        let Some(place) = &inner.place else { return };
        let state = State {
            server: place.server().into(),
            session: format!("{}/{}", place.namespace, place.session),
            intercepts: present().map(Record::keep).collect(),
        };
        if let Err(error) = state::save(&self.path, &state) {
            tracing::warn!(%error, "intercepts would not outlive a crash");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // What it guards is whole between any two statements, so a panic elsewhere leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The overlay ports that a request gets, in order.
    fn overlay_ports(&self, key: &Key, request: &InterceptRequest) -> Vec<u16> {
        let others = self.records.iter().filter(|(other, _)| *other != key);
        let taken: BTreeSet<u16> =
            others.flat_map(|(_, record)| record.overlay_ports.iter().copied()).collect();
        let known = self.records.get(key).map(Record::mappings).unwrap_or_default();
        targets::assign(&request.ports, &known, &taken, targets::random)
    }
}

/// What is being done when an intercept is made or changed.
pub(super) fn creating(namespace: &str, name: &str) -> String {
    format!("create Intercept {namespace}/{name}")
}

/// How it is: what is there already is changed, whoever wrote to it.
pub(super) fn patching() -> PatchParams {
    PatchParams::apply(FIELD_MANAGER).force()
}

async fn delete(place: &Place, (namespace, name): &Key) -> Result<(), Failure> {
    let doing = format!("delete Intercept {namespace}/{name}");
    let call = Call { doing: &doing, server: place.server(), namespace };
    let api: Api<Intercept> = Api::namespaced(place.cluster.client().await?, namespace);
    let request = async {
        match api.delete(name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    };
    errors::judged(call, refusals::failure, CALL_TIMEOUT, request).await
}

pub(super) fn unknown(namespace: &str, name: &str) -> Failure {
    Failure::new(ExitCode::NotFound, format!("this machine has no intercept {namespace}/{name}"))
        .help("see those that there are with: tpd list")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::example;
    use crate::intercept::state::Kept;
    use crate::invoker::Invoker;
    use crate::kube::config::Target;

    /// A cluster that nobody answers for.
    fn place() -> Place {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let invoker = Invoker { uid: 0, gid: 0, environment: BTreeMap::new(), directory: "/".into() };
        Place {
            cluster: Arc::new(Cluster::new(Target::example("http://127.0.0.1:9"), &invoker)),
            owner: "ann".into(),
            namespace: "tpd-system".into(),
            session: "laptop".into(),
        }
    }

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("tpd-keeper-{name}-{}", std::process::id()))
    }

    fn left_behind(session: &str) -> State {
        let request = InterceptRequest { name: Some("web-x".into()), ..example("web", &["http"]) };
        let kept = Kept { name: "web-x".into(), request, overlay_ports: vec![20_001] };
        State { server: "http://127.0.0.1:9".into(), session: session.into(), intercepts: vec![kept] }
    }

    #[tokio::test]
    async fn what_a_killed_daemon_left_is_in_force_again() {
        let path = path("resume");
        state::save(&path, &left_behind("tpd-system/laptop")).unwrap();
        let keeper = Keeper::new(path.clone());
        let effects = keeper.effects();
        keeper.connect(place());
        let local: SocketAddr = "127.0.0.1:9090".parse().unwrap();
        assert_eq!(effects.borrow().targets, BTreeMap::from([((Protocol::Tcp, 20_001), local)]));
        assert_eq!(keeper.list()[0].request.name.as_deref(), Some("web-x"));
        assert!(keeper.get("shop", "web-x").is_ok());
        assert_eq!(keeper.get("shop", "other").unwrap_err().code, ExitCode::NotFound);

        // Nobody answers, but the laptop is left all the same, and nothing is resumed after that.
        let leftovers = keeper.leave().await;
        assert!(leftovers[0].contains("kubectl -n shop delete intercept web-x"), "{leftovers:?}");
        assert!(effects.borrow().targets.is_empty() && !path.exists());
    }

    #[tokio::test]
    async fn what_belongs_to_another_session_is_not() {
        let path = path("foreign");
        state::save(&path, &left_behind("tpd-system/desktop")).unwrap();
        let keeper = Keeper::new(path.clone());
        keeper.connect(place());
        assert!(keeper.list().is_empty() && !path.exists());
    }

    #[tokio::test]
    async fn an_intercept_that_the_cluster_does_not_take_leaves_no_target() {
        let path = path("refused");
        let keeper = Keeper::new(path.clone());
        assert_eq!(keeper.create(example("web", &["http"])).await.unwrap_err().code, ExitCode::NotConnected);
        keeper.connect(place());
        assert_eq!(keeper.create(example("web", &["http"])).await.unwrap_err().code, ExitCode::Unreachable);
        assert!(keeper.list().is_empty() && keeper.effects().borrow().targets.is_empty() && !path.exists());
    }

    #[tokio::test]
    async fn an_end_in_the_cluster_takes_the_target_away_and_is_told() {
        let path = path("revoked");
        state::save(&path, &left_behind("tpd-system/laptop")).unwrap();
        let keeper = Keeper::new(path.clone());
        keeper.connect(place());
        keeper.heard(&("shop".into(), "web-x".into()), Change::Deleted);
        assert!(keeper.effects().borrow().targets.is_empty() && !path.exists());
        let over = keeper.get("shop", "web-x").unwrap();
        assert!(over.over && over.problem.is_some());
    }
}
