//! The control loop: what the cluster says becomes policy, peers and statuses.
//!
//! Every replica follows everything, and sets its own policy and peers. The leader writes, too: statuses
//! wherever they differ from what they should be, and deletions of the dead.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tpd_api::session::{ClientSession, ClientSessionStatus, Networks};
use tpd_netstack::key::PublicKey;
use tracing::{debug, info, warn};

use super::cluster::{Cluster, Kind, Session};
use super::collect::{Collector, Report, Subject};
use super::config::Config;
use super::intercepts::world::Known;
use super::liveness;
use super::metrics::{Metrics, Outcome};
use super::overlay::Overlay;
use super::policy::Policy;
use super::pool::Pool;
use super::registry::Rules;
use super::resolv::Resolver;
use super::status::Facts;
use super::watch as watches;

/// How often what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// How often the dead are looked for. A session's time-out is minutes.
const COLLECT_EVERY: u64 = 15;

/// How long statuses wait for the slower lists, whose networks they would otherwise lose and find again.
const SETTLE: Duration = Duration::from_secs(3);

/// For one write to the API server.
const PATIENCE: Duration = Duration::from_secs(5);

/// Statuses written at the same time. A change of the cluster concerns every session, and the API server is shared.
const WRITES: usize = 32;

/// What the controller works with.
#[derive(Debug)]
pub struct Controller {
    config: Config,
    sessions: Api<ClientSession>,
    overlay: Arc<Overlay>,
    metrics: Arc<Metrics>,
    rules: Rules,
    facts: Facts,
    resolver: Option<IpAddr>,
    reported: Networks,
    cluster: Cluster,
    collector: Collector,
    peers: BTreeMap<PublicKey, Vec<IpAddr>>,
    writing: BTreeSet<String>,
    tasks: JoinSet<Done>,
    /// Whether something must be tried again though nothing has changed.
    unfinished: bool,
    started: Instant,
}

/// What a task of the controller came to. The loop itself waits for nobody.
#[derive(Debug)]
enum Done {
    /// A status was written, or was not.
    Written { name: String, result: Result<Box<ClientSession>, String> },
    /// Every replica was asked whom it has heard.
    Asked(HashMap<String, Option<Report>>),
    /// A dead session was deleted, or was not.
    Deleted { name: String, result: Result<(), String> },
}

impl Controller {
    /// A controller that knows nothing yet.
    #[must_use]
    pub fn new(
        config: Config,
        client: &Client,
        overlay: Arc<Overlay>,
        metrics: Arc<Metrics>,
        manager: PublicKey,
        resolver: Resolver,
    ) -> Self {
        let rules = Rules {
            pool: Pool::new(config.pool_v4, config.pool_v6),
            manager,
            sessions_per_owner: config.sessions_per_owner,
        };
        let facts = Facts {
            manager,
            gateway: config.gateway(),
            networks: Networks::default(),
            zone: config.zone.clone().or(resolver.zone).unwrap_or_default(),
        };
        let configured =
            Networks { pods: config.pod_networks.clone(), services: config.service_networks.clone() };
        Self {
            sessions: Api::namespaced(client.clone(), &config.namespace),
            cluster: Cluster::new(configured, config.watch_pods),
            collector: Collector::new(Duration::from_secs(config.session_timeout.into())),
            resolver: resolver.server,
            reported: Networks::default(),
            overlay,
            metrics,
            rules,
            facts,
            config,
            peers: BTreeMap::new(),
            writing: BTreeSet::new(),
            tasks: JoinSet::new(),
            unfinished: false,
            started: Instant::now(),
        }
    }

