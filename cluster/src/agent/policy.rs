//! What laptops may reach at the agent: its resolver, and where it was granted the environment of the app.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{PoisonError, RwLock};

use tpd_api::agent::Config;
use tpd_api::inject::AGENT_SERVICE_PORT;
use tpd_api::overlay;
use tpd_netstack::flow::{Policy, Protocol, Route};

use super::dns;

/// What the intercepts in force grant. Nothing at first.
#[derive(Debug, Default)]
pub struct Grants(RwLock<State>);

#[derive(Debug, Default)]
struct State {
    address: Option<Ipv6Addr>,
    /// Laptops with an intercept, and the container whose environment each may have.
    laptops: BTreeMap<Ipv6Addr, Option<String>>,
}

impl Grants {
    /// Grants what a configuration does, and nothing else; none at all grants nothing.
    pub fn replace(&self, config: Option<&Config>) {
        let mut state = State::default();
        if let Some(config) = config {
            state.address = Some(config.address);
            for intercept in &config.intercepts {
                // Of several intercepts of a laptop, the oldest that grants one.
                let granted = state.laptops.entry(intercept.laptop).or_default();
                *granted = granted.take().or_else(|| intercept.environment.clone());
            }
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The container whose environment a laptop may have.
    pub fn container(&self, laptop: IpAddr) -> Option<String> {
        let IpAddr::V6(laptop) = laptop else { return None };
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        state.laptops.get(&laptop).cloned().flatten()
    }
}

impl Policy for Grants {
    fn route(&self, protocol: Protocol, source: IpAddr, destination: SocketAddr) -> Route {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let IpAddr::V6(laptop) = source else { return Route::Drop };
        let Some(environment) = state.laptops.get(&laptop) else { return Route::Drop };
        if state.address.map(IpAddr::V6) != Some(destination.ip()) {
            return Route::Drop;
        }
        match (protocol, destination.port()) {
            (Protocol::Tcp | Protocol::Udp, overlay::DNS_PORT) => Route::Dial(dns::ADDRESS),
            (Protocol::Tcp, AGENT_SERVICE_PORT) if environment.is_some() => Route::Serve,
            _ => Route::Prohibited,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tpd_api::agent::Config;
    use tpd_netstack::flow::{Policy as _, Protocol, Route};

    use super::Grants;
    use crate::agent::dns;
    use crate::agent::merge::tests::{config, intercept};

    #[test]
    fn only_laptops_of_intercepts_reach_anything_and_secrets_only_who_was_granted_them() {
        let (plain, trusted) = ("fd74::2", "fd74::3");
        let mut config = config(1, "10.0.0.1:8443", &[]);
        let mut granted = intercept("b", trusted);
        granted.environment = Some("app".into());
        config.intercepts = vec![intercept("a", plain), intercept("c", trusted), granted];
        let grants = Grants::default();
        let route = |protocol, laptop: &str, port| {
            let agent = SocketAddr::from((config.address, port));
            grants.route(protocol, laptop.parse().unwrap(), agent)
        };
        assert_eq!(route(Protocol::Udp, plain, 53), Route::Drop, "nothing is granted yet");

        grants.replace(Some(&config));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert_eq!(route(protocol, plain, 53), Route::Dial(dns::ADDRESS));
        }
        assert_eq!(route(Protocol::Tcp, plain, 2), Route::Prohibited);
        assert_eq!(route(Protocol::Tcp, trusted, 2), Route::Serve);
        assert_eq!(route(Protocol::Udp, trusted, 2), Route::Prohibited);
        assert_eq!(route(Protocol::Tcp, trusted, 8080), Route::Prohibited);
        assert_eq!(route(Protocol::Tcp, "fd74::9", 53), Route::Drop);
        assert_eq!(grants.container(trusted.parse().unwrap()).as_deref(), Some("app"));
        assert_eq!(grants.container(plain.parse().unwrap()), None);
        let elsewhere = "[fd74::8000:0:0:2]:53".parse().unwrap();
        assert_eq!(grants.route(Protocol::Udp, plain.parse().unwrap(), elsewhere), Route::Drop);

        let without = Config { intercepts: vec![], ..config.clone() };
        grants.replace(Some(&without));
        assert_eq!(route(Protocol::Udp, trusted, 53), Route::Drop);
        grants.replace(None);
        assert_eq!(route(Protocol::Udp, plain, 53), Route::Drop);
    }
}
