//! The laptop's lane: a TUN on one side, one manager on the other, and the paths between. What agents send to local
//! targets ends in a flow engine of its own.

mod agents;
mod heartbeat;
mod stream;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::{pending, poll_fn},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU16,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv6Net};
use tokio::{
    net::UdpSocket,
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};

use self::agents::{Agents, Targets};
use crate::{
    control::{self, Hello, Message},
    exit::Exit,
    flow::{Engine, Policy, Protocol},
    key::{PrivateKey, PublicKey},
    lane::{self, READS_PER_TURN},
    overlay::Overlay,
    packet::{IpHeader, coalesce::Coalescer, virtio::Segmentation},
    path::{PathKind, PathPolicy, Room, StreamDialer, Via},
    peers::{Drops, PeerId, Peers, Roaming, Traffic},
    selector::Selector,
    tun::{self, Tun},
    tunnel::Responder,
};

/// What a laptop's lane is made of.
pub struct Config {
    /// The device that carries cluster addresses.
    pub tun: Tun,
    /// The lane's own key.
    pub private_key: PrivateKey,
    /// The manager's key.
    pub manager_key: PublicKey,
    /// Our overlay addresses: inner packets to any other are dropped.
    pub address: Vec<IpAddr>,
    /// The manager's overlay addresses, for the control channel.
    pub gateway: Vec<IpAddr>,
    /// Port of the control channel.
    pub control_port: u16,
    /// Networks that the manager may send from: pods, services, gateway.
    pub allowed: Vec<IpNet>,
    /// Agents' addresses. What they send to ours goes to local targets ([`Lane::set_targets`]).
    pub agents: Option<Ipv6Net>,
    /// Ports of agents that this laptop's programs may ask; the answers go to the TUN.
    pub kernel_ports: Vec<u16>,
    /// Makers of streams, the preferred first.
    pub streams: Vec<Arc<dyn StreamDialer>>,
    /// Addresses where the manager may answer by UDP, the preferred first.
    pub udp: Vec<SocketAddr>,
    /// Which paths may be used.
    pub policy: PathPolicy,
    /// Who we are.
    pub hello: Hello,
}

/// How the lane fares.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The path that carries the session.
    pub active: Option<PathKind>,
    /// Every path, the one in use first.
    pub paths: Vec<PathStatus>,
    /// Time since the last handshake when this was written; `None` without a session.
    pub handshake_age: Option<Duration>,
    /// What went through the tunnel.
    pub traffic: Traffic,
    /// What was dropped.
    pub drops: Drops,
    /// The manager, as it answered last.
    pub peer: Option<Hello>,
    /// What the kernel offloads at the TUN and for UDP.
    pub offload: String,
}

/// How one path fares.
#[derive(Clone, Debug, PartialEq)]
pub struct PathStatus {
    /// Which kind.
    pub kind: PathKind,
    /// Where it leads.
    pub target: String,
    /// Whether it carries the session.
    pub active: bool,
    /// Why it does, or doesn't.
    pub reason: String,
    /// Round trip of the last ping.
    pub rtt: Option<Duration>,
}

enum Command {
    Udp(Vec<SocketAddr>),
    Streams(Vec<Arc<dyn StreamDialer>>),
    Allowed(Vec<IpNet>),
}

