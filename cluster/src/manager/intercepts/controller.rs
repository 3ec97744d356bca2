//! The control loop of intercepts: what the cluster and the agents say becomes configurations, hub routes and statuses.
//!
//! Every replica follows everything and tells its agents. The leader writes, too: statuses, replacements of pods without
//! agents, deletions of intercepts whose time is over, and what other people are told of all that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tpd_api::intercept::{Intercept as Object, InterceptStatus};
use tpd_netstack::key::PublicKey;
use tpd_netstack::server::Pair;
use tracing::{debug, info, warn};

use super::configure::Facts;
use super::departed::Departed;
use super::events::journal::Journal;
use super::events::{self, Cause, Entry, Roll};
use super::evict::{self, Outcome};
use super::expire::{End, Reaper};
use super::objects::{self, Intercept};
use super::question::{Question, Questions};
use super::replace::Step;
use super::sessions::{News, Sessions};
use super::status;
use super::track::{Survey, Tracker};
use super::watch as watches;
use super::world::Known;
use crate::manager::agents::session::{Event, Joined, Outgoing};
use crate::manager::metrics::Metrics;
use crate::manager::overlay::Overlay;

/// How often time itself is looked at: for what expires, and for what failed.
const TICK: Duration = Duration::from_secs(1);

/// Least time between two surveys. One of a thousand pods and a hundred agents takes some milliseconds.
const PAUSE: Duration = Duration::from_millis(50);

/// How long mere counts may wait.
const COUNTS_LATER: Duration = Duration::from_millis(500);

/// How often a status is written because of mere counts.
const COUNTS_EVERY: Duration = Duration::from_secs(2);

/// Pause after a status that could not be written: where none ever can be, in a cluster where pods come and go, every survey
/// would try.
const REFUSED_PAUSE: Duration = Duration::from_millis(500);

/// How long after the first lists a status may not say that an intercept has fallen back: agents are coming back meanwhile.
const SETTLE: Duration = Duration::from_secs(3);

/// For one write to the API server.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes at the same time: the API server is shared.
const WRITES: usize = 16;

/// Pause before the next step with the same object: for the watch to tell of the last one, and for what hinders it to change.
const STEP_PAUSE: Duration = Duration::from_secs(1);

/// The same after a failure.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);

/// Seconds before an agent that was turned away should come again.
const REFUSED: u64 = 60;

/// What the controller works with.
pub struct Controller {
    client: Client,
    overlay: Arc<Overlay>,
    metrics: Arc<Metrics>,
    key: PublicKey,
    tracker: Tracker,
    reaper: Reaper,
    lines: BTreeMap<String, watch::Sender<Outgoing>>,
    departed: Departed,
    heard: BTreeSet<PublicKey>,
    pairs: Vec<Pair>,
    writing: BTreeSet<String>,
    written: BTreeMap<String, Instant>,
    /// When a status could not be written.
    unwritten: BTreeMap<String, Instant>,
    /// UIDs of pods and intercepts that something is being done to, and until when nothing else is.
    busy: BTreeMap<String, Option<Instant>>,
    journal: Journal,
    roll: Roll,
    tasks: JoinSet<Done>,
    /// When the lists were complete.
    settled: Option<Instant>,
    surveyed: Instant,
    /// When the next survey is due, if something has changed.
    due: Option<Instant>,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("tracker", &self.tracker).finish_non_exhaustive()
    }
}

/// What a task of the controller came to. The loop itself waits for nobody.
#[derive(Debug)]
enum Done {
    /// A status was written, or was not; what is told of it if it was.
    Written { key: String, result: Result<Box<Object>, String>, news: Vec<Entry> },
    /// An intercept was deleted, or was not.
    Deleted { key: String, uid: String, end: End, result: Result<(), String> },
    /// A step was taken with a pod, or was not.
    Stepped { cause: Box<Cause>, result: anyhow::Result<Outcome> },
}

impl Controller {
    /// A controller that knows nothing yet.
    #[must_use]
    pub fn new(
        client: Client,
        overlay: Arc<Overlay>,
        metrics: Arc<Metrics>,
        facts: Facts,
        sessions: Sessions,
        journal: Journal,
    ) -> Self {
        let now = Instant::now();
        Self {
            client,
            overlay,
            metrics,
            key: facts.key,
            tracker: Tracker::new(facts, sessions),
            reaper: Reaper::new(now),
            lines: BTreeMap::new(),
            departed: Departed::default(),
            heard: BTreeSet::new(),
            pairs: Vec::new(),
            writing: BTreeSet::new(),
            written: BTreeMap::new(),
            unwritten: BTreeMap::new(),
            busy: BTreeMap::new(),
            journal,
            roll: Roll::default(),
            tasks: JoinSet::new(),
            settled: None,
            surveyed: now,
            due: None,
        }
    }

