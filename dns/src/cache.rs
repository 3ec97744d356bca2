//! The cluster's answers for as long as they hold. Bounded; no clock of its own.

use std::{collections::HashMap, sync::Arc, time::Instant};

use crate::{answer::Answer, name::Name};

/// Answers kept at most: with 5 s of lifetime it would take 800 different names a second to fill, at about 300 octets each.
const MAX_ENTRIES: usize = 4096;

/// What tells one question to the cluster from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) name: Name,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    pub(crate) dnssec_ok: bool,
    pub(crate) checking_disabled: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: HashMap<Key, Arc<Answer>>,
}

impl Cache {
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<Arc<Answer>> {
        self.entries.get(key).filter(|answer| is_fresh(answer, now)).cloned()
    }

    /// Keeps `answer` if it may be kept. In a full cache what has expired makes room, or else everything does: the next questions
    /// cost one round trip each, and there is no order to maintain on every hit.
    pub(crate) fn put(&mut self, key: Key, answer: Arc<Answer>, now: Instant) {
        if !is_fresh(&answer, now) {
            return;
        }
        if self.entries.len() >= MAX_ENTRIES {
            self.entries.retain(|_, answer| is_fresh(answer, now));
        }
        if self.entries.len() >= MAX_ENTRIES {
            self.entries.clear();
        }
        self.entries.insert(key, answer);
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }
}

fn is_fresh(answer: &Answer, now: Instant) -> bool {
    answer.expires().is_some_and(|expires| now < expires)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::wire;

    fn key(name: &str) -> Key {
        let name = Name::parse(name).unwrap();
        Key { name, kind: 1, class: wire::CLASS_IN, dnssec_ok: false, checking_disabled: false }
    }

    /// An answer with one address record.
    fn answer(ttl: u8, now: Instant) -> Arc<Answer> {
        let mut reply = vec![0, 0, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        reply.extend([0, 0, 1, 0, 1, 0, 0, 0, ttl, 0, 4, 10, 0, 0, 1]);
        Arc::new(Answer::read(&reply, now).unwrap())
    }

    #[test]
    fn forgets_in_time() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.put(key("web"), answer(3, now), now);
        assert!(cache.get(&key("WEB"), now + Duration::from_millis(2999)).is_some());
        assert!(cache.get(&key("web"), now + Duration::from_secs(3)).is_none());
        assert!(cache.get(&Key { kind: 28, ..key("web") }, now).is_none());
    }

    #[test]
    fn keeps_nothing_without_lifetime() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.put(key("web"), answer(0, now), now);
        assert!(cache.entries.is_empty());
    }

    #[test]
    fn stays_within_its_bound() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for index in 0..=MAX_ENTRIES {
            cache.put(key(&format!("n{index}")), answer(5, now), now);
        }
        assert!(cache.entries.len() <= MAX_ENTRIES);
        assert!(cache.get(&key(&format!("n{MAX_ENTRIES}")), now).is_some());
    }
}
