//! Two engines and the wire between them.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU16,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::net::{TcpListener, TcpStream};

use crate::{
    flow::{DialCause, Engine, Limits, Outlet, PeerId, Policy, Protocol, Route},
    packet::{IpHeader, protocol},
};

pub(super) const A: PeerId = PeerId(1);
pub(super) const B: PeerId = PeerId(2);

/// Most packets on the wire in one direction.
const ROOM: usize = 64;

/// What the wire does to packets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weather {
    /// Cut super-packets into segments, as a UDP path does.
    pub(super) cut: bool,
    /// Lose one packet in so many.
    pub(super) lose: Option<u32>,
    /// Swap one packet in so many with the next.
    pub(super) swap: Option<u32>,
}

/// One direction of the wire: what one engine sends.
#[derive(Default)]
pub(super) struct Wire {
    queue: RefCell<VecDeque<(PeerId, Vec<u8>)>>,
    /// Woken when there is something to deliver.
    reader: RefCell<Option<Waker>>,
    /// Woken when there is room.
    writers: RefCell<Vec<Waker>>,
    weather: Cell<Weather>,
    random: Cell<u32>,
    pub(super) sent: Cell<u64>,
    /// The packet sent last.
    pub(super) last: RefCell<Vec<u8>>,
    /// While set, nothing fits.
    pub(super) blocked: Cell<bool>,
}

impl Wire {
    fn chance(&self, one_in: Option<u32>) -> bool {
        let Some(one_in) = one_in else { return false };
        // xorshift32: the same run every time.
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random.set(x);
        x.is_multiple_of(one_in)
    }

    pub(super) fn set_blocked(&self, blocked: bool) {
        self.blocked.set(blocked);
        self.writers.borrow_mut().drain(..).for_each(Waker::wake);
    }

    /// The packet that was sent next, of a [`Pair::one_sided`].
    pub(super) async fn next(&self) -> Vec<u8> {
        poll_fn(|context| {
            let Some((_, packet)) = self.queue.borrow_mut().pop_front() else {
                *self.reader.borrow_mut() = Some(context.waker().clone());
                return Poll::Pending;
            };
            self.writers.borrow_mut().drain(..).for_each(Waker::wake);
            Poll::Ready(packet)
        })
        .await
    }

    async fn batch(&self) -> Vec<Vec<u8>> {
        poll_fn(|context| {
            let mut queue = self.queue.borrow_mut();
            if queue.is_empty() {
                *self.reader.borrow_mut() = Some(context.waker().clone());
                return Poll::Pending;
            }
            self.writers.borrow_mut().drain(..).for_each(Waker::wake);
            Poll::Ready(queue.drain(..).map(|(_, packet)| packet).collect())
        })
        .await
    }
}

impl Outlet for Wire {
    fn is_lossy(&self, _: PeerId) -> bool {
        true
    }

