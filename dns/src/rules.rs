//! Which names are the cluster's: a name in, a [`Decision`] out.
//!
//! | asked | goes to |
//! |---|---|
//! | names of the zone (`web.shop.svc.cluster.local`) | the cluster |
//! | reverse names of the cluster's networks | the cluster |
//! | `web.shop.svc`, `10-244-0-7.shop.pod` | the cluster: neither `svc` nor `pod` is a top-level domain |
//! | `web`, `_http._tcp.web` | the cluster beside the old resolver |
//! | `web.shop`, `pg-0.pgsql` | the cluster beside the old resolver; the cluster alone first where `shop` is known as a namespace |
//! | `pg-0.pgsql.shop` | the same, and only where `shop` is known as a namespace |
//! | `example.com`, `heise.de`, `www.web.dev` | the old resolver |
//! | names below a [`Forward`]'s domain | that forward's servers, whatever else the name may be |
//! | `localhost` | answered here (RFC 6761, 6.3) |
//! | `wpad` | does not exist: browsers ask for it, and whoever owns a Service of that name would own their proxy settings |
//!
//! **Two labels can mean two things.** `web.dev` is a Service in namespace `dev`, and a site. The cluster's name wins where it
//! exists, because a person connects to a cluster to reach it. But whoever may create a namespace shall not take over
//! the world's names: labels that everybody's names end in (`com`, `org`, `local` and others) are never read as a namespace, and two
//! letters (which are a country, RFC 1591) only where the person chose that namespace to connect to. Those that are left alone still
//! resolve where the system's resolver has a search list, after the old resolver has said that it doesn't know them.
//!
//! Nothing here needs the list of namespaces, which a developer may lack the right to read. Where it is known, or where the
//! cluster has answered for one before, short forms with more labels are recognised, and they aren't shown to the old resolver.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use ipnet::IpNet;

use crate::name::{Name, NameError};

/// Last labels that are never a namespace: the oldest generic domains, and the special-use ones (RFC 6761, 6762, 7686).
const EVERYBODYS: [&[u8]; 14] = [
    b"com",
    b"net",
    b"org",
    b"edu",
    b"gov",
    b"mil",
    b"int",
    b"arpa",
    b"info",
    b"biz",
    b"local",
    b"localhost",
    b"invalid",
    b"onion",
];

/// May names that end in `label` be cluster names, seen from the connected `namespace`?
pub(crate) fn is_namespace_domain(label: &str, namespace: &str) -> bool {
    !EVERYBODYS.contains(&label.as_bytes()) && (label == namespace || label.len() > 2)
}

/// First label of the name that the proxy answers with its own addresses (see [`crate::prove()`]).
pub(crate) const PROOF_LABEL: &str = "tpd-proof";

/// What belongs to the cluster, as far as it is known. Changes while connected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// The cluster's DNS zone, `cluster.local` for most. Read from the cluster.
    pub zone: String,
    /// The connected namespace, in which `web` is looked up.
    pub namespace: String,
    /// Namespaces that are known to exist; may be empty. A developer may lack the right to list them.
    pub namespaces: BTreeSet<String>,
    /// Networks of pods and Services, whose reverse names the cluster answers.
    pub networks: Vec<IpNet>,
    /// Names that the tunnel itself needs (the API server's host, those of its login): never asked through the tunnel.
    pub never: BTreeSet<String>,
    /// Domains that have servers of their own. Of several that a name lies below, the longest counts.
    pub forwards: Vec<Forward>,
}

/// A domain that is asked of other servers than the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The domain: it and every name below it. `.` is every name that reaches the proxy.
    pub domain: String,
    /// Whom to ask, the preferred first.
    pub servers: Arc<[SocketAddr]>,
}

/// Where the answer to a question comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// From the cluster alone. The first of the names that exists is the answer.
    Cluster(Vec<Name>),
    /// From the cluster if it has one of the names, else from the resolver that the system used before.
    Short {
        /// The full names that the question may mean, in a pod's order.
        candidates: Vec<Name>,
        /// The namespace is known: the old resolver hears of the name only after the cluster has said that it doesn't exist.
        certain: bool,
    },
    /// From these servers, untouched.
    Forward(Arc<[SocketAddr]>),
    /// From the resolver that the system used before, untouched.
    Upstream,
    /// The name and everything below it is this machine.
    Loopback,
    /// The proxy's own addresses: the proof that a question reached it.
    Proof,
    /// The name does not exist.
    NxDomain,
}

