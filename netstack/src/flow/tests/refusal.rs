//! What can't be had is refused in the right words, and before it ever looks connected.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use tokio::net::TcpStream;

use super::pair::{
    A, B, DROPPED, NO_NETWORK, PROHIBITED, Pair, UNREACHABLE, Weather, listen, on_lane, until,
};
use crate::{
    flow::{DialCause, Limits, PeerId},
    packet::{IpHeader, header, icmp::Unreachable, protocol},
};

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

async fn cause(port: u16) -> DialCause {
    Pair::new(Weather::default()).connect(port).await.unwrap_err()
}

/// A TCP segment from 100.127.0.9:4000 to 10.0.0.1:`port`.
fn segment(port: u16, flags: u8) -> Vec<u8> {
    let mut packet = vec![0; 40];
    let (source, destination) = (Ipv4Addr::new(100, 127, 0, 9), Ipv4Addr::new(10, 0, 0, 1));
    header::write(&mut packet, IpAddr::V4(source), IpAddr::V4(destination), protocol::TCP, 20);
    packet[20..22].copy_from_slice(&4000u16.to_be_bytes());
    packet[22..24].copy_from_slice(&port.to_be_bytes());
    packet[32] = 5 << 4;
    packet[33] = flags;
    packet[34] = 0xff;
    packet
}

fn flags(packet: &[u8]) -> u8 {
    let header = IpHeader::parse(packet).unwrap();
    assert_eq!(header.protocol, protocol::TCP);
    packet[header.payload + 13]
}

/// A port on which connecting hangs: the backlog is full.
async fn hanging() -> (impl Sized, u16) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut filling = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await
    {
        filling.push(stream.unwrap());
    }
    ((socket, filling), address.port())
}

#[test]
fn a_closed_port_refuses() {
    on_lane(async {
        let (listener, port) = listen().await;
        drop(listener);
        let started = Instant::now();
        assert_eq!(cause(port).await, DialCause::Refused);
        assert!(started.elapsed() < Duration::from_millis(100));
    });
}

#[test]
fn what_policy_and_kernel_say_is_passed_on() {
    on_lane(async {
        assert_eq!(cause(PROHIBITED).await, DialCause::Unreachable(Unreachable::Prohibited));
        assert_eq!(cause(UNREACHABLE).await, DialCause::Unreachable(Unreachable::Host));
        assert_eq!(cause(NO_NETWORK).await, DialCause::Unreachable(Unreachable::Network));
        assert_eq!(cause(DROPPED).await, DialCause::TimedOut);
    });
}

#[test]
fn a_destination_that_is_silent_stays_silent() {
    on_lane(async {
        let (_hanging, port) = hanging().await;
        let pair = Pair::new(Weather::default());
        pair.b.ingest(A, &segment(port, SYN));
        // The peer asks again while its first SYN is held.
        pair.b.ingest(A, &segment(port, SYN));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(pair.b.counters().tcp_flows, 1);
        assert_eq!(pair.from_b.sent.get(), 0);

        let started = Instant::now();
        let outcome = pair.a.connect(B, pair.local(), pair.remote(port), Duration::from_millis(500));
        assert_eq!(outcome.await.unwrap_err(), DialCause::TimedOut);
        assert!((450..700).contains(&started.elapsed().as_millis()));
        pair.b.remove_peer(A);
        until(|| pair.b.counters().tcp_flows == 0).await;
    });
}

#[test]
fn a_connection_that_nobody_waits_for_is_given_up() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let attempt = pair.a.connect(B, pair.local(), pair.remote(DROPPED), Duration::from_secs(30));
        tokio::time::timeout(Duration::from_millis(20), attempt).await.unwrap_err();
        until(|| pair.a.counters().tcp_flows == 0).await;
        assert_eq!(flags(&pair.from_a.last.borrow()) & RST, RST, "the peer is told");
    });
}

#[test]
fn strays_are_reset_and_resets_are_not() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        pair.b.ingest(A, &segment(80, RST));
        pair.b.ingest(A, &segment(80, RST | ACK));
        pair.b.ingest(A, &segment(80, ACK));
        tokio::task::yield_now().await;
        assert_eq!(pair.from_b.sent.get(), 1);
        assert_eq!(flags(&pair.from_b.last.borrow()), RST);
    });
}

#[test]
fn strays_are_answered_at_a_bounded_rate() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        for _ in 0..10_000 {
            pair.b.ingest(A, &segment(80, ACK));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        let counters = pair.b.counters();
        assert!(pair.from_b.sent.get() <= 256, "{} answers", pair.from_b.sent.get());
        assert!(counters.answers_dropped >= 9_700);
    });
}

#[test]
fn a_peer_can_have_only_so_many_connections() {
    on_lane(async {
        let limits = Limits { tcp_flows_per_peer: 2, tcp_flows: 3, ..Limits::default() };
        let pair = Pair::with(Weather::default(), limits);
        let (_hanging, port) = hanging().await;
        let ingest = |peer, source: u16| {
            let mut syn = segment(port, SYN);
            syn[20..22].copy_from_slice(&source.to_be_bytes());
            pair.b.ingest(peer, &syn);
        };
        (0..3).for_each(|source| ingest(A, 4000 + source));
        assert_eq!((pair.b.counters().tcp_flows, pair.b.counters().over_limit), (2, 1));
        (0..3).for_each(|source| ingest(PeerId(7), 4000 + source));
        assert_eq!((pair.b.counters().tcp_flows, pair.b.counters().over_limit), (3, 3));
        pair.b.remove_peer(A);
        pair.b.remove_peer(PeerId(7));
        until(|| pair.b.counters().tcp_flows == 0).await;
    });
}