    /// Runs for ever. `installation` tells which one agents are to belong to; `alive` is told which of the manager's pods exist,
    /// `awaited` what is still missing for being ready, and `known` what intercepts need.
    pub async fn run(
        mut self,
        client: Client,
        mut leads: watch::Receiver<bool>,
        mut installation: watch::Receiver<Option<String>>,
        alive: watch::Sender<Option<BTreeSet<String>>>,
        awaited: watch::Sender<Vec<Kind>>,
        known: watch::Sender<Known>,
    ) {
        let mut changes = watches::all(&client, &self.config);
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick = 0;
        loop {
            let mut changed = false;
            tokio::select! {
                Some(change) = changes.next() => {
                    changed |= self.cluster.apply(change);
                    // All that has arrived meanwhile is one batch.
                    while let Some(Some(change)) = changes.next().now_or_never() {
                        changed |= self.cluster.apply(change);
                    }
                }
                Some(Ok(done)) = self.tasks.join_next() => changed |= self.take(done, *leads.borrow()),
                Ok(()) = leads.changed() => changed = true,
                Ok(()) = installation.changed() => changed = true,
                _ = ticks.tick() => {
                    changed |= std::mem::take(&mut self.unfinished);
                    tick += 1;
                    if tick % COLLECT_EVERY == 0 && *leads.borrow() {
                        self.ask();
                    }
                }
            }
            if changed {
                alive.send_if_modified(|old| replace(old, self.cluster.alive()));
                awaited.send_if_modified(|old| replace(old, self.cluster.awaited()));
                let installation = installation.borrow().clone();
                known.send_if_modified(|old| replace(old, self.cluster.known(installation)));
                self.follow();
                if *leads.borrow() {
                    self.publish();
                }
            }
        }
    }

    /// Brings the overlay in line: what may be dialled, and who may speak.
    fn follow(&mut self) {
        self.facts.networks = self.cluster.networks();
        if self.facts.networks != self.reported && self.cluster.awaited().is_empty() {
            self.report_networks();
        }
        let mut refused = self.cluster.node_addresses();
        refused.extend(&self.config.pod_ips);
        refused.extend(self.cluster.replicas().values().flat_map(|replica| &replica.addresses));
        self.overlay.set_policy(Policy {
            gateway: self.facts.gateway,
            pools: [self.config.pool_v4.into(), self.config.pool_v6.into()],
            resolver: self.resolver,
            published: self.facts.networks.all().collect(),
            refused,
        });

        let peers = self.cluster.peers(self.rules.pool);
        for key in self.peers.keys().filter(|key| !peers.contains_key(key)) {
            self.overlay.dismiss(*key);
        }
        for (key, addresses) in peers.iter().filter(|(key, addresses)| self.peers.get(key) != Some(addresses))
        {
            self.overlay.admit(*key, addresses.clone());
        }
        self.peers = peers;
        self.metrics.sessions(self.cluster.sessions().values().map(|session| session.status.as_ref()));
    }

