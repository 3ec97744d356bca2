//! What several managers say, taken together: which configuration is in force, who carries a laptop, whom to connect to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddr};
use std::rc::Rc;

use tpd_api::agent::{Config, Intercept};

/// Most managers that an agent connects to. Three replicas are many; a configuration that names more is not followed beyond it.
pub const MAX_MANAGERS: usize = 16;

/// A manager that an agent is connected to, and has heard a configuration from.
#[derive(Clone, Debug)]
pub struct Manager {
    /// Its latest configuration.
    pub config: Rc<Config>,
    /// Laptops that it carries.
    pub carries: BTreeSet<Ipv6Addr>,
}

impl Manager {
    /// Its own address, whatever was dialled: by the Service's, one comes to any of them.
    #[must_use]
    pub fn own_address(&self) -> SocketAddr {
        self.config.manager.stream
    }
}

/// All managers, by the address that was dialled.
#[derive(Debug)]
pub struct Managers {
    /// The managers' Service, where a first one is found.
    service: SocketAddr,
    connected: BTreeMap<SocketAddr, Manager>,
    /// Of the last configuration in force: where to find managers after the last of them is lost.
    replicas: BTreeSet<SocketAddr>,
}

impl Managers {
    /// None yet but the Service.
    #[must_use]
    pub fn new(service: SocketAddr) -> Self {
        Self { service, connected: BTreeMap::new(), replicas: BTreeSet::new() }
    }

    /// One has sent a configuration.
    pub fn configured(&mut self, manager: SocketAddr, config: Config) {
        let config = Rc::new(config);
        match self.connected.get_mut(&manager) {
            Some(known) => known.config = config,
            None => {
                self.connected.insert(manager, Manager { config, carries: BTreeSet::new() });
            }
        }
        if let Some(config) = self.in_force() {
            self.replicas =
                config.replicas.iter().map(|replica| replica.address).take(MAX_MANAGERS).collect();
        }
    }

    /// One has said which laptops it carries. Those that it carries only now are returned.
    pub fn carried(&mut self, manager: SocketAddr, laptops: Vec<Ipv6Addr>) -> Vec<Ipv6Addr> {
        let Some(known) = self.connected.get_mut(&manager) else { return Vec::new() };
        let laptops: BTreeSet<_> = laptops.into_iter().collect();
        let new = laptops.difference(&known.carries).copied().collect();
        known.carries = laptops;
        new
    }

    /// The connection to one is lost.
    pub fn lost(&mut self, manager: SocketAddr) {
        self.connected.remove(&manager);
    }

    /// The configuration that counts: the newest that a connected manager has sent. Where two are as new, both say the same.
    #[must_use]
    pub fn in_force(&self) -> Option<&Rc<Config>> {
        self.connected.values().map(|manager| &manager.config).max_by_key(|config| config.revision)
    }

    /// What is to be carried out.
    #[must_use]
    pub fn intercepts(&self) -> &[Intercept] {
        self.in_force().map_or(&[], |config| &config.intercepts)
    }

    /// Every connected manager, by the address that was dialled.
    pub fn connected(&self) -> impl Iterator<Item = (&SocketAddr, &Manager)> {
        self.connected.iter()
    }

    /// Managers that carry a laptop, by their own addresses.
    #[must_use]
    pub fn carriers(&self, laptop: Ipv6Addr) -> BTreeSet<SocketAddr> {
        let carriers = self.connected.values().filter(|manager| manager.carries.contains(&laptop));
        carriers.map(Manager::own_address).collect()
    }

