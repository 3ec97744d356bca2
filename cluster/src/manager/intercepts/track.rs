//! From what is known of pods, Services, intercepts, laptops and agents to what follows: configurations, what may pass the hub,
//! statuses, and what becomes of pods without agents.
//!
//! ```text
//! Service ◄──► Pod ◄── workload ──► Intercept ──► ClientSession (laptop)
//!               ▲                        │
//!             Agent ◄── configuration ───┘
//! ```
//!
//! Nothing is elected: every agent of the workload has every intercept of it that is served.

pub mod outlook;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tpd_api::agent::Config;
use tpd_api::intercept::{InterceptStatus, Workload};
use tpd_netstack::server::Pair;

use super::accept::{self, Verdict};
use super::configure::{self, Facts, Served};
use super::leavers::{Leaver, Leavers};
use super::linger::Lingering;
use super::objects::{Intercept, Pod, Service};
use super::ports;
use super::replace::{Lack, Lacks, Need, Plan, PortKey, Step};
use super::services::Services;
use super::sessions::{Agent, Sessions};
use super::spread::Spread;
use super::status::{self, Carriage, Fare, Fares};
use super::strangers::{self, Strangers};
use super::tally::Tally;
use super::world::{Known, World};
use crate::manager::agents::token::Identity;

/// All that is known, and remembered.
#[derive(Debug)]
pub struct Tracker {
    /// The cluster's objects.
    pub world: World,
    /// Laptops and managers.
    pub known: Known,
    /// The agents.
    pub sessions: Sessions,
    /// The laptops that this manager carries and hears.
    pub carried: BTreeSet<Ipv6Addr>,
    /// What hinders the replacing of pods, by UID, as it was found when it was tried.
    pub hindrances: BTreeMap<String, String>,
    facts: Facts,
    tallies: BTreeMap<String, Tally>,
    lacks: Lacks,
    strangers: Strangers,
    lingering: Lingering,
    leavers: Leavers,
    spread: Spread,
}

/// What follows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Survey {
    /// New configurations by the UID of the agent's pod.
    pub configs: Vec<(String, Arc<Config>)>,
    /// What may pass the hub.
    pub pairs: Vec<Pair>,
    /// The status that each intercept should have, by namespace and name.
    pub statuses: BTreeMap<String, InterceptStatus>,
    /// What is to be done to pods.
    pub steps: Vec<Step>,
    /// When something else will follow though nothing happens.
    pub again: Option<Duration>,
}

/// A workload that somebody intercepts, or of which a pod was released.
#[derive(Debug, Default)]
struct Crew<'a> {
    pods: Vec<&'a Pod>,
    intercepts: Vec<(&'a String, &'a Intercept)>,
    verdicts: Vec<Verdict>,
    /// UIDs of pods whose agents are another installation's.
    strangers: BTreeSet<&'a str>,
    plan: Plan,
}

type Crews<'a> = BTreeMap<(&'a str, &'a Workload), Crew<'a>>;
type Neighbourhoods<'a> = BTreeMap<&'a str, Services<'a>>;

impl Tracker {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(facts: Facts, sessions: Sessions) -> Self {
        Self {
            world: World::default(),
            known: Known::default(),
            sessions,
            carried: BTreeSet::new(),
            hindrances: BTreeMap::new(),
            facts,
            tallies: BTreeMap::new(),
            lacks: Lacks::default(),
            strangers: Strangers::default(),
            lingering: Lingering::default(),
            leavers: Leavers::default(),
            spread: Spread::default(),
        }
    }

