//! The agent's last seconds. The pod is going away, and its app perhaps gone, but endpoints may still name it: whoever comes
//! is served, and what is under way goes on for as long as the kubelet lets it. Pure.

use std::time::Duration;

use tokio::time::Instant;

use super::proxy::Activity;

/// For endpoints that name the pod to be updated everywhere.
const LINGER: Duration = Duration::from_secs(3);

/// Connections without a request under way, on which nothing has come for so long, are idle ones, and end as they would with the
/// app.
const QUIET: Duration = Duration::from_secs(2);

/// When it is over.
#[derive(Debug)]
pub struct Drain {
    began: Instant,
    moved: u64,
    /// When something was last going on.
    busy: Instant,
}

impl Drain {
    /// Begins.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { began: now, moved: 0, busy: now }
    }

    /// Whether it is over, given whether traffic is led to the agent, how many connections it has and what goes on on them.
    pub fn is_over(&mut self, led: bool, connections: usize, activity: Activity, now: Instant) -> bool {
        let moved = std::mem::replace(&mut self.moved, activity.moved) != activity.moved;
        if moved || activity.under_way > 0 {
            self.busy = now;
        }
        let lingered = !led || now >= self.began + LINGER;
        lingered && (connections == 0 || now >= self.busy + QUIET)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::Drain;
    use crate::agent::proxy::Activity;

    const IDLE: Activity = Activity { under_way: 0, moved: 9 };

    #[test]
    fn whoever_comes_is_served_for_a_while() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(Drain::new(start).is_over(false, 0, IDLE, start), "nothing comes by here");
        let mut drain = Drain::new(start);
        assert!(!drain.is_over(true, 0, IDLE, at(0)));
        assert!(!drain.is_over(true, 2, IDLE, at(2)));
        assert!(drain.is_over(true, 2, IDLE, at(3)), "they are idle");
        assert!(drain.is_over(true, 0, IDLE, at(3)), "there are none");
    }

    #[test]
    fn what_is_under_way_is_waited_for() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut drain = Drain::new(start);
        let answering = Activity { under_way: 1, moved: 9 };
        assert!((0..60).all(|second| !drain.is_over(true, 1, answering, at(second))));
        let answered = Activity { under_way: 0, moved: 10 };
        assert!(!drain.is_over(true, 1, answered, at(60)));
        assert!(!drain.is_over(true, 1, answered, at(61)));
        let moved = Activity { under_way: 0, moved: 11 };
        assert!(!drain.is_over(false, 1, moved, at(62)), "bytes have come on a connection without requests");
        assert!(!drain.is_over(false, 1, moved, at(63)));
        assert!(drain.is_over(false, 1, moved, at(64)));
    }
}
