//! An agent's lane: one manager, two ways to it, and the flow engine, as tasks of the caller's `LocalSet`.
//!
//! It takes little memory: 320 KiB, 384 KiB more while a stream is open, at most 768 KiB of the kernel's, and what
//! [`Config::limits`] lets flows have: a connection up to 64 KiB each way besides its share of `tcp_memory`, an association
//! of datagrams up to 208 KiB.

mod stream;
#[cfg(test)]
mod tests;
mod ways;

use std::{
    cell::{Cell, RefCell},
    future::pending,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv6Net};
use tokio::{
    net::UdpSocket,
    sync::{mpsc, oneshot, watch},
    task::{JoinSet, spawn_local},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

pub use self::ways::Way;
use self::ways::{BEAT, SILENCE, Ways};
use crate::{
    control::{self, Hello, Message},
    exit::Exit,
    flow::{Counters, Datagrams, DialCause, Engine, Limits, Policy, Stream},
    key::{PrivateKey, PublicKey},
    lane,
    overlay::Overlay,
    packet::IpHeader,
    path::{Room, Via},
    peers::{PeerId, Peers, Roaming},
    tunnel::Responder,
};

/// Everything: a manager speaks for all laptops, and decides itself who may send to whom.
const ANYONE: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0));

/// What the resets of connections that end with an uplink are given to leave.
const FAREWELL: Duration = Duration::from_millis(50);

/// What an uplink is made of.
pub struct Config {
    /// The agent's key.
    pub private_key: PrivateKey,
    /// The manager's key.
    pub manager_key: PublicKey,
    /// Our overlay address: inner packets to any other are dropped.
    pub address: Ipv6Addr,
    /// The manager's overlay address, for the control channel.
    pub gateway: Ipv6Addr,
    /// Port of the control channel.
    pub control_port: u16,
    /// Where the manager may answer by UDP.
    pub udp: SocketAddr,
    /// Where it takes streams.
    pub stream: SocketAddr,
    /// Path and protocol of the HTTP Upgrade that begins a stream.
    pub upgrade: (&'static str, &'static str),
    /// What becomes of flows that laptops open.
    pub policy: Arc<dyn Policy>,
    /// Who we are.
    pub hello: Hello,
    /// Bounds of the flow engine.
    pub limits: Limits,
}

/// A running uplink. Its flows are aborted and its tasks end when it is dropped.
#[derive(Debug)]
pub struct Uplink {
    link: Rc<Link>,
    ready: watch::Receiver<Option<Way>>,
    /// Dropped with the uplink, which ends its tasks.
    _alive: oneshot::Sender<()>,
}

impl Uplink {
    /// Starts the uplink's tasks in the `LocalSet` that this is called in.
    ///
    /// # Errors
    /// When a UDP socket could not be had.
    pub fn start(config: Config) -> io::Result<Self> {
        let (report, ready) = watch::channel(None);
        let (alive, ended) = oneshot::channel();
        let (link, socket) = Link::new(config, report)?;
        spawn_local(Rc::clone(&link).run(socket, ended));
        Ok(Self { link, ready, _alive: alive })
    }

    /// The way that leads to the manager; `None` while none does. Its sender is gone once the uplink has failed.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<Option<Way>> {
        self.ready.clone()
    }

    /// Connects to `remote`, a laptop's address, within `timeout`.
    ///
    /// # Errors
    /// What the laptop, or the manager on the way, answered, if any did.
    pub async fn connect(&self, remote: SocketAddr, timeout: Duration) -> Result<Stream, DialCause> {
        let link = &self.link;
        link.engine.connect(link.manager, link.local(), remote, timeout).await
    }

    /// Opens an association of UDP datagrams with `remote`, a laptop's address.
    ///
    /// # Errors
    /// When there are too many.
    pub fn open_datagrams(&self, remote: SocketAddr) -> Result<Datagrams, DialCause> {
        let link = &self.link;
        link.engine.open_datagrams(link.manager, link.local(), remote)
    }

    /// The connections from laptops that the policy has end here ([`Route::Serve`](crate::flow::Route::Serve)), from
    /// now on.
    #[must_use]
    pub fn serve(&self) -> mpsc::Receiver<Stream> {
        self.link.engine.serve()
    }

    /// What the flow engine has seen.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.link.engine.counters()
    }
}

