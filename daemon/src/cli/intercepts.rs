//! Intercepts in `tpd status`: each with its pods, and what has gone where.

use tpd_api::intercept::{COVERED, InterceptStatus, PodStatus, Traffic};
use tpd_api::local::Intercept;

use super::describe::{end_of_older, filter, older, ports, share, table};
use super::intercept::{millis, silence};
use super::list::state;

/// One intercept, several lines.
pub(super) fn render(intercept: &Intercept) -> String {
    let request = &intercept.request;
    let mut text = format!(
        "\nintercept  {}/{} of {}\n  traffic  {}, {}\n",
        request.namespace,
        request.name.as_deref().unwrap_or_default(),
        request.workload,
        filter(&request.filter, request.mode),
        ports(request, intercept.status.as_ref())
    );
    text += &format!("  state    {}\n", standing(intercept));
    for problem in intercept.problem.iter().cloned().chain(silence(&intercept.silent)) {
        text += &format!("  problem  {problem}\n");
    }
    if let Some(status) = &intercept.status {
        text += &conditions(status);
        if let Some(older) = older(status) {
            text += &format!("  older    {older}: {}\n", end_of_older(request));
        }
        text += &pods(&status.pods);
    }
    text
}

fn standing(intercept: &Intercept) -> String {
    if intercept.over {
        return "over".into();
    }
    let Some(status) = &intercept.status else { return state(&None).into() };
    let counts = status.counts;
    let outdated = if intercept.current { "" } else { ", before the latest change" };
    let state = state(&intercept.status);
    format!(
        "{state}{outdated}: {} of {} ready pods acknowledged, {} of {} with an agent; {}",
        counts.acknowledged,
        counts.ready,
        counts.agents,
        counts.pods,
        went(status.traffic)
    )
}

fn went(traffic: Traffic) -> String {
    let lost = if traffic.copies_lost > 0 {
        format!(", {} copies lost", traffic.copies_lost)
    } else {
        String::new()
    };
    match share(traffic) {
        None => format!("no traffic yet{lost}"),
        Some(share) => format!(
            "{share:.1} % came here ({} here, {} to the app, {} failed open{lost})",
            traffic.to_laptop, traffic.to_app, traffic.failed_open
        ),
    }
}

/// What is not as it should be.
fn conditions(status: &InterceptStatus) -> String {
    // How many pods are covered stands above.
    let wrong = status.conditions.iter().filter(|one| one.status == "False" && one.type_ != COVERED);
    let wrong = wrong.filter(|condition| !condition.message.is_empty());
    wrong.map(|condition| format!("  not {}: {}\n", condition.type_, condition.message)).collect()
}

fn pods(pods: &[PodStatus]) -> String {
    if pods.is_empty() {
        return String::new();
    }
    let head =
        ["  POD", "STATE", "HERE", "APP", "FAILED OPEN", "OLDER", "PROOF", ""].map(str::to_owned).to_vec();
    table(&std::iter::once(head).chain(pods.iter().map(row)).collect::<Vec<_>>())
}

fn row(pod: &PodStatus) -> Vec<String> {
    let state = match (pod.agent, pod.acknowledged, pod.ready) {
        (false, ..) => "no agent",
        (_, true, true) => "acknowledged",
        (_, true, false) => "acknowledged, not ready",
        (_, false, true) => "not acknowledged",
        (_, false, false) => "not ready",
    };
    let traffic = pod.traffic;
    let why: Vec<&str> = pod.reason.iter().chain(&pod.problem).map(String::as_str).collect();
    vec![
        format!("  {}", pod.name),
        state.into(),
        traffic.to_laptop.to_string(),
        traffic.to_app.to_string(),
        traffic.failed_open.to_string(),
        pod.stragglers.to_string(),
        pod.proof_micros.map_or_else(|| "-".into(), millis),
        why.join("; "),
    ]
}

#[cfg(test)]
mod tests {
    use tpd_api::intercept::{Counts, State};

    use super::*;
    use crate::intercept::example;

    #[test]
    fn each_pod_has_its_row_and_all_together_their_share() {
        let traffic = Traffic { to_laptop: 90, to_app: 6, failed_open: 4, copies_lost: 0 };
        let good = PodStatus {
            name: "web-1".into(),
            ready: true,
            agent: true,
            acknowledged: true,
            traffic,
            stragglers: 2,
            proof_micros: Some(420),
            ..PodStatus::default()
        };
        let bad = PodStatus {
            name: "web-2".into(),
            ready: true,
            reason: Some("the namespace forbids it".into()),
            ..PodStatus::default()
        };
        let mut request = example("web", &["http"]);
        request.name = Some("web-ann-1".into());
        let intercept = Intercept {
            request,
            status: Some(InterceptStatus {
                state: State::Active,
                counts: Counts { pods: 2, ready: 2, agents: 1, acknowledged: 1, leaving: 0 },
                traffic,
                pods: vec![good, bad],
                ..InterceptStatus::default()
            }),
            current: true,
            silent: vec!["127.0.0.1:9090".parse().unwrap()],
            over: false,
            problem: None,
        };
        assert_eq!(
            render(&intercept),
            "
intercept  shop/web-ann-1 of deployment/web
  traffic  all traffic, http -> 127.0.0.1:9090
  state    Active: 1 of 2 ready pods acknowledged, 1 of 2 with an agent; 90.0 % came here (90 here, 6 to the app, 4 failed open)
  problem  nothing listens at 127.0.0.1:9090; the app serves until something does
  older    2 connections from before: HTTP through the agent comes with its next request, what goes past it or is no HTTP stays until it closes (kubectl -n shop rollout restart deployment/web closes it now)
  POD     STATE          HERE   APP   FAILED OPEN   OLDER   PROOF
  web-1   acknowledged   90     6     4             2       0.42 ms
  web-2   no agent       0      0     0             0       -         the namespace forbids it
"
        );
    }

    #[test]
    fn one_that_is_over_says_why() {
        let intercept = Intercept {
            request: example("web", &["http"]),
            status: None,
            current: false,
            silent: Vec::new(),
            over: true,
            problem: Some("somebody deleted it in the cluster".into()),
        };
        let text = render(&intercept);
        assert!(text.contains("  state    over\n  problem  somebody deleted it in the cluster\n"), "{text}");
    }
}
