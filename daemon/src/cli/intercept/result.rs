//! What a person reads in the end.

use std::net::SocketAddr;

use tpd_api::local::Intercept;

use super::super::describe::{self, count};

/// The intercept as it stands, proved or not.
pub(super) fn summary(intercept: &Intercept) -> String {
    let request = &intercept.request;
    let what = describe::filter(&request.filter, request.mode);
    let verb = if what.starts_with("requests") { "come" } else { "comes" };
    let name = request.name.as_deref().unwrap_or_default();
    let mut rows = vec![("to", describe::ports(request, intercept.status.as_ref()))];
    rows.extend(proof(intercept).map(|proof| ("proved", proof)));
    let older = intercept.status.as_ref().and_then(describe::older);
    rows.extend(older.map(|older| ("older", format!("{older} still to come; tpd status counts them"))));
    rows.extend(silence(&intercept.silent).map(|silence| ("but", silence)));
    rows.push(("name", format!("{}/{name}", request.namespace)));
    rows.push(("leave", format!("tpd leave {name}")));
    let rows = rows.into_iter().map(|(label, text)| format!("  {label:<8} {text}\n"));
    format!(
        "{}: {what} {verb} to this machine{}\n{}",
        request.workload,
        pods(intercept),
        rows.collect::<String>()
    )
}

fn pods(intercept: &Intercept) -> String {
    let Some(status) = &intercept.status else { return String::new() };
    match status.counts.pods {
        0 => ", once it has pods".into(),
        _ => format!(
            ", from {} of {}",
            status.counts.acknowledged,
            count(status.counts.ready as usize, "ready pod")
        ),
    }
}

/// Round trips from pods to the local port and back, pod by pod as far as they fit.
fn proof(intercept: &Intercept) -> Option<String> {
    // As many as fit in a line.
    const SHOWN: usize = 4;
    let pods = intercept.status.iter().flat_map(|status| &status.pods);
    let proved: Vec<(&str, u64)> = pods.filter_map(|pod| Some((&*pod.name, pod.proof_micros?))).collect();
    let slowest = proved.iter().map(|(_, micros)| *micros).max()?;
    let each = |(name, micros): &(&str, u64)| format!("{name} {}", millis(*micros));
    let shown: Vec<_> = proved.iter().take(SHOWN).map(each).collect();
    Some(if proved.len() > SHOWN {
        format!("by {} and back, {} at the most", count(proved.len(), "pod"), millis(slowest))
    } else {
        format!("there and back from {}", shown.join(", "))
    })
}

/// Where nothing listens.
pub(in crate::cli) fn silence(silent: &[SocketAddr]) -> Option<String> {
    let places: Vec<_> = silent.iter().map(ToString::to_string).collect();
    (!places.is_empty())
        .then(|| format!("nothing listens at {}; the app serves until something does", places.join(" and ")))
}

/// Microseconds, for people.
pub(in crate::cli) fn millis(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use tpd_api::filter::{Filter, HeaderCondition, Match};
    use tpd_api::intercept::{Counts, FoundPort, InterceptStatus, PodStatus, State};

    use super::*;
    use crate::intercept::example;

    fn intercept() -> Intercept {
        let pod = |name: &str, micros| PodStatus {
            name: name.into(),
            ready: true,
            agent: true,
            acknowledged: true,
            proof_micros: Some(micros),
            ..PodStatus::default()
        };
        let header = HeaderCondition { name: "x-dev".into(), value: "ann".into(), r#match: Match::Exact };
        let mut request = example("web", &["http"]);
        request.name = Some("web-ann-1".into());
        request.ports[0].port = None;
        request.filter = Filter { headers: vec![header], ..Filter::default() };
        let port = FoundPort {
            port: 8080,
            name: Some("http".into()),
            container: None,
            protocol: Default::default(),
        };
        Intercept {
            request,
            status: Some(InterceptStatus {
                state: State::Active,
                counts: Counts { pods: 2, ready: 2, agents: 2, acknowledged: 2, leaving: 0 },
                ports: vec![port],
                pods: vec![pod("web-1", 420), pod("web-2", 1510)],
                ..InterceptStatus::default()
            }),
            current: true,
            silent: Vec::new(),
            over: false,
            problem: None,
        }
    }

    #[test]
    fn a_proved_intercept_says_where_it_goes_and_how_to_leave() {
        assert_eq!(
            summary(&intercept()),
            "deployment/web: requests with x-dev=ann come to this machine, from 2 of 2 ready pods
  to       8080 -> 127.0.0.1:9090
  proved   there and back from web-1 0.42 ms, web-2 1.51 ms
  name     shop/web-ann-1
  leave    tpd leave web-ann-1
"
        );
    }

    #[test]
    fn connections_that_stay_with_the_app_are_named() {
        let mut late = intercept();
        late.status.as_mut().unwrap().pods[1].stragglers = 1;
        let text = summary(&late);
        assert!(text.contains("\n  older    1 connection from before still to come; tpd status"), "{text}");
    }

    #[test]
    fn one_that_nothing_serves_says_so() {
        let mut silent = intercept();
        silent.silent = vec!["127.0.0.1:9090".parse().unwrap()];
        silent.status.as_mut().unwrap().pods.clear();
        silent.request.filter = Filter::default();
        assert_eq!(
            summary(&silent),
            "deployment/web: all traffic comes to this machine, from 2 of 2 ready pods
  to       8080 -> 127.0.0.1:9090
  but      nothing listens at 127.0.0.1:9090; the app serves until something does
  name     shop/web-ann-1
  leave    tpd leave web-ann-1
"
        );
    }

    #[test]
    fn a_workload_without_pods_is_no_failure() {
        let mut empty = intercept();
        empty.status = Some(InterceptStatus::default());
        assert!(
            summary(&empty).starts_with(
                "deployment/web: requests with x-dev=ann come to this machine, once it has pods\n"
            )
        );
    }
}
