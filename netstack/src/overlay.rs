//! Peers and the paths beneath them: everything between an inner packet and the wire, on one lane.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use tokio::net::UdpSocket;

use crate::{
    packet::segment,
    path::{Room, Via, stream, udp},
    peers::{PeerId, Peers, Received, source_of},
    tunnel::OVERHEAD,
};

/// The sending side of a lane, and the table of its peers.
#[derive(Debug)]
pub(crate) struct Overlay {
    pub(crate) peers: Peers,
    udp: Option<(Rc<UdpSocket>, udp::Output)>,
    streams: HashMap<u64, StreamState>,
    next_stream: u64,
    /// Producers for peers that no path leads to. Each peer has its own: what others receive must not wake those of one that is away,
    /// again and again.
    pathless: HashMap<PeerId, Vec<Waker>>,
    flusher: Option<Waker>,
    /// One packet at a time, on its way from a super-packet to a seal.
    scratch: Vec<u8>,
    pub(crate) room: Room,
}

#[derive(Debug)]
struct StreamState {
    output: stream::Output,
    remote: SocketAddr,
    /// Whether anything authentic ever came by it.
    authentic: bool,
}

impl Overlay {
    pub(crate) fn new(peers: Peers, socket: Option<Rc<UdpSocket>>, room: Room) -> std::io::Result<Self> {
        let udp = socket
            .map(|socket| udp::Output::new(&socket, &room).map(|output| (socket, output)))
            .transpose()?;
        Ok(Self {
            peers,
            udp,
            streams: HashMap::new(),
            next_stream: 0,
            pathless: HashMap::new(),
            flusher: None,
            scratch: Vec::with_capacity(2048),
            room,
        })
    }

    /// Sends an inner packet to a peer by its path. `gso` is set on a TCP (or UDP) super-packet: the payload bytes
    /// of each packet that it becomes where the path carries no super-packets.
    pub(crate) fn transmit(&mut self, id: PeerId, packet: &mut [u8], gso: Option<NonZeroU16>) {
        match self.peers.get_mut(id).and_then(|peer| peer.path) {
            Some(via) => self.transmit_by(via, id, packet, gso),
            None => self.peers.drops.no_path += 1,
        }
    }

