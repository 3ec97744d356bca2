//! How many pods each maker of pods is known to have made. It tells the webhook whether the pods that it gives agents come to be.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most makers that are remembered, of some hundred bytes each: those of a large cluster, and what its rollouts add in a month.
const MOST: usize = 1 << 16;

/// How many pods a maker has made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// All of them.
    pub all: u64,
    /// Those that have an agent which their traffic is redirected to.
    pub redirected: u64,
}

/// What makers have made, by their UIDs: the control loop notes it, and the webhooks read it.
#[derive(Clone, Debug, Default)]
pub struct Births(Arc<Mutex<BTreeMap<String, Made>>>);

impl Births {
    /// A maker has made another pod.
    pub fn note(&self, maker: &str, redirected: bool) {
        let mut makers = self.lock();
        if makers.len() >= MOST && !makers.contains_key(maker) {
            // Who compares takes that for births, at worst: then an agent is tried once more.
            makers.clear();
        }
        let made = makers.entry(maker.to_owned()).or_default();
        made.all += 1;
        made.redirected += u64::from(redirected);
    }

    /// What a maker has made so far.
    #[must_use]
    pub fn of(&self, maker: &str) -> Made {
        self.lock().get(maker).copied().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Made>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{Births, MOST, Made};

    #[test]
    fn there_is_a_bound() {
        let births = Births::default();
        births.note("first", true);
        births.note("first", false);
        assert_eq!(births.of("first"), Made { all: 2, redirected: 1 });
        (0..MOST).for_each(|maker| births.note(&maker.to_string(), false));
        assert!(births.lock().len() < MOST);
        assert_eq!(births.of("first"), Made::default());
    }
}
