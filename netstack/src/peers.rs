//! Who may speak: peers by key, by tunnel index, and the addresses each may send from. Pure but for the tunnels' clock.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    control::Hello,
    key::PublicKey,
    packet::IpHeader,
    path::Via,
    tunnel::{Addressee, MAX_TUNNELS, Opened, Refusal, Responder, Tunnel},
};

/// A peer's place among the peers of one lane; also its index on the wire.
pub use crate::flow::PeerId;

/// How a peer's way back follows what arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Roaming {
    /// The newest authentic datagram names it: WireGuard's own rule, for peers that do not speak the control channel.
    Follow,
    /// The peer has said which path to use. Within UDP its address may still move.
    Pinned,
    /// This side chooses; what arrives moves nothing.
    Fixed,
}

/// One peer.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    pub(crate) tunnel: Tunnel,
    pub(crate) allowed: Vec<IpNet>,
    pub(crate) path: Option<Via>,
    pub(crate) roaming: Roaming,
    pub(crate) hello: Option<Hello>,
    pub(crate) traffic: Traffic,
}

/// What went through a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of inner packets sent.
    pub sent_bytes: u64,
    /// Inner packets sent; a super-packet counts once.
    pub sent_packets: u64,
    /// Bytes of inner packets received.
    pub received_bytes: u64,
    /// Inner packets received.
    pub received_packets: u64,
}

/// Why datagrams or packets were dropped, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// Not WireGuard at all.
    pub garbage: u64,
    /// Handshakes or data that no known key made.
    pub forged: u64,
    /// Counters and timestamps that were seen before.
    pub replayed: u64,
    /// Data of sessions that are gone.
    pub no_session: u64,
    /// Handshakes above the rate that is worked on.
    pub under_load: u64,
    /// Handshakes of keys that no session has.
    pub unknown_peer: u64,
    /// Inner packets from an address that isn't the peer's.
    pub spoofed: u64,
    /// Packets for a peer that no path leads to.
    pub no_path: u64,
    /// Packets that a full or broken socket did not take.
    pub unsent: u64,
}

/// What a datagram came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// An inner packet from its peer, in the first bytes of the output.
    Packet(PeerId, usize),
    /// Something to send back by the same path: handshake, keepalive, cookie.
    Reply(Option<PeerId>, usize),
    /// Authentic, and nothing more.
    Heard(PeerId),
    /// Dropped and counted.
    Dropped,
}

/// All peers of a lane.
#[derive(Debug)]
pub(crate) struct Peers {
    responder: Responder,
    slots: Vec<Option<Peer>>,
    by_key: HashMap<PublicKey, PeerId>,
    pub(crate) drops: Drops,
    pub(crate) handshakes: u64,
}

impl Peers {
    pub(crate) fn new(responder: Responder) -> Self {
        Self { responder, slots: Vec::new(), by_key: HashMap::new(), drops: Drops::default(), handshakes: 0 }
    }

    /// Adds a peer, or gives the known one with this key other addresses. `None` when there is no room.
    pub(crate) fn upsert(&mut self, key: PublicKey, allowed: Vec<IpNet>, roaming: Roaming) -> Option<PeerId> {
        if let Some(&id) = self.by_key.get(&key) {
            self.get_mut(id)?.allowed = allowed;
            return Some(id);
        }
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if slot >= MAX_TUNNELS {
            return None;
        }
        let id = PeerId(slot as u32);
        let tunnel = self.responder.tunnel(key, id.0);
        let peer =
            Peer { key, tunnel, allowed, path: None, roaming, hello: None, traffic: Traffic::default() };
        if slot == self.slots.len() {
            self.slots.push(Some(peer));
        } else {
            self.slots[slot] = Some(peer);
        }
        self.by_key.insert(key, id);
        Some(id)
    }

    pub(crate) fn remove(&mut self, key: &PublicKey) -> Option<PeerId> {
        let id = self.by_key.remove(key)?;
        self.slots[id.0 as usize] = None;
        Some(id)
    }

    pub(crate) fn get_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.slots.get_mut(id.0 as usize)?.as_mut()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (PeerId, &mut Peer)> {
        self.slots.iter_mut().enumerate().filter_map(|(at, slot)| Some((PeerId(at as u32), slot.as_mut()?)))
    }

