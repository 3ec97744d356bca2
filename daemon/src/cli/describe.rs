//! Intercepts in words.

use tpd_api::filter::{Filter, Match};
use tpd_api::intercept::{InterceptStatus, Mode, Protocol, Traffic, WorkloadKind};
use tpd_api::local::{InterceptRequest, LocalPort};

/// Which traffic a filter lets through.
pub(super) fn filter(filter: &Filter, mode: Mode) -> String {
    let what = if filter.is_empty() {
        "all traffic".to_owned()
    } else {
        format!("requests with {}", conditions(filter))
    };
    match mode {
        Mode::Intercept => what,
        Mode::Wiretap => format!("a copy of {what}"),
    }
}

fn conditions(filter: &Filter) -> String {
    let header = |one: &tpd_api::filter::HeaderCondition| {
        let how = match one.r#match {
            Match::Exact => "=",
            Match::Prefix => "^=",
            Match::Regex => "~=",
        };
        format!("{}{how}{}", one.name, one.value)
    };
    let grpc = |one: &tpd_api::filter::GrpcCondition| match &one.method {
        Some(method) => format!("{}/{method}", one.service),
        None => one.service.clone(),
    };
    let mut parts: Vec<String> = filter.headers.iter().map(header).collect();
    let lists = [
        ("path", filter.paths.clone()),
        ("method", filter.methods.clone()),
        ("gRPC", filter.grpc.iter().map(grpc).collect()),
    ];
    let lists = lists.into_iter().filter(|(_, list)| !list.is_empty());
    parts.extend(lists.map(|(name, list)| format!("{name} {}", list.join(" or "))));
    parts.join(" and ")
}

/// Where each port leads.
pub(super) fn ports(request: &InterceptRequest, status: Option<&InterceptStatus>) -> String {
    let found = |index: usize| status.and_then(|status| status.ports.get(index));
    let one = |(index, port): (usize, &LocalPort)| {
        let wanted = port.port.clone().or_else(|| found(index).map(|found| found.port.to_string()));
        let suffix = if port.protocol == Protocol::Udp { "/udp" } else { "" };
        format!("{}{suffix} -> {}", wanted.as_deref().unwrap_or("its port"), port.local)
    };
    request.ports.iter().enumerate().map(one).collect::<Vec<_>>().join(", ")
}

/// Connections that are older than the intercept and still go where they went, if there are any.
pub(super) fn older(status: &InterceptStatus) -> Option<String> {
    let connections = status.pods.iter().map(|pod| pod.stragglers).sum::<u64>();
    (connections > 0).then(|| {
        format!("{} from before", count(usize::try_from(connections).unwrap_or(usize::MAX), "connection"))
    })
}

/// How those come to an end.
pub(super) fn end_of_older(request: &InterceptRequest) -> String {
    let restart = match request.workload.kind {
        WorkloadKind::Deployment | WorkloadKind::StatefulSet | WorkloadKind::DaemonSet => {
            format!(" (kubectl -n {} rollout restart {} closes it now)", request.namespace, request.workload)
        }
        WorkloadKind::ReplicaSet | WorkloadKind::Pod => String::new(),
    };
    format!(
        "HTTP through the agent comes with its next request, what goes past it or is no HTTP stays until it closes{restart}"
    )
}

/// The part of the traffic that comes to the laptop, percent. `None` before there was any.
pub(super) fn share(traffic: Traffic) -> Option<f64> {
    let total = traffic.to_laptop + traffic.to_app + traffic.failed_open;
    (total > 0).then(|| traffic.to_laptop as f64 * 100.0 / total as f64)
}

/// `1 pod`, `2 pods`.
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Columns, each as wide as its widest cell; the last is left as it is.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("   ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use tpd_api::filter::{GrpcCondition, HeaderCondition};

    use super::*;

    #[test]
    fn filters_read_as_they_were_typed() {
        let header = |name: &str, value: &str, how| HeaderCondition {
            name: name.into(),
            value: value.into(),
            r#match: how,
        };
        let both = Filter {
            headers: vec![header("x-dev", "ann", Match::Exact), header("accept", "^text", Match::Regex)],
            paths: vec!["/api/*".into(), "/v2".into()],
            methods: vec!["GET".into()],
            grpc: vec![GrpcCondition { service: "shop.Cart".into(), method: Some("Add".into()) }],
        };
        assert_eq!(
            filter(&both, Mode::Wiretap),
            "a copy of requests with x-dev=ann and accept~=^text and path /api/* or /v2 and method GET and gRPC shop.Cart/Add"
        );
        assert_eq!(filter(&Filter::default(), Mode::Intercept), "all traffic");
    }

    #[test]
    fn shares_and_counts() {
        let traffic = Traffic { to_laptop: 1, to_app: 2, failed_open: 1, copies_lost: 9 };
        assert_eq!((share(traffic), share(Traffic::default())), (Some(25.0), None));
        assert_eq!((count(1, "pod"), count(0, "pod")), ("1 pod".into(), "0 pods".into()));
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["A".to_owned(), "LONG".to_owned()], vec!["wide".to_owned(), "x".to_owned()]];
        assert_eq!(table(&rows), "A      LONG\nwide   x\n");
    }
}
