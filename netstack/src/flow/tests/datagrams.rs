//! Datagrams keep their boundaries, sizes and order, and what can't be delivered is reported.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::net::UdpSocket;

use super::pair::{A, DROPPED, PROHIBITED, Pair, TestPolicy, UNREACHABLE, Weather, on_lane, until};
use crate::{
    flow::{Limits, PeerId},
    packet::{
        IpHeader, checksum,
        fragment::{Joined, Reassembler, fragment},
        header,
        icmp::{self, Unreachable, parse_unreachable},
        protocol,
    },
};

pub(super) fn addresses(version: u8) -> (IpAddr, IpAddr) {
    match version {
        4 => (Ipv4Addr::new(100, 127, 0, 9).into(), Ipv4Addr::new(10, 0, 0, 1).into()),
        _ => (
            Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 9).into(),
            Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 1).into(),
        ),
    }
}

/// A UDP packet from port `from` of the peer.
fn udp(version: u8, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let (source, destination) = addresses(version);
    let start = header::length(source);
    let mut packet = vec![0; start + 8];
    packet.extend_from_slice(payload);
    header::write(&mut packet, source, destination, protocol::UDP, 8 + payload.len());
    packet[start..start + 2].copy_from_slice(&from.to_be_bytes());
    packet[start + 2..start + 4].copy_from_slice(&to.to_be_bytes());
    packet[start + 4..start + 6].copy_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    packet
}

fn echo_request(version: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let (source, destination) = addresses(version);
    let mut message = vec![if version == 4 { 8 } else { 128 }, 0, 0, 0, 0, 0, 0, 3];
    message[4..6].copy_from_slice(&id.to_be_bytes());
    message.extend_from_slice(payload);
    icmp::wrap(source, destination, &mut message)
}

/// Ingests `packet` at B, in fragments if need be.
fn ingest(pair: &Pair, packet: &[u8]) {
    fragment(&mut packet.to_vec(), 1420, 77, |piece| pair.b.ingest(A, piece));
}

/// What B sends next, joined if it is in fragments.
async fn answer(pair: &Pair) -> Vec<u8> {
    let mut reassembler = Reassembler::default();
    loop {
        let packet = pair.from_b.next().await;
        let header = IpHeader::parse(&packet).unwrap();
        if header.fragment.is_none() {
            return packet;
        }
        if let Joined::Whole(packet) = reassembler.add(1, &header, &packet, Duration::ZERO) {
            return packet;
        }
    }
}

async fn server() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

#[test]
fn datagrams_of_all_sizes_go_there_and_back() {
    on_lane(async {
        let pair = Pair::one_sided(Limits::default());
        let (server, port) = server().await;
        let mut buffer = vec![0; 65_536];
        for version in [4, 6] {
            for length in [0, 1, 1392, 1393, 9000, 60_000, 65_507] {
                let payload: Vec<u8> = (0..length).map(|index| (index * 7) as u8).collect();
                ingest(&pair, &udp(version, 5000, port, &payload));
                let (received, client) = server.recv_from(&mut buffer).await.unwrap();
                assert!(buffer[..received] == payload, "{received} bytes instead of {length}");
                server.send_to(&payload, client).await.unwrap();

                let packet = answer(&pair).await;
                let header = IpHeader::parse(&packet).unwrap();
                let (peer, destination) = addresses(version);
                let expected = (SocketAddr::new(destination, port), SocketAddr::new(peer, 5000));
                assert_eq!(header.sockets(&packet), Some(expected));
                let datagram = &packet[header.payload..];
                assert!(datagram[8..] == payload);
                assert_eq!(checksum::upper_layer(destination, peer, protocol::UDP, datagram), 0);
            }
        }
        assert_eq!(pair.b.counters().udp_flows, 2);
        pair.b.remove_peer(A);
        until(|| pair.b.counters().udp_flows == 0).await;
    });
}

#[test]
fn order_and_boundaries_are_kept() {
    on_lane(async {
        let pair = Pair::one_sided(Limits::default());
        let (server, port) = server().await;
        for index in 0..60u8 {
            ingest(&pair, &udp(4, 5000, port, &[index; 3]));
        }
        let mut buffer = [0; 16];
        for index in 0..60u8 {
            assert_eq!(server.recv(&mut buffer).await.unwrap(), 3);
            assert_eq!(buffer[..3], [index; 3]);
        }
        assert_eq!(pair.b.counters().datagrams_dropped, 0);
    });
}

#[test]
fn a_closed_port_is_reported() {
    on_lane(async {
        let pair = Pair::one_sided(Limits::default());
        let (closed, port) = server().await;
        drop(closed);
        for version in [4, 6] {
            let sent = udp(version, 5000, port, b"anyone?");
            ingest(&pair, &sent);
            let error = answer(&pair).await;
            let (why, quoted) = parse_unreachable(&error).unwrap();
            assert_eq!(why, Unreachable::Port);
            let sockets = |packet: &[u8]| IpHeader::parse(packet).unwrap().sockets(packet);
            assert_eq!(sockets(quoted), sockets(&sent));
            assert_eq!(IpHeader::parse(&error).unwrap().source, addresses(version).1);
        }
    });
}

