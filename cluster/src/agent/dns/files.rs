//! /etc/hosts and /etc/resolv.conf, as the pod has them (hosts(5), resolv.conf(5)).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::rr::Name;

/// Most addresses of hosts that are known. A kubelet writes a dozen, and what `hostAliases` holds.
const MAX_HOSTS: usize = 4096;

/// Most name servers that a resolver asks (`MAXNS`).
const MAX_SERVERS: usize = 3;

/// Most search domains; Kubernetes allows 32 in a pod.
const MAX_SEARCH: usize = 32;

/// Greatest `ndots`, as resolvers cap it (`RES_MAXNDOTS`).
const MAX_NDOTS: u8 = 15;

/// Longest that one server is waited for, and the most times that all are asked. Resolvers of the asker wait five seconds.
const MAX_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_ATTEMPTS: u8 = 2;

/// Port of name servers.
const PORT: u16 = 53;

/// Names of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hosts(Vec<(IpAddr, Vec<Name>)>);

impl Hosts {
    /// Reads /etc/hosts. Lines that make no sense are left out.
    pub(super) fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(host).take(MAX_HOSTS).collect())
    }

    /// Addresses of a name; `None` if it is not here.
    pub(super) fn addresses(&self, name: &Name) -> Option<Vec<IpAddr>> {
        let named = self.0.iter().filter(|(_, names)| names.contains(name));
        let addresses: Vec<_> = named.map(|(address, _)| *address).collect();
        (!addresses.is_empty()).then_some(addresses)
    }

    /// The first name of an address.
    pub(super) fn name(&self, address: IpAddr) -> Option<&Name> {
        let (_, names) = self.0.iter().find(|(known, _)| *known == address)?;
        names.first()
    }
}

fn host(line: &str) -> Option<(IpAddr, Vec<Name>)> {
    let mut words = line.split('#').next()?.split_whitespace();
    let address = words.next()?.parse().ok()?;
    let names: Vec<_> = words.filter_map(absolute).collect();
    (!names.is_empty()).then_some((address, names))
}

/// A name that is complete, whether or not it ends with a dot.
fn absolute(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// How the pod's programs resolve names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resolver {
    /// In the order that they are asked.
    pub(super) servers: Vec<SocketAddr>,
    /// Domains that short names may be below.
    pub(super) search: Vec<Name>,
    /// A name with fewer dots is looked for in those domains first.
    pub(super) ndots: u8,
    /// For one server to answer.
    pub(super) timeout: Duration,
    /// How many times all are asked.
    pub(super) attempts: u8,
}

impl Default for Resolver {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            search: Vec::new(),
            ndots: 1,
            timeout: MAX_TIMEOUT,
            attempts: MAX_ATTEMPTS,
        }
    }
}

impl Resolver {
    /// Reads /etc/resolv.conf. What makes no sense is left out.
    pub(super) fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => resolver.servers.extend(words.next().and_then(server)),
                Some("search") => resolver.search = words.filter_map(absolute).take(MAX_SEARCH).collect(),
                Some("domain") => resolver.search = words.filter_map(absolute).take(1).collect(),
                Some("options") => words.for_each(|word| resolver.option(word)),
                _ => {}
            }
        }
        resolver.servers.truncate(MAX_SERVERS);
        resolver
    }

    fn option(&mut self, word: &str) {
        let Some((name, value)) = word.split_once(':') else { return };
        let Ok(value) = value.parse::<u8>() else { return };
        match name {
            "ndots" => self.ndots = value.min(MAX_NDOTS),
            "timeout" => self.timeout = Duration::from_secs(value.max(1).into()).min(MAX_TIMEOUT),
            "attempts" => self.attempts = value.clamp(1, MAX_ATTEMPTS),
            _ => {}
        }
    }

    /// What a program of the pod would ask for, one after another, when it looks for a name.
    pub(super) fn candidates(&self, name: &Name) -> Vec<Name> {
        let dots = name.num_labels().saturating_sub(1);
        let mut candidates: Vec<_> =
            self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok()).collect();
        let place = if dots >= self.ndots { 0 } else { candidates.len() };
        candidates.insert(place, name.clone());
        candidates
    }
}

fn server(text: &str) -> Option<SocketAddr> {
    Some((text.parse::<IpAddr>().ok()?, PORT).into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hickory_proto::rr::Name;

    use super::{Hosts, Resolver, absolute};

    fn name(text: &str) -> Name {
        absolute(text).unwrap()
    }

    #[test]
    fn hosts_are_read_as_a_kubelet_writes_them() {
        let hosts = Hosts::parse(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n\
             10.244.0.7\tweb-1.web.shop.svc.cluster.local\tweb-1\n\n# Entries added by HostAliases.\n\
             10.1.2.3\tlegacy.corp Other.corp # old\nnonsense\n10.1.2.4\n",
        );
        let of = |text| hosts.addresses(&name(text)).map(|found| found.len());
        assert_eq!(
            (of("localhost"), of("WEB-1"), of("other.corp"), of("old")),
            (Some(2), Some(1), Some(1), None)
        );
        assert_eq!(hosts.name("10.1.2.3".parse().unwrap()), Some(&name("legacy.corp")));
        assert_eq!(hosts.name("10.1.2.4".parse().unwrap()), None);
    }

    #[test]
    fn short_names_are_looked_for_as_programs_do() {
        let resolver = Resolver::parse(
            "search shop.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\nnameserver fd00::a\n\
             nameserver nonsense\noptions ndots:2 timeout:30 edns0 attempts:9\n",
        );
        assert_eq!(resolver.servers, ["10.96.0.10:53".parse().unwrap(), "[fd00::a]:53".parse().unwrap()]);
        assert_eq!((resolver.timeout, resolver.attempts), (Duration::from_secs(2), 2));
        let candidates =
            |text| -> Vec<String> { resolver.candidates(&name(text)).iter().map(Name::to_ascii).collect() };
        let inside = ["db.shop.svc.cluster.local.", "db.svc.cluster.local.", "db."];
        assert_eq!(candidates("db"), inside);
        let outside = ["a.b.c.", "a.b.c.shop.svc.cluster.local.", "a.b.c.svc.cluster.local."];
        assert_eq!(candidates("a.b.c"), outside);
        assert_eq!(Resolver::parse("garbage").candidates(&name("db")), [name("db")]);
    }
}