    /// Sends an inner packet to a peer by the path named.
    pub(crate) fn transmit_by(&mut self, via: Via, id: PeerId, packet: &mut [u8], gso: Option<NonZeroU16>) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        let length = packet.len();
        let mut sent = false;
        match via {
            Via::Stream(stream) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    let tunnel = &mut peer.tunnel;
                    sent = stream.output.frame(length + OVERHEAD, |room| tunnel.seal(packet, room));
                }
            }
            Via::Udp(address) => {
                let Some((socket, output)) = &mut self.udp else { return };
                let tunnel = &mut peer.tunnel;
                let size = gso.map_or(u16::MAX, NonZeroU16::get);
                segment::split(packet, size, &mut self.scratch, |piece| {
                    sent =
                        output.push(socket, address, piece.len() + OVERHEAD, |room| tunnel.seal(piece, room));
                });
            }
        }
        if sent {
            peer.traffic.sent_packets += 1;
            peer.traffic.sent_bytes += length as u64;
            self.wake_flusher();
        } else {
            self.peers.drops.unsent += 1;
        }
    }

    /// Sends a datagram that is sealed already: a handshake, a keepalive, a cookie.
    pub(crate) fn send_sealed(&mut self, via: Via, datagram: &[u8]) {
        let copy = |room: &mut [u8]| {
            room[..datagram.len()].copy_from_slice(datagram);
            Some(datagram.len())
        };
        match via {
            Via::Stream(stream) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.output.frame(datagram.len(), copy);
                }
            }
            Via::Udp(address) => {
                if let Some((socket, output)) = &mut self.udp {
                    output.push(socket, address, datagram.len(), copy);
                    self.wake_flusher();
                }
            }
        }
    }

    /// Starts a handshake with a peer by the path named.
    pub(crate) fn initiate(&mut self, via: Via, id: PeerId) {
        let mut initiation = [0; crate::tunnel::MIN_OUTPUT];
        let length = self.peers.get_mut(id).and_then(|peer| peer.tunnel.initiate(&mut initiation));
        if let Some(length) = length {
            self.send_sealed(via, &initiation[..length]);
        }
    }

    /// Opens a datagram into `output`, answering it where WireGuard does. `Some` for an inner packet.
    pub(crate) fn receive(&mut self, via: Via, datagram: &[u8], output: &mut [u8]) -> Arrival {
        let source = self.source(via);
        let (peer, arrival) = match self.peers.receive(via, source, datagram, output) {
            Received::Packet(id, length) => (id, Arrival::Packet(id, length)),
            Received::Heard(id) => (id, Arrival::Authentic),
            Received::Reply(id, length) => {
                self.send_sealed(via, &output[..length]);
                match id {
                    Some(id) => (id, Arrival::Authentic),
                    None => return Arrival::Nothing,
                }
            }
            Received::Dropped => return Arrival::Nothing,
        };
        if let Via::Stream(stream) = via
            && let Some(stream) = self.streams.get_mut(&stream)
        {
            stream.authentic = true;
        }
        self.wake_pathless(peer);
        arrival
    }

    fn source(&self, via: Via) -> IpAddr {
        let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
        let remote = match via {
            Via::Stream(stream) => self.streams.get(&stream).map_or(unspecified, |stream| stream.remote),
            Via::Udp(address) => address,
        };
        source_of(via, remote)
    }

    /// Runs the tunnels' clocks.
    pub(crate) fn tick(&mut self) {
        let mut output = [0; crate::tunnel::MIN_OUTPUT];
        let mut due = Vec::new();
        self.peers.tick(&mut output, |via, datagram| due.push((via, datagram.to_vec())));
        for (via, datagram) in due {
            self.send_sealed(via, &datagram);
        }
    }

    /// Whether the peer's path has room for more; keeps the waker if not, or if there is no path.
    pub(crate) fn poll_ready(&mut self, id: PeerId, cx: &Context<'_>) -> Poll<()> {
        match self.peers.get_mut(id).and_then(|peer| peer.path) {
            Some(Via::Stream(stream)) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    return stream.output.poll_room(cx);
                }
            }
            Some(Via::Udp(_)) => {
                if let Some((_, output)) = &mut self.udp {
                    return output.poll_room(cx);
                }
            }
            None => {}
        }
        let waiting = self.pathless.entry(id).or_default();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Lets those look again who waited for `before`, now that the path to this peer is another one: a stream that has stalled would
    /// hold them up for as long as it does.
    pub(crate) fn path_changed(&mut self, id: PeerId, before: Option<Via>) {
        if let Some(Via::Stream(stream)) = before
            && let Some(stream) = self.streams.get_mut(&stream)
        {
            stream.output.wake_producers();
        }
        self.wake_pathless(id);
    }

    /// Lets those go on who waited for a path to this peer.
    fn wake_pathless(&mut self, id: PeerId) {
        self.pathless.remove(&id).into_iter().flatten().for_each(Waker::wake);
    }

    /// Registers a stream. Its reader and writer know it by the number.
    pub(crate) fn open_stream(&mut self, remote: SocketAddr) -> u64 {
        self.next_stream += 1;
        let output = stream::Output::new(self.room.stream_waiting);
        let state = StreamState { output, remote, authentic: false };
        self.streams.insert(self.next_stream, state);
        self.next_stream
    }

    /// Ends a stream: its writer stops, and whoever used it has no path.
    pub(crate) fn close_stream(&mut self, id: u64) {
        if let Some(mut stream) = self.streams.remove(&id) {
            self.peers.path_ended(Via::Stream(id));
            stream.output.wake_all();
        }
    }

    /// Takes what waits for a stream's writer; `Err` once the stream is closed.
    pub(crate) fn poll_output(
        &mut self,
        id: u64,
        taken: &mut Vec<u8>,
        cx: &Context<'_>,
    ) -> Poll<Result<(), StreamClosed>> {
        match self.streams.get_mut(&id) {
            Some(stream) => stream.output.poll_take(taken, cx).map(Ok),
            None => Poll::Ready(Err(StreamClosed)),
        }
    }

    /// Whether anything authentic ever came by the stream.
    pub(crate) fn is_authentic(&self, id: u64) -> bool {
        self.streams.get(&id).is_some_and(|stream| stream.authentic)
    }

    /// Streams that nothing authentic came by, and all streams.
    pub(crate) fn stream_counts(&self) -> (usize, usize) {
        (self.streams.values().filter(|stream| !stream.authentic).count(), self.streams.len())
    }

    /// Whether UDP is sent in batches that the kernel cuts.
    pub(crate) fn udp_offload(&self) -> Option<bool> {
        self.udp.as_ref().map(|(_, output)| output.offload())
    }

    /// `address` as our UDP socket wants to hear it.
    pub(crate) fn native(&self, address: SocketAddr) -> SocketAddr {
        self.udp.as_ref().map_or(address, |(_, output)| output.native(address))
    }

    /// Sends what waits in the UDP batch. Pending until there is something, or while the socket has no room;
    /// in that case the socket is answered, to wait for.
    pub(crate) fn poll_flush(&mut self, cx: &Context<'_>) -> Poll<Option<Rc<UdpSocket>>> {
        self.flusher = Some(cx.waker().clone());
        if let Some((socket, output)) = &mut self.udp {
            output.flush(socket);
            if output.is_blocked() {
                return Poll::Ready(Some(Rc::clone(socket)));
            }
        }
        Poll::Pending
    }

    fn wake_flusher(&mut self) {
        if let Some(flusher) = self.flusher.take() {
            flusher.wake();
        }
    }

    /// Datagrams that the UDP socket did not take.
    pub(crate) fn udp_dropped(&self) -> u64 {
        self.udp.as_ref().map_or(0, |(_, output)| output.dropped)
    }
}

