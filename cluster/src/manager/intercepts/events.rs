//! What other people are told: Events on intercepts, on pods that are replaced for them, and on the workloads of those.
//!
//! Who shares a cluster sees pods go and does not know why. Events are made where something has changed (a status that is written, a
//! step that was taken, an intercept that is gone), and never because something is looked at again.

pub mod journal;
pub mod series;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use tpd_api::intercept::{
    ACCEPTED, CONNECTED, InterceptStatus, Mode, State, UNDER_WAY, Workload, WorkloadKind,
};

use super::accept::Refusal;
use super::evict::Outcome;
use super::expire::End;
use super::objects::{Intercept, shortened};
use super::replace::{Step, UNNEEDED, Victim};
use super::strangers;
use super::world::World;

/// Most reasons for pods without agents that one change of a status is told for: what is wrong with one pod is mostly wrong with all.
const MOST_REASONS: usize = 4;

/// Most intercepts that one event names. All of them are in the list of intercepts.
const MOST_NAMED: usize = 3;

/// Why most pods are replaced.
const NEEDS_AGENT: &str = "it needs an agent";

/// An object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct About {
    /// What it is.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; a workload's is asked for when the event is written.
    pub uid: Option<String>,
}

/// The kinds of objects that events are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An Intercept.
    Intercept,
    /// A Pod.
    Pod,
    /// What makes pods.
    Workload(WorkloadKind),
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is about.
    pub about: About,
    /// What else it has to do with.
    pub related: Option<About>,
    /// Whether somebody should look.
    pub is_warning: bool,
    /// What has happened, in one word.
    pub reason: &'static str,
    /// The same for people.
    pub note: String,
}

impl About {
    fn intercept(intercept: &Intercept) -> Self {
        let Intercept { namespace, name, uid, .. } = intercept;
        let (namespace, name, uid) = (namespace.clone(), name.clone(), Some(uid.clone()));
        Self { kind: Kind::Intercept, namespace, name, uid }
    }

    fn pod(pod: &Victim) -> Self {
        let (namespace, name, uid) = (pod.namespace.clone(), pod.name.clone(), Some(pod.uid.clone()));
        Self { kind: Kind::Pod, namespace, name, uid }
    }

    /// `None` for a pod that is its own workload.
    fn workload(namespace: &str, workload: &Workload) -> Option<Self> {
        (workload.kind != WorkloadKind::Pod).then(|| Self {
            kind: Kind::Workload(workload.kind),
            namespace: namespace.to_owned(),
            name: workload.name.clone(),
            uid: None,
        })
    }
}

/// An intercept with whose it is.
fn named(intercept: &Intercept) -> String {
    format!("{}/{} of {}", intercept.namespace, intercept.name, shortened(&intercept.spec.owner))
}

/// What is told once an intercept's status has become another.
#[must_use]
pub fn of_status(intercept: &Intercept, next: &InterceptStatus) -> Vec<Entry> {
    let last = intercept.status.as_ref();
    if let Some(no) = refusal(next) {
        let is_known = last.and_then(refusal).is_some_and(|known| known.message == no.message);
        // One whose time is over is deleted at once, and that is told.
        return match is_known || no.reason == Refusal::Expired.reason() {
            true => Vec::new(),
            false => vec![on(intercept, true, "NotAccepted", format!("It is not served: {}", no.message))],
        };
    }
    let last = last.filter(|last| refusal(last).is_none());
    let mut entries = Vec::new();
    if last.is_none_or(|last| last.state != next.state) {
        entries.extend(state(intercept, last.map(|last| last.state), next));
    }
    entries.extend(without_agents(intercept, last, next));
    entries
}

fn refusal(status: &InterceptStatus) -> Option<&Condition> {
    status.conditions.iter().find(|found| found.type_ == ACCEPTED && found.status == "False")
}

fn on(intercept: &Intercept, is_warning: bool, reason: &'static str, note: String) -> Entry {
    Entry { about: About::intercept(intercept), related: None, is_warning, reason, note }
}