    /// Whether all lists are complete.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.world.settled() && self.known.laptops.is_some()
    }

    /// Whether the pod of an agent may be there: it is, or not all pods are known.
    #[must_use]
    pub fn may_exist(&self, identity: &Identity) -> bool {
        !self.settled() || pod_of(&self.world, identity).is_some()
    }

    /// What follows from all that is known; nothing before the lists are complete.
    pub fn survey(&mut self, now: Timestamp) -> Survey {
        let left = self.world.take_left();
        if !self.settled() {
            return Survey::default();
        }
        let Self {
            world,
            known,
            sessions,
            carried,
            hindrances,
            facts,
            tallies,
            lacks,
            strangers,
            lingering,
            leavers,
            spread,
        } = self;
        let (world, known) = (&*world, &*known);
        let mut crews = crews(world);
        let neighbourhoods = neighbourhoods(world, &crews, sessions);
        for ((namespace, _), crew) in &mut crews {
            crew.decide(&neighbourhoods[namespace], known, now);
        }
        let intercepted = crews.values().filter(|crew| !crew.intercepts.is_empty()).flat_map(Crew::present);
        let connected = |uid: &str| sessions.get(uid).is_some();
        leavers.see(left, connected, now);
        let unknown = spread.see(world.intercepts().values(), now);
        let strangers = strangers.see(intercepted, known.installation.as_deref(), connected, now);
        for ((namespace, workload), crew) in &mut crews {
            let strange = crew.present().map(|pod| pod.uid.as_str()).filter(|uid| strangers.contains(uid));
            crew.strangers = strange.collect();
            let name = format!("{namespace}/{workload}");
            crew.plan(&name, workload, &neighbourhoods[namespace], lacks, now);
        }
        lacks.retain(|workload| {
            crews.iter().any(|((namespace, name), crew)| {
                !crew.intercepts.is_empty() && format!("{namespace}/{name}") == workload
            })
        });
        let (configs, mut pairs) = configure_all(world, known, sessions, facts, &crews, &neighbourhoods);
        let held = sessions.iter().flat_map(|(_, agent)| agent.held()).collect();
        lingering.extend(&mut pairs, &held, |laptop| known.has(laptop), now);
        count(tallies, sessions, &crews);
        let seen =
            Seen { known, sessions, carried, hindrances, tallies, leavers, neighbourhoods: &neighbourhoods };
        Survey {
            configs,
            pairs,
            statuses: crews.values().flat_map(|crew| crew.statuses(&seen, now)).collect(),
            steps: crews.values().flat_map(|crew| crew.steps(&unknown)).collect(),
            again: [spread.next(now), leavers.next(now)].into_iter().flatten().min(),
        }
    }

    /// Whether a survey is due although nothing happens: for intercepts, whose time may be over, and for what lingers after them.
    #[must_use]
    pub fn minds_time(&self) -> bool {
        !self.world.intercepts().is_empty() || !self.lingering.is_empty()
    }

    /// The laptops of an agent's configuration that this manager carries.
    #[must_use]
    pub fn carried_for(&self, config: &Config) -> Vec<Ipv6Addr> {
        let laptops: BTreeSet<_> = config.intercepts.iter().map(|intercept| intercept.laptop).collect();
        laptops.intersection(&self.carried).copied().collect()
    }
}

/// What statuses are made from, beside the objects.
struct Seen<'a> {
    known: &'a Known,
    sessions: &'a Sessions,
    carried: &'a BTreeSet<Ipv6Addr>,
    hindrances: &'a BTreeMap<String, String>,
    tallies: &'a BTreeMap<String, Tally>,
    leavers: &'a Leavers,
    neighbourhoods: &'a Neighbourhoods<'a>,
}

fn crews(world: &World) -> Crews<'_> {
    let mut crews = Crews::new();
    for (key, intercept) in world.intercepts() {
        let crew = crews.entry((&intercept.namespace, &intercept.spec.workload)).or_default();
        crew.intercepts.push((key, intercept));
    }
    for pod in world.pods().values() {
        let Some(workload) = &pod.workload else { continue };
        let place = (pod.namespace.as_str(), workload);
        if pod.released {
            crews.entry(place).or_default();
        }
        if let Some(crew) = crews.get_mut(&place) {
            crew.pods.push(pod);
        }
    }
    // A released pod may come behind others of its workload.
    for ((namespace, workload), crew) in &mut crews {
        crew.intercepts.sort_by_key(|(_, intercept)| (intercept.created, &intercept.uid));
        if crew.intercepts.is_empty() {
            let pods = world.pods_in(namespace);
            crew.pods = pods.filter(|pod| pod.workload.as_ref() == Some(*workload)).collect();
        }
    }
    crews
}