/// A running lane. Dropping it ends the lane, and with it the TUN and its routes.
#[derive(Debug)]
pub struct Lane {
    commands: mpsc::UnboundedSender<Command>,
    targets: Arc<Targets>,
    status: watch::Receiver<Status>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Lane {
    /// Starts the lane's thread.
    ///
    /// # Errors
    /// When a thread, a UDP socket or the TUN's registration could not be had.
    pub fn spawn(config: Config) -> io::Result<Self> {
        let (commands, received) = mpsc::unbounded_channel();
        let (report, status) = watch::channel(Status::default());
        let socket = udp_socket()?;
        let targets = Arc::new(Targets::default());
        let policy = Arc::clone(&targets) as Arc<dyn Policy>;
        let thread = lane::spawn("tpd-lane", move || async move {
            match Client::new(config, socket, policy, report) {
                Ok(client) => client.run(received).await,
                Err(error) => tracing::error!(%error, "the lane could not start"),
            }
        })?;
        Ok(Self { commands, targets, status, thread: Some(thread) })
    }

    /// The lane's state, as it changes. Its sender is gone once the lane has ended.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Addresses where the manager may answer by UDP from now on.
    pub fn set_udp(&self, addresses: Vec<SocketAddr>) {
        let _ = self.commands.send(Command::Udp(addresses));
    }

    /// Makers of streams from now on. A stream that is open stays.
    pub fn set_streams(&self, streams: Vec<Arc<dyn StreamDialer>>) {
        let _ = self.commands.send(Command::Streams(streams));
    }

    /// Networks that the manager may send from, from now on.
    pub fn set_allowed(&self, networks: Vec<IpNet>) {
        let _ = self.commands.send(Command::Allowed(networks));
    }

    /// Where flows go from now on that agents open to these ports of our overlay address. All others are refused;
    /// flows that are open stay.
    pub fn set_targets(&self, targets: HashMap<(Protocol, u16), SocketAddr>) {
        self.targets.set(targets);
    }

    /// Ends the lane, and returns once its TUN is gone.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let (closed, _) = mpsc::unbounded_channel();
        drop(std::mem::replace(&mut self.commands, closed));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.end();
    }
}

/// A socket for either family, or for IPv4 alone where the machine has no IPv6.
fn udp_socket() -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The state that the lane's tasks share.
struct Client {
    exit: Rc<Exit>,
    engine: Engine<Exit>,
    agents: Agents,
    selector: RefCell<Selector>,
    tun: tun::Attached,
    tun_offload: tun::Offload,
    coalescer: RefCell<Coalescer>,
    mtu: u16,
    manager: PeerId,
    address: Vec<IpAddr>,
    gateway: Vec<IpAddr>,
    control_port: u16,
    policy: PathPolicy,
    hello: Hello,
    dialers: RefCell<Vec<Arc<dyn StreamDialer>>>,
    dialers_changed: Notify,
    udp: RefCell<Vec<SocketAddr>>,
    /// The address that answered by UDP last.
    udp_target: Cell<Option<SocketAddr>>,
    /// The stream that is open, and its kind.
    stream: Cell<Option<(u64, PathKind)>>,
    pings: RefCell<heartbeat::Pings>,
    peer: RefCell<Option<Hello>>,
    report: watch::Sender<Status>,
    socket: Rc<UdpSocket>,
}

impl Client {
    fn new(
        config: Config,
        socket: std::net::UdpSocket,
        targets: Arc<dyn Policy>,
        report: watch::Sender<Status>,
    ) -> io::Result<Rc<Self>> {
        let socket = Rc::new(UdpSocket::from_std(socket)?);
        let mut peers = Peers::new(Responder::new(&config.private_key));
        let agents = Agents::new(config.agents, config.kernel_ports);
        let manager = peers
            .upsert(config.manager_key, agents.and(config.allowed), Roaming::Fixed)
            .ok_or_else(|| io::Error::other("no room for a peer"))?;
        let mtu = config.tun.mtu();
        let tun_offload = config.tun.offload().clone();
        let tun = config.tun.attach()?;
        let overlay = Overlay::new(peers, Some(Rc::clone(&socket)), Room::AMPLE)?;
        let exit = Rc::new(Exit::relayed(overlay));
        Ok(Rc::new(Self {
            engine: Engine::new(Rc::clone(&exit), targets, agents::limits(mtu)),
            exit,
            agents,
            selector: RefCell::new(Selector::new(config.policy)),
            coalescer: RefCell::new(Coalescer::new(mtu, tun.joining())),
            tun,
            tun_offload,
            mtu,
            manager,
            address: config.address,
            gateway: config.gateway,
            control_port: config.control_port,
            policy: config.policy,
            hello: config.hello,
            dialers: RefCell::new(config.streams),
            dialers_changed: Notify::new(),
            udp: RefCell::new(config.udp),
            udp_target: Cell::new(None),
            stream: Cell::new(None),
            pings: RefCell::default(),
            peer: RefCell::new(None),
            report,
            socket,
        }))
    }