/// The counts are left out: an intercept that goes back and forth says the same each time, and is a series.
fn state(intercept: &Intercept, last: Option<State>, next: &InterceptStatus) -> Vec<Entry> {
    let workload = &intercept.spec.workload;
    let was_more = last.is_some_and(|last| last != State::NoAgent);
    match next.state {
        State::NoAgent => {
            vec![on(intercept, was_more, "NoAgent", format!("No pod of {workload} has an agent"))]
        }
        State::Waiting => {
            let disconnected = next.conditions.iter().find(|found| found.type_ == CONNECTED);
            let why = disconnected.filter(|found| found.status == "False" && !found.message.is_empty());
            let why = why.map(|found| format!(": {}", found.message)).unwrap_or_default();
            let note = format!("Pods of {workload} have agents, and none hands traffic over{why}");
            vec![on(intercept, last == Some(State::Active), "Waiting", note)]
        }
        State::Active => {
            let traffic = traffic(intercept, next);
            let note = format!("Agents of {workload} hand {traffic} over to the laptop");
            let mut entries = vec![on(intercept, false, "Active", note)];
            entries.extend(About::workload(&intercept.namespace, workload).map(|about| Entry {
                about,
                related: Some(About::intercept(intercept)),
                is_warning: false,
                reason: "Intercepted",
                note: format!("Agents hand {traffic} over to the laptop for Intercept {}", named(intercept)),
            }));
            entries
        }
    }
}

fn traffic(intercept: &Intercept, status: &InterceptStatus) -> String {
    let what = match (intercept.spec.mode, intercept.spec.filter.is_empty()) {
        (Mode::Intercept, true) => "all traffic",
        (Mode::Intercept, false) => "what its filter matches",
        (Mode::Wiretap, true) => "a copy of all traffic",
        (Mode::Wiretap, false) => "a copy of what its filter matches",
    };
    let ports: BTreeSet<_> = status.ports.iter().map(|port| port.port).collect();
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    match ports.is_empty() {
        true => what.to_owned(),
        false => format!("{what} of port {}", ports.join(" and ")),
    }
}

/// Pods that have no agent and get none, those left out that were known before.
fn without_agents(
    intercept: &Intercept,
    last: Option<&InterceptStatus>,
    next: &InterceptStatus,
) -> Vec<Entry> {
    let known = last.map(left_without).unwrap_or_default();
    let new = left_without(next).into_iter().filter(|(why, _)| !known.contains_key(why));
    let told = new.take(MOST_REASONS).filter_map(|(why, pods)| {
        let (pod, others) = pods.split_first()?;
        let note = match others.len() {
            0 => format!("Pod {pod} has no agent: {why}"),
            others => format!("Pod {pod} and {others} more have no agents: {why}"),
        };
        Some(on(intercept, true, "PodWithoutAgent", note))
    });
    told.collect()
}

/// The pods that stay without agents, by the reason.
fn left_without(status: &InterceptStatus) -> BTreeMap<&str, Vec<&str>> {
    let mut left: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for pod in status.pods.iter().filter(|pod| !pod.agent) {
        if let Some(why) = pod.reason.as_deref().filter(|why| !is_under_way(why)) {
            left.entry(why).or_default().push(pod.name.as_str());
        }
    }
    left
}

fn is_under_way(reason: &str) -> bool {
    UNDER_WAY.iter().any(|start| reason.starts_with(start))
}

/// Why something is done to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The pod.
    pub pod: Victim,
    /// What it is a pod of.
    workload: Option<About>,
    /// One of the intercepts that want it replaced.
    first: Option<About>,
    /// All of them, for people.
    whom: String,
    /// What it lacks.
    lack: &'static str,
    /// Whether it goes before its successor is there.
    leaves_gap: bool,
}

impl Cause {
    /// Of a step, as things are when it is taken. `statuses` are those that the intercepts should have.
    #[must_use]
    pub fn of(
        step: &Step,
        world: &World,
        statuses: &BTreeMap<String, InterceptStatus>,
        installation: Option<&str>,
    ) -> Self {
        let victim = step.pod();
        let pod = world.pods().get(&format!("{}/{}", victim.namespace, victim.name));
        let workload = pod.and_then(|pod| pod.workload.as_ref());
        let is_served = |key: &str| statuses.get(key).is_some_and(|status| refusal(status).is_none());
        let served = world.intercepts().iter().filter(|(key, intercept)| {
            intercept.namespace == victim.namespace
                && Some(&intercept.spec.workload) == workload
                && is_served(key)
        });
        let served: Vec<_> = served.map(|(_, intercept)| intercept).collect();
        let is_strange = |own: &String| Some(own.as_str()) != installation;
        let lack = match pod {
            Some(pod) if pod.entry.is_none() => NEEDS_AGENT,
            Some(pod) if pod.installation.as_ref().is_some_and(is_strange) => strangers::REASON,
            Some(_) => "its agent is not in the path of an intercepted port",
            None => NEEDS_AGENT,
        };
        Self {
            pod: victim.clone(),
            workload: workload.and_then(|workload| About::workload(&victim.namespace, workload)),
            first: served.first().map(|intercept| About::intercept(intercept)),
            whom: whom(&served),
            lack,
            leaves_gap: matches!(step, Step::Evict { .. }),
        }
    }

