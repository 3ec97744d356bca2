//! UDP and ping flows: associations of a peer's datagrams with a kernel socket of their own, or with an owner here.

mod codec;
mod own;
mod relay;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use socket2::SockRef;
use tokio::net::UdpSocket;

pub use self::own::Datagrams;
use self::{codec::Codec, own::Association};
use super::{
    FlowKey, Outlet, PeerId, Protocol, Route, Shared,
    table::{Serial, Table},
    task::Task,
};
use crate::packet::{
    IpHeader,
    icmp::{self, Echo, Unreachable},
    protocol,
};

/// Most datagrams that wait for a full socket, and most bytes: what the kernel's own default send buffer holds
/// (212,992 bytes).
const MAX_QUEUE: usize = 64;
const MAX_QUEUE_BYTES: usize = 208 << 10;

/// How many of a peer's oldest associations are looked at for one to give up for a new one.
const CANDIDATES: usize = 8;

/// The UDP and ping flows of an engine.
#[derive(Default)]
pub(super) struct Associations {
    flows: Table<Flow>,
    /// Those that end here.
    own: Table<Association>,
    /// Whether it has been said that there are no ping sockets.
    pings_denied: Cell<bool>,
}

struct Flow {
    key: FlowKey,
    codec: Codec,
    socket: UdpSocket,
    /// What the socket had no room for, in order.
    queue: RefCell<VecDeque<Box<[u8]>>>,
    queued: Cell<usize>,
    /// When a datagram last passed, either way.
    used: Cell<Duration>,
    task: Task,
}

impl Associations {
    pub(super) fn remove_peer(&self, peer: PeerId) {
        self.flows.visit(peer, |_, flow| {
            flow.task.abort();
            true
        });
        self.own.visit(peer, |_, association| {
            association.remove();
            true
        });
    }

    /// Ends the flow of `peer` that has been unused for longest, of its oldest few.
    fn give_one_up(&self, peer: PeerId) -> bool {
        let mut candidates = Vec::with_capacity(CANDIDATES);
        self.flows.visit(peer, |serial, flow| {
            candidates.push((serial, Rc::clone(flow)));
            candidates.len() < CANDIDATES
        });
        let victim = candidates.into_iter().min_by_key(|(_, flow)| flow.used.get());
        let Some((serial, flow)) = victim else { return false };
        self.flows.remove(&flow.key, serial);
        flow.task.abort();
        true
    }
}

impl<O: Outlet> Shared<O> {
    pub(super) fn ingest_udp(self: &Rc<Self>, peer: PeerId, header: &IpHeader, packet: &[u8]) {
        let sockets = header.sockets(packet);
        let Some(((far, near), datagram)) = sockets.zip(codec::udp_payload(header, packet)) else {
            return self.count(|counters| counters.malformed += 1);
        };
        let key = FlowKey { peer, protocol: Protocol::Udp, far, near };
        if !self.take_own(&key, datagram) {
            self.ingest_datagram(key, packet, datagram);
        }
    }

    pub(super) fn ingest_icmp(self: &Rc<Self>, peer: PeerId, header: &IpHeader, packet: &[u8]) {
        let message = &packet[header.payload..];
        if let Some((why, quoted)) = icmp::parse_unreachable(packet) {
            return self.note_unreachable(peer, why, quoted);
        }
        // Of all other messages none asks for anything that this host would do.
        let Some(echo) = Echo::parse(message, header.source).filter(|echo| echo.request) else { return };
        if self.limits.reporters.contains(&header.destination) {
            let reply = codec::reply_to(message, header);
            return self.answer_stray(peer, Some(reply));
        }
        let far = SocketAddr::new(header.source, echo.id);
        let near = SocketAddr::new(header.destination, 0);
        let key = FlowKey { peer, protocol: Protocol::Icmp, far, near };
        self.ingest_datagram(key, packet, message);
    }

    /// Notes that what `peer` was sent, of which `quoted` is the start, did not arrive.
    fn note_unreachable(&self, peer: PeerId, why: Unreachable, quoted: &[u8]) {
        match icmp::quoted_sockets(quoted) {
            Some((protocol::TCP, near, far)) => {
                self.tcp.unreachable(&FlowKey { peer, protocol: Protocol::Tcp, far, near }, why);
            }
            Some((protocol::UDP, near, far)) => {
                self.fail_own(&FlowKey { peer, protocol: Protocol::Udp, far, near }, why);
            }
            _ => {}
        }
    }

    /// Passes `datagram`, which came in `packet`, on to its flow's socket, or to that of a new flow.
    fn ingest_datagram(self: &Rc<Self>, key: FlowKey, packet: &[u8], datagram: &[u8]) {
        let known = self.datagrams.flows.get(&key);
        if let Some(flow) = known.or_else(|| self.open_datagram(key, packet)) {
            self.pass_on(&flow, datagram);
        }
    }

