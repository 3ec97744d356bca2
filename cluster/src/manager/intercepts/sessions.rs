//! The agents that are connected, at most one for each pod.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::Ipv6Net;
use tpd_api::agent::{Config, Hello, InterceptReport, MAX_HELD, Report};
use tpd_netstack::key::PublicKey;

use super::linger::Flow;
use crate::manager::agents::address;
use crate::manager::agents::token::Identity;

/// An agent that is connected.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Its pod.
    pub identity: Identity,
    /// Number of its connection.
    pub connection: u64,
    /// Its WireGuard key.
    pub key: PublicKey,
    /// Its overlay address.
    pub address: Ipv6Addr,
    /// What it was told last.
    pub config: Option<Arc<Config>>,
    /// What it said last.
    pub report: Report,
}

impl Agent {
    /// What it said of an intercept.
    #[must_use]
    pub fn report_on(&self, uid: &str) -> Option<&InterceptReport> {
        self.report.intercepts.iter().find(|report| report.uid == uid)
    }

    /// What it says is still under way with laptops, without an intercept.
    pub fn held(&self) -> impl Iterator<Item = Flow> {
        self.report.held.iter().filter_map(|held| match held.ip() {
            IpAddr::V6(laptop) => Some((self.address, laptop, held.port())),
            IpAddr::V4(_) => None,
        })
    }

    /// Takes in the configuration it should have. Returns it with the next generation if it is not the one that it has.
    pub fn configure(&mut self, mut config: Config) -> Option<Arc<Config>> {
        if let Some(old) = &self.config {
            let revision = std::mem::replace(&mut config.revision, old.revision);
            config.generation = old.generation;
            if config == **old {
                return None;
            }
            config.revision = revision;
        }
        config.generation += 1;
        let config = Arc::new(config);
        self.config = Some(Arc::clone(&config));
        Some(config)
    }
}

/// The connected agents by the UID of their pods.
#[derive(Clone, Debug)]
pub struct Sessions {
    pool: Ipv6Net,
    agents: BTreeMap<String, Agent>,
}

/// What a report brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing.
    Nothing,
    /// Other counts.
    Counts,
    /// What is in force, or what goes wrong.
    Important,
}

/// An agent was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its key.
    pub key: PublicKey,
    /// Its address.
    pub address: Ipv6Addr,
    /// Key of the same pod's agent before it, if that is another.
    pub replaces: Option<PublicKey>,
}

impl Sessions {
    /// Nobody yet; addresses are of this pool.
    #[must_use]
    pub fn new(pool: Ipv6Net) -> Self {
        Self { pool, agents: BTreeMap::new() }
    }