    /// Opens a datagram that came by `via` from `source` into `output`.
    pub(crate) fn receive(
        &mut self,
        via: Via,
        source: IpAddr,
        datagram: &[u8],
        output: &mut [u8],
    ) -> Received {
        let id = match self.responder.addressee(source, datagram, output) {
            Ok(Addressee::Tunnel(index)) => PeerId(index),
            Ok(Addressee::Initiator(key)) => match self.by_key.get(&key) {
                Some(&id) => id,
                None => {
                    self.drops.unknown_peer += 1;
                    return Received::Dropped;
                }
            },
            Err((refusal, reply)) => {
                self.refuse(refusal);
                return if reply > 0 { Received::Reply(None, reply) } else { Received::Dropped };
            }
        };
        let Some(peer) = self.slots.get_mut(id.0 as usize).and_then(Option::as_mut) else {
            self.drops.no_session += 1;
            return Received::Dropped;
        };
        match peer.tunnel.open(source, datagram, output) {
            Ok(Opened::Packet(length)) => {
                peer.heard(via);
                if !peer.may_send(&output[..length]) {
                    self.drops.spoofed += 1;
                    return Received::Dropped;
                }
                peer.traffic.received_packets += 1;
                peer.traffic.received_bytes += length as u64;
                Received::Packet(id, length)
            }
            Ok(Opened::Reply(length)) => {
                // A first handshake shows the way; a later one may be a replay of another path's.
                if peer.path.is_none() {
                    peer.heard(via);
                }
                self.handshakes += 1;
                Received::Reply(Some(id), length)
            }
            Ok(Opened::Nothing) => {
                peer.heard(via);
                Received::Heard(id)
            }
            Err(refusal) => {
                self.refuse(refusal);
                Received::Dropped
            }
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        *match refusal {
            Refusal::Garbage => &mut self.drops.garbage,
            Refusal::Forged => &mut self.drops.forged,
            Refusal::Replayed => &mut self.drops.replayed,
            Refusal::NoSession => &mut self.drops.no_session,
            Refusal::UnderLoad => &mut self.drops.under_load,
        } += 1;
    }

    /// Runs every tunnel's clock; `send` gets what is due and where it goes.
    pub(crate) fn tick(&mut self, output: &mut [u8], mut send: impl FnMut(Via, &[u8])) {
        self.responder.tick();
        for (_, peer) in self.iter_mut() {
            if let Some(length) = peer.tunnel.tick(output)
                && let Some(via) = peer.path
            {
                send(via, &output[..length]);
            }
        }
    }

    /// Forgets a path that has ended, for all who used it.
    pub(crate) fn path_ended(&mut self, ended: Via) {
        for (_, peer) in self.iter_mut().filter(|(_, peer)| peer.path == Some(ended)) {
            peer.path = None;
        }
    }
}

impl Peer {
    /// Notes an authentic datagram's path.
    fn heard(&mut self, via: Via) {
        let follow = match (self.roaming, self.path, via) {
            (Roaming::Fixed, _, _) => false,
            (Roaming::Follow, _, _) | (Roaming::Pinned, None, _) => true,
            (Roaming::Pinned, Some(Via::Udp(_)), Via::Udp(_)) => true,
            (Roaming::Pinned, Some(_), _) => false,
        };
        if follow {
            self.path = Some(via);
        }
    }

    /// The peer has said that `via` is to carry its session.
    pub(crate) fn pin(&mut self, via: Via) {
        self.roaming = Roaming::Pinned;
        self.path = Some(via);
    }

    /// Whether the source of an inner packet is one of the peer's addresses (cryptokey routing; whitepaper, 2).
    fn may_send(&self, packet: &[u8]) -> bool {
        IpHeader::parse(packet)
            .is_some_and(|header| self.allowed.iter().any(|network| network.contains(&header.source)))
    }

