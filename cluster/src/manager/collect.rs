//! Which sessions are dead. Liveness is the age of WireGuard's handshakes, which the replicas tell each other; the
//! API server is never written to for it.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// What one replica knows: `GET /sessions` of its health port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Seconds since the replica started.
    pub uptime: u64,
    /// Seconds since the last handshake of each public key that has had one.
    pub handshakes: BTreeMap<String, u64>,
}

/// A session as far as this decision needs it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its UID.
    pub uid: &'a str,
    /// Its public keys.
    pub keys: &'a [String],
}

/// Nothing is collected while any manager is younger than this: laptops need time to come back.
const MIN_UPTIME: Duration = Duration::from_secs(60);

/// Decides who is dead, and remembers what it takes to be sure.
#[derive(Debug)]
pub struct Collector {
    timeout: Duration,
    sessions: HashMap<String, Instant>,
    replicas: HashMap<String, Instant>,
}

impl Collector {
    /// A collector of sessions that have had no handshake for `timeout`.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, sessions: HashMap::new(), replicas: HashMap::new() }
    }

    /// Names of the sessions that are dead by what every replica, by the UID of its pod, reports or fails to report.
    ///
    /// Each replica bounds how long a session can have been idle: by its handshake; by the replica's own
    /// age, since its predecessor may have seen one just before it ended; or, if it does not answer, by when it last did.
    pub fn dead<'a>(
        &mut self,
        now: Instant,
        reports: &HashMap<String, Option<Report>>,
        sessions: &[Subject<'a>],
    ) -> Vec<&'a str> {
        remember(&mut self.sessions, now, sessions.iter().map(|session| session.uid));
        remember(&mut self.replicas, now, reports.keys().map(String::as_str));
        for (uid, _) in reports.iter().filter(|(_, report)| report.is_some()) {
            self.replicas.insert(uid.clone(), now);
        }
        let young = |report: &Report| report.uptime < MIN_UPTIME.as_secs();
        if reports.values().flatten().any(young) {
            return Vec::new();
        }
        let idle = |session: &Subject<'_>| {
            let known_for = now - self.sessions[session.uid];
            let bounds = reports.iter().map(|(uid, report)| match report {
                Some(report) => report.idle(session.keys),
                None => now - self.replicas[uid],
            });
            bounds.fold(known_for, Duration::min)
        };
        let dead = sessions.iter().filter(|session| idle(session) > self.timeout);
        dead.map(|session| session.name).collect()
    }
}

impl Report {
    fn idle(&self, keys: &[String]) -> Duration {
        let ages = keys.iter().filter_map(|key| self.handshakes.get(key));
        Duration::from_secs(ages.min().copied().unwrap_or(u64::MAX).min(self.uptime))
    }
}

/// Notes when each was first seen, and forgets those that have gone.
fn remember<'a>(seen: &mut HashMap<String, Instant>, now: Instant, present: impl Iterator<Item = &'a str>) {
    let old = std::mem::take(seen);
    seen.extend(present.map(|uid| (uid.to_owned(), old.get(uid).copied().unwrap_or(now))));
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{Collector, Report, Subject};

    const KEY: &str = "key";

    fn report(uptime: u64, handshake: Option<u64>) -> Option<Report> {
        Some(Report { uptime, handshakes: handshake.map(|age| (KEY.to_owned(), age)).into_iter().collect() })
    }

    /// Whether a session that was first seen `known` seconds ago, as were the replicas, is dead now.
    fn is_dead(known: u64, replicas: &[Option<Report>]) -> bool {
        let mut collector = Collector::new(Duration::from_secs(600));
        let keys = [KEY.to_owned()];
        let subject = Subject { name: "s", uid: "u", keys: &keys };
        let named = |reports: &[Option<Report>]| -> HashMap<String, Option<Report>> {
            reports.iter().enumerate().map(|(n, report)| (n.to_string(), report.clone())).collect()
        };
        let start = Instant::now();
        let silent = vec![None; replicas.len()];
        collector.dead(start, &named(&silent), &[subject]);
        !collector.dead(start + Duration::from_secs(known), &named(replicas), &[subject]).is_empty()
    }

    #[test]
    fn a_session_dies_when_no_replica_can_have_heard_of_it() {
        for (known, replicas, expected) in [
            (3600, vec![report(9999, Some(601))], true),
            (3600, vec![report(9999, None)], true),
            (3600, vec![report(9999, Some(599))], false),
            // Another replica carries it.
            (3600, vec![report(9999, Some(3000)), report(9999, Some(5))], false),
            (3600, vec![report(9999, Some(3000)), report(9999, None)], true),
            // It is new.
            (30, vec![report(9999, None)], false),
            // The replica is new: its predecessor may have carried it.
            (3600, vec![report(500, None)], false),
            (3600, vec![report(30, None), report(9999, Some(3000))], false),
            // The other replica does not answer, and last did at the start.
            (300, vec![report(9999, None), None], false),
            (700, vec![report(9999, None), None], true),
        ] {
            assert_eq!(is_dead(known, &replicas), expected, "{known} {replicas:?}");
        }
    }

    #[test]
    fn nothing_dies_in_a_managers_first_minute() {
        let mut collector = Collector::new(Duration::from_secs(1));
        let keys = [KEY.to_owned()];
        let subject = Subject { name: "s", uid: "u", keys: &keys };
        let reports = |uptime| HashMap::from([("r".to_owned(), report(uptime, None))]);
        let start = Instant::now();
        collector.dead(start, &reports(0), &[subject]);
        assert!(collector.dead(start + Duration::from_secs(59), &reports(59), &[subject]).is_empty());
        assert_eq!(collector.dead(start + Duration::from_secs(61), &reports(61), &[subject]), ["s"]);
    }
}