/// Record types that ask about a zone and not about a host: no Service has them, so a short form isn't expanded for them.
/// SOA, NS, DS, RRSIG, NSEC, DNSKEY, NSEC3, NSEC3PARAM, CDS, CDNSKEY, IXFR, AXFR.
const ZONE_TYPES: [u16; 12] = [6, 2, 43, 46, 47, 48, 50, 51, 59, 60, 251, 252];

/// A [`Scope`], prepared for deciding.
#[derive(Debug, Clone)]
pub struct Rules {
    zone: Name,
    services: Name,
    own: Name,
    proof: Name,
    namespace: Vec<u8>,
    namespaces: BTreeSet<Vec<u8>>,
    networks: Vec<IpNet>,
    never: BTreeSet<Name>,
    /// The longest domain first.
    forwards: Vec<(Name, Arc<[SocketAddr]>)>,
}

impl Rules {
    /// Fails when the zone, the namespace, or a name in [`Scope::never`] or [`Scope::forwards`] is no domain name.
    pub fn new(scope: &Scope) -> Result<Self, NameError> {
        let zone = Name::parse(&scope.zone)?;
        let services = Name::parse(&format!("svc.{}", scope.zone))?;
        let own = Name::parse(&format!("{}.{services}", scope.namespace))?;
        let proof = Name::parse(&format!("{PROOF_LABEL}.{}", scope.zone))?;
        let never = scope.never.iter().map(|name| Name::parse(name)).collect::<Result<_, _>>()?;
        let forward = |one: &Forward| Ok((Name::parse(&one.domain)?, Arc::clone(&one.servers)));
        let mut forwards: Vec<_> = scope.forwards.iter().map(forward).collect::<Result<_, NameError>>()?;
        forwards.sort_by_key(|(domain, _)| std::cmp::Reverse(domain.labels().count()));
        Ok(Self {
            zone,
            services,
            own,
            proof,
            namespace: scope.namespace.to_ascii_lowercase().into(),
            namespaces: scope.namespaces.iter().map(|name| name.to_ascii_lowercase().into()).collect(),
            networks: scope.networks.clone(),
            never,
            forwards,
        })
    }

    /// Where the answer to (`name`, `kind`) comes from. `learned` says whether the cluster has answered for a namespace before.
    pub fn decide(&self, name: &Name, kind: u16, learned: impl Fn(&[u8]) -> bool) -> Decision {
        let last = name.last_label().unwrap_or_default();
        let known = |label: &[u8]| self.namespaces.contains(label) || learned(label);
        match last {
            _ if self.never.contains(name) => Decision::Upstream,
            b"localhost" => Decision::Loopback,
            _ if *name == self.proof => Decision::Proof,
            _ if let Some(servers) = self.forward(name) => Decision::Forward(servers),
            _ if last.is_empty() => Decision::Upstream,
            _ if self.is_wpad(name) => Decision::NxDomain,
            _ if name.is_within(&self.zone) => Decision::Cluster(vec![name.clone()]),
            b"arpa" => self.reverse(name),
            _ if ZONE_TYPES.contains(&kind) || !looks_like_service(name) => Decision::Upstream,
            _ => self.short(name, last, known),
        }
    }

    /// The namespace that an existing candidate of a [`Decision::Short`] lies in.
    pub(crate) fn namespace_of(&self, candidate: &Name) -> Option<Vec<u8>> {
        let depth = candidate.labels().count().checked_sub(self.services.labels().count() + 1)?;
        candidate
            .is_within(&self.services)
            .then(|| candidate.labels().nth(depth).map(<[u8]>::to_vec))
            .flatten()
    }

    /// The zone, and with it what the cache may hold.
    pub(crate) fn zone(&self) -> &Name {
        &self.zone
    }

