//! The manager's lane: many peers on one side, the cluster's ordinary network on the other. Peers that belong together
//! also reach each other.

mod addresses;
mod carried;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    rc::Rc,
    sync::Arc,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use ipnet::IpNet;
use tokio::{
    net::{TcpStream, UdpSocket},
    sync::{mpsc, oneshot, watch},
    task::{JoinSet, spawn_local},
    time::{MissedTickBehavior, interval, sleep},
};

use self::{addresses::Addresses, carried::Carried};
pub use crate::hub::{Hub, Pair};
use crate::{
    control::{self, Hello, Message},
    exit::Exit,
    flow::{Counters, Engine, Limits, Policy},
    hub::Rules,
    key::{PrivateKey, PublicKey},
    lane,
    overlay::Overlay,
    packet::{IpHeader, segment},
    path::{Room, Via},
    peers::{Drops, PeerId, Peers, Roaming, Traffic},
    tunnel::Responder,
};

/// Streams that have not proved a key yet. A laptop proves its own within a round trip, so this many cover a
/// hundred that start in the same second over a slow path; each costs about 600 KiB of buffers.
const MOST_STRANGERS: usize = 128;

/// How long a stream may stay a stranger: the laptop's handshakes on a new stream end after 3.2 s.
const STRANGER: Duration = Duration::from_secs(5);

/// How often it is told whose sessions are carried, if that has changed: a tenth of the second that a failover may take.
const NEWS: Duration = Duration::from_millis(100);

/// What a manager's lane is made of.
pub struct Config {
    /// The managers' key.
    pub private_key: PrivateKey,
    /// The bound, non-blocking socket that WireGuard's datagrams come to.
    pub udp: std::net::UdpSocket,
    /// The manager's overlay addresses.
    pub gateway: Vec<IpAddr>,
    /// Port of the control channel at those addresses.
    pub control_port: u16,
    /// What flows may reach.
    pub policy: Arc<dyn Policy>,
    /// Bounds of the flow engine.
    pub limits: Limits,
    /// Who we are.
    pub hello: Hello,
}

/// What the lane knows of one peer.
#[derive(Clone, Debug)]
pub struct PeerSnapshot {
    /// Its key.
    pub key: PublicKey,
    /// Time since its last handshake; `None` if it has no session.
    pub handshake_age: Option<Duration>,
    /// The path of its session: `udp`, `stream`, or `None`.
    pub path: Option<&'static str>,
    /// What went through its tunnel.
    pub traffic: Traffic,
    /// Who it says it is, if it speaks the control channel.
    pub hello: Option<Hello>,
}

/// The lane at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// All peers.
    pub peers: Vec<PeerSnapshot>,
    /// What was dropped.
    pub drops: Drops,
    /// Handshakes answered or completed.
    pub handshakes: u64,
    /// Streams open.
    pub streams: usize,
    /// Streams turned away because too many strangers were waiting.
    pub refused_streams: u64,
    /// The flow engine's counts.
    pub flows: Counters,
}

enum Command {
    Upsert(PublicKey, Vec<IpAddr>),
    Remove(PublicKey),
    Hub(Hub),
    Attach(std::net::TcpStream, Bytes),
    Snapshot(oneshot::Sender<Snapshot>),
    Shutdown,
}

/// A running lane. All clones are handles to the same one, which ends with the last, or by [`Lane::shutdown`].
#[derive(Clone, Debug)]
pub struct Lane {
    commands: mpsc::UnboundedSender<Command>,
    carried: watch::Receiver<BTreeSet<PublicKey>>,
}

impl Lane {
    /// Starts the lane's thread.
    ///
    /// # Errors
    /// When a thread or its runtime could not be had.
    pub fn spawn(config: Config) -> io::Result<Self> {
        let (commands, received) = mpsc::unbounded_channel();
        let (report, carried) = watch::channel(BTreeSet::new());
        lane::spawn("tpd-lane", move || async move {
            match Server::new(config, report) {
                Ok((server, socket)) => server.run(socket, received).await,
                Err(error) => tracing::error!(%error, "the lane could not start"),
            }
        })?;
        Ok(Self { commands, carried })
    }

    /// Lets the owner of `key` speak from `addresses`; a known peer gets these addresses instead.
    pub fn upsert_peer(&self, key: PublicKey, addresses: Vec<IpAddr>) {
        self.send(Command::Upsert(key, addresses));
    }

    /// Forgets a peer; its flows are aborted.
    pub fn remove_peer(&self, key: PublicKey) {
        self.send(Command::Remove(key));
    }

    /// Which peers may send to each other from now on. At first, none.
    pub fn set_hub(&self, hub: Hub) {
        self.send(Command::Hub(hub));
    }

    /// The peers whose sessions this lane carries: of each the control channel has said so within the last 1.2 s. Told
    /// at most every 100 ms.
    #[must_use]
    pub fn carried(&self) -> watch::Receiver<BTreeSet<PublicKey>> {
        self.carried.clone()
    }

    /// Takes over a non-blocking connection that carries frames from now on, after bytes that were read already.
    pub fn attach_stream(&self, stream: std::net::TcpStream, already_read: Bytes) {
        self.send(Command::Attach(stream, already_read));
    }

