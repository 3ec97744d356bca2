//! What the manager knows of its cluster: a value that watch events change and everything else reads.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use kube::runtime::watcher::Event;
use tpd_api::session::{ClientSessionStatus, Networks, Phase};
use tpd_netstack::key::PublicKey;

use super::endpoints::{self, Node, Ranked, Replica, UdpService};
use super::intercepts::world::{Known, Laptop};
use super::networks::{Blocks, compact};
use super::pool::Pool;
use super::registry::Request;
use super::store::{Store, is_older};

/// A ClientSession as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// What it asks for.
    pub request: Request,
    /// Version of the object, to write against.
    pub resource_version: String,
    /// Version of its spec.
    pub generation: Option<i64>,
    /// What it was answered.
    pub status: Option<ClientSessionStatus>,
}

/// The kinds of objects that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// ClientSessions of the manager's namespace.
    Sessions,
    /// The manager's own pods.
    Replicas,
    /// The replicas' UDP Services.
    Services,
    /// The cluster's nodes.
    Nodes,
    /// The cluster's ServiceCIDRs.
    ServiceCidrs,
    /// All pods of the cluster, for their addresses.
    Pods,
}

/// One step of a watch, by the name of the object.
#[derive(Clone, Debug)]
pub enum Change {
    /// A ClientSession.
    Session(Box<Event<(String, Session)>>),
    /// A pod of the manager.
    Replica(Event<(String, Replica)>),
    /// A replica's UDP Service.
    Service(Event<(String, UdpService)>),
    /// A node.
    Node(Event<(String, Node)>),
    /// The networks of a ServiceCIDR.
    ServiceCidr(Event<(String, Vec<IpNet>)>),
    /// The addresses of a pod that has some of its own.
    Pod(Event<(String, Vec<IpAddr>)>),
    /// The API server will not give these: no permission, or no such kind.
    Denied(Kind),
}

/// The cluster as it is known.
#[derive(Clone, Debug)]
pub struct Cluster {
    configured: Networks,
    sessions: Store<Session>,
    replicas: Store<Replica>,
    services: Store<UdpService>,
    nodes: Store<Node>,
    service_cidrs: Store<Vec<IpNet>>,
    blocks: Blocks,
    pods_settled: bool,
}

impl Cluster {
    /// Nothing is known but what was configured.
    #[must_use]
    pub fn new(configured: Networks, watch_pods: bool) -> Self {
        Self {
            configured,
            sessions: Store::default(),
            replicas: Store::default(),
            services: Store::default(),
            nodes: Store::default(),
            service_cidrs: Store::default(),
            blocks: Blocks::default(),
            pods_settled: !watch_pods,
        }
    }