    fn poll_ready(&self, _: PeerId, context: &mut Context<'_>) -> Poll<()> {
        if self.blocked.get() || self.queue.borrow().len() >= ROOM {
            self.writers.borrow_mut().push(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn send(&self, peer: PeerId, packet: &mut [u8], gso: Option<NonZeroU16>) {
        assert_eq!(IpHeader::parse(packet).unwrap().total, packet.len());
        assert!(gso.is_some() || packet.len() <= 1420, "{} bytes are longer than the MTU", packet.len());
        self.sent.set(self.sent.get() + 1);
        *self.last.borrow_mut() = packet.to_vec();
        let weather = self.weather.get();
        let packets = match gso {
            Some(mss) if weather.cut => cut(packet, usize::from(mss.get())),
            _ => vec![packet.to_vec()],
        };
        let mut queue = self.queue.borrow_mut();
        for packet in packets {
            assert!(!weather.cut || packet.len() <= 1420, "a segment of {} bytes", packet.len());
            if self.chance(weather.lose) {
                continue;
            }
            queue.push_back((peer, packet));
            let last = queue.len() - 1;
            if last > 0 && self.chance(weather.swap) {
                queue.swap(last, last - 1);
            }
        }
        if let Some(reader) = self.reader.borrow_mut().take() {
            reader.wake();
        }
    }
}

fn cut(packet: &[u8], mss: usize) -> Vec<Vec<u8>> {
    let header = IpHeader::parse(packet).unwrap();
    assert_eq!(header.protocol, protocol::TCP);
    let data = header.payload + usize::from(packet[header.payload + 12] >> 4) * 4;
    let sequence = u32::from_be_bytes(*packet[header.payload + 4..].first_chunk().unwrap());
    let chunks: Vec<_> = packet[data..].chunks(mss).collect();
    let segment = |(index, chunk): (usize, &&[u8])| {
        let mut segment = packet[..data].to_vec();
        segment.extend_from_slice(chunk);
        let total = segment.len();
        match header.source {
            IpAddr::V4(_) => segment[2..4].copy_from_slice(&(total as u16).to_be_bytes()),
            IpAddr::V6(_) => segment[4..6].copy_from_slice(&(total as u16 - 40).to_be_bytes()),
        }
        let sequence = sequence.wrapping_add((index * mss) as u32);
        segment[header.payload + 4..header.payload + 8].copy_from_slice(&sequence.to_be_bytes());
        if index + 1 < chunks.len() {
            segment[header.payload + 13] &= !0x09;
        }
        segment
    };
    chunks.iter().enumerate().map(segment).collect()
}

/// Ports below 10 have a meaning of their own; the rest is at 127.0.0.1.
pub(super) struct TestPolicy;

pub(super) const PROHIBITED: u16 = 1;
pub(super) const UNREACHABLE: u16 = 2;
pub(super) const DROPPED: u16 = 3;
/// The kernel says ENETUNREACH to TCP towards a broadcast address, and sends nothing.
pub(super) const NO_NETWORK: u16 = 4;
/// What ends at the engine.
pub(super) const SERVED: u16 = 5;

impl Policy for TestPolicy {
    fn route(&self, _: Protocol, _: IpAddr, destination: SocketAddr) -> Route {
        match destination.port() {
            PROHIBITED => Route::Prohibited,
            UNREACHABLE => Route::Unreachable,
            DROPPED => Route::Drop,
            SERVED => Route::Serve,
            NO_NETWORK => Route::Dial(SocketAddr::from((Ipv4Addr::BROADCAST, NO_NETWORK))),
            port => Route::Dial(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        }
    }
}

/// Engines A and B; A's peer is B and the other way round.
pub(super) struct Pair {
    pub(super) a: Engine<Wire>,
    pub(super) b: Engine<Wire>,
    pub(super) from_a: Rc<Wire>,
    pub(super) from_b: Rc<Wire>,
    pub(super) version: u8,
}

impl Pair {
    pub(super) fn new(weather: Weather) -> Self {
        Self::with(weather, Limits::default())
    }

    pub(super) fn with(weather: Weather, limits: Limits) -> Self {
        let pair = Self::one_sided_with(weather, limits, Arc::new(TestPolicy));
        tokio::task::spawn_local(deliver(Rc::clone(&pair.from_a), pair.b.clone(), A));
        tokio::task::spawn_local(deliver(Rc::clone(&pair.from_b), pair.a.clone(), B));
        pair
    }

    /// A pair that the wire doesn't join: the test is B's peer.
    pub(super) fn one_sided(limits: Limits) -> Self {
        Self::one_sided_with(Weather::default(), limits, Arc::new(TestPolicy))
    }

    pub(super) fn one_sided_with(weather: Weather, limits: Limits, policy: Arc<dyn Policy>) -> Self {
        let wire = |seed| {
            let wire = Wire::default();
            wire.weather.set(weather);
            wire.random.set(seed);
            Rc::new(wire)
        };
        let (from_a, from_b) = (wire(0x9e37_79b9), wire(0x85eb_ca6b));
        let a = Engine::new(Rc::clone(&from_a), Arc::clone(&policy), limits.clone());
        let b = Engine::new(Rc::clone(&from_b), policy, limits);
        Self { a, b, from_a, from_b, version: 4 }
    }

    pub(super) fn local(&self) -> SocketAddr {
        match self.version {
            4 => SocketAddr::from((Ipv4Addr::new(100, 127, 0, 1), 0)),
            _ => SocketAddr::from((Ipv6Addr::new(0xfd74, 0x7064, 0, 0, 0, 0, 0, 1), 0)),
        }
    }

    pub(super) fn remote(&self, port: u16) -> SocketAddr {
        match self.version {
            4 => SocketAddr::from((Ipv4Addr::new(100, 127, 0, 2), port)),
            _ => SocketAddr::from((Ipv6Addr::new(0xfd74, 0x7064, 0, 0, 0, 0, 0, 2), port)),
        }
    }

    /// A stream whose far end is joined, from A through B, with whatever listens on `port`.
    pub(super) async fn connect(&self, port: u16) -> Result<TcpStream, DialCause> {
        let (near, far) = kernel_pair().await;
        // A lost SYN goes out again after 1, 3 and 7 s. Where one packet in thirty is lost, four times in a row is one
        // connection in fifty thousand.
        let timeout = Duration::from_secs(15);
        let stream = self.a.connect(B, self.local(), self.remote(port), timeout).await?;
        tokio::task::spawn_local(stream.splice(far));
        Ok(near)
    }
}

async fn deliver(wire: Rc<Wire>, engine: Engine<Wire>, from: PeerId) {
    loop {
        for packet in wire.batch().await {
            engine.ingest(from, &packet);
        }
        tokio::task::yield_now().await;
    }
}

/// Two ends of a kernel connection.
pub(super) async fn kernel_pair() -> (TcpStream, TcpStream) {
    let (listener, port) = listen().await;
    let near = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

/// A listener at 127.0.0.1 and its port.
pub(super) async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Runs a test as a lane would.
pub(super) fn on_lane<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let lane = tokio::task::LocalSet::new();
    let limited =
        async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs") };
    lane.block_on(&runtime, limited)
}

/// Waits until `condition` holds.
pub(super) async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
