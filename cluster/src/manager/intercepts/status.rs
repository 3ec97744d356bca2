//! An intercept's status, from what was decided about it and how its pods fare.

use std::net::Ipv6Addr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use tpd_api::agent::InterceptReport;
use tpd_api::intercept::{
    ACCEPTED, CONNECTED, COVERED, Counts, InterceptStatus, MAX_PODS_LISTED, PodStatus, State, Traffic,
};

use super::accept::Verdict;
use super::configure::Bypasses;
use super::objects::{Intercept, Pod, shortened};

/// How one pod fares with an intercept.
#[derive(Clone, Debug)]
pub struct Fare<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Overlay address of its agent, while that is connected.
    pub agent: Option<Ipv6Addr>,
    /// What its agent says.
    pub report: Option<&'a InterceptReport>,
    /// What has gone where there.
    pub traffic: Traffic,
    /// What Services lead past its agent.
    pub bypasses: Option<Bypasses>,
    /// Why it has no agent, or its agent nothing to do.
    pub reason: Option<String>,
}

/// How the pods of an intercept's workload fare.
#[derive(Clone, Debug, Default)]
pub struct Fares<'a> {
    /// Those that are there.
    pub present: Vec<Fare<'a>>,
    /// How many have just left without having handed their traffic over.
    pub leaving: usize,
}

impl Fare<'_> {
    /// Whether its agent hands traffic over by some generation of the spec.
    fn hands_over(&self) -> bool {
        let reached = self.bypasses.as_ref().is_none_or(|bypasses| !bypasses.wholly);
        reached
            && self.agent.is_some()
            && self.pod.ready
            && self.report.is_some_and(|report| report.acknowledged)
    }

    /// Whether it does so by this generation, with all that comes.
    fn acknowledged(&self, generation: i64) -> bool {
        self.bypasses.is_none()
            && self.agent.is_some()
            && self.report.is_some_and(|report| report.acknowledged && report.generation >= generation)
    }

    fn row(&self, generation: i64) -> PodStatus {
        let proof = self.report.and_then(|report| report.proof.as_ref());
        let bypassed = self.bypasses.as_ref().map(|bypasses| &bypasses.reason);
        let complaint = self.report.and_then(|report| report.problem.as_deref());
        PodStatus {
            name: self.pod.name.clone(),
            ready: self.pod.ready,
            agent: self.agent.is_some(),
            address: self.agent,
            acknowledged: self.acknowledged(generation),
            reason: complaint.map(shortened).or_else(|| bypassed.cloned()).or_else(|| self.reason.clone()),
            traffic: self.traffic,
            stragglers: self.report.map_or(0, |report| report.stragglers),
            proof_micros: proof.and_then(|proof| proof.micros),
            problem: proof.and_then(|proof| proof.problem.as_deref()).map(shortened),
        }
    }
}

/// Whether a manager carries the laptop's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carriage {
    /// There is no such session, or it has no address.
    NoSession,
    /// This manager does, or an agent has a way to it by another.
    Carried,
    /// This manager, the only one, does not.
    Nobody,
    /// Another may.
    Unknown,
}

/// The status that an intercept should have. Equal to its present one where nothing has changed.
#[must_use]
pub fn status(
    intercept: &Intercept,
    verdict: &Verdict,
    fares: &Fares<'_>,
    total: Traffic,
    carriage: Carriage,
    now: Timestamp,
) -> InterceptStatus {
    let generation = intercept.generation;
    let Fares { present: fares, leaving } = fares;
    let count = |which: &dyn Fn(&Fare<'_>) -> bool| {
        u32::try_from(fares.iter().filter(|fare| which(fare)).count()).unwrap_or(u32::MAX)
    };
    let counts = Counts {
        pods: count(&|_| true),
        ready: count(&|fare| fare.pod.ready),
        agents: count(&|fare| fare.agent.is_some()),
        acknowledged: count(&|fare| fare.pod.ready && fare.acknowledged(generation)),
        leaving: u32::try_from(*leaving).unwrap_or(u32::MAX),
    };
    let active = verdict.refusal.is_none() && fares.iter().any(Fare::hands_over);
    let state = match counts.agents {
        _ if active => State::Active,
        0 => State::NoAgent,
        _ => State::Waiting,
    };
    let old = intercept.status.as_ref().map_or(&[][..], |status| &status.conditions);
    let conditions = [accepted(verdict), connected(carriage, active), covered(counts)];
    InterceptStatus {
        state,
        observed_generation: generation,
        ports: verdict.ports.clone(),
        counts,
        traffic: total,
        pods: fares.iter().take(MAX_PODS_LISTED).map(|fare| fare.row(generation)).collect(),
        conditions: conditions.map(|said| said.condition(old, generation, now)).into(),
    }
}

