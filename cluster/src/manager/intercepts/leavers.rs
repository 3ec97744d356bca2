//! Pods that left a moment ago without having handed their traffic over. Services may lead to one for as long as it takes every node
//! to learn that it is gone, so an intercept that had it replaced does not have all requests yet. Pure.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::objects::Pod;

/// How long that takes: kube-proxy takes changes in once a second (`minSyncPeriod`), and as much again is for a cluster that is busy.
const TIME: Duration = Duration::from_secs(2);

/// A pod that has left.
#[derive(Clone, Debug)]
pub struct Leaver {
    /// The pod as it was before.
    pub pod: Pod,
    /// Whether its agent was connected then: that goes on until the app has ended.
    pub agent: bool,
    since: Timestamp,
}

impl Leaver {
    /// How long Services may lead to it still. A clock that was set is no reason to wait for longer.
    fn rest(&self, now: Timestamp) -> Option<Duration> {
        let rest = TIME.checked_sub(now.duration_since(self.since).unsigned_abs())?;
        (!rest.is_zero()).then_some(rest)
    }
}

/// Those of the last moment, of all workloads.
#[derive(Clone, Debug, Default)]
pub struct Leavers(Vec<Leaver>);

impl Leavers {
    /// Takes in those that have just left, and forgets those that Services have forgotten.
    pub fn see(
        &mut self,
        pods: impl IntoIterator<Item = Pod>,
        connected: impl Fn(&str) -> bool,
        now: Timestamp,
    ) {
        self.0.retain(|leaver| leaver.rest(now).is_some());
        self.0.extend(pods.into_iter().map(|pod| Leaver { agent: connected(&pod.uid), pod, since: now }));
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Leaver> {
        self.0.iter()
    }

    /// When the next one is forgotten.
    #[must_use]
    pub fn next(&self, now: Timestamp) -> Option<Duration> {
        self.0.iter().filter_map(|leaver| leaver.rest(now)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{at, pod};
    use super::{Duration, Leavers};

    #[test]
    fn who_has_left_is_minded_for_a_moment() {
        let mut leavers = Leavers::default();
        leavers.see([pod("a"), pod("b")], |uid| uid == "uid-b", at(100));
        leavers.see([pod("c")], |_| false, at(101));
        let seen: Vec<_> = leavers.iter().map(|leaver| (&*leaver.pod.name, leaver.agent)).collect();
        assert_eq!(seen, [("a", false), ("b", true), ("c", false)]);
        assert_eq!(leavers.next(at(101)), Some(Duration::from_secs(1)));
        leavers.see([], |_| false, at(102));
        assert_eq!(leavers.iter().count(), 1);
        leavers.see([], |_| false, at(103));
        assert_eq!((leavers.iter().count(), leavers.next(at(103))), (0, None));
    }
}