/// What a datagram brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// An inner packet of this length, from this peer.
    Packet(PeerId, usize),
    /// A handshake or keepalive: the path works.
    Authentic,
    /// Nothing that counts.
    Nothing,
}

/// The stream was closed from this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamClosed;

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use super::*;
    use crate::{
        key::PrivateKey,
        peers::Roaming,
        tunnel::{MIN_OUTPUT, Responder},
    };

    /// How often it was woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// An overlay that knows these two peers, and its key.
    fn overlay(keys: &[PrivateKey; 2]) -> (Overlay, [PeerId; 2], PrivateKey) {
        let own = PrivateKey::generate().unwrap();
        let mut peers = Peers::new(Responder::new(&own));
        let ids = keys.each_ref().map(|key| peers.upsert(key.public(), Vec::new(), Roaming::Follow).unwrap());
        (Overlay::new(peers, None, Room::SCANT).unwrap(), ids, own)
    }

    fn keys() -> [PrivateKey; 2] {
        [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()]
    }

    #[test]
    fn what_one_peer_receives_wakes_nobody_who_waits_for_another() {
        let keys = keys();
        let (mut overlay, [here, away], own) = overlay(&keys);
        let counts = [Arc::new(Count::default()), Arc::new(Count::default())];
        for (id, count) in [here, away].into_iter().zip(&counts) {
            let waker = Waker::from(Arc::clone(count));
            assert!(overlay.poll_ready(id, &Context::from_waker(&waker)).is_pending());
        }
        let mut initiation = [0; MIN_OUTPUT];
        let length = Responder::new(&keys[0]).tunnel(own.public(), 1).initiate(&mut initiation).unwrap();
        let stream = overlay.open_stream(([192, 0, 2, 1], 1).into());
        let arrival = overlay.receive(Via::Stream(stream), &initiation[..length], &mut [0; 400]);
        assert_eq!(arrival, Arrival::Authentic);
        assert_eq!(counts.map(|count| count.get()), [1, 0]);
    }

    #[test]
    fn who_waits_for_a_stream_that_has_stalled_goes_on_by_another_path() {
        let (mut overlay, [id, _], _) = overlay(&keys());
        let stalled = Via::Stream(overlay.open_stream(([192, 0, 2, 1], 1).into()));
        let other = Via::Stream(overlay.open_stream(([192, 0, 2, 1], 2).into()));
        (0..2).for_each(|_| overlay.send_sealed(stalled, &[0; 60_000]));
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        overlay.peers.get_mut(id).unwrap().pin(stalled);
        assert!(overlay.poll_ready(id, &Context::from_waker(&waker)).is_pending());
        overlay.peers.get_mut(id).unwrap().pin(other);
        overlay.path_changed(id, Some(stalled));
        assert_eq!(count.get(), 1);
        assert!(overlay.poll_ready(id, &Context::from_waker(&waker)).is_ready());
    }
}