    /// A name below a reverse zone of the cluster, for [`crate::recursion`].
    pub(crate) fn reverse_zone(&self) -> Option<Name> {
        Name::reverse_zones(self.networks.first()?).into_iter().next()
    }

    fn forward(&self, name: &Name) -> Option<Arc<[SocketAddr]>> {
        self.forwards
            .iter()
            .find(|(domain, _)| name.is_within(domain))
            .map(|(_, servers)| Arc::clone(servers))
    }

    fn is_wpad(&self, name: &Name) -> bool {
        let mut labels = name.labels();
        labels.next() == Some(b"wpad") && (labels.next().is_none() || name.is_within(&self.zone))
    }

    fn reverse(&self, name: &Name) -> Decision {
        let ours =
            name.reverse_network().is_some_and(|asked| self.networks.iter().any(|own| own.contains(&asked)));
        if ours { Decision::Cluster(vec![name.clone()]) } else { Decision::Upstream }
    }

    fn short(&self, name: &Name, last: &[u8], known: impl Fn(&[u8]) -> bool) -> Decision {
        let in_own = || name.within(&self.own);
        let in_services = || name.within(&self.services);
        let short = |candidates: [Option<Name>; 2], certain| Decision::Short {
            candidates: candidates.into_iter().flatten().collect(),
            certain,
        };
        match (name.labels().count() - service_labels(name), last) {
            (1, _) if name.labels().next() == Some(b"wpad") => Decision::NxDomain,
            (1, _) => short([in_own(), None], false),
            (_, b"svc" | b"pod") => Decision::Cluster(name.within(&self.zone).into_iter().collect()),
            (_, last) if EVERYBODYS.contains(&last) => Decision::Upstream,
            (2, last) if last == self.namespace => short([in_own(), in_services()], true),
            (_, last) if last == self.namespace => short([in_services(), None], false),
            (_, [_, _]) => Decision::Upstream,
            (2, last) => short([in_own(), in_services()], known(last)),
            (_, last) if known(last) => short([in_services(), None], false),
            _ => Decision::Upstream,
        }
    }
}

/// Labels of `_port._proto.` at the start of an SRV name.
fn service_labels(name: &Name) -> usize {
    let mut labels = name.labels();
    let port = labels.next().is_some_and(|label| label.starts_with(b"_"));
    let protocol = matches!(labels.next(), Some(b"_tcp" | b"_udp" | b"_sctp"));
    if port && protocol && labels.next().is_some() { 2 } else { 0 }
}