    fn open_datagram(self: &Rc<Self>, key: FlowKey, packet: &[u8]) -> Option<Rc<Flow>> {
        let destination = match self.policy.route(key.protocol, key.far.ip(), key.near) {
            Route::Dial(destination) => destination,
            Route::Prohibited => {
                self.count(|counters| counters.prohibited += 1);
                self.report_stray(key.peer, packet, Unreachable::Prohibited);
                return None;
            }
            Route::Unreachable => {
                self.count(|counters| counters.unreachable += 1);
                self.report_stray(key.peer, packet, Unreachable::Host);
                return None;
            }
            Route::Serve | Route::Drop => return None,
        };
        if !self.has_room_for(key.peer) {
            self.count(|counters| counters.over_limit += 1);
            return None;
        }
        let codec = Codec::of(key.protocol);
        match codec.open(destination) {
            Ok(socket) => Some(self.enter_datagram(key, codec, socket)),
            Err(error) => {
                self.note_no_socket(&key, &error);
                None
            }
        }
    }

    /// Whether `peer` may have another flow, after giving up one of its own where needed.
    fn has_room_for(&self, peer: PeerId) -> bool {
        let flows = &self.datagrams.flows;
        let full = flows.len_of(peer) >= self.limits.datagram_flows_per_peer
            || flows.len() >= self.limits.datagram_flows;
        !full || self.datagrams.give_one_up(peer)
    }

    fn enter_datagram(self: &Rc<Self>, key: FlowKey, codec: Codec, socket: UdpSocket) -> Rc<Flow> {
        let flow = Rc::new(Flow {
            key,
            codec,
            socket,
            queue: RefCell::default(),
            queued: Cell::new(0),
            used: Cell::new(self.now()),
            task: Task::default(),
        });
        let serial = self.datagrams.flows.insert(key, Rc::clone(&flow));
        self.count(|counters| *codec.gauge(counters) += 1);
        let registration = Registration { shared: Rc::clone(self), flow: Rc::clone(&flow), serial };
        tokio::task::spawn_local(registration.relay());
        flow
    }

    /// Sends `datagram` through the socket of `flow` now, or when there is room.
    fn pass_on(self: &Rc<Self>, flow: &Rc<Flow>, datagram: &[u8]) {
        flow.used.set(self.now());
        if !flow.queue.borrow().is_empty() {
            return self.queue(flow, datagram);
        }
        // Past tokio, which takes a new socket for full until it has polled it.
        let mut sent = SockRef::from(&flow.socket).send(datagram);
        // An error may be about an earlier datagram; then this one hasn't been tried yet.
        if let Err(error) = &sent
            && error.kind() != io::ErrorKind::WouldBlock
        {
            self.report_failure(flow, error);
            sent = SockRef::from(&flow.socket).send(datagram);
        }
        match sent {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.queue(flow, datagram),
            Err(_) => self.count(|counters| counters.datagrams_dropped += 1),
        }
    }

    fn queue(&self, flow: &Flow, datagram: &[u8]) {
        let mut queue = flow.queue.borrow_mut();
        let bytes = flow.queued.get() + datagram.len();
        if queue.len() >= MAX_QUEUE || bytes > MAX_QUEUE_BYTES {
            return self.count(|counters| counters.datagrams_dropped += 1);
        }
        flow.queued.set(bytes);
        queue.push_back(datagram.into());
        flow.task.wake();
    }

    /// Tells the peer what its destination, or the kernel, said to a datagram.
    fn report_failure(self: &Rc<Self>, flow: &Flow, error: &io::Error) {
        let why = match error.kind() {
            io::ErrorKind::ConnectionRefused => Unreachable::Port,
            io::ErrorKind::HostUnreachable => Unreachable::Host,
            io::ErrorKind::NetworkUnreachable => Unreachable::Network,
            io::ErrorKind::PermissionDenied => Unreachable::Prohibited,
            _ => return,
        };
        self.report_stray(flow.key.peer, &flow.codec.quote(&flow.key), why);
    }

    fn note_no_socket(self: &Rc<Self>, key: &FlowKey, error: &io::Error) {
        match (key.protocol, error.kind()) {
            (Protocol::Icmp, io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                self.count(|counters| counters.pings_denied += 1);
                if !self.datagrams.pings_denied.replace(true) {
                    tracing::info!(
                        "pings are not carried: net.ipv4.ping_group_range grants this process no ping sockets"
                    );
                }
            }
            (_, io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable) => {
                self.count(|counters| counters.unreachable += 1);
                self.report_stray(key.peer, &Codec::of(key.protocol).quote(key), Unreachable::Network);
            }
            _ => {
                tracing::debug!(flow = ?key, %error, "no socket");
                self.count(|counters| counters.no_socket += 1);
            }
        }
    }
}

/// A flow's place in the table.
struct Registration<O: Outlet> {
    shared: Rc<Shared<O>>,
    flow: Rc<Flow>,
    serial: Serial,
}

impl<O: Outlet> Drop for Registration<O> {
    fn drop(&mut self) {
        let Self { shared, flow, serial } = self;
        shared.datagrams.flows.remove(&flow.key, *serial);
        shared.count(|counters| *flow.codec.gauge(counters) -= 1);
    }
}
