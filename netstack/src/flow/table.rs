//! Flows by what names them and by the peer they belong to.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

use super::{FlowKey, PeerId};

/// A set of flows. A peer's are kept in the order in which they came.
pub(super) struct Table<F> {
    flows: RefCell<HashMap<FlowKey, Rc<F>>>,
    peers: RefCell<HashMap<PeerId, BTreeMap<Serial, Rc<F>>>>,
    next: Cell<Serial>,
}

/// The how manieth flow of its table a flow is.
pub(super) type Serial = u64;

impl<F> Default for Table<F> {
    fn default() -> Self {
        Self { flows: RefCell::default(), peers: RefCell::default(), next: Cell::default() }
    }
}

impl<F> Table<F> {
    pub(super) fn get(&self, key: &FlowKey) -> Option<Rc<F>> {
        self.flows.borrow().get(key).cloned()
    }

    pub(super) fn contains(&self, key: &FlowKey) -> bool {
        self.flows.borrow().contains_key(key)
    }

    pub(super) fn len(&self) -> usize {
        self.flows.borrow().len()
    }

    pub(super) fn len_of(&self, peer: PeerId) -> usize {
        self.peers.borrow().get(&peer).map_or(0, BTreeMap::len)
    }

    /// Enters a flow under a key that is vacant.
    pub(super) fn insert(&self, key: FlowKey, flow: Rc<F>) -> Serial {
        let serial = self.next.get();
        self.next.set(serial + 1);
        self.peers.borrow_mut().entry(key.peer).or_default().insert(serial, Rc::clone(&flow));
        self.flows.borrow_mut().insert(key, flow);
        serial
    }

    pub(super) fn remove(&self, key: &FlowKey, serial: Serial) {
        let mut peers = self.peers.borrow_mut();
        let Some(flows) = peers.get_mut(&key.peer) else { return };
        if flows.remove(&serial).is_some() {
            self.flows.borrow_mut().remove(key);
        }
        if flows.is_empty() {
            peers.remove(&key.peer);
        }
    }

    /// Calls `visit` with each flow of `peer`, oldest first, as long as it returns `true`.
    pub(super) fn visit(&self, peer: PeerId, mut visit: impl FnMut(Serial, &Rc<F>) -> bool) {
        if let Some(flows) = self.peers.borrow().get(&peer) {
            flows.iter().all(|(serial, flow)| visit(*serial, flow));
        }
    }
}