    /// The lane as it is now; `None` if it has ended.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let (answer, received) = oneshot::channel();
        self.send(Command::Snapshot(answer));
        received.await.ok()
    }

    /// Closes every stream, so that laptops notice at once, and ends the lane.
    pub fn shutdown(&self) {
        self.send(Command::Shutdown);
    }

    fn send(&self, command: Command) {
        // A lane that has ended has nothing to do for anyone.
        let _ = self.commands.send(command);
    }
}

/// The state that the lane's tasks share.
struct Server {
    exit: Rc<Exit>,
    engine: Engine<Exit>,
    gateway: Vec<IpAddr>,
    control_port: u16,
    hello: Hello,
    mtu: u16,
    addresses: RefCell<Addresses>,
    hub: RefCell<Rules>,
    carried: RefCell<Carried>,
    report: watch::Sender<BTreeSet<PublicKey>>,
    refused_streams: Cell<u64>,
}

impl Server {
    fn new(
        config: Config,
        report: watch::Sender<BTreeSet<PublicKey>>,
    ) -> io::Result<(Rc<Self>, Rc<UdpSocket>)> {
        let socket = Rc::new(UdpSocket::from_std(config.udp)?);
        let peers = Peers::new(Responder::new(&config.private_key));
        let exit = Rc::new(Exit::direct(Overlay::new(peers, Some(Rc::clone(&socket)), Room::AMPLE)?));
        let mtu = config.limits.mtu;
        let engine = Engine::new(Rc::clone(&exit), config.policy, config.limits);
        let server = Self {
            exit,
            engine,
            gateway: config.gateway,
            control_port: config.control_port,
            hello: config.hello,
            mtu,
            addresses: RefCell::default(),
            hub: RefCell::default(),
            carried: RefCell::default(),
            report,
            refused_streams: Cell::new(0),
        };
        Ok((Rc::new(server), socket))
    }

    async fn run(self: Rc<Self>, socket: Rc<UdpSocket>, commands: mpsc::UnboundedReceiver<Command>) {
        let mut flush = JoinSet::new();
        flush.spawn_local(lane::flush(Rc::clone(&self)));
        let ended = tokio::select! {
            () = Rc::clone(&self).obey(commands) => return,
            result = lane::receive_udp(Rc::clone(&self), socket) => format!("udp: {result:?}"),
            _ = flush.join_next() => "flush".to_owned(),
            () = lane::tick(Rc::clone(&self)) => "clock".to_owned(),
            () = Rc::clone(&self).tell_carried() => "news".to_owned(),
        };
        tracing::error!(ended, "the lane ends");
    }

    async fn obey(self: Rc<Self>, mut commands: mpsc::UnboundedReceiver<Command>) {
        while let Some(command) = commands.recv().await {
            match command {
                Command::Upsert(key, addresses) => self.upsert(key, addresses),
                Command::Remove(key) => self.remove(&key),
                Command::Hub(hub) => *self.hub.borrow_mut() = hub.into(),
                Command::Attach(stream, already_read) => self.attach(stream, already_read),
                Command::Snapshot(answer) => {
                    let _ = answer.send(self.snapshot());
                }
                Command::Shutdown => return,
            }
        }
    }

    fn upsert(&self, key: PublicKey, addresses: Vec<IpAddr>) {
        let allowed = addresses.iter().copied().map(IpNet::from).collect();
        let added = self.exit.overlay.borrow_mut().peers.upsert(key, allowed, Roaming::Follow);
        match added {
            Some(peer) => self.addresses.borrow_mut().assign(peer, &addresses),
            None => tracing::error!(%key, "no room for another peer"),
        }
    }

    fn remove(&self, key: &PublicKey) {
        let removed = self.exit.overlay.borrow_mut().peers.remove(key);
        if let Some(peer) = removed {
            self.exit.overlay.borrow_mut().path_changed(peer, None);
            self.addresses.borrow_mut().remove(peer);
            self.carried.borrow_mut().forget(key);
            self.engine.remove_peer(peer);
        }
    }

    fn attach(self: &Rc<Self>, stream: std::net::TcpStream, already_read: Bytes) {
        let (strangers, _) = self.exit.overlay.borrow().stream_counts();
        if strangers >= MOST_STRANGERS {
            self.refused_streams.set(self.refused_streams.get() + 1);
            return;
        }
        let Ok(remote) = stream.peer_addr() else { return };
        match TcpStream::from_std(stream) {
            Ok(stream) => {
                spawn_local(Rc::clone(self).carry(stream, remote, already_read));
            }
            Err(error) => tracing::warn!(%error, "stream not taken"),
        }
    }

    /// Runs one stream until it ends, or has stayed a stranger for too long.
    async fn carry(self: Rc<Self>, stream: TcpStream, remote: SocketAddr, already_read: Bytes) {
        let id = self.exit.overlay.borrow_mut().open_stream(remote);
        let (reader, writer) = stream.into_split();
        let problem = tokio::select! {
            problem = lane::read_stream(Rc::clone(&self), id, reader, &already_read) => problem,
            problem = lane::write_stream(Rc::clone(&self), id, writer) => problem,
            () = self.stranger(id) => "no handshake in time".into(),
        };
        tracing::debug!(%remote, problem, "stream ended");
        self.exit.overlay.borrow_mut().close_stream(id);
    }