    /// Runs for ever.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut known: watch::Receiver<Known>,
        mut leads: watch::Receiver<bool>,
        mut questions: Questions,
    ) {
        self.tracker.world.births = questions.births.clone();
        let mut changes = watches::all(&self.client);
        let mut carried = self.overlay.carried();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.due;
            tokio::select! {
                Some(change) = changes.next() => {
                    let mut changed = self.tracker.world.apply(change);
                    // All that has arrived meanwhile is one batch.
                    while let Some(Some(change)) = changes.next().now_or_never() {
                        changed |= self.tracker.world.apply(change);
                    }
                    if changed {
                        self.want(Duration::ZERO);
                    }
                }
                Some(event) = events.recv() => self.agent(event),
                Ok(()) = known.changed() => {
                    self.tracker.known = known.borrow_and_update().clone();
                    self.hear();
                    self.want(Duration::ZERO);
                }
                Ok(()) = carried.changed() => {
                    self.heard = carried.borrow_and_update().clone();
                    self.hear();
                }
                Some(Question { asked, answer }) = questions.recv() => {
                    if let Some(outlook) = self.tracker.foresee(&asked, Timestamp::now()) {
                        // Whoever asked may have gone on without it.
                        let _ = answer.send(outlook);
                    }
                }
                Some(Ok(done)) = self.tasks.join_next() => self.take(done),
                Ok(()) = leads.changed() => self.want(Duration::ZERO),
                _ = ticks.tick() => {
                    self.dismiss_departed();
                    if self.tracker.minds_time() || !self.busy.is_empty() {
                        self.want(Duration::ZERO);
                    }
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.survey(*leads.borrow());
                }
            }
        }
    }

    /// Has a survey made within a time, but not too soon after the last.
    fn want(&mut self, within: Duration) {
        let at = (Instant::now() + within).max(self.surveyed + PAUSE);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    fn survey(&mut self, leads: bool) {
        self.due = None;
        self.surveyed = Instant::now();
        self.dismiss_departed();
        if !self.tracker.settled() {
            return;
        }
        self.settled.get_or_insert(self.surveyed);
        let survey = self.tracker.survey(Timestamp::now());
        self.tell(&survey);
        survey.again.into_iter().for_each(|pause| self.want(pause));
        self.metrics.agents(self.tracker.sessions.count());
        self.metrics.intercepts(survey.statuses.values().map(|status| status.state));
        if leads {
            self.journal.tell(self.roll.follow(self.tracker.world.intercepts().values()));
            self.step(survey.steps, &survey.statuses);
            self.publish(survey.statuses);
            self.reap();
        } else {
            self.roll.forget();
        }
    }

    /// Tells agents and hub what has changed. The hub goes first: what an agent sends at once must not be dropped.
    fn tell(&mut self, survey: &Survey) {
        if self.pairs != survey.pairs {
            self.overlay.set_pairs(survey.pairs.clone());
            self.pairs.clone_from(&survey.pairs);
        }
        for (uid, config) in &survey.configs {
            let carried = self.tracker.carried_for(config);
            if let Some(line) = self.lines.get(uid) {
                line.send_modify(|outgoing| {
                    outgoing.config = Some(Arc::clone(config));
                    outgoing.carried = carried;
                });
            }
        }
    }

    /// Takes in which keys are heard: every agent learns at once which laptops that makes.
    fn hear(&mut self) {
        let laptops = self.tracker.known.laptops.iter().flatten();
        let carried = laptops.filter(|(_, laptop)| laptop.keys.iter().any(|key| self.heard.contains(key)));
        let carried = carried.filter_map(|(_, laptop)| Some(laptop.address?.ipv6)).collect();
        if self.tracker.carried == carried {
            return;
        }
        self.tracker.carried = carried;
        for (uid, agent) in self.tracker.sessions.iter() {
            let (Some(config), Some(line)) = (&agent.config, self.lines.get(uid)) else { continue };
            let carried = self.tracker.carried_for(config);
            line.send_if_modified(|outgoing| {
                let changed = outgoing.carried != carried;
                outgoing.carried = carried;
                changed
            });
        }
        self.want(Duration::ZERO);
    }

    fn agent(&mut self, event: Event) {
        match event {
            Event::Joined(joined) => self.join(*joined),
            Event::Reported { uid, connection, report } => {
                match self.tracker.sessions.report(&uid, connection, report) {
                    News::Important => self.want(Duration::ZERO),
                    News::Counts => self.want(COUNTS_LATER),
                    News::Nothing => {}
                }
            }
            Event::Left { uid, connection } => {
                if let Some(agent) = self.tracker.sessions.leave(&uid, connection) {
                    debug!(
                        pod = agent.identity.pod,
                        namespace = agent.identity.namespace,
                        "an agent has left"
                    );
                    self.lines.remove(&uid);
                    // The survey ends its peer at once if its pod is gone.
                    self.departed.left(agent, Instant::now());
                    self.want(Duration::ZERO);
                }
            }
        }
    }

    fn join(&mut self, joined: Joined) {
        let Joined { identity, connection, hello, outgoing } = joined;
        let (pod, namespace) = (identity.pod.clone(), identity.namespace.clone());
        let uid = identity.uid.clone();
        let laptops: BTreeSet<_> = self.laptops_keys().copied().collect();
        let own = self.key;
        let departed = &self.departed;
        let taken = |key: &PublicKey| *key == own || laptops.contains(key) || departed.is_anothers(&uid, key);
        match self.tracker.sessions.join(identity, connection, &hello, taken) {
            Ok(admission) => {
                debug!(pod, namespace, address = %admission.address, version = hello.version, "an agent has joined");
                let departed = self.departed.returned(&uid, &admission.key);
                for old in admission.replaces.into_iter().chain(departed.filter(|old| !self.is_taken(old))) {
                    self.overlay.dismiss(old);
                }
                self.overlay.admit(admission.key, vec![admission.address.into()]);
                // The former connection of the pod ends with its line.
                self.lines.insert(uid, outgoing);
                self.want(Duration::ZERO);
            }
            Err(reason) => {
                warn!(pod, namespace, reason, "an agent was turned away");
                outgoing.send_modify(|outgoing| outgoing.refused = Some((reason.to_owned(), REFUSED)));
            }
        }
    }

    /// Ends the peers of agents that have not come back, or cannot.
    fn dismiss_departed(&mut self) {
        let tracker = &self.tracker;
        for key in self.departed.over(|identity| tracker.may_exist(identity), Instant::now()) {
            if !self.is_taken(&key) {
                self.overlay.dismiss(key);
            }
        }
    }

    fn laptops_keys(&self) -> impl Iterator<Item = &PublicKey> {
        self.tracker.known.laptops.iter().flatten().flat_map(|(_, laptop)| &laptop.keys)
    }

    /// Whether a laptop has come to have an agent's key: then the peer is the laptop's.
    fn is_taken(&self, key: &PublicKey) -> bool {
        self.laptops_keys().any(|laptops| laptops == key)
    }

    /// Writes every status that is not what it should be.
    fn publish(&mut self, statuses: BTreeMap<String, InterceptStatus>) {
        self.written.retain(|key, _| statuses.contains_key(key));
        self.unwritten.retain(|_, at| at.elapsed() < REFUSED_PAUSE);
        for (key, status) in statuses {
            let intercept = &self.tracker.world.intercepts()[&key];
            if self.writing.contains(&key)
                || self.unwritten.contains_key(&key)
                || self.writing.len() >= WRITES
                || !self.may_write(&key, intercept, &status)
            {
                continue;
            }
            self.writing.insert(key.clone());
            self.written.insert(key.clone(), Instant::now());
            let api = Api::namespaced(self.client.clone(), &intercept.namespace);
            let news = events::of_status(intercept, &status);
            self.tasks.spawn(write(api, key, intercept, &status, news));
        }
    }

    fn may_write(&self, key: &str, intercept: &Intercept, status: &InterceptStatus) -> bool {
        let Some(current) = &intercept.status else { return true };
        let settling = self.settled.is_none_or(|since| since.elapsed() < SETTLE);
        if current == status || (settling && status::falls_back(current, status)) {
            return false;
        }
        let recent = self.written.get(key).is_some_and(|at| at.elapsed() < COUNTS_EVERY);
        !recent || !status::only_counts(current, status)
    }

    /// Takes the steps that are not being taken, or were tried a moment ago.
    fn step(&mut self, steps: Vec<Step>, statuses: &BTreeMap<String, InterceptStatus>) {
        let now = Instant::now();
        let planned: BTreeSet<_> = steps.iter().map(|step| step.pod().uid.clone()).collect();
        self.tracker.hindrances.retain(|uid, _| planned.contains(uid));
        self.busy.retain(|_, until| until.is_none_or(|until| until > now));
        for step in steps {
            let uid = step.pod().uid.clone();
            if self.busy.len() >= WRITES || self.busy.contains_key(&uid) {
                continue;
            }
            self.busy.insert(uid, None);
            let (world, known) = (&self.tracker.world, &self.tracker.known);
            let cause = Box::new(Cause::of(&step, world, statuses, known.installation.as_deref()));
            let taken = evict::take(self.client.clone(), step);
            self.tasks.spawn(async move { Done::Stepped { cause, result: taken.await } });
        }
    }

    /// Deletes the intercepts that end by themselves.
    fn reap(&mut self) {
        let Some(laptops) = &self.tracker.known.laptops else { return };
        let intercepts = self.tracker.world.intercepts();
        let exists = |session: &str| laptops.contains_key(session);
        let due = self.reaper.due(intercepts.values(), exists, Instant::now(), Timestamp::now());
        for (intercept, end) in due {
            if self.busy.len() >= WRITES || self.busy.contains_key(&intercept.uid) {
                continue;
            }
            self.busy.insert(intercept.uid.clone(), None);
            self.roll.ends(&intercept.uid, end);
            self.tasks.spawn(delete(self.client.clone(), intercept, end));
        }
    }

    /// Takes in what a task came to. What failed is tried again at a later survey.
    fn take(&mut self, done: Done) {
        match done {
            Done::Written { key, result, news } => {
                self.writing.remove(&key);
                match result {
                    Ok(object) => {
                        self.journal.tell(news);
                        self.tracker.world.written(key, objects::intercept(*object));
                        self.want(PAUSE);
                    }
                    Err(error) => {
                        debug!(intercept = key, error, "status not written");
                        self.unwritten.insert(key, Instant::now());
                        self.want(REFUSED_PAUSE);
                    }
                }
            }
            Done::Deleted { key, uid, end, result } => {
                self.rest(uid, result.is_ok());
                match result {
                    Ok(()) => info!(intercept = key, ?end, "deleted"),
                    Err(error) => warn!(intercept = key, error, "an intercept could not be deleted"),
                }
            }
            Done::Stepped { cause, result } => self.stepped(&cause, result),
        }
    }

    /// Leaves an object alone for a while.
    fn rest(&mut self, uid: String, well: bool) {
        let pause = if well { STEP_PAUSE } else { FAILURE_PAUSE };
        self.busy.insert(uid, Some(Instant::now() + pause));
    }

    fn stepped(&mut self, cause: &Cause, result: anyhow::Result<Outcome>) {
        self.rest(cause.pod.uid.clone(), result.is_ok());
        let pod = format!("{}/{}", cause.pod.namespace, cause.pod.name);
        let outcome = result.unwrap_or_else(|error| {
            let error = format!("{error:#}");
            warn!(pod, error, "a pod could not be replaced");
            Outcome::NotYet(objects::shortened(&format!("it cannot be replaced: {error}")))
        });
        match &outcome {
            Outcome::Released => info!(pod, "released: another takes its place"),
            Outcome::Evicted => {
                self.metrics.evicted();
                info!(pod, "evicted to be replaced by one with an agent");
            }
            Outcome::GivenBack(why) => info!(pod, why, "given back to its ReplicaSet"),
            Outcome::Deleted => info!(pod, "deleted: it was released, and its workload is gone"),
            Outcome::NotYet(why) => {
                let known = self.tracker.hindrances.insert(cause.pod.uid.clone(), why.clone());
                if known.as_ref() == Some(why) {
                    return self.want(Duration::ZERO);
                }
            }
        }
        self.journal.tell(cause.entries(&outcome));
        self.want(Duration::ZERO);
    }
}