    /// Runs every task until the lane's handle is dropped, or one that must not end does.
    async fn run(self: Rc<Self>, commands: mpsc::UnboundedReceiver<Command>) {
        let mut flush = JoinSet::new();
        flush.spawn_local(lane::flush(Rc::clone(&self)));
        let ended = tokio::select! {
            () = Rc::clone(&self).obey(commands) => return,
            result = lane::receive_udp(Rc::clone(&self), Rc::clone(&self.socket)) => format!("udp: {result:?}"),
            error = Rc::clone(&self).read_tun() => format!("tun: {error}"),
            () = Rc::clone(&self).keep_stream() => "stream".to_owned(),
            () = Rc::clone(&self).beat() => "heartbeat".to_owned(),
            _ = flush.join_next() => "flush".to_owned(),
            () = lane::tick(Rc::clone(&self)) => "clock".to_owned(),
        };
        tracing::error!(ended, "the lane ends");
    }

    async fn obey(self: Rc<Self>, mut commands: mpsc::UnboundedReceiver<Command>) {
        while let Some(command) = commands.recv().await {
            match command {
                Command::Udp(addresses) => *self.udp.borrow_mut() = addresses,
                Command::Streams(streams) => {
                    *self.dialers.borrow_mut() = streams;
                    self.dialers_changed.notify_one();
                }
                Command::Allowed(networks) => {
                    if let Some(manager) = self.exit.overlay.borrow_mut().peers.get_mut(self.manager) {
                        manager.allowed = self.agents.and(networks);
                    }
                }
            }
        }
    }