    /// Lets an agent in, in the place of its pod's former one. `taken` tells of a key whether the manager, a laptop or an
    /// agent that may be back has it: one that claimed it would be sent their packets.
    ///
    /// # Errors
    /// Says why the agent cannot be let in.
    pub fn join(
        &mut self,
        identity: Identity,
        connection: u64,
        hello: &Hello,
        taken: impl Fn(&PublicKey) -> bool,
    ) -> Result<Admission, &'static str> {
        let key = hello.public_key.parse().map_err(|_| "that is no WireGuard key")?;
        let address = address::of(self.pool, &identity.uid);
        let mut others = self.agents.iter().filter(|(uid, _)| **uid != identity.uid).map(|(_, agent)| agent);
        if taken(&key) || others.clone().any(|other| other.key == key) {
            return Err("that key is somebody else's");
        }
        if others.any(|other| other.address == address) {
            return Err("another pod has the overlay address that this one's UID leads to; replace the pod");
        }
        let uid = identity.uid.clone();
        if self.agents.get(&uid).is_some_and(|old| old.connection > connection) {
            return Err("the pod has a newer connection");
        }
        let agent = Agent { identity, connection, key, address, config: None, report: Report::default() };
        let old = self.agents.insert(uid, agent);
        // A key that a laptop has come to have since is the laptop's to keep.
        let replaces = old.map(|old| old.key).filter(|old| *old != key && !taken(old));
        Ok(Admission { key, address, replaces })
    }

    /// Takes in a report. Tells what is different now.
    pub fn report(&mut self, uid: &str, connection: u64, mut report: Report) -> News {
        report.held.truncate(MAX_HELD);
        let Some(agent) = self.agents.get_mut(uid).filter(|agent| agent.connection == connection) else {
            return News::Nothing;
        };
        let old = std::mem::replace(&mut agent.report, report);
        let matters = |report: &Report| {
            let each = report.intercepts.iter().map(|one| {
                let proven = one.proof.as_ref().map(|proof| proof.micros.is_some());
                (one.uid.clone(), one.generation, one.acknowledged, proven, one.problem.clone())
            });
            each.collect::<Vec<_>>()
        };
        if old == agent.report {
            News::Nothing
        } else if matters(&old) == matters(&agent.report) {
            News::Counts
        } else {
            News::Important
        }
    }

    /// Forgets an agent whose connection has ended, unless it has another already.
    pub fn leave(&mut self, uid: &str, connection: u64) -> Option<Agent> {
        let current = self.agents.get(uid).is_some_and(|agent| agent.connection == connection);
        if current { self.agents.remove(uid) } else { None }
    }

    /// The agent in a pod.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<&Agent> {
        self.agents.get(uid)
    }

    /// All of them, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Agent> {
        self.agents.values_mut()
    }

    /// All of them, by the UID of their pods.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Agent)> {
        self.agents.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.agents.len()
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::agent::{Entry, Hello, InterceptReport, Report};
    use tpd_netstack::key::PublicKey;

    use super::{Identity, MAX_HELD, News, Sessions};

    fn identity(uid: &str) -> Identity {
        Identity { namespace: "shop".into(), pod: "web-1".into(), uid: uid.into() }
    }

    fn hello(key: u8) -> Hello {
        Hello { version: "1".into(), public_key: PublicKey([key; 32]).to_string(), entry: Entry::Redirect }
    }

    fn sessions() -> Sessions {
        Sessions::new("fd74::/64".parse().unwrap())
    }

    #[test]
    fn the_newest_connection_of_a_pod_counts() {
        let mut sessions = sessions();
        let first = sessions.join(identity("u"), 1, &hello(1), |_| false).unwrap();
        let second = sessions.join(identity("u"), 2, &hello(2), |_| false).unwrap();
        assert_eq!((second.address, second.replaces), (first.address, Some(PublicKey([1; 32]))));
        assert!(sessions.join(identity("u"), 1, &hello(3), |_| false).is_err());

        assert!(sessions.leave("u", 1).is_none(), "the first is not the pod's any more");
        let report = Report { intercepts: vec![InterceptReport::default()], ..Report::default() };
        assert_eq!(sessions.report("u", 1, report.clone()), News::Nothing);
        assert_eq!(sessions.report("u", 2, report.clone()), News::Important);
        assert_eq!(sessions.report("u", 2, Report { generation: 9, ..report }), News::Counts);
        let held = vec!["[fd74::2]:2000".parse().unwrap(); 2 * MAX_HELD];
        sessions.report("u", 2, Report { held, ..Report::default() });
        assert_eq!(sessions.get("u").unwrap().held().count(), MAX_HELD);
        assert!(sessions.leave("u", 2).is_some());
        assert_eq!(sessions.count(), 0);
    }

    #[test]
    fn a_key_that_is_a_laptops_by_now_is_not_given_up_for_it() {
        let mut sessions = sessions();
        sessions.join(identity("u"), 1, &hello(1), |_| false).unwrap();
        let laptops = |key: &PublicKey| *key == PublicKey([1; 32]);
        assert_eq!(sessions.join(identity("u"), 2, &hello(2), laptops).unwrap().replaces, None);
    }

    #[test]
    fn nobody_claims_the_key_of_another() {
        let mut sessions = sessions();
        sessions.join(identity("u"), 1, &hello(1), |_| false).unwrap();
        assert!(sessions.join(identity("v"), 2, &hello(1), |_| false).is_err());
        assert!(sessions.join(identity("v"), 3, &hello(5), |key| *key == PublicKey([5; 32])).is_err());
        let nonsense = Hello { public_key: "nonsense".into(), ..hello(1) };
        assert!(sessions.join(identity("v"), 4, &nonsense, |_| false).is_err());
        assert_eq!(sessions.count(), 1);
    }
}