/// What is said of a condition, before it has a time.
struct Said {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Said {
    /// The time is when `status` last changed, as the API conventions have it.
    fn condition(self, old: &[Condition], generation: i64, now: Timestamp) -> Condition {
        let same = old.iter().find(|old| old.type_ == self.kind && old.status == self.status);
        Condition {
            type_: self.kind.to_owned(),
            status: self.status.to_owned(),
            reason: self.reason.to_owned(),
            message: self.message,
            observed_generation: Some(generation),
            last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
        }
    }
}

fn accepted(verdict: &Verdict) -> Said {
    match &verdict.refusal {
        None => Said { kind: ACCEPTED, status: "True", reason: "Accepted", message: String::new() },
        Some(refusal) => {
            Said { kind: ACCEPTED, status: "False", reason: refusal.reason(), message: refusal.to_string() }
        }
    }
}

fn connected(carriage: Carriage, active: bool) -> Said {
    let (status, reason, message) = match carriage {
        Carriage::NoSession => ("False", "NoSession", "there is no such session: is `tpd up` running?"),
        Carriage::Carried => ("True", "Carried", ""),
        // An agent that hands over has a way to the laptop.
        _ if active => ("True", "Carried", ""),
        Carriage::Nobody => ("False", "NotCarried", "the laptop is not heard: is `tpd up` running?"),
        Carriage::Unknown => ("Unknown", "NotCarriedHere", "another manager may carry the session"),
    };
    Said { kind: CONNECTED, status, reason, message: message.to_owned() }
}

fn covered(counts: Counts) -> Said {
    let Counts { ready, acknowledged, leaving, .. } = counts;
    let (status, reason) = match (ready, acknowledged) {
        (0, _) => ("False", "NoReadyPods"),
        (ready, acknowledged) if ready == acknowledged && leaving > 0 => ("False", "PodsLeaving"),
        (ready, acknowledged) if ready == acknowledged => ("True", "AllAcknowledged"),
        (_, 0) => ("False", "NoneAcknowledged"),
        _ => ("False", "SomeAcknowledged"),
    };
    let left = match leaving {
        0 => String::new(),
        leaving => format!("; Services may still lead to {leaving} that left without an agent"),
    };
    let message = format!("{acknowledged} of {ready} ready pods hand traffic over{left}");
    Said { kind: COVERED, status, reason, message }
}

/// How far an intercept has come.
fn rank(state: State) -> u8 {
    match state {
        State::NoAgent => 0,
        State::Waiting => 1,
        State::Active => 2,
    }
}

/// Whether a status says that the intercept has come less far than another says.
#[must_use]
pub fn falls_back(from: &InterceptStatus, to: &InterceptStatus) -> bool {
    rank(to.state) < rank(from.state) || to.counts.acknowledged < from.counts.acknowledged
}

/// Whether two statuses differ only in what grows with every request.
#[must_use]
pub fn only_counts(one: &InterceptStatus, other: &InterceptStatus) -> bool {
    let still = |status: &InterceptStatus| {
        let mut still = status.clone();
        still.traffic = Traffic::default();
        for pod in &mut still.pods {
            (pod.traffic, pod.stragglers, pod.proof_micros) = (Traffic::default(), 0, None);
        }
        still
    };
    still(one) == still(other)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use tpd_api::agent::InterceptReport;
    use tpd_api::intercept::{InterceptStatus, State, Traffic};

    use super::super::accept::{Refusal, Verdict};
    use super::super::objects::Intercept;
    use super::super::samples::{at, injected, intercept};
    use super::{Carriage, Fare, Fares, falls_back, only_counts, status};

    fn report(generation: i64) -> InterceptReport {
        InterceptReport { generation, acknowledged: true, ..InterceptReport::default() }
    }

    const AGENT: Ipv6Addr = Ipv6Addr::LOCALHOST;

    /// The status with these agents' reports, and one ready pod for each.
    fn with(intercept: &Intercept, reports: &[Option<InterceptReport>], second: i64) -> InterceptStatus {
        let pods: Vec<_> = (0..reports.len()).map(|n| injected(&format!("p{n}"))).collect();
        let fares: Vec<_> = pods
            .iter()
            .zip(reports)
            .map(|(pod, report)| Fare {
                pod,
                agent: Some(AGENT),
                report: report.as_ref(),
                traffic: Traffic::default(),
                bypasses: None,
                reason: None,
            })
            .collect();
        let verdict = Verdict { refusal: None, ports: vec![] };
        status(
            intercept,
            &verdict,
            &Fares { present: fares, leaving: 0 },
            Traffic::default(),
            Carriage::Carried,
            at(second),
        )
    }

    fn condition<'a>(status: &'a InterceptStatus, kind: &str) -> (&'a str, &'a str) {
        let found = status.conditions.iter().find(|found| found.type_ == kind).unwrap();
        (&found.status, &found.reason)
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let mut one = intercept("a");
        one.status = Some(with(&one, &[Some(report(1)), None], 50));
        let later = with(&one, &[Some(report(1)), Some(report(1))], 60);
        assert_eq!(condition(&later, "Covered"), ("True", "AllAcknowledged"));
        assert_eq!(later.conditions[0].last_transition_time.0, at(50));
        assert_eq!(later.conditions[2].last_transition_time.0, at(60));
    }

