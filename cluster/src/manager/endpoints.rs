//! The ways to the replicas, as a session is told of them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tpd_api::STREAM_PORT;
use tpd_api::session::Endpoint;

use super::pool::fnv1a;

/// A pod of the manager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Name of the pod.
    pub name: String,
    /// UID of the pod.
    pub uid: String,
    /// Node it runs on, once scheduled.
    pub node: Option<String>,
    /// Its addresses, once it has some.
    pub addresses: Vec<IpAddr>,
    /// Whether it passes its readiness probe.
    pub ready: bool,
    /// Whether it is being deleted, or has ended.
    pub leaving: bool,
}

/// The UDP Service of one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpService {
    /// The Service's own port, which load balancers listen on.
    pub port: u16,
    /// The port that every node listens on.
    pub node_port: Option<u16>,
    /// Addresses or names of load balancers.
    pub balancers: Vec<String>,
    /// Whether a node forwards only to its own pods (`externalTrafficPolicy: Local`).
    pub local: bool,
}

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Addresses that the world knows.
    pub external: Vec<IpAddr>,
    /// Addresses within the cluster's own network.
    pub internal: Vec<IpAddr>,
    /// Networks that its pods are numbered from.
    pub pod_networks: Vec<ipnet::IpNet>,
}

/// Nodes beside its own whose port is named as a way to a replica. One that a laptop can reach is enough; two more
/// are for the case that the first is down, and each one costs a probe.
const OTHER_NODES: usize = 3;

/// The ways to one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranked {
    ready: bool,
    endpoint: Endpoint,
}

/// The ways to every replica that runs or starts.
#[must_use]
pub fn all(
    replicas: &BTreeMap<String, Replica>,
    services: &BTreeMap<String, UdpService>,
    nodes: &BTreeMap<String, Node>,
) -> Vec<Ranked> {
    let present = replicas.values().filter(|replica| !replica.leaving);
    present
        .map(|replica| {
            let udp = services.get(&replica.name).map(|service| udp(replica, service, nodes));
            let endpoint =
                Endpoint { pod: replica.name.clone(), port: STREAM_PORT, udp: udp.unwrap_or_default() };
            Ranked { ready: replica.ready, endpoint }
        })
        .collect()
}

/// The order for one session: ready replicas first, and among those each session its own favourite,
/// which stays when others come and go (rendezvous hashing).
#[must_use]
pub fn ordered(session: &str, all: &[Ranked]) -> Vec<Endpoint> {
    let mut ranked: Vec<_> = all.iter().collect();
    ranked.sort_by_cached_key(|ranked| (!ranked.ready, fnv1a(&format!("{session}/{}", ranked.endpoint.pod))));
    ranked.into_iter().map(|ranked| ranked.endpoint.clone()).collect()
}

fn udp(replica: &Replica, service: &UdpService, nodes: &BTreeMap<String, Node>) -> Vec<String> {
    let balancers = service.balancers.iter().map(|host| authority(host, service.port));
    let on_nodes = service.node_port.into_iter().flat_map(|port| {
        let addresses = reachable(replica, service.local, nodes);
        addresses.into_iter().map(move |address| authority(&address.to_string(), port))
    });
    balancers.chain(on_nodes).collect()
}

/// Addresses of the replica's own node, then of a few others, the external ones of each first.
fn reachable(replica: &Replica, local: bool, nodes: &BTreeMap<String, Node>) -> Vec<IpAddr> {
    let is_own = |name: &&String| replica.node.as_ref() == Some(*name);
    let own = nodes.iter().filter(|(name, _)| is_own(name));
    let others = nodes.iter().filter(|(name, _)| !is_own(name)).take(if local { 0 } else { OTHER_NODES });
    own.chain(others).flat_map(|(_, node)| node.external.iter().chain(&node.internal)).copied().collect()
}

/// `host:port`, with the brackets that an IPv6 address needs.
fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{Node, Replica, UdpService, all, ordered};

    fn replica(name: &str, node: &str, ready: bool) -> (String, Replica) {
        let replica = Replica {
            name: name.into(),
            uid: format!("uid-{name}"),
            node: Some(node.into()),
            addresses: vec![],
            ready,
            leaving: false,
        };
        (name.into(), replica)
    }

    fn node(name: &str, external: &[&str], internal: &[&str]) -> (String, Node) {
        let parse = |list: &[&str]| list.iter().map(|address| address.parse().unwrap()).collect();
        (name.into(), Node { external: parse(external), internal: parse(internal), pod_networks: vec![] })
    }

    fn service(name: &str, service: UdpService) -> BTreeMap<String, UdpService> {
        [(name.to_owned(), service)].into()
    }

    #[test]
    fn load_balancers_come_first_and_the_own_node_before_others() {
        let replicas = [replica("tpd-manager-0", "b", true)].into();
        let nodes =
            [node("a", &[], &["10.0.0.1"]), node("b", &["203.0.113.2"], &["10.0.0.2", "fd00::2"])].into();
        let udp = UdpService {
            port: 51820,
            node_port: Some(31000),
            balancers: vec!["198.51.100.7".into(), "lb.example".into()],
            local: false,
        };
        let endpoints = ordered("s", &all(&replicas, &service("tpd-manager-0", udp.clone()), &nodes));
        assert_eq!(
            endpoints[0].udp,
            [
                "198.51.100.7:51820",
                "lb.example:51820",
                "203.0.113.2:31000",
                "10.0.0.2:31000",
                "[fd00::2]:31000",
                "10.0.0.1:31000",
            ],
        );
        let local = UdpService { local: true, balancers: vec![], ..udp };
        let endpoints = ordered("s", &all(&replicas, &service("tpd-manager-0", local), &nodes));
        assert_eq!(endpoints[0].udp, ["203.0.113.2:31000", "10.0.0.2:31000", "[fd00::2]:31000"]);
    }

    #[test]
    fn a_replica_without_a_service_has_its_streams() {
        let replicas = [replica("tpd-manager-0", "a", true)].into();
        let endpoints = ordered("s", &all(&replicas, &BTreeMap::new(), &BTreeMap::new()));
        assert_eq!((endpoints[0].port, endpoints[0].udp.len()), (8443, 0));
    }

    #[test]
    fn sessions_spread_over_the_ready_and_keep_their_favourite() {
        let names = ["tpd-manager-0", "tpd-manager-1", "tpd-manager-2"];
        let three: BTreeMap<_, _> = names.map(|name| replica(name, "a", true)).into();
        let favourite = |session: &str, replicas: &BTreeMap<String, Replica>| {
            let endpoints = ordered(session, &all(replicas, &BTreeMap::new(), &BTreeMap::new()));
            endpoints[0].pod.clone()
        };
        let sessions: Vec<_> = (0..60).map(|n| format!("session-{n}")).collect();
        for name in names {
            let count = sessions.iter().filter(|session| favourite(session, &three) == name).count();
            assert!((8..=34).contains(&count), "{name} carries {count} of 60");
        }
        let mut two = three.clone();
        two.get_mut("tpd-manager-1").unwrap().leaving = true;
        let mut starting = three.clone();
        starting.get_mut("tpd-manager-1").unwrap().ready = false;
        for session in &sessions {
            let before = favourite(session, &three);
            for fewer in [&two, &starting] {
                let now = favourite(session, fewer);
                assert!(now == before || before == "tpd-manager-1", "{session}");
                assert_ne!(now, "tpd-manager-1");
            }
        }
    }
}
