//! Proof that an intercept works: a connection from here to the local port on the laptop, and back.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::time::Instant;
use tpd_api::agent::{Intercept, Proof, Protocol};

/// Pause after a probe that failed, or when requests did. A local process that comes back is to serve within three seconds.
const RETRY: Duration = Duration::from_secs(1);

/// Probes of every intercept, by its UID.
#[derive(Debug, Default)]
pub struct Probes(BTreeMap<String, Probe>);

#[derive(Debug)]
struct Probe {
    targets: Vec<SocketAddr>,
    generation: i64,
    /// Whether there was a way to the laptop the last time, and when a probe may be made again.
    reachable: bool,
    next: Option<Instant>,
    /// A probe is on its way.
    running: bool,
    proof: Option<Proof>,
}

impl Probes {
    /// Forgets all but these intercepts, and says which are to be probed now, and where. `reachable` tells whether there is a way
    /// to a laptop, `suspended` whether requests to one of its ports have failed.
    pub fn due(
        &mut self,
        intercepts: &[Intercept],
        reachable: impl Fn(Ipv6Addr) -> bool,
        suspended: impl Fn(SocketAddr) -> bool,
        now: Instant,
    ) -> Vec<(String, Vec<SocketAddr>)> {
        self.0.retain(|uid, _| intercepts.iter().any(|intercept| intercept.uid == *uid));
        let mut due = Vec::new();
        for intercept in intercepts {
            let targets = targets(intercept);
            let probe = self.0.entry(intercept.uid.clone()).or_insert_with(Probe::new);
            if probe.generation != intercept.generation || probe.targets != targets {
                *probe = Probe { generation: intercept.generation, targets, ..Probe::new() };
            }
            let came = !std::mem::replace(&mut probe.reachable, reachable(intercept.laptop));
            if probe.is_due(came, &suspended, now) {
                probe.running = true;
                due.push((intercept.uid.clone(), probe.targets.clone()));
            }
        }
        due
    }

    /// Takes the result of a probe of these targets; those of intercepts that have changed meanwhile don't count.
    pub fn settle(&mut self, uid: &str, targets: &[SocketAddr], proof: Proof, now: Instant) {
        if let Some(probe) = self.0.get_mut(uid).filter(|probe| probe.targets == targets) {
            probe.running = false;
            probe.next = Some(now + RETRY);
            probe.proof = Some(proof);
        }
    }

    /// The last result of an intercept.
    #[must_use]
    pub fn proof(&self, uid: &str) -> Option<&Proof> {
        self.0.get(uid)?.proof.as_ref()
    }
}

impl Probe {
    fn new() -> Self {
        Self { targets: Vec::new(), generation: 0, reachable: false, next: None, running: false, proof: None }
    }

    /// At once when the laptop has come, or the intercept is new; then only while something is wrong.
    fn is_due(&self, came: bool, suspended: impl Fn(SocketAddr) -> bool, now: Instant) -> bool {
        if !self.reachable || self.running || self.targets.is_empty() {
            return false;
        }
        let failed = self.proof.as_ref().is_none_or(|proof| proof.problem.is_some());
        let wrong = failed || self.targets.iter().any(|target| suspended(*target));
        came || (wrong && self.next.is_none_or(|next| now >= next))
    }
}

/// The TCP ports of the laptop. UDP has no handshake that would prove anything.
fn targets(intercept: &Intercept) -> Vec<SocketAddr> {
    let tcp = intercept.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    tcp.map(|port| (intercept.laptop, port.overlay_port).into()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;
    use tpd_api::agent::{Intercept, Port, Proof, Protocol};

    use super::Probes;
    use crate::agent::merge::tests::intercept;

    fn one() -> Vec<Intercept> {
        let port = |protocol, overlay_port| Port { port: 80, protocol, overlay_port };
        let mut one = intercept("i", "fd74::2");
        one.ports = vec![port(Protocol::Tcp, 4000), port(Protocol::Udp, 4001)];
        vec![one]
    }

    fn proof(problem: Option<&str>) -> Proof {
        Proof { micros: problem.is_none().then_some(400), problem: problem.map(Into::into) }
    }

    #[test]
    fn a_probe_is_made_when_there_is_a_way_and_again_while_it_fails() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let (mut probes, intercepts) = (Probes::default(), one());
        let due = |probes: &mut Probes, way: bool, bad: bool, now| {
            probes.due(&intercepts, |_| way, |_| bad, now).into_iter().map(|(_, targets)| targets).next()
        };
        let targets = vec!["[fd74::2]:4000".parse().unwrap()];
        assert_eq!(due(&mut probes, false, false, at(0)), None);
        assert_eq!(due(&mut probes, true, false, at(1)), Some(targets.clone()), "without the UDP port");
        assert_eq!(due(&mut probes, true, false, at(2)), None, "it is on its way");
        probes.settle("i", &targets, proof(Some("refused")), at(3));
        assert_eq!(due(&mut probes, true, false, at(500)), None);
        assert!(due(&mut probes, true, false, at(1_003)).is_some());
        probes.settle("i", &targets, proof(None), at(1_004));
        assert_eq!(due(&mut probes, true, false, at(60_000)), None, "it is proved");
        assert_eq!(probes.proof("i"), Some(&proof(None)));
        assert!(due(&mut probes, true, true, at(60_001)).is_some(), "requests have failed since");
        probes.settle("i", &targets, proof(None), at(60_002));
        assert_eq!(due(&mut probes, false, false, at(60_003)), None);
        assert!(due(&mut probes, true, false, at(60_004)).is_some(), "the laptop has come back");
    }

    #[test]
    fn a_changed_intercept_is_proved_anew() {
        let now = Instant::now();
        let (mut probes, mut intercepts) = (Probes::default(), one());
        let (_, targets) = probes.due(&intercepts, |_| true, |_| false, now).remove(0);
        intercepts[0].generation += 1;
        intercepts[0].ports[0].overlay_port = 5000;
        assert_eq!(probes.due(&intercepts, |_| true, |_| false, now).len(), 1);
        probes.settle("i", &targets, proof(None), now);
        assert_eq!(probes.proof("i"), None, "that was about another port");
        assert!(probes.due(&[], |_| true, |_| false, now).is_empty());
        assert_eq!(probes.proof("i"), None);
    }
}