    fn report_networks(&mut self) {
        let networks = &self.facts.networks;
        let list = |networks: &[ipnet::IpNet]| {
            networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        info!(pods = list(&networks.pods), services = list(&networks.services), "networks");
        let pools = [self.config.pool_v4.into(), self.config.pool_v6.into()];
        for network in networks.all() {
            if pools.iter().any(|pool: &ipnet::IpNet| pool.contains(&network) || network.contains(pool)) {
                warn!(%network, "overlaps with the overlay's addresses; install with other pools");
            }
        }
        self.reported = networks.clone();
    }

    /// Writes every status that is not what it should be.
    fn publish(&mut self) {
        let awaited = self.cluster.awaited();
        let patient = self.started.elapsed() < SETTLE && !awaited.is_empty();
        if patient || awaited.contains(&Kind::Sessions) {
            self.unfinished = true;
            return;
        }
        let sessions = self.cluster.sessions();
        let verdicts = self.rules.settle(sessions.values().map(|session| &session.request));
        let endpoints = self.cluster.endpoints();
        let now = Timestamp::now();
        for (name, session) in sessions {
            if self.writing.len() >= WRITES {
                break;
            }
            if self.writing.contains(name) {
                continue;
            }
            let current = session.status.as_ref();
            let ways = super::endpoints::ordered(&session.request.uid, &endpoints);
            let status = self.facts.status(&verdicts[name], ways, session.generation, current, now);
            if current != Some(&status) {
                self.writing.insert(name.clone());
                self.tasks.spawn(write(self.sessions.clone(), name.clone(), patch(session, &status)));
            }
        }
    }

    /// Takes in what a task came to. What failed is tried again at the next tick, or when a watch brings news.
    fn take(&mut self, done: Done, leads: bool) -> bool {
        match done {
            Done::Written { name, result: Ok(object) } => {
                self.metrics.wrote(Outcome::Ok);
                self.writing.remove(&name);
                self.cluster.written(name, watches::session(*object));
                true
            }
            Done::Written { name, result: Err(error) } => {
                self.metrics.wrote(Outcome::Failed);
                self.writing.remove(&name);
                self.unfinished = true;
                debug!(session = name, error, "status not written");
                false
            }
            Done::Asked(reports) => {
                if leads {
                    self.collect(&reports);
                }
                false
            }
            Done::Deleted { name, result } => {
                match result {
                    Ok(()) => {
                        self.metrics.collected();
                        info!(session = name, "deleted: no handshake for too long");
                    }
                    Err(error) => warn!(session = name, error, "a dead session could not be deleted"),
                }
                false
            }
        }
    }

    /// Asks every replica whom it has heard.
    fn ask(&mut self) {
        let (replicas, own) = (self.cluster.replicas().clone(), self.config.pod_uid.clone());
        let overlay = Arc::clone(&self.overlay);
        self.tasks.spawn(async move { Done::Asked(liveness::ask(&replicas, &own, &overlay).await) });
    }

    /// Deletes the sessions that no replica has heard of for too long.
    fn collect(&mut self, reports: &HashMap<String, Option<Report>>) {
        let sessions = self.cluster.sessions();
        let subjects: Vec<_> = sessions
            .iter()
            .map(|(name, session)| Subject { name, uid: &session.request.uid, keys: &session.request.keys })
            .collect();
        for name in self.collector.dead(Instant::now(), reports, &subjects).into_iter().take(WRITES) {
            self.tasks.spawn(delete(self.sessions.clone(), name.to_owned(), &sessions[name]));
        }
    }
}

fn replace<T: PartialEq>(old: &mut T, new: T) -> bool {
    let changed = *old != new;
    *old = new;
    changed
}

/// A merge patch against the version that was seen: whoever wrote in between, another leader included, wins, and is
/// answered next. What a status leaves out must be named, or it would stay.
fn patch(session: &Session, status: &ClientSessionStatus) -> Value {
    let mut status = serde_json::to_value(status).expect("a status is plain data");
    for optional in ["address", "gateway"] {
        if status.get(optional).is_none() {
            status[optional] = Value::Null;
        }
    }
    json!({
        "metadata": { "uid": session.request.uid, "resourceVersion": session.resource_version },
        "status": status,
    })
}

async fn write(api: Api<ClientSession>, name: String, patch: Value) -> Done {
    let parameters =
        PatchParams { field_manager: Some(tpd_api::MANAGER.to_owned()), ..PatchParams::default() };
    let patch = Patch::Merge(&patch);
    let result = in_time(api.patch_status(&name, &parameters, &patch)).await.map(Box::new);
    Done::Written { name, result }
}

/// Deletes a session as it was seen: one that has changed since is alive.
fn delete(api: Api<ClientSession>, name: String, session: &Session) -> impl Future<Output = Done> + use<> {
    let preconditions = Preconditions {
        uid: Some(session.request.uid.clone()),
        resource_version: Some(session.resource_version.clone()),
    };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    async move {
        let result = in_time(api.delete(&name, &parameters)).await.map(|_| ());
        Done::Deleted { name, result }
    }
}

async fn in_time<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout(PATIENCE, request).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the API server does not answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use serde_json::Value;
    use tpd_api::session::ClientSessionStatus;

    use super::{Session, patch};
    use crate::manager::registry::Request;

    #[test]
    fn a_patch_clears_what_a_status_leaves_out() {
        let request = Request {
            name: "s".into(),
            uid: "u".into(),
            owner: "alice".into(),
            host: String::new(),
            created: Timestamp::UNIX_EPOCH,
            keys: vec![],
            address: None,
        };
        let session = Session { request, resource_version: "7".into(), generation: None, status: None };
        let patch = patch(&session, &ClientSessionStatus::default());
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        assert_eq!(patch["status"].get("address"), Some(&Value::Null));
    }
}