    /// Time since the last handshake; `None` if there is no session.
    pub(crate) fn handshake_age(&self) -> Option<Duration> {
        self.tunnel.handshake_age()
    }
}

/// The address that WireGuard's cookies are bound to, for a path.
pub(crate) fn source_of(via: Via, stream_peer: SocketAddr) -> IpAddr {
    match via {
        Via::Udp(address) => address.ip(),
        Via::Stream(_) => stream_peer.ip(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::{key::PrivateKey, tunnel::OVERHEAD};

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9));
    const STREAM: Via = Via::Stream(1);

    fn udp(port: u16) -> Via {
        Via::Udp(SocketAddr::new(SOURCE, port))
    }

    fn packet(source: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend(source);
        packet.extend([10, 96, 0, 1, 0, 0, 0, 0, 0, 8, 0, 0]);
        packet
    }

    struct Ends {
        laptop: Tunnel,
        peers: Peers,
        id: PeerId,
        out: Vec<u8>,
    }

    impl Ends {
        fn new() -> Self {
            let (laptop, manager) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
            let mut peers = Peers::new(Responder::new(&manager));
            let id = peers
                .upsert(laptop.public(), vec!["100.127.0.2/32".parse().unwrap()], Roaming::Follow)
                .unwrap();
            let mut ends = Self {
                laptop: Responder::new(&laptop).tunnel(manager.public(), 5),
                peers,
                id,
                out: vec![0; 2000],
            };
            ends.handshake(STREAM);
            ends
        }

        fn handshake(&mut self, via: Via) {
            let mut init = [0; 200];
            let length = self.laptop.initiate(&mut init).unwrap();
            let Received::Reply(Some(id), length) =
                self.peers.receive(via, SOURCE, &init[..length], &mut self.out)
            else {
                panic!("no response")
            };
            assert_eq!(id, self.id);
            let response = self.out[..length].to_vec();
            let mut keepalive = [0; 200];
            let Ok(Opened::Reply(length)) = self.laptop.open(SOURCE, &response, &mut keepalive) else {
                panic!("no keepalive")
            };
            let heard = self.peers.receive(via, SOURCE, &keepalive[..length], &mut self.out);
            assert_eq!(heard, Received::Heard(self.id));
        }

        fn send(&mut self, via: Via, source: [u8; 4]) -> Received {
            let plain = packet(source);
            let mut sealed = vec![0; (plain.len() + OVERHEAD).max(148)];
            let length = self.laptop.seal(&plain, &mut sealed).unwrap();
            self.peers.receive(via, SOURCE, &sealed[..length], &mut self.out)
        }

        fn path(&mut self) -> Option<Via> {
            self.peers.get_mut(self.id).unwrap().path
        }
    }

    #[test]
    fn a_peer_sends_only_from_its_own_address() {
        let mut ends = Ends::new();
        assert_eq!(ends.send(STREAM, [100, 127, 0, 2]), Received::Packet(ends.id, 28));
        assert_eq!(ends.send(STREAM, [100, 127, 0, 3]), Received::Dropped);
        assert_eq!(ends.peers.drops.spoofed, 1);
    }

    #[test]
    fn a_plain_peer_is_answered_where_it_was_last_heard() {
        let mut ends = Ends::new();
        ends.send(udp(1000), [100, 127, 0, 2]);
        assert_eq!(ends.path(), Some(udp(1000)));
        ends.send(udp(2000), [100, 127, 0, 2]);
        assert_eq!(ends.path(), Some(udp(2000)));
    }

    #[test]
    fn a_peer_that_is_let_in_again_goes_on_as_before() {
        let mut ends = Ends::new();
        let key = ends.peers.get_mut(ends.id).unwrap().key;
        ends.send(udp(1000), [100, 127, 0, 2]);
        let again = ends.peers.upsert(key, vec!["100.127.0.2/32".parse().unwrap()], Roaming::Follow);
        assert_eq!(again, Some(ends.id));
        assert_eq!(ends.path(), Some(udp(1000)));
        assert_eq!(ends.send(STREAM, [100, 127, 0, 2]), Received::Packet(ends.id, 28));
    }

    #[test]
    fn a_probe_moves_nothing_once_a_path_was_chosen() {
        let mut ends = Ends::new();
        let id = ends.id;
        ends.peers.get_mut(id).unwrap().pin(STREAM);
        ends.send(udp(1000), [100, 127, 0, 2]);
        assert_eq!(ends.path(), Some(STREAM));
        ends.handshake(udp(1000));
        assert_eq!(ends.path(), Some(STREAM));
        ends.peers.get_mut(id).unwrap().pin(udp(1000));
        ends.send(STREAM, [100, 127, 0, 2]);
        assert_eq!(ends.path(), Some(udp(1000)));
        ends.send(udp(2000), [100, 127, 0, 2]);
        assert_eq!(ends.path(), Some(udp(2000)), "within UDP the address roams");
    }

    #[test]
    fn a_path_that_ended_is_left_and_the_next_one_taken() {
        let mut ends = Ends::new();
        let id = ends.id;
        ends.peers.get_mut(id).unwrap().pin(STREAM);
        ends.peers.path_ended(STREAM);
        assert_eq!(ends.path(), None);
        ends.send(udp(1000), [100, 127, 0, 2]);
        assert_eq!(ends.path(), Some(udp(1000)));
    }

    #[test]
    fn a_removed_peer_and_a_stranger_get_nothing() {
        let mut ends = Ends::new();
        let key = ends.peers.get_mut(ends.id).unwrap().key;
        ends.peers.remove(&key);
        assert_eq!(ends.send(STREAM, [100, 127, 0, 2]), Received::Dropped);
        assert_eq!(ends.peers.drops.no_session, 1);
        let mut init = [0; 200];
        let length = ends.laptop.initiate(&mut init).unwrap();
        let received = ends.peers.receive(STREAM, SOURCE, &init[..length], &mut ends.out);
        assert_eq!(received, Received::Dropped);
        assert_eq!(ends.peers.drops.unknown_peer, 1);
    }
}