/// Could every label be a Kubernetes name, or the `_port._proto` of one?
fn looks_like_service(name: &Name) -> bool {
    name.labels().skip(service_labels(name)).all(|label| {
        label.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
            && !label.starts_with(b"-")
            && !label.ends_with(b"-")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: u16 = 1;
    const NS: u16 = 2;
    const PTR: u16 = 12;
    const SRV: u16 = 33;

    fn scope(namespaces: &[&str]) -> Scope {
        Scope {
            zone: "cluster.local".into(),
            namespace: "shop".into(),
            namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
            networks: vec!["10.96.0.0/16".parse().unwrap(), "fd00:10:96::/112".parse().unwrap()],
            never: ["api.cluster.local".to_owned(), "login.prod".to_owned()].into(),
            forwards: Vec::new(),
        }
    }

    /// `=` the cluster alone, `+` certain, `?` beside the old resolver.
    fn decide(scope: &Scope, name: &str, kind: u16) -> String {
        let join = |names: &[Name]| names.iter().map(Name::to_string).collect::<Vec<_>>().join(" ");
        let rules = Rules::new(scope).unwrap();
        match rules.decide(&Name::parse(name).unwrap(), kind, |label| label == b"learned") {
            Decision::Cluster(names) => format!("= {}", join(&names)),
            Decision::Short { candidates, certain: true } => format!("+ {}", join(&candidates)),
            Decision::Short { candidates, certain: false } => format!("? {}", join(&candidates)),
            Decision::Forward(servers) => format!("forward {}", servers[0]),
            Decision::Upstream => "upstream".into(),
            Decision::Loopback => "loopback".into(),
            Decision::Proof => "proof".into(),
            Decision::NxDomain => "nxdomain".into(),
        }
    }

    fn check(scope: &Scope, table: &[(&str, u16, &str)]) {
        for (name, kind, expected) in table {
            assert_eq!(decide(scope, name, *kind), *expected, "{name} {kind}");
        }
    }

    #[test]
    fn without_the_list_of_namespaces() {
        check(
            &scope(&[]),
            &[
                ("web.shop.svc.cluster.local", A, "= web.shop.svc.cluster.local"),
                ("WEB.shop.SVC.cluster.local.", A, "= web.shop.svc.cluster.local"),
                ("cluster.local", 6, "= cluster.local"),
                ("www.example.com.shop.svc.cluster.local", A, "= www.example.com.shop.svc.cluster.local"),
                ("10-244-0-7.shop.pod.cluster.local", A, "= 10-244-0-7.shop.pod.cluster.local"),
                ("web.shop.svc", A, "= web.shop.svc.cluster.local"),
                ("pg-0.pgsql.shop.svc", A, "= pg-0.pgsql.shop.svc.cluster.local"),
                ("10-244-0-7.shop.pod", A, "= 10-244-0-7.shop.pod.cluster.local"),
                ("_http._tcp.web.shop.svc", SRV, "= _http._tcp.web.shop.svc.cluster.local"),
                ("web", A, "? web.shop.svc.cluster.local"),
                ("_http._tcp.web", SRV, "? _http._tcp.web.shop.svc.cluster.local"),
                ("web.shop", A, "+ web.shop.shop.svc.cluster.local web.shop.svc.cluster.local"),
                ("web.dev", A, "? web.dev.shop.svc.cluster.local web.dev.svc.cluster.local"),
                ("pg-0.pgsql", A, "? pg-0.pgsql.shop.svc.cluster.local pg-0.pgsql.svc.cluster.local"),
                ("pg-0.pgsql.shop", A, "? pg-0.pgsql.shop.svc.cluster.local"),
                ("pg-0.pgsql.dev", A, "upstream"),
                ("pg-0.pgsql.learned", A, "? pg-0.pgsql.learned.svc.cluster.local"),
                (
                    "_http._tcp.web.shop",
                    SRV,
                    "+ _http._tcp.web.shop.shop.svc.cluster.local _http._tcp.web.shop.svc.cluster.local",
                ),
            ],
        );
    }

    #[test]
    fn with_the_list_of_namespaces() {
        check(
            &scope(&["shop", "dev", "io", "com", "kube-system"]),
            &[
                ("web.dev", A, "+ web.dev.shop.svc.cluster.local web.dev.svc.cluster.local"),
                ("www.web.dev", A, "? www.web.dev.svc.cluster.local"),
                (
                    "kube-dns.kube-system",
                    A,
                    "+ kube-dns.kube-system.shop.svc.cluster.local kube-dns.kube-system.svc.cluster.local",
                ),
                ("github.com", A, "upstream"),
                ("crates.io", A, "upstream"),
                ("golang.page", A, "? golang.page.shop.svc.cluster.local golang.page.svc.cluster.local"),
            ],
        );
    }

    #[test]
    fn two_letters_are_a_country_unless_they_are_the_connected_namespace() {
        let qa = Scope { namespace: "qa".into(), ..scope(&["ci"]) };
        check(
            &qa,
            &[
                ("web.qa", A, "+ web.qa.qa.svc.cluster.local web.qa.svc.cluster.local"),
                ("web.ci", A, "upstream"),
                ("heise.de", A, "upstream"),
            ],
        );
    }

    #[test]
    fn leaves_everything_else_alone() {
        check(
            &scope(&[]),
            &[
                ("example.com", A, "upstream"),
                ("www.google.com", A, "upstream"),
                ("www.web.dev", A, "upstream"),
                ("printer.local", A, "upstream"),
                ("wpad.corp.example", A, "upstream"),
                ("_xmpp._tcp.example.org", SRV, "upstream"),
                ("_ldap._tcp.dc._msdcs.corp", SRV, "upstream"),
                ("under_score.shop", A, "upstream"),
                (".", NS, "upstream"),
                ("shop", NS, "upstream"),
                ("api.cluster.local", A, "upstream"),
                ("login.prod", A, "upstream"),
                ("8.8.8.8.in-addr.arpa", PTR, "upstream"),
                ("arpa", NS, "upstream"),
            ],
        );
    }

    #[test]
    fn special_names() {
        check(
            &scope(&[]),
            &[
                ("localhost", A, "loopback"),
                ("a.localhost", A, "loopback"),
                ("wpad", A, "nxdomain"),
                ("wpad.shop.svc.cluster.local", A, "nxdomain"),
                ("tpd-proof.cluster.local", A, "proof"),
                ("7.0.96.10.in-addr.arpa", PTR, "= 7.0.96.10.in-addr.arpa"),
                ("96.10.in-addr.arpa", PTR, "= 96.10.in-addr.arpa"),
                ("10.in-addr.arpa", PTR, "upstream"),
            ],
        );
    }

    #[test]
    fn the_longest_domain_with_servers_of_its_own_counts() {
        let forward = |domain: &str, server: &str| Forward {
            domain: domain.into(),
            servers: [server.parse().unwrap()].into(),
        };
        let mut scope = Scope {
            forwards: vec![
                forward("corp.example", "192.0.2.1:53"),
                forward("db.corp.example.", "192.0.2.2:53"),
                forward("shop.svc.cluster.local", "192.0.2.3:53"),
            ],
            never: ["login.corp.example".to_owned()].into(),
            ..scope(&[])
        };
        check(
            &scope,
            &[
                ("corp.example", A, "forward 192.0.2.1:53"),
                ("a.CORP.example", NS, "forward 192.0.2.1:53"),
                ("a.db.corp.example", A, "forward 192.0.2.2:53"),
                ("web.shop.svc.cluster.local", A, "forward 192.0.2.3:53"),
                ("login.corp.example", A, "upstream"),
                ("www.mycorp.example", A, "upstream"),
                ("localhost", A, "loopback"),
            ],
        );
        scope.forwards.push(forward(".", "192.0.2.4:53"));
        check(
            &scope,
            &[
                ("web", A, "forward 192.0.2.4:53"),
                (".", NS, "forward 192.0.2.4:53"),
                ("a.corp.example", A, "forward 192.0.2.1:53"),
                ("tpd-proof.cluster.local", A, "proof"),
            ],
        );
    }

    #[test]
    fn a_zone_of_another_name() {
        let scope = Scope { zone: "k8s.example".into(), ..scope(&[]) };
        check(
            &scope,
            &[
                ("web.shop.svc", A, "= web.shop.svc.k8s.example"),
                ("web.shop.svc.k8s.example", A, "= web.shop.svc.k8s.example"),
                ("web.shop.svc.cluster.local", A, "upstream"),
            ],
        );
    }

    #[test]
    fn knows_the_namespace_of_a_candidate() {
        let rules = Rules::new(&scope(&[])).unwrap();
        let namespace = |name: &str| rules.namespace_of(&Name::parse(name).unwrap());
        assert_eq!(namespace("web.dev.svc.cluster.local"), Some(b"dev".to_vec()));
        assert_eq!(namespace("pg-0.pgsql.dev.svc.cluster.local"), Some(b"dev".to_vec()));
        assert_eq!(namespace("svc.cluster.local"), None);
        assert_eq!(namespace("a.b.c.d.e"), None);
    }

    proptest! {
        #[test]
        fn never_expands_everybodys_names(host in "[a-z]{1,10}", tld in "(com|net|org|de|io)", kind in any::<u16>()) {
            let scope = scope(&["com", "net", "org", "de", "io"]);
            prop_assert_eq!(decide(&scope, &format!("{host}.{tld}"), kind), "upstream");
        }

        #[test]
        fn garbage_never_panics(wire in proptest::collection::vec(any::<u8>(), 0..300), kind in any::<u16>()) {
            if let Some((name, _)) = Name::read(&wire) {
                Rules::new(&scope(&["dev"])).unwrap().decide(&name, kind, |_| true);
            }
        }
    }
}
