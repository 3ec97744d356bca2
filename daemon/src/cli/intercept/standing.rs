//! How far an intercept is, judged from what the daemon knows of it.

use tpd_api::exit::ExitCode;
use tpd_api::intercept::{
    ACCEPTED, CONNECTED, COVERED, InterceptStatus, PodStatus, Protocol, State, UNDER_WAY,
};
use tpd_api::local::Intercept;

use super::super::describe::count;
use crate::failure::Failure;

/// How far an intercept is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Standing {
    /// Something is still to happen.
    Waiting {
        /// What.
        what: String,
        /// Pods that stay as they are, each with its reason; not those that something is being done about.
        stuck: Vec<String>,
    },
    /// Every ready pod hands traffic over, and nothing answers at a local port.
    Silent,
    /// Every ready pod hands traffic over, and each has reached the local port.
    Proved,
    /// The workload has no pods.
    Empty,
    /// It will not be served, or is over.
    Failed(Failure),
}

/// Judges it.
pub(super) fn standing(intercept: &Intercept) -> Standing {
    let waiting = |what: String| Standing::Waiting { what, stuck: Vec::new() };
    if intercept.over {
        let failure = Failure::new(ExitCode::Failure, "the intercept is over");
        return Standing::Failed(intercept.problem.iter().fold(failure, Failure::because));
    }
    let Some(status) = intercept.status.as_ref().filter(|_| intercept.current) else {
        let problem = intercept.problem.as_ref().map(|problem| format!(" ({problem})"));
        return waiting(format!("waiting for the manager{}", problem.unwrap_or_default()));
    };
    if let Some(failure) = refusal(status) {
        return Standing::Failed(failure);
    }
    if status.counts.pods == 0 {
        return Standing::Empty;
    }
    if !is_covered(status) {
        return Standing::Waiting { what: uncovered(status), stuck: stuck(status) };
    }
    if let Some(message) = refused_condition(status, CONNECTED) {
        return waiting(format!("waiting for a way to this machine: {message}"));
    }
    if !intercept.silent.is_empty() {
        return Standing::Silent;
    }
    let has_tcp = intercept.request.ports.iter().any(|port| port.protocol == Protocol::Tcp);
    match acknowledged(status).find(|pod| pod.proof_micros.is_none()) {
        Some(pod) if has_tcp => waiting(unproved(status, pod)),
        _ => Standing::Proved,
    }
}

/// Whether every ready pod hands traffic over, and Services lead to no other.
pub(super) fn is_covered(status: &InterceptStatus) -> bool {
    status.state == State::Active
        && status.counts.ready > 0
        && status.counts.acknowledged >= status.counts.ready
        && (status.counts.leaving == 0 || is_said_to_be(status))
}

/// Whether the manager says that it is covered: one that does not know of pods that leave keeps the count as another has left it.
fn is_said_to_be(status: &InterceptStatus) -> bool {
    status.conditions.iter().any(|one| one.type_ == COVERED && one.status == "True")
}

/// Why the manager does not serve it.
fn refusal(status: &InterceptStatus) -> Option<Failure> {
    let condition = status.conditions.iter().find(|one| one.type_ == ACCEPTED && one.status == "False")?;
    let code = match &*condition.reason {
        "Conflict" => ExitCode::Conflict,
        "NoSuchPort" => ExitCode::NotFound,
        "InvalidFilter" => ExitCode::Usage,
        "ForeignSession" => ExitCode::Forbidden,
        _ => ExitCode::Failure,
    };
    Some(Failure::new(code, "the manager does not serve this intercept").because(&condition.message))
}

fn refused_condition<'a>(status: &'a InterceptStatus, kind: &str) -> Option<&'a str> {
    let condition = status.conditions.iter().find(|one| one.type_ == kind && one.status == "False")?;
    Some(&condition.message)
}

fn acknowledged(status: &InterceptStatus) -> impl Iterator<Item = &PodStatus> {
    status.pods.iter().filter(|pod| pod.acknowledged)
}

/// What is still to happen, the first thing first.
fn uncovered(status: &InterceptStatus) -> String {
    let counts = status.counts;
    let without = counts.pods.saturating_sub(counts.agents);
    if without > 0 {
        let pods = count(without as usize, "pod");
        let verb = if without == 1 { "has" } else { "have" };
        return format!("waiting for agents: {pods} of {} {verb} none yet", counts.pods);
    }
    if counts.ready == 0 {
        return "waiting for a pod to be ready".into();
    }
    if counts.acknowledged >= counts.ready && counts.leaving > 0 {
        let pods = count(counts.leaving as usize, "pod");
        return format!("waiting for Services to forget {pods} that left without an agent");
    }
    format!("waiting for acknowledgements: {} of {} pods", counts.acknowledged, counts.ready)
}

fn stuck(status: &InterceptStatus) -> Vec<String> {
    let pods = status.pods.iter().filter(|pod| !pod.acknowledged);
    let under_way = |reason: &str| UNDER_WAY.iter().any(|start| reason.starts_with(start));
    let stuck = pods.filter(|pod| pod.reason.as_deref().is_some_and(|reason| !under_way(reason)));
    stuck.filter_map(explained).collect()
}

/// The pods that do not hand traffic over, each with its reason where one is known.
pub(super) fn reasons(status: &InterceptStatus) -> Vec<String> {
    status.pods.iter().filter(|pod| !pod.acknowledged).filter_map(explained).collect()
}

