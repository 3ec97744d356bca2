//! The manager's own resolv.conf: which resolver the cluster's pods ask, and what their zone is called.

use std::net::IpAddr;

/// What a pod's resolv.conf tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    /// The first name server.
    pub server: Option<IpAddr>,
    /// The cluster's zone, such as `cluster.local`.
    pub zone: Option<String>,
}

/// Reads a resolv.conf. The last `search` or `domain` line counts, as it does for the C library.
#[must_use]
pub fn parse(text: &str) -> Resolver {
    let mut resolver = Resolver::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") if resolver.server.is_none() => {
                resolver.server = words.next().and_then(|word| word.parse().ok());
            }
            Some("search" | "domain") => resolver.zone = words.find_map(zone),
            _ => {}
        }
    }
    resolver
}

/// A pod's search list has `NAMESPACE.svc.ZONE` and `svc.ZONE`.
fn zone(domain: &str) -> Option<String> {
    let domain = domain.trim_end_matches('.').to_ascii_lowercase();
    let zone = domain.strip_prefix("svc.").or_else(|| domain.split_once(".svc.").map(|(_, zone)| zone))?;
    (!zone.is_empty()).then(|| zone.to_owned())
}

#[cfg(test)]
mod tests {
    use super::parse;

    fn read(text: &str) -> (Option<String>, Option<String>) {
        let resolver = parse(text);
        (resolver.server.map(|server| server.to_string()), resolver.zone)
    }

    #[test]
    fn a_pods_configuration() {
        let text = "search tpd-system.svc.k8s.corp.example svc.k8s.corp.example k8s.corp.example lan\n\
                    nameserver 10.96.0.10\nnameserver fd00:10:96::a\noptions ndots:5\n";
        assert_eq!(read(text), (Some("10.96.0.10".into()), Some("k8s.corp.example".into())));
    }

    #[test]
    fn other_configurations() {
        let none = (None, None);
        for (text, expected) in [
            ("", none.clone()),
            ("# nameserver 1.1.1.1\n; search svc.x\n", none.clone()),
            ("nameserver nonsense\n", none),
            ("nameserver fd00:10:96::a\n", (Some("fd00:10:96::a".into()), None)),
            ("search lan home\nnameserver 9.9.9.9\n", (Some("9.9.9.9".into()), None)),
            ("search svc.Cluster.Local.\n", (None, Some("cluster.local".into()))),
            ("search a.svc.one\nsearch a.svc.two\n", (None, Some("two".into()))),
            ("search my.svc\n", (None, None)),
        ] {
            assert_eq!(read(text), expected, "{text:?}");
        }
    }
}
