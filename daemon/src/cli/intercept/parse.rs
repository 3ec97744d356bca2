//! Words of the command line, taken apart.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tpd_api::filter::{GrpcCondition, HeaderCondition, Match};
use tpd_api::intercept::{Protocol, Workload, WorkloadKind};
use tpd_api::local::LocalPort;

/// Longest time that an intercept may be asked for, seconds: a year. What lasts longer has no end.
const MAX_SECONDS: u64 = 365 * 24 * 60 * 60;

/// `LOCAL[:PORT][/udp]`, where LOCAL is a port, or an address and a port.
pub(super) fn port(text: &str) -> Result<LocalPort, String> {
    let (rest, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((rest, protocol)) if protocol.eq_ignore_ascii_case("udp") => (rest, Protocol::Udp),
        Some((rest, protocol)) if protocol.eq_ignore_ascii_case("tcp") => (rest, Protocol::Tcp),
        Some((_, other)) => return Err(format!("{other:?} is neither tcp nor udp")),
    };
    let (address, rest) = address(rest)?;
    let (local, port) = rest.split_once(':').map_or((rest, None), |(local, port)| (local, Some(port)));
    let local: u16 = local.parse().ok().filter(|&port| port > 0).ok_or_else(|| {
        format!("{local:?} is no local port; write LOCAL, LOCAL:PORT or ADDRESS:LOCAL:PORT, as in 9090:http")
    })?;
    match port {
        Some("") => Err("the workload's port is missing behind the colon".into()),
        Some(port) if port.contains(':') => Err(format!("{port:?} is no port of a workload")),
        port => {
            Ok(LocalPort { local: SocketAddr::new(address, local), port: port.map(str::to_owned), protocol })
        }
    }
}

/// The address at the front, and what follows it. Without one it is this machine's own, where most programs listen.
fn address(text: &str) -> Result<(IpAddr, &str), String> {
    if let Some((inside, rest)) = text.strip_prefix('[').and_then(|text| text.split_once("]:")) {
        let address = inside.parse().map_err(|_| format!("{inside:?} is no IPv6 address"))?;
        return Ok((IpAddr::V6(address), rest));
    }
    match text.split_once(':') {
        Some(("localhost", rest)) => Ok((Ipv4Addr::LOCALHOST.into(), rest)),
        Some((first, rest)) if first.contains('.') => {
            let address = first.parse().map_err(|_| format!("{first:?} is no address"))?;
            Ok((IpAddr::V4(address), rest))
        }
        _ => Ok((Ipv4Addr::LOCALHOST.into(), text)),
    }
}