fn explained(pod: &PodStatus) -> Option<String> {
    Some(format!("{}: {}", pod.name, pod.reason.as_ref()?))
}

fn unproved(status: &InterceptStatus, pod: &PodStatus) -> String {
    let proved = acknowledged(status).filter(|pod| pod.proof_micros.is_some()).count();
    let all = acknowledged(status).count();
    let problem = pod.problem.as_ref().map(|problem| format!("; {}: {problem}", pod.name));
    format!(
        "waiting for probes: {proved} of {all} pods have reached this machine{}",
        problem.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use k8s_openapi::jiff::Timestamp;
    use tpd_api::intercept::Counts;

    use super::*;
    use crate::intercept::example;

    fn pod(name: &str, acknowledged: bool, proof_micros: Option<u64>, reason: Option<&str>) -> PodStatus {
        PodStatus {
            name: name.into(),
            ready: true,
            agent: reason.is_none(),
            acknowledged,
            proof_micros,
            reason: reason.map(Into::into),
            ..PodStatus::default()
        }
    }

    fn intercept(state: State, pods: Vec<PodStatus>) -> Intercept {
        let counts = Counts {
            pods: pods.len() as u32,
            ready: pods.len() as u32,
            agents: pods.iter().filter(|pod| pod.agent).count() as u32,
            acknowledged: pods.iter().filter(|pod| pod.acknowledged).count() as u32,
            leaving: 0,
        };
        Intercept {
            request: example("web", &["http"]),
            status: Some(InterceptStatus { state, counts, pods, ..InterceptStatus::default() }),
            current: true,
            silent: Vec::new(),
            over: false,
            problem: None,
        }
    }

    fn condition(kind: &str, reason: &str, message: &str) -> Condition {
        Condition {
            type_: kind.into(),
            status: "False".into(),
            reason: reason.into(),
            message: message.into(),
            last_transition_time: Time(Timestamp::now()),
            observed_generation: None,
        }
    }

    fn what(intercept: &Intercept) -> String {
        match standing(intercept) {
            Standing::Waiting { what, .. } => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_step_says_what_it_waits_for() {
        let mut fresh = intercept(State::NoAgent, Vec::new());
        fresh.current = false;
        assert_eq!(what(&fresh), "waiting for the manager");
        fresh.problem = Some("no answer".into());
        assert_eq!(what(&fresh), "waiting for the manager (no answer)");

        let reason = Some("image cannot be pulled");
        let without = intercept(
            State::NoAgent,
            vec![pod("web-1", false, None, reason), pod("web-2", false, None, None)],
        );
        assert_eq!(what(&without), "waiting for agents: 1 pod of 2 has none yet");
        let Standing::Waiting { stuck, .. } = standing(&without) else { panic!() };
        assert_eq!(stuck, ["web-1: image cannot be pulled"]);

        let half =
            intercept(State::Active, vec![pod("web-1", true, None, None), pod("web-2", false, None, None)]);
        assert_eq!(what(&half), "waiting for acknowledgements: 1 of 2 pods");
        let mut unproved = intercept(
            State::Active,
            vec![pod("web-1", true, Some(400), None), pod("web-2", true, None, None)],
        );
        assert_eq!(what(&unproved), "waiting for probes: 1 of 2 pods have reached this machine");
        unproved.status.as_mut().unwrap().counts.leaving = 1;
        assert_eq!(what(&unproved), "waiting for Services to forget 1 pod that left without an agent");
        unproved.status.as_mut().unwrap().counts.leaving = 0;
        unproved.silent = vec!["127.0.0.1:9090".parse().unwrap()];
        assert_eq!(standing(&unproved), Standing::Silent);
        assert_eq!(
            standing(&intercept(State::Active, vec![pod("web-1", true, Some(1), None)])),
            Standing::Proved
        );
        assert_eq!(standing(&intercept(State::NoAgent, Vec::new())), Standing::Empty);
    }

    #[test]
    fn pods_that_are_being_replaced_are_not_stuck() {
        let reason = "it is being replaced, and waits for its successor to be ready";
        let replaced = intercept(State::NoAgent, vec![pod("web-1", false, None, Some(reason))]);
        let Standing::Waiting { stuck, .. } = standing(&replaced) else { panic!() };
        assert!(stuck.is_empty());
        assert_eq!(reasons(replaced.status.as_ref().unwrap()), [format!("web-1: {reason}")]);
    }

    #[test]
    fn udp_alone_needs_no_probe() {
        let mut udp = intercept(State::Active, vec![pod("web-1", true, None, None)]);
        udp.request.ports[0].protocol = Protocol::Udp;
        assert_eq!(standing(&udp), Standing::Proved);
    }

    #[test]
    fn what_is_not_served_or_over_ends_the_wait() {
        let mut refused = intercept(State::Waiting, vec![pod("web-1", false, None, None)]);
        refused.status.as_mut().unwrap().conditions = vec![condition(ACCEPTED, "Conflict", "bob has it")];
        let Standing::Failed(failure) = standing(&refused) else { panic!() };
        assert_eq!((failure.code, failure.causes), (ExitCode::Conflict, vec!["bob has it".to_owned()]));

        let mut over = intercept(State::Active, vec![pod("web-1", true, Some(1), None)]);
        over.problem = Some("the API server does not answer".into());
        assert_eq!(standing(&over), Standing::Proved);
        over.over = true;
        assert!(matches!(standing(&over), Standing::Failed(_)));
    }
}
