//! The flow engine: TCP, UDP and ping of overlay peers end here and continue on ordinary sockets, and the other
//! way round.
//!
//! An engine lives on one lane: a thread with a tokio current-thread runtime and a `LocalSet`. [`Engine::ingest`] only
//! takes packets in and marks flows; each flow is a task that runs once for all that a batch brought it, and it
//! is from such tasks that packets go out.

mod answers;
mod counters;
mod datagram;
mod table;
mod task;
mod tcp;
#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    fmt,
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use self::{answers::Answers, datagram::Associations, tcp::Connections};
pub use self::{
    counters::Counters,
    datagram::Datagrams,
    tcp::{DialCause, Stream},
};
use crate::{
    packet::{
        self, IpHeader,
        fragment::{Joined, Reassembler, fragment},
        icmp::{self, Unreachable},
        protocol,
    },
    tcp::Budget,
};

/// Room to build the longest packet that a socket can give rise to: 65,535 bytes behind an IPv6 header.
const SCRATCH: usize = packet::MAX + 40;

/// The ports that flows of ours come from which don't name one (RFC 6335, 6).
const EPHEMERAL: std::ops::RangeInclusive<u16> = 49_152..=65_535;

/// How many of them are tried: with a quarter of them taken, all tries fail once in 10^19.
const TRIES: u16 = 32;

/// A peer of the overlay, as its lane numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u32);

/// The way out to peers, as flows see it.
pub trait Outlet: 'static {
    /// Ready when `peer`'s path takes packets. While it is full, pending, and the task is woken when it no
    /// longer is; a flow must not produce then.
    fn poll_ready(&self, peer: PeerId, context: &mut Context<'_>) -> Poll<()>;

    /// Whether `peer`'s path may lose packets, so that TCP must measure at what rate to send. On one that loses
    /// nothing and pushes back when full, that isn't needed.
    fn is_lossy(&self, peer: PeerId) -> bool;

    /// Sends one whole IP packet towards `peer`.
    ///
    /// With `gso` it is a TCP super-packet of at most 65,535 bytes, to be cut into segments of so many bytes of
    /// data where the path needs it. The checksum of a TCP packet needn't be filled; everything else is
    /// complete. Called only from tasks of the engine, never from within [`Engine::ingest`].
    fn send(&self, peer: PeerId, packet: &mut [u8], gso: Option<NonZeroU16>);
}

/// What a new flow wants to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP or ICMPv6 echo.
    Icmp,
}

/// What becomes of a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// It continues to this address. (The port means nothing to pings.)
    Dial(SocketAddr),
    /// It ends here: a TCP connection is given to whoever called [`Engine::serve`]. Anything else is ignored.
    Serve,
    /// It is refused with "administratively prohibited".
    Prohibited,
    /// It is refused with "host unreachable".
    Unreachable,
    /// It is ignored.
    Drop,
}

/// Decides what becomes of new flows.
pub trait Policy: Send + Sync {
    /// Asked once for each flow that is dialed, at its SYN or first datagram, and for each packet that asks for a flow
    /// which isn't. Must not block.
    fn route(&self, protocol: Protocol, source: IpAddr, destination: SocketAddr) -> Route;
}

/// What a TCP connection outlives by default: Linux's own limit (`tcp_retries2`).
pub const TCP_PATIENCE: Duration = Duration::from_secs(15 * 60);

/// Bounds of an engine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest packet on the overlay, bytes; 1,280 or more.
    pub mtu: u16,
    /// TCP connections of all peers together. One costs a file descriptor, and buffers of up to 8 MiB each way
    /// as far as it fills them.
    pub tcp_flows: usize,
    /// TCP connections of one peer.
    pub tcp_flows_per_peer: usize,
    /// What the buffers of all TCP connections together may use beyond 64 KiB each way, bytes.
    pub tcp_memory: usize,
    /// How long a TCP peer may leave data or keep-alives unanswered before its connection is reset.
    pub tcp_patience: Duration,
    /// UDP and ping associations of all peers together. One costs a file descriptor.
    pub datagram_flows: usize,
    /// UDP and ping associations of one peer.
    pub datagram_flows_per_peer: usize,
    /// The addresses that ICMP errors come from, at most one of each family; without one, they come from the
    /// destination that they are about.
    pub reporters: Vec<IpAddr>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            mtu: 1420,
            // At 4 KiB while idle, 64 MiB; container runtimes grant 2^20 file descriptors.
            tcp_flows: 16_384,
            // A laptop has 28,232 ephemeral ports; browsers and test suites keep below a thousand open.
            tcp_flows_per_peer: 2_048,
            // Sixteen that fill 8 MiB each way, or a thousand with 256 KiB.
            tcp_memory: 256 << 20,
            tcp_patience: TCP_PATIENCE,
            datagram_flows: 16_384,
            datagram_flows_per_peer: 1_024,
            reporters: Vec::new(),
        }
    }
}