    /// Seals what the kernel sends, for as long as the path has room.
    async fn read_tun(self: Rc<Self>) -> io::Error {
        let mut buffer = tun::Attached::read_buffer();
        loop {
            if let Err(error) = self.tun.device.readable().await {
                return error;
            }
            for _ in 0..READS_PER_TURN {
                poll_fn(|cx| self.exit.overlay.borrow_mut().poll_ready(self.manager, cx)).await;
                match self.tun.read(&mut buffer) {
                    Ok(Some(read)) => {
                        let size = match read.header.segmentation {
                            Segmentation::None => None,
                            _ => NonZeroU16::new(read.header.size),
                        };
                        self.transmit(&mut buffer[read.start..read.end], size, read.header.segmentation);
                    }
                    Ok(None) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return error,
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Sends one packet or super-packet of the kernel's. Datagrams of a burst must keep their bounds, so those are
    /// cut even for a stream.
    fn transmit(&self, packet: &mut [u8], size: Option<NonZeroU16>, segmentation: Segmentation) {
        let mut overlay = self.exit.overlay.borrow_mut();
        match (segmentation, size) {
            (Segmentation::Udp, Some(size)) => {
                crate::packet::segment::split(packet, size.get(), &mut Vec::new(), |piece| {
                    overlay.transmit(self.manager, &mut piece.to_vec(), None);
                });
            }
            _ => overlay.transmit(self.manager, packet, size),
        }
    }

    /// Puts the choice of the selector into effect.
    fn choose(&self) {
        let choice = self.selector.borrow().choice();
        let via = match choice {
            Some(PathKind::Udp) => self.udp_target.get().map(Via::Udp),
            Some(_) => self.stream.get().map(|(id, _)| Via::Stream(id)),
            None => None,
        };
        let before = {
            let mut overlay = self.exit.overlay.borrow_mut();
            let Some(manager) = overlay.peers.get_mut(self.manager) else { return };
            let before = std::mem::replace(&mut manager.path, via);
            if before != via {
                overlay.path_changed(self.manager, before);
            }
            before
        };
        if before != via {
            tracing::info!(path = ?choice, "path");
            if let (Some(kind), Some(via)) = (choice, via) {
                self.ping(kind, via);
            }
            self.publish();
        }
    }

    fn kind_of(&self, via: Via) -> Option<PathKind> {
        match via {
            Via::Udp(_) => Some(PathKind::Udp),
            Via::Stream(id) => self.stream.get().filter(|(open, _)| *open == id).map(|(_, kind)| kind),
        }
    }

    fn heard(&self, via: Via, rtt: Option<Duration>) {
        let Some(kind) = self.kind_of(via) else { return };
        self.selector.borrow_mut().heard(kind, rtt, Instant::now());
        self.choose();
        // A handshake over UDP alone: the ping that proves the path need not wait for the next beat.
        if kind == PathKind::Udp && rtt.is_none() && self.selector.borrow().choice().is_none() {
            self.ping(kind, via);
        }
    }

    fn write_tun(&self, bytes: &[u8]) {
        if let Err(error) = self.tun.write(bytes) {
            tracing::debug!(%error, "tun write");
            self.exit.overlay.borrow_mut().peers.drops.unsent += 1;
        }
    }

    /// Says how things stand, to whoever watches.
    fn publish(&self) {
        let mut overlay = self.exit.overlay.borrow_mut();
        let selector = self.selector.borrow();
        let active = selector.choice();
        let path = |kind, target: String| PathStatus {
            kind,
            target,
            active: active == Some(kind),
            reason: selector.reason(kind),
            rtt: selector.rtt(kind),
        };
        let udp = self.udp_target.get().map(|address| canonical(address).to_string());
        let candidates = self.udp.borrow().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let mut paths = vec![path(PathKind::Udp, udp.unwrap_or(candidates))];
        for dialer in &*self.dialers.borrow() {
            if !paths.iter().any(|known| known.kind == dialer.kind()) {
                paths.push(path(dialer.kind(), dialer.target()));
            }
        }
        paths.sort_by_key(|path| !path.active);

        let udp_offload = match overlay.udp_offload() {
            Some(true) => "udp batches",
            Some(false) | None => "no udp batches",
        };
        let tun_offload = match &self.tun_offload {
            tun::Offload::SuperPackets if !self.tun.joining() => {
                "none (the kernel refuses super-packets)".into()
            }
            offload => offload.to_string(),
        };
        let udp_dropped = overlay.udp_dropped();
        let mut drops = overlay.peers.drops;
        drops.unsent += udp_dropped;
        let Some(manager) = overlay.peers.get_mut(self.manager) else { return };
        let status = Status {
            active,
            paths,
            handshake_age: manager.handshake_age(),
            traffic: manager.traffic,
            drops,
            peer: self.peer.borrow().clone(),
            offload: format!("{tun_offload}, {udp_offload}"),
        };
        self.report.send_replace(status);
    }
}

/// An address without the IPv6 form that a dual-stack socket gives IPv4 ones.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl lane::Lane for Client {
    fn overlay(&self) -> &RefCell<Overlay> {
        &self.exit.overlay
    }

    fn deliver(&self, peer: PeerId, via: Via, packet: &mut [u8]) {
        // The manager has no business with the laptop's other networks.
        let header = IpHeader::parse(packet).filter(|header| self.address.contains(&header.destination));
        let Some(header) = header else {
            self.exit.overlay.borrow_mut().peers.drops.spoofed += 1;
            return;
        };
        if let Some(received) = control::decode(packet, self.control_port)
            && self.gateway.contains(&received.source.ip())
        {
            if let Message::Pong { sequence, hello } = received.message {
                self.pong(sequence, hello, via);
            }
            return;
        }
        if self.agents.call(&header, packet) {
            return self.engine.ingest(peer, packet);
        }
        self.coalescer.borrow_mut().push(packet, &mut |bytes| self.write_tun(bytes));
    }

    fn batch_end(&self, via: Via, authentic: bool) {
        let mut coalescer = self.coalescer.borrow_mut();
        coalescer.flush(&mut |bytes| self.write_tun(bytes));
        if !self.tun.joining() {
            coalescer.stop_joining();
        }
        if authentic {
            self.heard(via, None);
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("tun", &self.tun).field("udp", &self.udp).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Udp(_) => "Udp",
            Self::Streams(_) => "Streams",
            Self::Allowed(_) => "Allowed",
        })
    }
}

/// Waits for ever: for a task that has nothing to do in some configuration.
async fn idle() {
    pending::<()>().await;
}