    async fn stranger(&self, id: u64) {
        sleep(STRANGER).await;
        if self.exit.overlay.borrow().is_authentic(id) {
            std::future::pending::<()>().await;
        }
    }

    fn snapshot(&self) -> Snapshot {
        let mut overlay = self.exit.overlay.borrow_mut();
        let mut drops = overlay.peers.drops;
        drops.unsent += overlay.udp_dropped();
        let peers = overlay
            .peers
            .iter_mut()
            .map(|(_, peer)| PeerSnapshot {
                key: peer.key,
                handshake_age: peer.handshake_age(),
                path: peer.path.map(|via| match via {
                    Via::Udp(_) => "udp",
                    Via::Stream(_) => "stream",
                }),
                traffic: peer.traffic,
                hello: peer.hello.clone(),
            })
            .collect();
        Snapshot {
            peers,
            drops,
            handshakes: overlay.peers.handshakes,
            streams: overlay.stream_counts().1,
            refused_streams: self.refused_streams.get(),
            flows: self.engine.counters(),
        }
    }

    /// Answers a ping by the path that it came by, and moves the session there if that is what it asks.
    fn answer(&self, peer: PeerId, via: Via, received: control::Received, size: usize) {
        let Message::Ping { sequence, select, hello } = received.message else { return };
        let mut overlay = self.exit.overlay.borrow_mut();
        if let Some(known) = overlay.peers.get_mut(peer) {
            let before = known.path;
            known.hello = Some(hello);
            if select {
                self.carried.borrow_mut().heard(known.key, Instant::now());
                if before != Some(via) {
                    known.pin(via);
                    overlay.path_changed(peer, before);
                }
            }
        }
        let pong = Message::Pong { sequence, hello: self.hello.clone() };
        let mut packet = control::encode(received.destination, received.source, &pong, size);
        overlay.transmit_by(via, peer, &mut packet, None);
    }
}

/// The hub.
impl Server {
    /// The peer that `packet` is for, if it may have it.
    fn addressee(&self, header: &IpHeader, packet: &[u8]) -> Option<PeerId> {
        let addresses = self.addresses.borrow();
        let mut owners = addresses.owners(&header.destination).peekable();
        owners.peek()?;
        if !self.hub.borrow().allow(header, packet) {
            return None;
        }
        let mut overlay = self.exit.overlay.borrow_mut();
        owners.find(|owner| overlay.peers.get_mut(*owner).is_some_and(|peer| peer.path.is_some()))
    }

    /// Passes `packet` on to `peer`; drops it where its path is full, so that no peer holds up another.
    fn pass_on(&self, peer: PeerId, packet: &mut [u8]) {
        let mut overlay = self.exit.overlay.borrow_mut();
        let is_long = packet.len() > usize::from(self.mtu);
        let size = segment::tcp_headers(packet)
            .filter(|_| is_long)
            .and_then(|headers| NonZeroU16::new(self.mtu.saturating_sub(headers as u16)));
        // Nobody who keeps to the MTU sends anything longer than that but TCP super-packets.
        let fits = size.is_some() || !is_long;
        if !fits || overlay.poll_ready(peer, &Context::from_waker(Waker::noop())).is_pending() {
            overlay.peers.drops.unsent += 1;
            return;
        }
        overlay.transmit(peer, packet, size);
    }

    async fn tell_carried(self: Rc<Self>) {
        let mut news = interval(NEWS);
        news.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            news.tick().await;
            let carried = self.carried.borrow_mut().at(Instant::now());
            self.report.send_if_modified(|known| {
                let changed = *known != carried;
                *known = carried;
                changed
            });
        }
    }
}

impl lane::Lane for Server {
    fn overlay(&self) -> &RefCell<Overlay> {
        &self.exit.overlay
    }

    fn deliver(&self, peer: PeerId, via: Via, packet: &mut [u8]) {
        let Some(header) = IpHeader::parse(packet) else { return self.engine.ingest(peer, packet) };
        if self.gateway.contains(&header.destination) {
            return match control::decode(packet, self.control_port) {
                Some(received) => self.answer(peer, via, received, packet.len()),
                None => self.engine.ingest(peer, packet),
            };
        }
        match self.addressee(&header, packet) {
            Some(addressee) => self.pass_on(addressee, packet),
            // Also what other peers may not have: the policy, which knows no overlay address, refuses it.
            None => self.engine.ingest(peer, packet),
        }
    }

    fn batch_end(&self, _via: Via, _authentic: bool) {}
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("udp", &self.udp).field("hello", &self.hello).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Upsert(..) => "Upsert",
            Self::Remove(_) => "Remove",
            Self::Hub(_) => "Hub",
            Self::Attach(..) => "Attach",
            Self::Snapshot(_) => "Snapshot",
            Self::Shutdown => "Shutdown",
        })
    }
}