/// The Services of every namespace that matters.
fn neighbourhoods<'a>(world: &'a World, crews: &Crews<'a>, sessions: &Sessions) -> Neighbourhoods<'a> {
    let mut namespaces: BTreeSet<&str> = crews.keys().map(|(namespace, _)| *namespace).collect();
    namespaces.extend(
        sessions.iter().filter_map(|(_, agent)| Some(pod_of(world, &agent.identity)?.namespace.as_str())),
    );
    namespaces.into_iter().map(|namespace| (namespace, Services::of(world, namespace))).collect()
}

/// The pod of an agent, if it is there and the same.
fn pod_of<'a>(world: &'a World, identity: &Identity) -> Option<&'a Pod> {
    let pod = world.pods().get(&format!("{}/{}", identity.namespace, identity.pod))?;
    (pod.uid == identity.uid).then_some(pod)
}

/// Brings the agents' configurations up to date. Returns those that have changed, and what may pass for the sake of all.
fn configure_all(
    world: &World,
    known: &Known,
    sessions: &mut Sessions,
    facts: &Facts,
    crews: &Crews<'_>,
    neighbourhoods: &Neighbourhoods<'_>,
) -> (Vec<(String, Arc<Config>)>, Vec<Pair>) {
    let (mut changed, mut pairs) = (Vec::new(), Vec::new());
    for agent in sessions.iter_mut() {
        let Some(pod) = pod_of(world, &agent.identity) else { continue };
        let services = &neighbourhoods[pod.namespace.as_str()];
        let place = pod.workload.as_ref().map(|workload| (pod.namespace.as_str(), workload));
        let crew = place.and_then(|place| crews.get(&place));
        let served = crew.map(|crew| crew.served(known)).unwrap_or_default();
        // Nodes lead to one that leaves for a moment more.
        let leading = if pod.leaving { services.selecting(pod) } else { services.leading_to(pod) };
        let described = services.describe(pod, &facts.zone);
        let mut config = facts.config(pod, agent.address, &known.replicas, &leading, described, &served);
        config.revision = world.revision();
        pairs.extend(configure::pairs(&config));
        if let Some(config) = agent.configure(config) {
            changed.push((pod.uid.clone(), config));
        }
    }
    (changed, pairs)
}

/// Brings the counts up to date.
fn count(tallies: &mut BTreeMap<String, Tally>, sessions: &Sessions, crews: &Crews<'_>) {
    let mut present = BTreeSet::new();
    for crew in crews.values() {
        let names: BTreeSet<_> = crew.pods.iter().map(|pod| pod.name.as_str()).collect();
        for (_, intercept) in &crew.intercepts {
            present.insert(intercept.uid.as_str());
            let resume = || intercept.status.as_ref().map(Tally::resume).unwrap_or_default();
            let tally = tallies.entry(intercept.uid.clone()).or_insert_with(resume);
            for pod in &crew.pods {
                let report = sessions.get(&pod.uid).and_then(|agent| agent.report_on(&intercept.uid));
                if let Some(report) = report {
                    tally.count(&pod.name, report);
                }
            }
            tally.retain(|pod| names.contains(pod));
        }
    }
    tallies.retain(|uid, _| present.contains(uid.as_str()));
}