/// A merge patch against the version that was seen: whoever wrote in between wins, and is answered next.
fn write(
    api: Api<Object>,
    key: String,
    intercept: &Intercept,
    status: &InterceptStatus,
    news: Vec<Entry>,
) -> impl Future<Output = Done> + use<> {
    let name = intercept.name.clone();
    let patch = json!({
        "metadata": { "uid": intercept.uid, "resourceVersion": intercept.resource_version },
        "status": status,
    });
    let parameters =
        PatchParams { field_manager: Some(tpd_api::MANAGER.to_owned()), ..PatchParams::default() };
    async move {
        let patch = Patch::Merge(&patch);
        let result = in_time(api.patch_status(&name, &parameters, &patch)).await.map(Box::new);
        Done::Written { key, result, news }
    }
}

/// Deletes an intercept, and not one of the same name that was made since.
fn delete(client: Client, intercept: &Intercept, end: End) -> impl Future<Output = Done> + use<> {
    let api: Api<Object> = Api::namespaced(client, &intercept.namespace);
    let (name, uid) = (intercept.name.clone(), intercept.uid.clone());
    let key = format!("{}/{name}", intercept.namespace);
    async move {
        let preconditions = Preconditions { uid: Some(uid.clone()), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let result = in_time(api.delete(&name, &parameters)).await.map(|_| ());
        Done::Deleted { key, uid, end, result }
    }
}

async fn in_time<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout(PATIENCE, request).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the API server does not answer".to_owned()),
    }
}
