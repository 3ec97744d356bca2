//! What may pass the hub for a while after its intercept has ended or changed: what is in flight then is not cut. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tpd_netstack::server::Pair;

/// How long, whoever says what. Agents keep their ways into the overlay for as long after what they last had to do with a laptop.
const GRACE: SignedDuration = SignedDuration::from_secs(30);

/// How long at most, while the agent says that something is under way: what ingress controllers are told to give WebSockets
/// (`proxy-read-timeout: 3600`). Who has left a workload is to be rid of it one day.
const LONGEST: SignedDuration = SignedDuration::from_hours(1);

/// An agent, a laptop, and a port of the laptop's that the agent opens flows to.
pub type Flow = (Ipv6Addr, Ipv6Addr, u16);

/// The ways that were needed, and when they last were.
#[derive(Debug, Default)]
pub struct Lingering(BTreeMap<Flow, Last>);

#[derive(Clone, Copy, Debug)]
struct Last {
    /// By an intercept.
    needed: Timestamp,
    /// By that, or by what was under way then.
    used: Timestamp,
}

impl Lingering {
    /// Adds to `pairs`, which are needed now, what was needed a moment ago, and what was needed once and is `held` by something
    /// that is under way: to laptops that are still there. Nothing is to be had of the agents' own services any more.
    pub fn extend(
        &mut self,
        pairs: &mut Vec<Pair>,
        held: &BTreeSet<Flow>,
        is_there: impl Fn(Ipv6Addr) -> bool,
        now: Timestamp,
    ) {
        let flows = |pair: &Pair| {
            let (agent, laptop) = (pair.agent, pair.laptop);
            pair.ports.iter().map(move |port| (agent, laptop, *port)).collect::<Vec<Flow>>()
        };
        let needed: BTreeSet<_> = pairs.iter().flat_map(flows).collect();
        self.0.extend(needed.iter().map(|flow| (*flow, Last { needed: now, used: now })));
        // An agent's word keeps what there is, and opens nothing.
        self.0.iter_mut().filter(|(flow, _)| held.contains(flow)).for_each(|(_, last)| last.used = now);
        self.0.retain(|(_, laptop, _), last| {
            let within = |since, limit| now.duration_since(since) < limit;
            within(last.used, GRACE) && within(last.needed, LONGEST) && is_there(*laptop)
        });
        let mut over: BTreeMap<(Ipv6Addr, Ipv6Addr), Vec<u16>> = BTreeMap::new();
        for (agent, laptop, port) in self.0.keys().filter(|flow| !needed.contains(flow)) {
            over.entry((*agent, *laptop)).or_default().push(*port);
        }
        let over = over.into_iter();
        pairs.extend(over.map(|((agent, laptop), ports)| Pair {
            agent,
            laptop,
            ports,
            services: Vec::new(),
        }));
    }

    /// Whether there is anything that ends by itself.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tpd_netstack::server::Pair;

    use super::Lingering;
    use crate::manager::intercepts::samples::at;

    fn pair(laptop: u16, ports: &[u16], services: &[u16]) -> Pair {
        let laptop = format!("fd74::{laptop}").parse().unwrap();
        let agent = "fd74::8000:0:0:1".parse().unwrap();
        Pair { agent, laptop, ports: ports.to_vec(), services: services.to_vec() }
    }

    fn pairs(lingering: &mut Lingering, needed: &[Pair], now: i64) -> Vec<Pair> {
        pairs_held(lingering, needed, &[], now)
    }

    fn pairs_held(lingering: &mut Lingering, needed: &[Pair], held: &[u16], now: i64) -> Vec<Pair> {
        let mut pairs = needed.to_vec();
        let Pair { agent, laptop, .. } = pair(2, &[], &[]);
        let held = held.iter().map(|port| (agent, laptop, *port)).collect();
        lingering.extend(&mut pairs, &held, |laptop| laptop != pair(9, &[], &[]).laptop, at(now));
        pairs
    }

    #[test]
    fn what_was_needed_passes_for_a_while_and_opens_nothing_to_the_agent() {
        let mut lingering = Lingering::default();
        let (needed, less) = ([pair(2, &[2000, 2001], &[53])], [pair(2, &[2000], &[53])]);
        assert_eq!(pairs(&mut lingering, &needed, 100), needed);
        let both = [pair(2, &[2000], &[53]), pair(2, &[2001], &[])];
        assert_eq!(pairs(&mut lingering, &less, 101), both, "one port has gone");
        assert_eq!(pairs(&mut lingering, &[], 129), [pair(2, &[2000, 2001], &[])], "all have");
        assert_eq!(pairs(&mut lingering, &[], 130), [pair(2, &[2000], &[])]);
        assert!(!lingering.is_empty());
        assert_eq!(pairs(&mut lingering, &[], 131), []);
        assert!(lingering.is_empty());
    }

    #[test]
    fn what_is_under_way_passes_for_longer_but_not_for_ever() {
        let mut lingering = Lingering::default();
        pairs(&mut lingering, &[pair(2, &[2000, 2001], &[53])], 0);
        for now in (20..3600).step_by(20) {
            let ports: &[u16] = if now < 30 { &[2000, 2001] } else { &[2000] };
            let passing = pairs_held(&mut lingering, &[], &[2000], now);
            assert_eq!(passing, [pair(2, ports, &[])], "{now}");
        }
        assert_eq!(pairs_held(&mut lingering, &[], &[2000], 3600), []);
        assert!(lingering.is_empty());
    }

    #[test]
    fn what_is_under_way_no_longer_passes_for_a_while_yet() {
        let mut lingering = Lingering::default();
        pairs(&mut lingering, &[pair(2, &[2000], &[])], 0);
        pairs_held(&mut lingering, &[], &[2000], 20);
        assert_eq!(pairs(&mut lingering, &[], 49), [pair(2, &[2000], &[])]);
        assert_eq!(pairs(&mut lingering, &[], 50), []);
    }

    #[test]
    fn an_agent_holds_nothing_that_it_did_not_have() {
        let mut lingering = Lingering::default();
        assert_eq!(pairs_held(&mut lingering, &[], &[2000], 0), []);
        pairs(&mut lingering, &[pair(2, &[2000], &[])], 0);
        assert_eq!(pairs_held(&mut lingering, &[], &[2000, 2001], 20), [pair(2, &[2000], &[])]);
        pairs(&mut lingering, &[], 60);
        assert_eq!(pairs_held(&mut lingering, &[], &[2000], 61), [], "it is too late");
    }

    #[test]
    fn the_address_of_a_laptop_that_has_left_may_be_anothers() {
        let mut lingering = Lingering::default();
        pairs(&mut lingering, &[pair(9, &[2000], &[])], 100);
        assert_eq!(pairs(&mut lingering, &[], 101), []);
    }
}