impl<'a> Crew<'a> {
    fn present(&self) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().copied().filter(|pod| !pod.leaving)
    }

    fn decide(&mut self, services: &Services<'a>, known: &'a Known, now: Timestamp) {
        let pods: Vec<_> = self.present().map(|pod| (pod, services.leading_to(pod))).collect();
        let intercepts: Vec<_> = self.intercepts.iter().map(|(_, intercept)| *intercept).collect();
        let owner = |session: &str| {
            known.laptops.as_ref().and_then(|laptops| laptops.get(session)).map(|laptop| &*laptop.owner)
        };
        self.verdicts = accept::decide(&intercepts, &pods, owner, now);
    }

    /// The intercepts that are served, the oldest first.
    fn accepted(&self) -> impl Iterator<Item = &'a Intercept> {
        let both = self.intercepts.iter().zip(&self.verdicts);
        both.filter(|(_, verdict)| verdict.refusal.is_none()).map(|((_, intercept), _)| *intercept)
    }

    /// Those whose laptop has an address.
    fn served(&self, known: &Known) -> Vec<Served<'a>> {
        let served = self.accepted().filter_map(|intercept| {
            let laptop = known.laptops.as_ref()?.get(&intercept.spec.session)?;
            Some(Served { intercept, laptop: laptop.address?.ipv6 })
        });
        served.collect()
    }

    fn plan(
        &mut self,
        name: &str,
        workload: &Workload,
        services: &Services<'a>,
        lacks: &mut Lacks,
        now: Timestamp,
    ) {
        let mut lacking: BTreeMap<PortKey, Vec<&Pod>> = BTreeMap::new();
        for pod in self.present().filter(|pod| pod.entry.is_some()) {
            for port in missing(pod, &services.leading_to(pod), self.accepted()) {
                lacking.entry(port).or_default().push(pod);
            }
        }
        let mut need = Need {
            now,
            since: self.accepted().map(|intercept| intercept.created).min(),
            gaps: self.accepted().any(|intercept| intercept.spec.replace_pods),
            lacking: BTreeSet::new(),
            asked: self.accepted().map(Intercept::version).collect(),
            present: self.intercepts.iter().map(|(_, intercept)| intercept.version()).collect(),
        };
        let youngest = self.present().map(|pod| pod.created).max().unwrap_or_default();
        for (port, pods) in lacking {
            need.lacking.extend(lacks.see(name, Lack::Port(port), &pods, youngest));
        }
        let strange: Vec<_> =
            self.present().filter(|pod| self.strangers.contains(pod.uid.as_str())).collect();
        if !strange.is_empty() {
            need.lacking.extend(lacks.see(name, Lack::Installation, &strange, youngest));
        }
        self.plan = Plan::new(workload, &self.pods, &need);
    }

    /// What is to be done now. Nothing begins for the sake of intercepts that are `unknown` to other managers.
    fn steps(&self, unknown: &BTreeSet<String>) -> impl Iterator<Item = Step> {
        let may_begin = self.accepted().any(|intercept| !unknown.contains(&intercept.version()));
        let steps = self.plan.steps.iter().cloned();
        steps.filter(move |step| may_begin || matches!(step, Step::Finish { .. }))
    }

    fn statuses(&self, seen: &Seen<'_>, now: Timestamp) -> Vec<(String, InterceptStatus)> {
        let both = self.intercepts.iter().zip(&self.verdicts);
        both.map(|((key, intercept), verdict)| {
            let tally = &seen.tallies[&intercept.uid];
            let fares = Fares {
                present: self.present().map(|pod| self.fare(seen, intercept, tally, pod)).collect(),
                leaving: seen.leaving(intercept),
            };
            let carriage = seen.carriage(&intercept.spec.session);
            let status = status::status(intercept, verdict, &fares, tally.total(), carriage, now);
            (String::clone(key), status)
        })
        .collect()
    }

    fn fare<'b>(&self, seen: &Seen<'b>, intercept: &Intercept, tally: &Tally, pod: &'b Pod) -> Fare<'b>
    where
        'a: 'b,
    {
        let agent = seen.sessions.get(&pod.uid);
        Fare {
            pod,
            agent: agent.map(|agent| agent.address),
            report: agent.and_then(|agent| agent.report_on(&intercept.uid)),
            traffic: tally.of(&pod.name),
            bypasses: agent.and_then(|_| {
                let leading = seen.neighbourhoods[pod.namespace.as_str()].leading_to(pod);
                configure::bypasses(pod, &leading, intercept)
            }),
            reason: self.reason(seen, intercept, pod, agent),
        }
    }

    /// Why a pod has no agent, or its agent nothing to do with an intercept.
    fn reason(
        &self,
        seen: &Seen<'_>,
        intercept: &Intercept,
        pod: &Pod,
        agent: Option<&Agent>,
    ) -> Option<String> {
        let planned = seen.hindrances.get(&pod.uid).or_else(|| self.plan.reasons.get(&pod.uid));
        if let Some(agent) = agent {
            let told = agent.config.as_ref().filter(|_| {
                self.served(seen.known).iter().any(|served| served.intercept.uid == intercept.uid)
            });
            let left_out =
                told.is_some_and(|told| told.intercepts.iter().all(|one| one.uid != intercept.uid));
            let why = "the pod has none of these ports, or its agent is not in their path";
            return planned.cloned().or_else(|| left_out.then(|| why.to_owned()));
        }
        if self.strangers.contains(pod.uid.as_str()) {
            let planned = planned.map(|planned| format!("{planned}; ")).unwrap_or_default();
            return Some(format!("{planned}{}", strangers::REASON));
        }
        let otherwise = || match (&pod.trouble, &pod.entry) {
            (Some(trouble), _) => trouble.clone(),
            (None, Some(_)) if pod.running => "its agent is not connected".to_owned(),
            (None, Some(_)) => "it is starting".to_owned(),
            (None, None) => "it has no agent".to_owned(),
        };
        Some(planned.cloned().unwrap_or_else(otherwise))
    }
}