/// `NAME=VALUE`, `NAME^=PREFIX` or `NAME~=REGEX`.
pub(super) fn header(text: &str) -> Result<HeaderCondition, String> {
    let (name, value) =
        text.split_once('=').ok_or("write NAME=VALUE, NAME^=PREFIX or NAME~=REGEX, as in x-intercept=dev")?;
    let (name, how) = match (name.strip_suffix('^'), name.strip_suffix('~')) {
        (Some(name), _) => (name, Match::Prefix),
        (_, Some(name)) => (name, Match::Regex),
        _ => (name, Match::Exact),
    };
    if name.is_empty() {
        return Err("the header has no name".into());
    }
    Ok(HeaderCondition { name: name.into(), value: value.into(), r#match: how })
}

/// `SERVICE` or `SERVICE/METHOD`, with a leading slash or without.
pub(super) fn grpc(text: &str) -> Result<GrpcCondition, String> {
    let text = text.strip_prefix('/').unwrap_or(text);
    let (service, method) =
        text.split_once('/').map_or((text, None), |(service, method)| (service, Some(method)));
    match (service, method) {
        ("", _) | (_, Some("")) => Err("write SERVICE or SERVICE/METHOD, as in shop.v1.Cart/Add".into()),
        (service, method) => Ok(GrpcCondition { service: service.into(), method: method.map(str::to_owned) }),
    }
}

/// A kind of workload, as kubectl knows it.
pub(super) fn kind(text: &str) -> Result<WorkloadKind, String> {
    match &*text.to_ascii_lowercase() {
        "deployment" | "deployments" | "deploy" => Ok(WorkloadKind::Deployment),
        "statefulset" | "statefulsets" | "sts" => Ok(WorkloadKind::StatefulSet),
        "daemonset" | "daemonsets" | "ds" => Ok(WorkloadKind::DaemonSet),
        "replicaset" | "replicasets" | "rs" => Ok(WorkloadKind::ReplicaSet),
        "pod" | "pods" | "po" => Ok(WorkloadKind::Pod),
        _ => Err("a workload is a deployment, statefulset, daemonset, replicaset or pod".into()),
    }
}

/// `NAME` or `KIND/NAME`.
pub(super) fn workload(text: &str, default: Option<WorkloadKind>) -> Result<Workload, String> {
    let (kind, name) = match text.split_once('/') {
        None => (default.unwrap_or_default(), text),
        Some((word, name)) => match (kind(word)?, default) {
            (kind, Some(other)) if kind != other => {
                return Err(format!("{text} and --kind name different kinds"));
            }
            (kind, _) => (kind, name),
        },
    };
    if name.is_empty() || name.contains('/') {
        return Err(format!("{text:?} is neither NAME nor KIND/NAME"));
    }
    Ok(Workload { kind, name: name.into() })
}

/// A time such as `90s`, `15m`, `1h30m` or `2d`, in seconds.
pub(super) fn duration(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no time; write it as in 90s, 15m or 1h30m");
    let (mut rest, mut seconds) = (text, 0_u64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let count: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = match rest.as_bytes()[digits] {
            b's' => 1,
            b'm' => 60,
            b'h' => 60 * 60,
            b'd' => 24 * 60 * 60,
            _ => return Err(wrong()),
        };
        seconds = seconds.saturating_add(count.saturating_mul(unit));
        rest = &rest[digits + 1..];
    }
    match seconds {
        0 => Err(wrong()),
        1..=MAX_SECONDS => Ok(seconds),
        _ => Err("that is longer than a year; leave it out for an intercept without an end".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_in_every_form() {
        for (text, local, wanted, protocol) in [
            ("9090", "127.0.0.1:9090", None, Protocol::Tcp),
            ("9090:8080", "127.0.0.1:9090", Some("8080"), Protocol::Tcp),
            ("9090:http", "127.0.0.1:9090", Some("http"), Protocol::Tcp),
            ("5353:53/udp", "127.0.0.1:5353", Some("53"), Protocol::Udp),
            ("5353/UDP", "127.0.0.1:5353", None, Protocol::Udp),
            ("192.0.2.1:9090", "192.0.2.1:9090", None, Protocol::Tcp),
            ("192.0.2.1:9090:http/tcp", "192.0.2.1:9090", Some("http"), Protocol::Tcp),
            ("localhost:9090:80", "127.0.0.1:9090", Some("80"), Protocol::Tcp),
            ("[::1]:9090", "[::1]:9090", None, Protocol::Tcp),
            ("[::1]:9090:grpc", "[::1]:9090", Some("grpc"), Protocol::Tcp),
        ] {
            let expected =
                LocalPort { local: local.parse().unwrap(), port: wanted.map(Into::into), protocol };
            assert_eq!(port(text), Ok(expected), "{text}");
        }
        for text in
            ["", "0", "http", "9090:", "9090:80:90", "1.2.3:9090", "[::1]", "[x]:1", "70000", "80/sctp"]
        {
            assert!(port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn headers_say_how_they_compare() {
        for (text, name, value, how) in [
            ("x-intercept=dev", "x-intercept", "dev", Match::Exact),
            ("x=", "x", "", Match::Exact),
            ("x=a=b", "x", "a=b", Match::Exact),
            ("user-agent^=curl/", "user-agent", "curl/", Match::Prefix),
            ("cookie~=(^|; )dev=1", "cookie", "(^|; )dev=1", Match::Regex),
        ] {
            let expected = HeaderCondition { name: name.into(), value: value.into(), r#match: how };
            assert_eq!(header(text), Ok(expected), "{text}");
        }
        assert!(header("x").is_err() && header("=x").is_err() && header("^=x").is_err());
    }

    #[test]
    fn grpc_methods_and_whole_services() {
        let cart = |method: Option<&str>| GrpcCondition {
            service: "shop.v1.Cart".into(),
            method: method.map(Into::into),
        };
        assert_eq!(grpc("shop.v1.Cart"), Ok(cart(None)));
        assert_eq!(grpc("/shop.v1.Cart/Add"), Ok(cart(Some("Add"))));
        assert!(grpc("shop.v1.Cart/").is_err() && grpc("/").is_err());
    }

    #[test]
    fn workloads_by_name_and_by_kind() {
        let of = |kind, name: &str| Ok(Workload { kind, name: name.into() });
        assert_eq!(workload("web", None), of(WorkloadKind::Deployment, "web"));
        assert_eq!(workload("sts/pg", None), of(WorkloadKind::StatefulSet, "pg"));
        assert_eq!(workload("Pod/x", Some(WorkloadKind::Pod)), of(WorkloadKind::Pod, "x"));
        assert_eq!(workload("pg", Some(WorkloadKind::StatefulSet)), of(WorkloadKind::StatefulSet, "pg"));
        for text in ["job/x", "deploy/", "a/b/c", "ds/x"] {
            assert!(workload(text, Some(WorkloadKind::Pod)).is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(
            ["90s", "15m", "1h30m", "2d"].map(|text| duration(text).unwrap()),
            [90, 900, 5400, 172_800]
        );
        for text in ["", "90", "0s", "1x", "m", "400d", "99999999999999999999s", "1hé"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