    /// Takes in a change. Tells whether anything that matters is different now.
    pub fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Session(event) => self.sessions.apply(*event),
            Change::Replica(event) => self.replicas.apply(event),
            Change::Service(event) => self.services.apply(event),
            Change::Node(event) => self.nodes.apply(event),
            Change::ServiceCidr(event) => self.service_cidrs.apply(event),
            Change::Pod(event) => self.apply_pod(event),
            Change::Denied(kind) => self.give_up(kind),
        }
    }

    /// Takes in what the API server answered to a write, without waiting for the watch to tell. The watch may have been quicker,
    /// and have told of a later change too: nothing would tell of that again.
    pub fn written(&mut self, name: String, session: Session) {
        let is_news = self.sessions.items().get(&name).is_some_and(|old| {
            old.request.uid == session.request.uid
                && !is_older(&session.resource_version, &old.resource_version)
        });
        if is_news {
            self.sessions.put(name, session);
        }
    }

    /// Kinds whose first list is still awaited.
    #[must_use]
    pub fn awaited(&self) -> Vec<Kind> {
        let settled = [
            (Kind::Sessions, self.sessions.settled()),
            (Kind::Replicas, self.replicas.settled()),
            (Kind::Services, self.services.settled()),
            (Kind::Nodes, self.nodes.settled()),
            (Kind::ServiceCidrs, self.service_cidrs.settled()),
            (Kind::Pods, self.pods_settled),
        ];
        settled.into_iter().filter(|(_, settled)| !settled).map(|(kind, _)| kind).collect()
    }

    /// All sessions by name.
    #[must_use]
    pub fn sessions(&self) -> &BTreeMap<String, Session> {
        self.sessions.items()
    }

    /// All replicas by the name of their pods.
    #[must_use]
    pub fn replicas(&self) -> &BTreeMap<String, Replica> {
        self.replicas.items()
    }

    /// UIDs of the manager's pods, once they are known.
    #[must_use]
    pub fn alive(&self) -> Option<BTreeSet<String>> {
        let uids = self.replicas.items().values().map(|replica| replica.uid.clone());
        self.replicas.settled().then(|| uids.collect())
    }

    /// What intercepts need to know, with the installation that agents are to belong to.
    #[must_use]
    pub fn known(&self, installation: Option<String>) -> Known {
        let laptops = self.sessions.items().iter().map(|(name, session)| {
            let status = session.status.as_ref().filter(|status| status.phase == Phase::Ready);
            let laptop = Laptop {
                owner: session.request.owner.clone(),
                address: status.and_then(|status| status.address),
                keys: session.request.keys.iter().filter_map(|key| key.parse().ok()).collect(),
            };
            (name.clone(), laptop)
        });
        Known {
            laptops: self.sessions.settled().then(|| laptops.collect()),
            replicas: self.replicas.items().clone(),
            installation,
        }
    }

    /// The ways to the replicas.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Ranked> {
        endpoints::all(self.replicas.items(), self.services.items(), self.nodes.items())
    }

    /// The networks that are published.
    #[must_use]
    pub fn networks(&self) -> Networks {
        let nodes = self.nodes.items().values().flat_map(|node| &node.pod_networks);
        let services = self.service_cidrs.items().values().flatten();
        let services: Vec<_> = services.chain(&self.configured.services).copied().collect();
        Networks {
            pods: self.blocks.complete(nodes.chain(&self.configured.pods).copied()),
            services: compact(&services),
        }
    }

    /// Addresses of nodes.
    #[must_use]
    pub fn node_addresses(&self) -> HashSet<IpAddr> {
        let nodes = self.nodes.items().values();
        nodes.flat_map(|node| node.internal.iter().chain(&node.external)).copied().collect()
    }

    /// Who may speak WireGuard with the manager, and from which addresses. The oldest wins where two claim
    /// the same, until the leader has settled it.
    #[must_use]
    pub fn peers(&self, pool: Pool) -> BTreeMap<PublicKey, Vec<IpAddr>> {
        let mut sessions: Vec<_> = self.sessions.items().values().collect();
        sessions.sort_by_key(|session| (session.request.created, &session.request.uid));
        let mut peers = BTreeMap::new();
        let mut taken = BTreeSet::new();
        for session in sessions {
            let Some(status) = session.status.as_ref().filter(|status| status.phase == Phase::Ready) else {
                continue;
            };
            let Some(address) = status.address else { continue };
            if pool.host(address).is_none_or(|host| !taken.insert(host)) {
                continue;
            }
            for key in session.request.keys.iter().filter_map(|key| key.parse().ok()) {
                peers.entry(key).or_insert_with(|| vec![address.ipv4.into(), address.ipv6.into()]);
            }
        }
        peers
    }

    fn apply_pod(&mut self, event: Event<(String, Vec<IpAddr>)>) -> bool {
        match event {
            Event::Apply((_, addresses)) | Event::InitApply((_, addresses)) => {
                let news = addresses.into_iter().filter(|address| self.blocks.observe(*address)).count();
                news > 0
            }
            Event::InitDone => !std::mem::replace(&mut self.pods_settled, true),
            Event::Init | Event::Delete(_) => false,
        }
    }

    /// A session that cannot be listed is no reason to go on without; anything else is.
    fn give_up(&mut self, kind: Kind) -> bool {
        match kind {
            Kind::Sessions => false,
            Kind::Replicas => self.replicas.give_up(),
            Kind::Services => self.services.give_up(),
            Kind::Nodes => self.nodes.give_up(),
            Kind::ServiceCidrs => self.service_cidrs.give_up(),
            Kind::Pods => !std::mem::replace(&mut self.pods_settled, true),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use kube::runtime::watcher::Event;
    use tpd_api::overlay::DualAddress;
    use tpd_api::session::{ClientSessionStatus, Networks, Phase};
    use tpd_netstack::key::PublicKey;

    use super::{Change, Cluster, Kind, Node, Pool, Request, Session};

    fn pool() -> Pool {
        Pool::new("10.9.8.0/24".parse().unwrap(), "fd09::/64".parse().unwrap())
    }

    fn session(name: &str, created: i64, key: u8, address: Option<DualAddress>) -> (String, Session) {
        let request = Request {
            name: name.into(),
            uid: format!("uid-{name}"),
            owner: "alice".into(),
            host: String::new(),
            created: Timestamp::from_second(created).unwrap(),
            keys: vec![PublicKey([key; 32]).to_string()],
            address,
        };
        let phase = if address.is_some() { Phase::Ready } else { Phase::Rejected };
        let status = ClientSessionStatus { phase, address, ..ClientSessionStatus::default() };
        (
            name.into(),
            Session { request, resource_version: "1".into(), generation: None, status: Some(status) },
        )
    }

    fn cluster() -> Cluster {
        let services = vec!["10.96.0.0/16".parse().unwrap()];
        Cluster::new(Networks { pods: vec![], services }, true)
    }

    #[test]
    fn it_is_known_what_is_awaited() {
        let mut cluster = cluster();
        assert_eq!(cluster.awaited().len(), 6);
        assert!(cluster.apply(Change::Session(Box::new(Event::InitDone))));
        assert!(cluster.apply(Change::Denied(Kind::Nodes)));
        assert!(!cluster.apply(Change::Denied(Kind::Nodes)), "that is no news");
        assert!(cluster.apply(Change::Pod(Event::InitDone)));
        assert_eq!(cluster.awaited(), [Kind::Replicas, Kind::Services, Kind::ServiceCidrs]);
        cluster.apply(Change::Denied(Kind::Sessions));
        assert!(!cluster.awaited().contains(&Kind::Sessions));
    }

    #[test]
    fn sessions_are_never_gone_without() {
        let mut cluster = cluster();
        cluster.apply(Change::Denied(Kind::Sessions));
        assert!(cluster.awaited().contains(&Kind::Sessions));
    }

    #[test]
    fn networks_come_from_everywhere() {
        let mut cluster = cluster();
        let node = Node {
            internal: vec!["192.168.1.10".parse().unwrap()],
            pod_networks: vec!["10.244.0.0/24".parse().unwrap()],
            ..Node::default()
        };
        cluster.apply(Change::Node(Event::Apply(("n".into(), node))));
        cluster.apply(Change::ServiceCidr(Event::Apply((
            "k".into(),
            vec!["fd00:10:96::/112".parse().unwrap()],
        ))));
        let pod = |address: &str| Change::Pod(Event::Apply(("p".into(), vec![address.parse().unwrap()])));
        assert!(cluster.apply(pod("172.20.3.9")));
        assert!(!cluster.apply(pod("172.20.3.10")));
        let networks = cluster.networks();
        let text: Vec<_> = networks.all().map(|network| network.to_string()).collect();
        assert_eq!(text, ["10.244.0.0/24", "172.20.3.0/24", "10.96.0.0/16", "fd00:10:96::/112"]);
        assert!(cluster.node_addresses().contains(&"192.168.1.10".parse().unwrap()));
    }

    #[test]
    fn peers_are_the_sessions_that_were_answered() {
        let mut cluster = cluster();
        let foreign = DualAddress { ipv4: "10.0.0.1".parse().unwrap(), ipv6: "fd00::1".parse().unwrap() };
        for (name, session) in [
            session("ready", 2, 1, Some(pool().address(5))),
            session("rejected", 1, 2, None),
            session("foreign", 1, 3, Some(foreign)),
            session("same-address", 3, 4, Some(pool().address(5))),
            session("same-key", 4, 1, Some(pool().address(6))),
        ] {
            cluster.apply(Change::Session(Box::new(Event::Apply((name, session)))));
        }
        let peers = cluster.peers(pool());
        assert_eq!(peers.len(), 1);
        let address = pool().address(5);
        assert_eq!(peers[&PublicKey([1; 32])], [address.ipv4.into(), std::net::IpAddr::from(address.ipv6)]);
    }

    #[test]
    fn an_answer_to_a_write_never_revives_a_session() {
        let mut cluster = cluster();
        let (name, session) = session("gone", 1, 1, None);
        cluster.written(name, session);
        assert!(cluster.sessions().is_empty());
    }

    #[test]
    fn an_answer_that_comes_late_undoes_no_later_change() {
        let version = |version: &str, key| {
            let (name, session) = session("a", 1, key, None);
            (name, Session { resource_version: version.into(), ..session })
        };
        let mut cluster = cluster();
        cluster.apply(Change::Session(Box::new(Event::Apply(version("11", 2)))));
        let (name, late) = version("10", 1);
        cluster.written(name, late);
        assert_eq!(cluster.sessions()["a"].request.keys, [PublicKey([2; 32]).to_string()]);
    }
}
