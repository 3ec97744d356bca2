//! Agents whose connection was lost a moment ago. They are no sessions any more, but they may be back at once, and what is in
//! flight through their tunnels is production's: their peers go on meanwhile. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tpd_netstack::key::PublicKey;

use super::sessions::Agent;
use crate::manager::agents::token::Identity;

/// How long. Agents keep their ways open for as long, and dial five times meanwhile.
const GRACE: Duration = Duration::from_secs(5);

/// Those whose peers go on, by the UID of their pods: no more than there are pods.
#[derive(Debug, Default)]
pub struct Departed(BTreeMap<String, Gone>);

#[derive(Debug)]
struct Gone {
    identity: Identity,
    key: PublicKey,
    since: Instant,
}

impl Departed {
    /// The connection of one is lost.
    pub fn left(&mut self, agent: Agent, now: Instant) {
        let Agent { identity, key, .. } = agent;
        self.0.insert(identity.uid.clone(), Gone { identity, key, since: now });
    }

    /// The agent of a pod is there again, with this key. Returns the key that it had, if that was another.
    pub fn returned(&mut self, uid: &str, key: &PublicKey) -> Option<PublicKey> {
        self.0.remove(uid).map(|gone| gone.key).filter(|old| old != key)
    }

    /// Whether a key is that of another pod's agent.
    #[must_use]
    pub fn is_anothers(&self, uid: &str, key: &PublicKey) -> bool {
        self.0.iter().any(|(pod, gone)| pod != uid && gone.key == *key)
    }

    /// Forgets those that stay away, and those whose pods do not exist any more. Returns their keys.
    pub fn over(&mut self, exists: impl Fn(&Identity) -> bool, now: Instant) -> Vec<PublicKey> {
        let over = self.0.extract_if(.., |_, gone| now >= gone.since + GRACE || !exists(&gone.identity));
        over.map(|(_, gone)| gone.key).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;
    use tpd_api::agent::Report;
    use tpd_netstack::key::PublicKey;

    use super::{Agent, Departed, GRACE, Identity};

    const KEY: PublicKey = PublicKey([1; 32]);
    const OTHER: PublicKey = PublicKey([2; 32]);

    fn agent(uid: &str, key: PublicKey) -> Agent {
        Agent {
            identity: Identity { namespace: "shop".into(), pod: "web-1".into(), uid: uid.into() },
            connection: 1,
            key,
            address: "fd74::8000:0:0:1".parse().unwrap(),
            config: None,
            report: Report::default(),
        }
    }

    #[test]
    fn a_peer_goes_on_for_a_while() {
        let (mut departed, start) = (Departed::default(), Instant::now());
        departed.left(agent("u", KEY), start);
        assert_eq!(departed.over(|_| true, start + GRACE - Duration::from_millis(1)), []);
        assert_eq!(departed.over(|_| true, start + GRACE), [KEY]);
        assert_eq!(departed.over(|_| true, start + GRACE), [], "it is told once");
    }

    #[test]
    fn a_peer_ends_with_its_pod() {
        let (mut departed, start) = (Departed::default(), Instant::now());
        departed.left(agent("u", KEY), start);
        departed.left(agent("v", OTHER), start);
        assert_eq!(departed.over(|identity| identity.uid != "u", start), [KEY]);
    }

    #[test]
    fn who_is_back_keeps_its_peer_unless_it_is_another_process() {
        let (mut departed, start) = (Departed::default(), Instant::now());
        departed.left(agent("u", KEY), start);
        assert_eq!(departed.returned("u", &KEY), None);
        assert_eq!(departed.over(|_| true, start + GRACE), []);

        departed.left(agent("u", KEY), start);
        assert_eq!(departed.returned("u", &OTHER), Some(KEY));
        assert_eq!(departed.over(|_| true, start + GRACE), []);
    }

    #[test]
    fn nobody_claims_the_key_of_who_may_be_back() {
        let mut departed = Departed::default();
        departed.left(agent("u", KEY), Instant::now());
        assert!(departed.is_anothers("v", &KEY));
        assert!(!departed.is_anothers("u", &KEY));
        assert!(!departed.is_anothers("v", &OTHER));
    }
}