/// The state that the uplink's tasks share.
struct Link {
    exit: Rc<Exit>,
    engine: Engine<Exit>,
    ways: RefCell<Ways>,
    started: Instant,
    manager: PeerId,
    address: Ipv6Addr,
    gateway: Ipv6Addr,
    control_port: u16,
    hello: Hello,
    mtu: u16,
    udp: SocketAddr,
    stream_address: SocketAddr,
    upgrade: (&'static str, &'static str),
    /// The stream that is open.
    stream: Cell<Option<u64>>,
    wants_stream: watch::Sender<bool>,
    /// Whether something has been asked, beyond the beat's questions, since the beat.
    prompted: Cell<bool>,
    report: watch::Sender<Option<Way>>,
}

impl Link {
    fn new(config: Config, report: watch::Sender<Option<Way>>) -> io::Result<(Rc<Self>, Rc<UdpSocket>)> {
        let socket = Rc::new(UdpSocket::from_std(udp_socket(config.udp)?)?);
        let mut peers = Peers::new(Responder::new(&config.private_key));
        let manager = peers
            .upsert(config.manager_key, vec![ANYONE], Roaming::Fixed)
            .ok_or_else(|| io::Error::other("no room for a peer"))?;
        let overlay = Overlay::new(peers, Some(Rc::clone(&socket)), Room::SCANT)?;
        let exit = Rc::new(Exit::relayed(overlay));
        let mtu = config.limits.mtu;
        let link = Self {
            engine: Engine::new(Rc::clone(&exit), config.policy, config.limits),
            exit,
            ways: RefCell::default(),
            started: Instant::now(),
            manager,
            address: config.address,
            gateway: config.gateway,
            control_port: config.control_port,
            hello: config.hello,
            mtu,
            udp: config.udp,
            stream_address: config.stream,
            upgrade: config.upgrade,
            stream: Cell::new(None),
            wants_stream: watch::Sender::new(false),
            prompted: Cell::new(false),
            report,
        };
        Ok((Rc::new(link), socket))
    }

    /// Runs every task until the uplink is dropped, or one that must not end does.
    async fn run(self: Rc<Self>, socket: Rc<UdpSocket>, ended: oneshot::Receiver<()>) {
        let mut flush = JoinSet::new();
        flush.spawn_local(lane::flush(Rc::clone(&self)));
        let problem = tokio::select! {
            () = self.until_dropped(ended) => return,
            result = lane::receive_udp(Rc::clone(&self), socket) => format!("udp: {result:?}"),
            () = Rc::clone(&self).keep_stream() => "stream".to_owned(),
            () = self.beat() => "heartbeat".to_owned(),
            _ = flush.join_next() => "flush".to_owned(),
            () = lane::tick(Rc::clone(&self)) => "clock".to_owned(),
        };
        tracing::error!(problem, "the uplink ends");
        self.report.send_replace(None);
        self.engine.remove_peer(self.manager);
    }

    async fn until_dropped(&self, ended: oneshot::Receiver<()>) {
        let _ = ended.await;
        self.engine.remove_peer(self.manager);
        sleep(FAREWELL).await;
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Where flows of ours come from.
    fn local(&self) -> SocketAddr {
        SocketAddr::new(self.address.into(), 0)
    }

    fn via(&self, way: Way) -> Option<Via> {
        match way {
            Way::Udp => Some(Via::Udp(self.udp)),
            Way::Stream => self.stream.get().map(Via::Stream),
        }
    }

    fn way(&self, via: Via) -> Option<Way> {
        match via {
            Via::Udp(_) => Some(Way::Udp),
            Via::Stream(id) => (self.stream.get() == Some(id)).then_some(Way::Stream),
        }
    }

    /// Asks both ways, and gives up what is silent.
    async fn beat(&self) {
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let expiry = self.ways.borrow().expiry();
            tokio::select! {
                _ = beats.tick() => self.ask(),
                () = silent_at(expiry.map(|expiry| self.started + expiry)) => {}
            }
            self.choose();
        }
    }

