//! UDP associations that are opened and end here.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io,
    net::SocketAddr,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use super::{
    MAX_QUEUE, MAX_QUEUE_BYTES,
    codec::{Codec, MAX_PAYLOAD},
};
use crate::{
    flow::{DialCause, FlowKey, Outlet, PeerId, Protocol, Shared, table::Serial},
    packet::icmp::Unreachable,
};

/// UDP datagrams of up to 65,507 bytes between two addresses over the overlay.
///
/// Datagrams that come faster than they are received are dropped, as a socket's are.
pub struct Datagrams {
    association: Rc<Association>,
    serial: Serial,
    engine: Rc<dyn Carrier>,
}

/// What has arrived and waits to be received.
pub(super) struct Association {
    key: FlowKey,
    queue: RefCell<VecDeque<Box<[u8]>>>,
    queued: Cell<usize>,
    /// What an ICMP error said of what was sent.
    failure: Cell<Option<io::ErrorKind>>,
    removed: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

/// The engine, whatever its outlet.
trait Carrier {
    fn poll_send(&self, key: &FlowKey, payload: &[u8], context: &mut Context<'_>) -> Poll<()>;
    fn forget(&self, key: &FlowKey, serial: Serial);
}

impl Datagrams {
    /// The other end's address.
    #[must_use]
    pub fn peer_addr(&self) -> SocketAddr {
        self.association.key.far
    }

    /// This end's address.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.association.key.near
    }

    /// Sends one datagram, as soon as the path takes it.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` and the like if that was the answer to an earlier one; `InvalidInput` for one that is too
    /// long; `ConnectionAborted` once the peer was removed.
    pub async fn send(&self, payload: &[u8]) -> io::Result<()> {
        if payload.len() > MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        poll_fn(|context| {
            self.association.check()?;
            self.engine.poll_send(&self.association.key, payload, context).map(Ok)
        })
        .await
    }

    /// Receives one datagram; of one longer than `buffer`, the rest is lost.
    ///
    /// # Errors
    ///
    /// As of [`Self::send`].
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        poll_fn(|context| self.poll_recv(context, buffer)).await
    }

    /// The same, for who lends its buffer only while there is something to put into it.
    ///
    /// # Errors
    ///
    /// As of [`Self::send`].
    pub fn poll_recv(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if let Some(datagram) = self.association.pop() {
            let count = datagram.len().min(buffer.len());
            buffer[..count].copy_from_slice(&datagram[..count]);
            return Poll::Ready(Ok(count));
        }
        self.association.check()?;
        let mut waiting = self.association.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            waiting.push(context.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.engine.forget(&self.association.key, self.serial);
    }
}

impl fmt::Debug for Datagrams {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Datagrams")
            .field("local", &self.local_addr())
            .field("peer", &self.peer_addr())
            .finish_non_exhaustive()
    }
}

impl Association {
    fn pop(&self) -> Option<Box<[u8]>> {
        let datagram = self.queue.borrow_mut().pop_front()?;
        self.queued.set(self.queued.get() - datagram.len());
        Some(datagram)
    }

    /// Takes a datagram in; `false` if there is no room.
    fn push(&self, datagram: &[u8]) -> bool {
        let mut queue = self.queue.borrow_mut();
        let bytes = self.queued.get() + datagram.len();
        if queue.len() >= MAX_QUEUE || bytes > MAX_QUEUE_BYTES {
            return false;
        }
        self.queued.set(bytes);
        queue.push_back(datagram.into());
        self.wake();
        true
    }

    /// What an ICMP error said, once, or that there is nobody to talk with.
    fn check(&self) -> io::Result<()> {
        if self.removed.get() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.failure.take().map_or(Ok(()), |kind| Err(kind.into()))
    }

    pub(super) fn remove(&self) {
        self.removed.set(true);
        self.wake();
    }

    fn wake(&self) {
        self.waiting.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

impl<O: Outlet> Shared<O> {
    pub(in crate::flow) fn open_own_datagrams(
        self: &Rc<Self>,
        peer: PeerId,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<Datagrams, DialCause> {
        let own = &self.datagrams.own;
        if own.len_of(peer) >= self.limits.datagram_flows_per_peer || own.len() >= self.limits.datagram_flows
        {
            self.count(|counters| counters.over_limit += 1);
            return Err(DialCause::Limit);
        }
        let key = FlowKey { peer, protocol: Protocol::Udp, far: remote, near: local };
        let taken = |key: &FlowKey| own.contains(key) || self.datagrams.flows.contains(key);
        let key = self.vacant(key, taken).ok_or(DialCause::Address)?;
        let association = Rc::new(Association {
            key,
            queue: RefCell::default(),
            queued: Cell::new(0),
            failure: Cell::new(None),
            removed: Cell::new(false),
            waiting: RefCell::default(),
        });
        let serial = own.insert(key, Rc::clone(&association));
        self.count(|counters| counters.udp_flows += 1);
        let engine: Rc<dyn Carrier> = Rc::<Self>::clone(self);
        Ok(Datagrams { association, serial, engine })
    }

    /// Takes `datagram` in if it belongs to an association that ends here.
    pub(super) fn take_own(&self, key: &FlowKey, datagram: &[u8]) -> bool {
        let Some(association) = self.datagrams.own.get(key) else { return false };
        if !association.push(datagram) {
            self.count(|counters| counters.datagrams_dropped += 1);
        }
        true
    }

    /// Notes that what was sent as part of the flow `key` did not arrive.
    pub(super) fn fail_own(&self, key: &FlowKey, why: Unreachable) {
        if let Some(association) = self.datagrams.own.get(key) {
            association.failure.set(Some(match why {
                Unreachable::Port => io::ErrorKind::ConnectionRefused,
                Unreachable::Host => io::ErrorKind::HostUnreachable,
                Unreachable::Network => io::ErrorKind::NetworkUnreachable,
                Unreachable::Prohibited => io::ErrorKind::PermissionDenied,
            }));
            association.wake();
        }
    }
}

impl<O: Outlet> Carrier for Shared<O> {
    fn poll_send(&self, key: &FlowKey, payload: &[u8], context: &mut Context<'_>) -> Poll<()> {
        if self.outlet.poll_ready(key.peer, context).is_pending() {
            return Poll::Pending;
        }
        let mut scratch = self.scratch.borrow_mut();
        let start = Codec::Udp.headroom(key);
        let packet = &mut scratch[..start + payload.len()];
        packet[start..].copy_from_slice(payload);
        Codec::Udp.finish(key, packet);
        self.send_cut(key.peer, packet);
        Poll::Ready(())
    }

    fn forget(&self, key: &FlowKey, serial: Serial) {
        self.datagrams.own.remove(key, serial);
        self.count(|counters| counters.udp_flows -= 1);
    }
}