#[test]
fn what_policy_says_is_reported() {
    on_lane(async {
        let reporter: IpAddr = Ipv4Addr::new(100, 127, 0, 1).into();
        let pair = Pair::one_sided(Limits { reporters: vec![reporter], ..Limits::default() });
        for (port, expected) in [(PROHIBITED, Unreachable::Prohibited), (UNREACHABLE, Unreachable::Host)] {
            let sent = udp(4, 5000, port, b"x");
            ingest(&pair, &sent);
            let error = answer(&pair).await;
            assert_eq!(parse_unreachable(&error), Some((expected, &sent[..])));
            assert_eq!(IpHeader::parse(&error).unwrap().source, reporter);
        }
        ingest(&pair, &udp(4, 5000, DROPPED, b"x"));
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(pair.from_b.sent.get(), 2);
        assert_eq!(pair.b.counters().udp_flows, 0);
    });
}

#[test]
fn the_least_used_association_makes_room() {
    on_lane(async {
        let limits = Limits { datagram_flows_per_peer: 4, datagram_flows: 6, ..Limits::default() };
        let pair = Pair::one_sided(limits);
        let (_server, port) = server().await;
        for from in 0..4 {
            ingest(&pair, &udp(4, 5000 + from, port, b"x"));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        ingest(&pair, &udp(4, 5000, port, b"still used"));
        for from in 4..7 {
            ingest(&pair, &udp(4, 5000 + from, port, b"x"));
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert_eq!(pair.b.counters().udp_flows, 4);
        }
        assert_eq!(pair.b.counters().over_limit, 0);

        // A peer without any has none to give up when all places are taken.
        for (peer, expected) in [(7, 5), (8, 6), (9, 6)] {
            pair.b.ingest(PeerId(peer), &udp(4, 5000, port, b"x"));
            assert_eq!(pair.b.counters().udp_flows, expected);
        }
        assert_eq!(pair.b.counters().over_limit, 1);
    });
}

#[test]
fn unused_associations_end() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let pair = Pair::one_sided(Limits::default());
        let (_server, port) = server().await;
        ingest(&pair, &udp(4, 5000, port, b"x"));
        tokio::time::sleep(Duration::from_secs(40)).await;
        ingest(&pair, &udp(4, 5000, port, b"x"));
        tokio::time::sleep(Duration::from_secs(40)).await;
        assert_eq!(pair.b.counters().udp_flows, 1);
        tokio::time::sleep(Duration::from_secs(21)).await;
        assert_eq!(pair.b.counters().udp_flows, 0);
    });
}

#[test]
fn pings_of_the_gateway_are_answered_here() {
    on_lane(async {
        for version in [4, 6] {
            let (peer, gateway) = addresses(version);
            let pair = Pair::one_sided(Limits { reporters: vec![gateway], ..Limits::default() });
            ingest(&pair, &echo_request(version, 0x1234, &[9; 3000]));
            let reply = answer(&pair).await;
            let header = IpHeader::parse(&reply).unwrap();
            assert_eq!((header.source, header.destination), (gateway, peer));
            let message = &reply[header.payload..];
            assert_eq!(message[0], if version == 4 { 0 } else { 129 });
            assert_eq!(message[4..8], [0x12, 0x34, 0, 3]);
            assert_eq!(message[8..], [9; 3000]);
        }
    });
}

#[test]
fn pings_go_through_where_the_kernel_lets_them() {
    on_lane(async {
        let pair = Pair::one_sided(Limits::default());
        for sequence in 0..3 {
            let mut request = echo_request(4, 0x1234, b"payload");
            request[27] = sequence;
            ingest(&pair, &request);
            if pair.b.counters().pings_denied > 0 {
                return eprintln!("skipped: this process may open no ping sockets");
            }
            let reply = answer(&pair).await;
            let header = IpHeader::parse(&reply).unwrap();
            assert_eq!((header.source, header.destination), (addresses(4).1, addresses(4).0));
            let message = &reply[header.payload..];
            assert_eq!(message[..2], [0, 0]);
            assert_eq!(message[4..8], [0x12, 0x34, 0, sequence]);
            assert_eq!(&message[8..], b"payload");
            assert_eq!(!checksum::fold(checksum::sum(message, 0)), 0);
        }
        assert_eq!(pair.b.counters().echo_flows, 1);
    });
}

#[test]
fn a_path_that_is_full_makes_answers_wait() {
    on_lane(async {
        let pair = Pair::one_sided(Limits::default());
        let (server, port) = server().await;
        ingest(&pair, &udp(4, 5000, port, b"x"));
        let (_, client) = server.recv_from(&mut [0; 8]).await.unwrap();
        pair.from_b.set_blocked(true);
        for index in 0..20 {
            server.send_to(&[index], client).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(pair.from_b.sent.get(), 0);
        pair.from_b.set_blocked(false);
        for index in 0..20 {
            assert_eq!(answer(&pair).await[28..], [index]);
        }
    });
}

#[test]
fn policy_is_asked_once_per_flow() {
    struct Counting(std::sync::atomic::AtomicUsize);
    impl crate::flow::Policy for Counting {
        fn route(
            &self,
            protocol: crate::flow::Protocol,
            source: IpAddr,
            destination: SocketAddr,
        ) -> crate::flow::Route {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            TestPolicy.route(protocol, source, destination)
        }
    }
    on_lane(async {
        let policy = std::sync::Arc::new(Counting(0.into()));
        let pair = Pair::one_sided_with(Weather::default(), Limits::default(), policy.clone());
        let (_server, port) = server().await;
        (0..10).for_each(|_| ingest(&pair, &udp(4, 5000, port, b"x")));
        assert_eq!(policy.0.load(std::sync::atomic::Ordering::Relaxed), 1);
    });
}