    #[test]
    fn a_changed_filter_uncovers_and_does_not_deactivate() {
        let mut one = intercept("a");
        one.generation = 2;
        let status = with(&one, &[Some(report(1)), Some(report(2))], 50);
        assert_eq!((status.state, status.counts.acknowledged), (State::Active, 1));
        assert_eq!(condition(&status, "Covered"), ("False", "SomeAcknowledged"));
        assert!(!status.pods[0].acknowledged && status.pods[1].acknowledged);
    }

    #[test]
    fn a_refused_intercept_is_never_active() {
        let one = intercept("a");
        let pod = injected("p");
        let report = report(1);
        let fare = Fare {
            pod: &pod,
            agent: Some(AGENT),
            report: Some(&report),
            traffic: Traffic::default(),
            bypasses: None,
            reason: None,
        };
        let verdict = Verdict { refusal: Some(Refusal::Expired), ports: vec![] };
        let status = status(
            &one,
            &verdict,
            &Fares { present: vec![fare], leaving: 0 },
            Traffic::default(),
            Carriage::Unknown,
            at(1),
        );
        assert_eq!(status.state, State::Waiting);
        assert_eq!(condition(&status, "Accepted"), ("False", "Expired"));
        assert_eq!(condition(&status, "Connected").0, "Unknown");
    }

    #[test]
    fn what_matters_is_told_from_what_counts() {
        let one = intercept("a");
        let first = with(&one, &[Some(report(1))], 50);
        let mut second = first.clone();
        second.traffic.to_laptop = 9;
        second.pods[0].traffic.to_laptop = 9;
        assert!(only_counts(&first, &second));
        second.counts.ready = 2;
        assert!(!only_counts(&first, &second));
        assert!(falls_back(&first, &InterceptStatus::default()));
        assert!(!falls_back(&InterceptStatus::default(), &first));
    }
}
