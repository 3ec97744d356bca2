//! Which intercepts end by themselves: their time is over, or their session is gone and stays so.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use super::objects::Intercept;

/// How long an intercept waits for its session to come back. A laptop that wakes up, or a daemon that is started again, keeps
/// its ClientSession; one that has been deleted and not made again within a minute was meant to go.
const PATIENCE: Duration = Duration::from_secs(60);

/// Nothing is deleted for a session's sake before the manager has run for so long: laptops need time to come back.
const MIN_UPTIME: Duration = Duration::from_secs(60);

/// Remembers since when sessions are gone.
#[derive(Debug)]
pub struct Reaper {
    started: Instant,
    gone: BTreeMap<String, Instant>,
}

/// Why an intercept ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its time is over.
    Expired,
    /// Its session is gone.
    SessionGone,
}

impl Reaper {
    /// One that begins to watch now.
    #[must_use]
    pub fn new(started: Instant) -> Self {
        Self { started, gone: BTreeMap::new() }
    }

    /// The intercepts that are to be deleted. Both lists are complete; `exists` tells of a session's name whether it is there.
    pub fn due<'a>(
        &mut self,
        intercepts: impl Iterator<Item = &'a Intercept>,
        exists: impl Fn(&str) -> bool,
        now: Instant,
        wall: Timestamp,
    ) -> Vec<(&'a Intercept, End)> {
        let mut due = Vec::new();
        let mut gone = BTreeMap::new();
        for intercept in intercepts {
            if intercept.spec.expires_at.as_ref().is_some_and(|end| end.0 <= wall) {
                due.push((intercept, End::Expired));
            } else if !exists(&intercept.spec.session) {
                let since = self.gone.get(&intercept.uid).copied().unwrap_or(now);
                gone.insert(intercept.uid.clone(), since);
                if now - since >= PATIENCE && now - self.started >= MIN_UPTIME {
                    due.push((intercept, End::SessionGone));
                }
            }
        }
        self.gone = gone;
        due
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use tokio::time::Instant;

    use super::super::samples::{at, intercept};
    use super::{End, Reaper};

    #[test]
    fn a_session_must_be_gone_for_a_minute_without_a_break() {
        let start = Instant::now();
        let mut reaper = Reaper::new(start);
        let list = [intercept("a")];
        let mut due = |second: u64, exists: bool| {
            let now = start + Duration::from_secs(second);
            reaper.due(list.iter(), |_| exists, now, at(0)).len()
        };
        assert_eq!([due(0, false), due(59, false), due(60, true)], [0, 0, 0]);
        assert_eq!([due(100, false), due(159, false), due(160, false)], [0, 0, 1]);
    }

    #[test]
    fn an_intercept_ends_when_its_time_is_over() {
        let start = Instant::now();
        let mut list = [intercept("a")];
        list[0].spec.expires_at = Some(Time(at(50)));
        let mut reaper = Reaper::new(start);
        assert!(reaper.due(list.iter(), |_| true, start, at(49)).is_empty());
        let due = reaper.due(list.iter(), |_| true, start, at(50));
        assert_eq!(due[0].1, End::Expired);
    }
}