    /// Where there should be a connection, or an attempt at one: at every replica, and at the Service while no replica is known to
    /// live. Behind the Service is one of the replicas; that one isn't asked twice. A replica that is named no longer is left when
    /// it leaves: it may still carry laptops.
    #[must_use]
    pub fn wanted(&self) -> BTreeSet<SocketAddr> {
        let behind_service = self.connected.get(&self.service).map(Manager::own_address);
        let directly = |replica: &SocketAddr| self.connected.contains_key(replica);
        let mut wanted: BTreeSet<_> = (self.replicas.iter().chain(self.connected.keys()))
            .filter(|replica| **replica != self.service)
            .filter(|replica| Some(**replica) != behind_service || directly(replica))
            .copied()
            .collect();
        let keeps_service = match behind_service {
            Some(replica) => !directly(&replica),
            None => self.connected.is_empty(),
        };
        if keeps_service {
            wanted.insert(self.service);
        }
        wanted
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{Ipv6Addr, SocketAddr};

    use tpd_api::agent::{Config, Intercept, Manager, Mode, Replica};
    use tpd_api::filter::Filter;

    use super::Managers;

    const SERVICE: &str = "10.96.0.9:443";

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A configuration of the manager at `own`, without intercepts.
    pub(crate) fn config(revision: u64, own: &str, replicas: &[&str]) -> Config {
        let gateway: Ipv6Addr = "fd74::1".parse().unwrap();
        Config {
            generation: 1,
            revision,
            workload: "deployment/web".into(),
            address: "fd74::8000:0:0:1".parse().unwrap(),
            manager: Manager { key: "k".into(), gateway, udp: address(own), stream: address(own) },
            replicas: replicas
                .iter()
                .map(|replica| Replica { pod: (*replica).into(), address: address(replica) })
                .collect(),
            services: Vec::new(),
            intercepts: Vec::new(),
        }
    }

    /// An intercept of nothing.
    pub(crate) fn intercept(uid: &str, laptop: &str) -> Intercept {
        Intercept {
            uid: uid.into(),
            name: uid.into(),
            generation: 1,
            laptop: laptop.parse().unwrap(),
            ports: Vec::new(),
            filter: Filter::default(),
            mode: Mode::Intercept,
            proxy_protocol: false,
            environment: None,
        }
    }

    fn wanted(managers: &Managers) -> Vec<String> {
        managers.wanted().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_newest_configuration_counts_while_its_manager_is_there() {
        let (a, b) = (address("10.0.0.1:8443"), address("10.0.0.2:8443"));
        let mut managers = Managers::new(address(SERVICE));
        assert!(managers.in_force().is_none());
        managers.configured(a, config(5, "10.0.0.1:8443", &[]));
        managers.configured(b, config(9, "10.0.0.2:8443", &[]));
        assert_eq!(managers.in_force().unwrap().revision, 9);
        managers.configured(a, config(7, "10.0.0.1:8443", &[]));
        assert_eq!(managers.in_force().unwrap().revision, 9);
        managers.lost(b);
        assert_eq!(managers.in_force().unwrap().revision, 7);
        managers.lost(a);
        assert!(managers.in_force().is_none());
    }

    #[test]
    fn a_laptop_is_carried_by_whom_says_so_last() {
        let (a, b) = (address("10.0.0.1:8443"), address("10.0.0.2:8443"));
        let (one, two): (Ipv6Addr, Ipv6Addr) = ("fd74::2".parse().unwrap(), "fd74::3".parse().unwrap());
        let mut managers = Managers::new(address(SERVICE));
        assert!(managers.carried(a, vec![one]).is_empty(), "nothing counts before a configuration");
        managers.configured(a, config(1, "10.0.0.1:8443", &[]));
        managers.configured(b, config(1, "10.0.0.2:8443", &[]));
        assert_eq!(managers.carried(a, vec![one]), [one]);
        assert_eq!(managers.carried(a, vec![one, two]), [two]);
        assert_eq!(managers.carried(b, vec![two]), [two]);
        assert_eq!(managers.carriers(two), [a, b].into());
        managers.lost(a);
        assert!(managers.carriers(one).is_empty());
        assert_eq!(managers.carriers(two), [b].into());
    }

    #[test]
    fn a_manager_that_is_reached_by_two_addresses_carries_a_laptop_once() {
        let (service, own) = (address(SERVICE), address("10.0.0.1:8443"));
        let laptop: Ipv6Addr = "fd74::2".parse().unwrap();
        let mut managers = Managers::new(service);
        for dialled in [service, own] {
            managers.configured(dialled, config(1, "10.0.0.1:8443", &[]));
            managers.carried(dialled, vec![laptop]);
        }
        assert_eq!(managers.carriers(laptop), [own].into());
        managers.lost(service);
        assert_eq!(managers.carriers(laptop), [own].into());
    }

    #[test]
    fn every_replica_is_dialled_once_and_the_service_when_none_lives() {
        let (service, a, b) = (address(SERVICE), "10.0.0.1:8443", "10.0.0.2:8443");
        let mut managers = Managers::new(service);
        assert_eq!(wanted(&managers), [SERVICE]);

        managers.configured(service, config(1, a, &[a, b]));
        assert_eq!(wanted(&managers), [b, SERVICE], "behind the Service is the first");
        managers.configured(address(b), config(1, b, &[a, b]));
        assert_eq!(wanted(&managers), [b, SERVICE]);

        managers.lost(service);
        assert_eq!(wanted(&managers), [a, b]);
        managers.configured(address(a), config(1, a, &[a, b]));
        assert_eq!(wanted(&managers), [a, b]);

        managers.configured(address(b), config(2, b, &[b]));
        assert_eq!(wanted(&managers), [a, b], "a replica that leaves is left when it does");
        managers.lost(address(a));
        assert_eq!(wanted(&managers), [b]);
        managers.lost(address(b));
        assert_eq!(wanted(&managers), [b, SERVICE]);

        managers.configured(service, config(3, b, &[b]));
        managers.configured(address(b), config(3, b, &[b]));
        assert_eq!(wanted(&managers), [b], "the direct way is kept where both came through");
    }
}
