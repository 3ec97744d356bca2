//! What an intercept would mean to the pods of its workload: the same plan, made before it is there.

use k8s_openapi::jiff::Timestamp;

use super::super::objects::{Intercept, Pod};
use super::super::services::Services;
use super::super::strangers;
use super::{Crew, Tracker, missing};

/// The workload's pods, as an intercept would find them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// How many there are, those left out that are ending.
    pub pods: usize,
    /// Those that could not take part as they are.
    pub unfit: Vec<Unfit>,
}

/// A pod that could not take part as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Its name.
    pub pod: String,
    /// What it lacks.
    pub fault: Fault,
    /// What becomes of it, as [`Plan::reasons`](super::super::replace::Plan) has it.
    pub why: String,
}

/// What a pod lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// An agent.
    NoAgent,
    /// An agent of this installation.
    Stranger,
    /// An agent in the path of this port.
    Port(u16),
}

impl Tracker {
    /// What would become of the pods if an intercept were made, or changed, like this. `None` before the lists are complete.
    #[must_use]
    pub fn foresee(&self, asked: &Intercept, now: Timestamp) -> Option<Outlook> {
        if !self.settled() {
            return None;
        }
        let key = format!("{}/{}", asked.namespace, asked.name);
        let present = self.world.intercepts().get(&key);
        let asked = Intercept { created: present.map_or(now, |present| present.created), ..asked.clone() };
        let mut crew = self.crew_with(&key, &asked);
        let services = Services::of(&self.world, &asked.namespace);
        crew.decide(&services, &self.known, now);
        let name = format!("{}/{}", asked.namespace, asked.spec.workload);
        // What is remembered for the sake of this question is forgotten with it.
        crew.plan(&name, &asked.spec.workload, &services, &mut self.lacks.clone(), now);
        Some(crew.outlook(&services))
    }

    /// The workload with its intercepts, one of them as it is asked for.
    fn crew_with<'a>(&'a self, key: &'a String, asked: &'a Intercept) -> Crew<'a> {
        let (namespace, workload) = (&asked.namespace, &asked.spec.workload);
        let is_other = |(other, intercept): &(&String, &Intercept)| {
            *other != key && intercept.namespace == *namespace && intercept.spec.workload == *workload
        };
        let mut intercepts: Vec<_> = self.world.intercepts().iter().filter(is_other).collect();
        intercepts.push((key, asked));
        intercepts.sort_by_key(|(_, intercept)| (intercept.created, &intercept.uid));
        let pods = self.world.pods_in(namespace);
        let pods: Vec<_> = pods.filter(|pod| pod.workload.as_ref() == Some(workload)).collect();
        let connected = |uid: &str| self.sessions.get(uid).is_some();
        let suspects = pods.iter().copied().filter(|pod| !pod.leaving);
        let strangers = strangers::suspects(suspects, self.known.installation.as_deref(), connected);
        Crew { pods, intercepts, strangers, ..Crew::default() }
    }
}

impl Crew<'_> {
    fn outlook(&self, services: &Services<'_>) -> Outlook {
        let unfit = self.present().filter_map(|pod| {
            let why = self.plan.reasons.get(&pod.uid)?.clone();
            Some(Unfit { pod: pod.name.clone(), fault: self.fault(pod, services)?, why })
        });
        Outlook { pods: self.present().count(), unfit: unfit.collect() }
    }

    fn fault(&self, pod: &Pod, services: &Services<'_>) -> Option<Fault> {
        if pod.entry.is_none() {
            return Some(Fault::NoAgent);
        }
        if self.strangers.contains(pod.uid.as_str()) {
            return Some(Fault::Stranger);
        }
        let missing = missing(pod, &services.leading_to(pod), self.accepted());
        missing.first().map(|(port, _)| Fault::Port(*port))
    }
}