/// The flow engine of a lane. Clones are handles to the same engine.
pub struct Engine<O>(Rc<Shared<O>>);

impl<O> Clone for Engine<O> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<O> fmt::Debug for Engine<O> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Engine").field("counters", &*self.0.counters.borrow()).finish_non_exhaustive()
    }
}

/// What flows share.
struct Shared<O> {
    outlet: Rc<O>,
    policy: Arc<dyn Policy>,
    limits: Limits,
    counters: RefCell<Counters>,
    answers: Answers,
    budget: Budget,
    /// Where outgoing packets are built, and datagrams received.
    scratch: RefCell<Box<[u8]>>,
    started: Instant,
    /// Secret key of sequence numbers.
    secret: RandomState,
    /// Identification of the next datagram that is sent in fragments.
    fragment_id: Cell<u32>,
    reassembler: RefCell<Reassembler<PeerId>>,
    tcp: Connections,
    datagrams: Associations,
}

impl<O: Outlet> Engine<O> {
    /// An engine without flows.
    pub fn new(outlet: Rc<O>, policy: Arc<dyn Policy>, limits: Limits) -> Self {
        let secret = RandomState::new();
        let first_id = secret.hash_one(0) as u32;
        Self(Rc::new(Shared {
            outlet,
            policy,
            counters: RefCell::default(),
            answers: Answers::default(),
            budget: Budget::new(limits.tcp_memory),
            scratch: RefCell::new(vec![0; SCRATCH].into()),
            started: Instant::now(),
            secret,
            fragment_id: Cell::new(first_id),
            reassembler: RefCell::default(),
            tcp: Connections::default(),
            datagrams: Associations::default(),
            limits,
        }))
    }

    /// Takes in one packet from `peer`, whose source address is `peer`'s own, from within a `LocalSet`.
    ///
    /// Checksums above IP are not looked at: the tunnel has authenticated the packet.
    pub fn ingest(&self, peer: PeerId, packet: &[u8]) {
        let Some(header) = IpHeader::parse(packet) else {
            return self.0.count(|counters| counters.malformed += 1);
        };
        let packet = &packet[..header.total];
        if header.fragment.is_none() {
            return self.0.ingest(peer, &header, packet);
        }
        let joined = self.0.reassembler.borrow_mut().add(peer, &header, packet, self.0.now());
        match joined {
            Joined::Whole(packet) => match IpHeader::parse(&packet) {
                Some(header) if header.fragment.is_none() => self.0.ingest(peer, &header, &packet),
                _ => self.0.count(|counters| counters.malformed += 1),
            },
            Joined::Waiting => {}
            Joined::Dropped => self.0.count(|counters| counters.fragments_dropped += 1),
        }
    }

    /// Connects from `local` to `remote`, at `peer`, within `timeout`. Port 0 of `local` stands for any free one.
    /// Once the future is dropped the attempt is given up.
    ///
    /// # Errors
    ///
    /// What the peer answered, if it did.
    pub async fn connect(
        &self,
        peer: PeerId,
        local: SocketAddr,
        remote: SocketAddr,
        timeout: Duration,
    ) -> Result<Stream, DialCause> {
        self.0.connect_tcp(peer, local, remote, timeout).await
    }

    /// The connections from peers that end here ([`Route::Serve`]), from now on. While nobody takes them, they are
    /// refused.
    #[must_use]
    pub fn serve(&self) -> mpsc::Receiver<Stream> {
        self.0.tcp.serve()
    }

    /// Opens an association of UDP datagrams between `local` and `remote`, at `peer`. Port 0 of `local` stands for
    /// any free one.
    ///
    /// # Errors
    ///
    /// When the addresses are taken, or the peer has too many associations.
    pub fn open_datagrams(
        &self,
        peer: PeerId,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<Datagrams, DialCause> {
        self.0.open_own_datagrams(peer, local, remote)
    }

    /// Aborts all flows of `peer`.
    pub fn remove_peer(&self, peer: PeerId) {
        self.0.tcp.remove_peer(peer);
        self.0.datagrams.remove_peer(peer);
        self.0.reassembler.borrow_mut().remove_peer(peer);
    }

    /// What has been seen so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *self.0.counters.borrow()
    }
}

