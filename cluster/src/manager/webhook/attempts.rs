//! Whether pods come to be that are given agents. A policy that nobody told tpd of (of the API server's own, or of a policy engine)
//! may refuse them for what the agent brings; their maker tries again and again, and would have no pod at all. So what was refused
//! a few times is tried with less, and then without an agent. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::manager::intercepts::births::Made;

/// How many pods, one after the other, must not have come to be: two may have been asked for at the same time, and one may have
/// been refused for another reason. Where that has happened once, the next is enough: its maker waits for longer and longer.
const REFUSALS: u32 = 3;

/// How long it must have gone on. Makers try again after 5 ms, and then wait for twice as long each time; a pod that has come to be
/// is known after some milliseconds.
const TIME: Duration = Duration::from_secs(2);

/// How long it is remembered: policies change, and what was refused for another reason is not to go without agents for long.
const MEMORY: Duration = Duration::from_secs(600);

/// Most makers that are remembered.
const MOST: usize = 4096;

/// How an agent may be put into a pod, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As it should be.
    Redirect,
    /// Without a container that may do more than others.
    Names,
    /// Not at all.
    None,
}

/// What became of the pods of each maker, by its UID, for which an agent was tried.
#[derive(Debug, Default)]
pub struct Attempts(BTreeMap<String, Attempt>);

#[derive(Debug)]
struct Attempt {
    way: Way,
    /// What the maker had made when this way was first tried.
    made: Made,
    /// How often it was tried since.
    tries: u32,
    first: Instant,
    last: Instant,
    /// Since when it is another way than it should be.
    lowered: Option<Instant>,
}

impl Attempts {
    /// How an agent may be put into the next pod of a maker that has made so many.
    pub fn way(&mut self, maker: &str, made: Made, now: Instant) -> Way {
        let Some(attempt) = self.0.get_mut(maker) else { return Way::Redirect };
        let is_over = attempt.lowered.is_some_and(|since| now.duration_since(since) >= MEMORY);
        if is_over || made.redirected != attempt.made.redirected {
            self.0.remove(maker);
            return Way::Redirect;
        }
        if made.all != attempt.made.all {
            // This way will do; or the API server went on without us.
            (attempt.made, attempt.tries) = (made, 0);
        } else if attempt.tries >= attempt.enough() && now.duration_since(attempt.first) >= TIME {
            attempt.lower(now);
        }
        attempt.way
    }

    /// An agent was put into a pod in that way. Whether the pod comes to be is seen later.
    pub fn tried(&mut self, maker: &str, made: Made, now: Instant) {
        if self.0.len() >= MOST && !self.0.contains_key(maker) {
            self.0.retain(|_, attempt| now.duration_since(attempt.last) < MEMORY);
            if self.0.len() >= MOST {
                return;
            }
        }
        let new = || Attempt { way: Way::Redirect, made, tries: 0, first: now, last: now, lowered: None };
        let attempt = self.0.entry(maker.to_owned()).or_insert_with(new);
        if attempt.tries == 0 {
            attempt.first = now;
        }
        attempt.tries = attempt.tries.saturating_add(1);
        attempt.last = now;
    }
}

impl Attempt {
    /// How many refusals are held against this way.
    const fn enough(&self) -> u32 {
        match self.way {
            Way::Redirect => REFUSALS,
            Way::Names | Way::None => 1,
        }
    }

    fn lower(&mut self, now: Instant) {
        self.way = match self.way {
            Way::Redirect => Way::Names,
            Way::Names | Way::None => Way::None,
        };
        self.tries = 0;
        self.lowered.get_or_insert(now);
    }
}

#[cfg(test)]
mod tests {
    use super::{Attempts, Duration, Instant, MEMORY, MOST, Made, Way};

    struct Maker {
        attempts: Attempts,
        made: Made,
        start: Instant,
    }

    impl Maker {
        fn new() -> Self {
            Self { attempts: Attempts::default(), made: Made::default(), start: Instant::now() }
        }

        /// Asks for a pod.
        fn asks(&mut self, millis: u64) -> Way {
            let now = self.start + Duration::from_millis(millis);
            let way = self.attempts.way("web", self.made, now);
            if way != Way::None {
                self.attempts.tried("web", self.made, now);
            }
            way
        }

        fn makes(&mut self, redirected: bool) {
            self.made.all += 1;
            self.made.redirected += u64::from(redirected);
        }
    }

    /// When a ReplicaSet tries again that is refused all the time, milliseconds.
    const RETRIES: [u64; 10] = [0, 5, 15, 35, 75, 155, 315, 635, 1275, 2555];

    #[test]
    fn who_is_refused_again_and_again_gets_less_and_then_nothing() {
        let mut maker = Maker::new();
        assert_eq!(RETRIES[..9].iter().filter(|at| maker.asks(**at) != Way::Redirect).count(), 0);
        assert_eq!(maker.asks(RETRIES[9]), Way::Names);
        assert_eq!([maker.asks(5115), maker.asks(10_235)], [Way::None; 2]);
        let again = MEMORY.as_millis() as u64 + RETRIES[9];
        assert_eq!([maker.asks(again - 1), maker.asks(again)], [Way::None, Way::Redirect]);
    }

    #[test]
    fn a_pod_that_comes_to_be_is_what_counts() {
        let mut maker = Maker::new();
        for at in (0..100).map(|step| step * 1000) {
            assert_eq!(maker.asks(at), Way::Redirect);
            maker.makes(true);
        }
    }

    #[test]
    fn many_that_are_asked_for_at_once_are_not_refused() {
        let mut maker = Maker::new();
        assert!((0..100).all(|at| maker.asks(at) == Way::Redirect));
        (0..100).for_each(|_| maker.makes(true));
        assert_eq!(maker.asks(60_000), Way::Redirect);
    }

    #[test]
    fn pods_that_start_without_us_are_no_refusal() {
        let mut maker = Maker::new();
        for at in (0..10).map(|step| step * 1000) {
            assert_eq!(maker.asks(at), Way::Redirect);
            maker.makes(false);
        }
    }

    #[test]
    fn a_way_that_will_do_is_kept_for_a_while() {
        let mut maker = Maker::new();
        for at in RETRIES {
            maker.asks(at);
        }
        for at in (3..500).map(|second| second * 1000) {
            maker.makes(false);
            assert_eq!(maker.asks(at), Way::Names, "{at}");
        }
        // One of those that seemed to be refused was only slow.
        maker.makes(true);
        assert_eq!(maker.asks(500_000), Way::Redirect);
    }

    #[test]
    fn there_is_a_bound() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        for maker in 0..2 * MOST {
            attempts.tried(&maker.to_string(), Made::default(), now);
        }
        assert_eq!(attempts.0.len(), MOST);
        attempts.tried("later", Made::default(), now + MEMORY);
        assert_eq!(attempts.0.len(), 1);
    }
}