/// The ports that the intercepts need, that a pod's agent is not in the path of, and that the agent of one made now would be.
fn missing<'a>(
    pod: &Pod,
    leading: &[&Service],
    intercepts: impl Iterator<Item = &'a Intercept>,
) -> BTreeSet<PortKey> {
    let mappings = intercepts.flat_map(|intercept| &intercept.spec.ports);
    let found = mappings.filter_map(|mapping| ports::find(pod, leading, mapping).ok());
    let missing = found.filter(|found| {
        !configure::is_in_path(pod, found.port, found.protocol)
            && ports::swappable(pod, leading, found.port, found.protocol)
    });
    missing.map(|found| (found.port, found.protocol)).collect()
}

impl Seen<'_> {
    /// How many pods have just left that Services may still lead to, past any agent.
    fn leaving(&self, intercept: &Intercept) -> usize {
        let services = &self.neighbourhoods[intercept.namespace.as_str()];
        let is_own = |leaver: &&Leaver| {
            leaver.pod.namespace == intercept.namespace
                && leaver.pod.workload.as_ref() == Some(&intercept.spec.workload)
        };
        let is_bare = |leaver: &&Leaver| {
            let selecting = services.selecting(&leaver.pod);
            let handed_over = leaver.agent && configure::covers(&leaver.pod, &selecting, intercept);
            !selecting.is_empty() && !handed_over
        };
        self.leavers.iter().filter(is_own).filter(is_bare).count()
    }

    fn carriage(&self, session: &str) -> Carriage {
        let laptop = self.known.laptops.as_ref().and_then(|laptops| laptops.get(session));
        let Some(address) = laptop.and_then(|laptop| laptop.address) else { return Carriage::NoSession };
        let managers = self.known.replicas.values().filter(|replica| !replica.leaving).count();
        match self.carried.contains(&address.ipv6) {
            true => Carriage::Carried,
            false if managers > 1 => Carriage::Unknown,
            false => Carriage::Nobody,
        }
    }
}

#[cfg(test)]
mod tests;