impl<O: Outlet> Shared<O> {
    /// Time since the engine was made.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn count(&self, update: impl FnOnce(&mut Counters)) {
        update(&mut self.counters.borrow_mut());
    }

    fn ingest(self: &Rc<Self>, peer: PeerId, header: &IpHeader, packet: &[u8]) {
        match header.protocol {
            protocol::TCP => self.ingest_tcp(peer, header, packet),
            protocol::UDP => self.ingest_udp(peer, header, packet),
            protocol::ICMP | protocol::ICMPV6 => self.ingest_icmp(peer, header, packet),
            _ => self.count(|counters| counters.malformed += 1),
        }
    }

    /// Sends `packet` as soon as the lane's present batch is done.
    fn answer(self: &Rc<Self>, peer: PeerId, packet: Option<Vec<u8>>) {
        let Some(packet) = packet else { return };
        match self.answers.push(peer, packet) {
            Ok(false) => {}
            Ok(true) => {
                let shared = Rc::clone(self);
                tokio::task::spawn_local(async move { shared.give_answers() });
            }
            Err(answers::Full) => self.count(|counters| counters.answers_dropped += 1),
        }
    }

    /// Sends `packet` if not too many such have been sent already.
    fn answer_stray(self: &Rc<Self>, peer: PeerId, packet: Option<Vec<u8>>) {
        if packet.is_some() && !self.answers.may(self.now()) {
            return self.count(|counters| counters.answers_dropped += 1);
        }
        self.answer(peer, packet);
    }

    /// Reports to `peer` that its `packet` can't be delivered.
    fn report(self: &Rc<Self>, peer: PeerId, packet: &[u8], why: Unreachable) {
        let is_v4 = packet.first().is_some_and(|first| first >> 4 == 4);
        let reporter = self.limits.reporters.iter().copied().find(|reporter| reporter.is_ipv4() == is_v4);
        // Nothing listens there: that only the destination itself can say.
        let reporter = reporter.filter(|_| why != Unreachable::Port);
        self.answer(peer, icmp::unreachable(packet, why, reporter));
    }

    /// Reports it if not too many such reports have been made already.
    fn report_stray(self: &Rc<Self>, peer: PeerId, packet: &[u8], why: Unreachable) {
        if self.answers.may(self.now()) {
            self.report(peer, packet, why);
        } else {
            self.count(|counters| counters.answers_dropped += 1);
        }
    }

    fn give_answers(&self) {
        while let Some((peer, mut packet)) = self.answers.pop() {
            // An answer isn't worth waiting for: whoever asked will ask again.
            match self.outlet.poll_ready(peer, &mut Context::from_waker(Waker::noop())) {
                Poll::Ready(()) => self.send_cut(peer, &mut packet),
                Poll::Pending => self.count(|counters| counters.answers_dropped += 1),
            }
        }
    }

    /// Sends a packet that is no TCP segment, in fragments if it is longer than the MTU.
    fn send_cut(&self, peer: PeerId, packet: &mut [u8]) {
        let id = self.fragment_id.replace(self.fragment_id.get().wrapping_add(1));
        fragment(packet, usize::from(self.limits.mtu), id, |piece| self.outlet.send(peer, piece, None));
    }

    /// `key` with a port in place of 0, if it is of one family and not `taken`.
    fn vacant(&self, mut key: FlowKey, taken: impl Fn(&FlowKey) -> bool) -> Option<FlowKey> {
        if key.near.is_ipv4() != key.far.is_ipv4() {
            return None;
        }
        if key.near.port() != 0 {
            return (!taken(&key)).then_some(key);
        }
        let (first, count) = (*EPHEMERAL.start(), EPHEMERAL.len() as u64);
        (0..TRIES).find_map(|_| {
            key.near.set_port(first + (self.seed(&key) % count) as u16);
            (!taken(&key)).then_some(key)
        })
    }

    /// An unpredictable number for a new connection (RFC 6528).
    fn seed(&self, flow: &FlowKey) -> u64 {
        self.secret.hash_one((flow, self.now()))
    }
}

/// Names a flow: by the addresses of the packets that come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FlowKey {
    peer: PeerId,
    protocol: Protocol,
    /// Where packets come from; of pings, the port is their identifier.
    far: SocketAddr,
    /// Where they go to.
    near: SocketAddr,
}
