//! What a session may reach: the published networks and the cluster's DNS, and nothing else.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use tpd_api::overlay::{DNS_PORT, DualAddress};
use tpd_netstack::flow::{Protocol, Route};

/// The manager's answer to every destination. A value: it is replaced when the cluster changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The overlay's addresses of the manager.
    pub gateway: DualAddress,
    /// The overlay itself: a session does not reach another.
    pub pools: [IpNet; 2],
    /// The resolver that the gateway's DNS port leads to.
    pub resolver: Option<IpAddr>,
    /// Networks of pods and services.
    pub published: Vec<IpNet>,
    /// Addresses that are never dialled though a published network has them: nodes, this pod, and the other managers'.
    pub refused: HashSet<IpAddr>,
}

/// Never dialled, whoever publishes them: they mean something else to the manager than to the laptop, or reach the
/// cloud's metadata service, which hands out credentials.
const NEVER: [&str; 11] = [
    "0.0.0.0/8",          // this network (RFC 1122)
    "127.0.0.0/8",        // loopback
    "169.254.0.0/16",     // link-local, and 169.254.169.254
    "224.0.0.0/4",        // multicast
    "255.255.255.255/32", // broadcast
    "::/96",              // unspecified, loopback, IPv4-compatible (RFC 4291)
    "::ffff:0:0/96",      // IPv4-mapped: would be dialled as IPv4, past the rules above
    "64:ff9b::/96",       // IPv4 behind NAT64 (RFC 6052): the same
    "fe80::/10",          // link-local
    "fd00:ec2::/32",      // metadata service of AWS
    "ff00::/8",           // multicast
];

impl Policy {
    /// What becomes of a flow to this destination.
    #[must_use]
    pub fn route(&self, protocol: Protocol, destination: SocketAddr) -> Route {
        let address = destination.ip();
        if self.is_gateway(address) {
            return self.at_gateway(protocol, destination);
        }
        let allowed = !never(address)
            && !self.refused.contains(&address)
            && !self.pools.iter().any(|pool| pool.contains(&address))
            && self.published.iter().any(|network| network.contains(&address));
        if allowed { Route::Dial(destination) } else { Route::Prohibited }
    }

    /// The gateway answers pings, which tell how far away the manager is, and DNS. The resolver is this pod's own,
    /// so it may be where no session may go: node-local DNS is link-local.
    fn at_gateway(&self, protocol: Protocol, destination: SocketAddr) -> Route {
        match (protocol, self.resolver) {
            (Protocol::Icmp, _) if destination.is_ipv4() => Route::Dial((Ipv4Addr::LOCALHOST, 0).into()),
            (Protocol::Icmp, _) => Route::Dial((Ipv6Addr::LOCALHOST, 0).into()),
            _ if destination.port() != DNS_PORT => Route::Prohibited,
            (_, Some(resolver)) => Route::Dial((resolver, DNS_PORT).into()),
            (_, None) => Route::Unreachable,
        }
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        address == IpAddr::V4(self.gateway.ipv4) || address == IpAddr::V6(self.gateway.ipv6)
    }
}

fn never(address: IpAddr) -> bool {
    static NETWORKS: std::sync::LazyLock<[IpNet; NEVER.len()]> = std::sync::LazyLock::new(|| {
        NEVER.map(|network| network.parse().expect("a network of the table above"))
    });
    NETWORKS.iter().any(|network| network.contains(&address))
}

#[cfg(test)]
mod tests {
    use tpd_api::overlay::{DEFAULT_POOL_V4, DEFAULT_POOL_V6, gateway};
    use tpd_netstack::flow::{Protocol, Route};

    use super::Policy;

    fn policy(published: &[&str]) -> Policy {
        Policy {
            gateway: gateway(DEFAULT_POOL_V4, DEFAULT_POOL_V6),
            pools: [DEFAULT_POOL_V4.into(), DEFAULT_POOL_V6.into()],
            resolver: Some("10.96.0.10".parse().unwrap()),
            published: published.iter().map(|net| net.parse().unwrap()).collect(),
            refused: ["10.244.0.7", "192.168.1.10"].map(|address| address.parse().unwrap()).into(),
        }
    }

    #[test]
    fn published_networks_are_reached_as_they_are() {
        let policy = policy(&["10.244.0.0/16", "fd00:10:96::/112"]);
        for destination in ["10.244.3.4:80", "[fd00:10:96::a]:53", "10.244.0.8:0"] {
            let destination = destination.parse().unwrap();
            assert_eq!(policy.route(Protocol::Tcp, destination), Route::Dial(destination));
        }
    }

    #[test]
    fn all_else_is_prohibited() {
        let policy = policy(&["10.244.0.0/16", "192.168.1.0/24"]);
        for destination in [
            "1.1.1.1:443",
            "10.243.255.255:80",
            "10.244.0.7:8080",   // this pod
            "192.168.1.10:6443", // a node, though its network is published
            "100.127.0.2:22",    // another session
            "[fd74:7064::2]:22",
            "100.127.0.1:80", // the gateway has DNS only
            "[fd74:7064::1]:8443",
        ] {
            assert_eq!(
                policy.route(Protocol::Tcp, destination.parse().unwrap()),
                Route::Prohibited,
                "{destination}"
            );
        }
    }

    #[test]
    fn publishing_everything_does_not_open_what_must_stay_shut() {
        let policy = policy(&["0.0.0.0/0", "::/0"]);
        for destination in [
            "127.0.0.1:8080",
            "127.8.8.8:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "169.254.169.254:80",
            "224.0.0.251:5353",
            "239.1.1.1:9",
            "255.255.255.255:67",
            "[::]:80",
            "[::1]:8080",
            "[::7f00:1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:169.254.169.254]:80",
            "[::ffff:10.244.0.7]:80",
            "[64:ff9b::a9fe:a9fe]:80",
            "[fe80::1]:80",
            "[fd00:ec2::254]:80",
            "[ff02::1]:80",
            "10.244.0.7:8443",
            "100.127.9.9:80",
        ] {
            assert_eq!(
                policy.route(Protocol::Tcp, destination.parse().unwrap()),
                Route::Prohibited,
                "{destination}"
            );
        }
        let elsewhere = "10.1.2.3:80".parse().unwrap();
        assert_eq!(policy.route(Protocol::Tcp, elsewhere), Route::Dial(elsewhere));
    }

    #[test]
    fn the_gateways_dns_port_leads_to_the_pods_resolver() {
        let mut policy = policy(&[]);
        let resolver = Route::Dial("10.96.0.10:53".parse().unwrap());
        assert_eq!(policy.route(Protocol::Tcp, "100.127.0.1:53".parse().unwrap()), resolver);
        assert_eq!(policy.route(Protocol::Tcp, "[fd74:7064::1]:53".parse().unwrap()), resolver);
        assert_eq!(policy.route(Protocol::Udp, "100.127.0.1:53".parse().unwrap()), resolver);
        policy.resolver = None;
        assert_eq!(policy.route(Protocol::Tcp, "100.127.0.1:53".parse().unwrap()), Route::Unreachable);
    }

    #[test]
    fn the_gateway_answers_pings() {
        let echo = |address: &str| {
            policy(&[]).route(Protocol::Icmp, (address.parse::<std::net::IpAddr>().unwrap(), 0).into())
        };
        assert_eq!(echo("100.127.0.1"), Route::Dial("127.0.0.1:0".parse().unwrap()));
        assert_eq!(echo("fd74:7064::1"), Route::Dial("[::1]:0".parse().unwrap()));
        assert_eq!(echo("100.127.0.2"), Route::Prohibited);
    }
}
