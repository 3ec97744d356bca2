//! Which connections there are on a port, by the generation of the rules that they last obeyed, and what goes on on them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::iter::Sum;
use std::rc::Rc;

use super::rules::Rules;

/// What goes on on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests that are being answered.
    pub under_way: usize,
    /// Raised by each of those that ends, and by bytes that come on connections without requests.
    pub moved: u64,
}

impl Sum for Activity {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            under_way: sum.under_way + one.under_way,
            moved: sum.moved + one.moved,
        })
    }
}

thread_local! {
    /// Connections of all ports of this thread.
    static CONNECTIONS: Cell<usize> = const { Cell::new(0) };
}

/// How many connections this thread relays.
pub fn connections() -> usize {
    CONNECTIONS.get()
}

/// The connections of a port. As many entries as there are generations that some connection still obeys.
#[derive(Debug, Default)]
pub(super) struct Live {
    all: Cell<usize>,
    by_generation: RefCell<BTreeMap<u64, u64>>,
    under_way: Cell<usize>,
    moved: Cell<u64>,
}

impl Live {
    pub(super) fn count(&self) -> usize {
        self.all.get()
    }

    pub(super) fn older_than(&self, generation: u64) -> u64 {
        self.by_generation.borrow().range(..generation).map(|(_, count)| count).sum()
    }

    pub(super) fn activity(&self) -> Activity {
        Activity { under_way: self.under_way.get(), moved: self.moved.get() }
    }

    fn moved(&self) {
        self.moved.update(|count| count + 1);
    }

    fn add(&self, generation: u64) {
        *self.by_generation.borrow_mut().entry(generation).or_default() += 1;
    }

    fn remove(&self, generation: u64) {
        let mut counts = self.by_generation.borrow_mut();
        if let Some(count) = counts.get_mut(&generation) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&generation);
            }
        }
    }
}

/// One connection, for as long as it lives.
#[derive(Debug)]
pub(super) struct Entry {
    live: Rc<Live>,
    /// `None` until something was asked on it.
    generation: Option<u64>,
}

impl Entry {
    pub(super) fn new(live: &Rc<Live>) -> Self {
        CONNECTIONS.set(connections() + 1);
        live.all.update(|count| count + 1);
        Self { live: live.clone(), generation: None }
    }

    /// Notes which rules the connection has obeyed last.
    pub(super) fn judged_by(&mut self, rules: &Rules) {
        let generation = Some(rules.generation());
        if self.generation != generation {
            self.leave();
            self.live.add(rules.generation());
            self.generation = generation;
        }
    }

    /// Notes that bytes have come on the connection, which has no requests.
    pub(super) fn moved(&self) {
        self.live.moved();
    }

    fn leave(&mut self) {
        if let Some(generation) = self.generation.take() {
            self.live.remove(generation);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.leave();
        self.live.all.update(|count| count - 1);
        CONNECTIONS.set(connections() - 1);
    }
}

/// A request that is being answered, for as long as it is.
#[derive(Debug)]
pub(super) struct UnderWay(Rc<Live>);

impl UnderWay {
    pub(super) fn new(live: &Rc<Live>) -> Self {
        live.under_way.update(|count| count + 1);
        Self(live.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.update(|count| count - 1);
        self.0.moved();
    }
}