    fn ask(&self) {
        let now = self.now();
        if self.ways.borrow().is_stream_dead(now) {
            self.close_stream();
        }
        self.prompted.set(false);
        let beat = self.ways.borrow_mut().beat(now);
        for (way, due) in [(Way::Udp, beat.udp), (Way::Stream, beat.stream)] {
            let Some(via) = self.via(way).filter(|_| due) else { continue };
            if beat.handshake {
                self.exit.overlay.borrow_mut().initiate(via, self.manager);
            }
            self.ping(way, via);
        }
    }

    /// Sends a ping by one way: by UDP as large as packets get, on a stream as small as it is. Its number is the time,
    /// by which a late answer is known.
    fn ping(&self, way: Way, via: Via) {
        let select = self.ways.borrow().chosen() == Some(way);
        let sequence = self.now().as_micros() as u64;
        let message = Message::Ping { sequence, select, hello: self.hello.clone() };
        let size = if way == Way::Udp { usize::from(self.mtu) } else { 0 };
        let at = |address: Ipv6Addr| SocketAddr::new(IpAddr::V6(address), self.control_port);
        let mut packet = control::encode(at(self.address), at(self.gateway), &message, size);
        self.exit.overlay.borrow_mut().transmit_by(via, self.manager, &mut packet, None);
    }

    fn pong(&self, sequence: u64, via: Via) {
        let now = self.now();
        let age = now.checked_sub(Duration::from_micros(sequence));
        if let Some(way) = self.way(via)
            && age.is_some_and(|age| age < SILENCE)
        {
            self.ways.borrow_mut().answered(way, now);
            self.choose();
        }
    }

    /// Puts the choice of the way into effect.
    fn choose(&self) {
        let now = self.now();
        let choice = self.ways.borrow_mut().choose(now);
        let wanted = self.ways.borrow().wants_stream(now);
        self.wants_stream.send_if_modified(|wants| std::mem::replace(wants, wanted) != wanted);
        let via = choice.and_then(|way| self.via(way));
        {
            let mut overlay = self.exit.overlay.borrow_mut();
            let Some(manager) = overlay.peers.get_mut(self.manager) else { return };
            let before = std::mem::replace(&mut manager.path, via);
            if before == via {
                return;
            }
            overlay.path_changed(self.manager, before);
        }
        tracing::info!(way = ?choice, "uplink");
        if let (Some(way), Some(via)) = (choice, via) {
            // The manager is to answer by the same way from now on, not from the next beat.
            self.ping(way, via);
        }
        self.report.send_replace(choice);
    }
}

/// An unbound socket of the family of `remote`.
fn udp_socket(remote: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

async fn silent_at(expiry: Option<Instant>) {
    match expiry {
        Some(expiry) => sleep_until(expiry).await,
        None => pending().await,
    }
}

impl lane::Lane for Link {
    fn overlay(&self) -> &RefCell<Overlay> {
        &self.exit.overlay
    }

    fn deliver(&self, peer: PeerId, via: Via, packet: &mut [u8]) {
        let Some(header) = IpHeader::parse(packet).filter(|header| header.destination == self.address) else {
            self.exit.overlay.borrow_mut().peers.drops.spoofed += 1;
            return;
        };
        if header.source == self.gateway
            && let Some(received) = control::decode(packet, self.control_port)
        {
            if let Message::Pong { sequence, .. } = received.message {
                self.pong(sequence, via);
            }
            return;
        }
        self.engine.ingest(peer, packet);
    }

    fn batch_end(&self, via: Via, authentic: bool) {
        // A handshake is done: the ping that proves the way need not wait for the next beat.
        if authentic
            && self.ways.borrow().chosen().is_none()
            && let Some(way) = self.way(via)
            && !self.prompted.replace(true)
        {
            self.ping(way, via);
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("address", &self.address)
            .field("udp", &self.udp)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("ways", &self.ways).field("udp", &self.udp).finish_non_exhaustive()
    }
}