    /// What is told of what came of the step. Nothing while it is merely under way.
    #[must_use]
    pub fn entries(&self, outcome: &Outcome) -> Vec<Entry> {
        let Self { whom, lack, .. } = self;
        let replaced = format!("replaced by tpd for {whom}: {lack}");
        let (is_warning, reason, what) = match outcome {
            Outcome::Released => {
                (false, "PodReleased", format!("{replaced}; it serves until its successor is ready"))
            }
            Outcome::Evicted if self.leaves_gap => {
                (false, "PodEvicted", format!("{replaced}; its successor comes once it is gone"))
            }
            Outcome::Evicted => (false, "PodEvicted", format!("{replaced}; its successor is ready")),
            Outcome::GivenBack(why) => {
                let what =
                    format!("given back to its ReplicaSet by tpd, that was to replace it for {whom}: {why}");
                (why != UNNEEDED, "PodGivenBack", what)
            }
            Outcome::Deleted => {
                let what = format!("deleted by tpd, that was replacing it for {whom}: its workload is gone");
                (false, "PodDeleted", what)
            }
            Outcome::NotYet(why) if is_under_way(why) => return Vec::new(),
            Outcome::NotYet(why) => {
                (true, "PodKept", format!("kept by tpd, that was to replace it for {whom}: {why}"))
            }
        };
        let pod = About::pod(&self.pod);
        let note = format!("Pod {}: {what}", pod.name);
        let entry = |about, related| Entry { about, related, is_warning, reason, note: note.clone() };
        let on_workload = self.workload.clone().map(|about| entry(about, Some(pod.clone())));
        [entry(pod, self.first.clone())].into_iter().chain(on_workload).collect()
    }
}

fn whom(intercepts: &[&Intercept]) -> String {
    let names: Vec<_> = intercepts.iter().take(MOST_NAMED).map(|intercept| named(intercept)).collect();
    let names = names.join(", ");
    match intercepts.len() {
        0 => "an Intercept that is over".to_owned(),
        1 => format!("Intercept {names}"),
        all if all > MOST_NAMED => format!("Intercepts {names} and {} more", all - MOST_NAMED),
        _ => format!("Intercepts {names}"),
    }
}

/// The intercepts that there are, to notice which are not any more.
#[derive(Debug, Default)]
pub struct Roll(BTreeMap<String, Member>);

#[derive(Debug)]
struct Member {
    about: About,
    workload: Option<About>,
    name: String,
    end: Option<End>,
}

impl Roll {
    /// Takes in all the intercepts. Returns what is told of those that are gone.
    pub fn follow<'a>(&mut self, intercepts: impl Iterator<Item = &'a Intercept>) -> Vec<Entry> {
        let mut gone = std::mem::take(&mut self.0);
        for intercept in intercepts {
            let (uid, member) = gone
                .remove_entry(&intercept.uid)
                .unwrap_or_else(|| (intercept.uid.clone(), Member::new(intercept)));
            self.0.insert(uid, member);
        }
        gone.into_values().flat_map(Member::farewell).collect()
    }

    /// Takes in why an intercept is about to be deleted.
    pub fn ends(&mut self, uid: &str, end: End) {
        if let Some(member) = self.0.get_mut(uid) {
            member.end = Some(end);
        }
    }

    /// Forgets them all: another replica sees to them.
    pub fn forget(&mut self) {
        self.0.clear();
    }
}

impl Member {
    fn new(intercept: &Intercept) -> Self {
        Self {
            about: About::intercept(intercept),
            workload: About::workload(&intercept.namespace, &intercept.spec.workload),
            name: named(intercept),
            end: None,
        }
    }

    /// Who has deleted it nobody is told; the API server's audit log knows.
    fn farewell(self) -> Vec<Entry> {
        let (reason, why) = match self.end {
            Some(End::Expired) => ("Expired", "its time is over"),
            Some(End::SessionGone) => ("SessionGone", "its laptop has left"),
            None => ("Ended", "its owner has left it, or an administrator has deleted it"),
        };
        let note = format!("Intercept {} is over: {why}", self.name);
        let entry =
            |about, related, reason| Entry { about, related, is_warning: false, reason, note: note.clone() };
        let on_workload = self.workload.map(|about| entry(about, Some(self.about.clone()), "InterceptEnded"));
        [entry(self.about, None, reason)].into_iter().chain(on_workload).collect()
    }
}

#[cfg(test)]
mod tests;
