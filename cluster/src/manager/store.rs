//! A mirror of the objects of one kind, kept by watch events.

use std::collections::BTreeMap;

use kube::runtime::watcher::Event;

/// Whether the state of an object that comes by one way is older than the one that is known, by their resource versions. Since
/// Kubernetes 1.35 it is written down that these are numbers that grow; they always were.
#[must_use]
pub fn is_older(version: &str, known: &str) -> bool {
    matches!((version.parse::<u64>(), known.parse::<u64>()), (Ok(version), Ok(known)) if version < known)
}

/// The objects of one kind by name, as far as the manager needs them.
///
/// A new list replaces the old one only when it is complete, so nothing flickers while a watch reconnects.
#[derive(Clone, Debug)]
pub struct Store<T> {
    items: BTreeMap<String, T>,
    incoming: Option<BTreeMap<String, T>>,
    settled: bool,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), incoming: None, settled: false }
    }
}

impl<T: PartialEq> Store<T> {
    /// Takes in an event. Tells whether anything that matters has changed.
    pub fn apply(&mut self, event: Event<(String, T)>) -> bool {
        match event {
            Event::Apply((name, item)) => self.put(name, item),
            Event::Delete((name, _)) => self.items.remove(&name).is_some(),
            Event::Init => {
                self.incoming = Some(BTreeMap::new());
                false
            }
            Event::InitApply((name, item)) => {
                self.incoming.get_or_insert_default().insert(name, item);
                false
            }
            Event::InitDone => {
                let incoming = self.incoming.take().unwrap_or_default();
                let changed = !self.settled || incoming != self.items;
                self.items = incoming;
                self.settled = true;
                changed
            }
        }
    }

    /// Takes in a newer state of one object that came another way.
    pub fn put(&mut self, name: String, item: T) -> bool {
        if self.items.get(&name) == Some(&item) {
            return false;
        }
        self.items.insert(name, item);
        true
    }

    /// Goes without this kind: it cannot be had.
    pub fn give_up(&mut self) -> bool {
        !std::mem::replace(&mut self.settled, true)
    }

    /// What has come of a list that is not complete yet.
    #[must_use]
    pub fn incoming(&self, name: &str) -> Option<&T> {
        self.incoming.as_ref()?.get(name)
    }

    /// Whether the first list is complete.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.settled
    }

    /// All objects.
    #[must_use]
    pub fn items(&self) -> &BTreeMap<String, T> {
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;

    use super::{Store, is_older};

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(is_older("9", "10"));
        assert!(!is_older("10", "9") && !is_older("10", "10"));
        assert!(!is_older("", "10") && !is_older("9", "later"), "what is no number is taken for news");
    }

    fn named(name: &str, value: u8) -> (String, u8) {
        (name.to_owned(), value)
    }

    #[test]
    fn a_list_counts_once_it_is_whole() {
        let mut store = Store::default();
        assert!(!store.apply(Event::Init));
        assert!(!store.apply(Event::InitApply(named("a", 1))));
        assert!(store.items().is_empty() && !store.settled());
        assert!(store.apply(Event::InitDone));
        assert!(store.settled());

        store.apply(Event::Init);
        assert_eq!(store.items().len(), 1, "the old list serves until the new one is complete");
        store.apply(Event::InitApply(named("a", 1)));
        assert!(!store.apply(Event::InitDone), "nothing has changed");

        store.apply(Event::Init);
        assert!(store.apply(Event::InitDone), "the object has gone meanwhile");
        assert!(store.items().is_empty());
    }

    #[test]
    fn the_first_list_is_news_even_when_empty() {
        let mut store = Store::<u8>::default();
        store.apply(Event::Init);
        assert!(store.apply(Event::InitDone));
    }

    #[test]
    fn only_what_differs_is_news() {
        let mut store = Store::default();
        assert!(store.apply(Event::Apply(named("a", 1))));
        assert!(!store.apply(Event::Apply(named("a", 1))));
        assert!(store.apply(Event::Apply(named("a", 2))));
        assert!(store.apply(Event::Delete(named("a", 2))));
        assert!(!store.apply(Event::Delete(named("a", 2))));
    }
}
