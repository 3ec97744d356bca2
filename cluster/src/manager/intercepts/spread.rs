//! Intercepts that other managers may not have heard of yet. Any of them may be asked about the pod that takes the place of one that is
//! replaced, and one that knows of no intercept gives it no agent. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::objects::Intercept;

/// How long that takes at most: a watch tells within milliseconds, on a machine that is busy within some tens of them.
const TIME: Duration = Duration::from_millis(500);

/// When this manager first knew of each version of an intercept (see [`Intercept::version`]).
#[derive(Clone, Debug, Default)]
pub struct Spread(BTreeMap<String, Timestamp>);

impl Spread {
    /// Takes in the intercepts that there are. Returns the versions that are still to become known.
    pub fn see<'a>(
        &mut self,
        intercepts: impl Iterator<Item = &'a Intercept>,
        now: Timestamp,
    ) -> BTreeSet<String> {
        let present: BTreeSet<_> = intercepts.map(Intercept::version).collect();
        self.0.retain(|version, _| present.contains(version));
        for version in &present {
            self.0.entry(version.clone()).or_insert(now);
        }
        present.into_iter().filter(|version| rest(self.0[version], now).is_some()).collect()
    }

    /// When the next one is known everywhere.
    #[must_use]
    pub fn next(&self, now: Timestamp) -> Option<Duration> {
        self.0.values().filter_map(|since| rest(*since, now)).min()
    }
}

/// How long it may still take. A clock that was set is no reason to wait for longer.
fn rest(since: Timestamp, now: Timestamp) -> Option<Duration> {
    let rest = TIME.checked_sub(now.duration_since(since).unsigned_abs())?;
    (!rest.is_zero()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::{SignedDuration, Timestamp};

    use super::super::samples::{at, intercept};
    use super::{Duration, Spread};

    fn later(millis: i64) -> Timestamp {
        at(100) + SignedDuration::from_millis(millis)
    }

    #[test]
    fn an_intercept_is_new_for_a_moment() {
        let (a, b) = (intercept("a"), intercept("b"));
        let mut spread = Spread::default();
        assert_eq!(spread.see([&a].into_iter(), at(100)).len(), 1);
        assert_eq!(spread.see([&a, &b].into_iter(), later(499)).len(), 2);
        assert_eq!(spread.see([&a, &b].into_iter(), later(500)), [b.version()].into());
        assert_eq!(spread.next(later(500)), Some(Duration::from_millis(499)));
        assert_eq!(spread.see([&b].into_iter(), later(999)).len(), 0);
        assert_eq!(spread.see([&a].into_iter(), later(1000)).len(), 1, "it was gone");
    }

    #[test]
    fn a_clock_that_is_set_holds_nobody_up() {
        let a = intercept("a");
        let mut spread = Spread::default();
        spread.see([&a].into_iter(), at(100));
        assert!(spread.see([&a].into_iter(), at(50)).is_empty());
    }
}
