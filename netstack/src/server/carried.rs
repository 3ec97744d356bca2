//! Whose sessions this lane carries: those who have lately said so. Pure.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use crate::key::PublicKey;

/// How long a peer's word holds. A laptop gives it twice a second, so one ping may be lost.
const VALID: Duration = Duration::from_millis(1_200);

/// Peers, and when each last chose a path of this lane.
#[derive(Debug, Default)]
pub(super) struct Carried(HashMap<PublicKey, Instant>);

impl Carried {
    /// A ping has said that the path which it came by is to carry the session of `key`.
    pub(super) fn heard(&mut self, key: PublicKey, now: Instant) {
        self.0.insert(key, now);
    }

    pub(super) fn forget(&mut self, key: &PublicKey) {
        self.0.remove(key);
    }

    /// Those whose word holds.
    pub(super) fn at(&mut self, now: Instant) -> BTreeSet<PublicKey> {
        self.0.retain(|_, heard| now.duration_since(*heard) < VALID);
        self.0.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_carried_for_as_long_as_it_says_so() {
        let (a, b) = (PublicKey([1; 32]), PublicKey([2; 32]));
        let mut carried = Carried::default();
        let start = Instant::now();
        carried.heard(a, start);
        carried.heard(b, start);
        carried.heard(a, start + VALID / 2);
        assert_eq!(carried.at(start + VALID / 2), BTreeSet::from([a, b]));
        assert_eq!(carried.at(start + VALID), BTreeSet::from([a]));
        carried.forget(&a);
        assert_eq!(carried.at(start + VALID), BTreeSet::new());
    }
}
